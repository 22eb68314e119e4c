"""Every strategy with its model on a device: the bits of the CPU's run, in both worlds; and what it moves.

The device is a double whose operations are NumPy's, so that equal arithmetic gives equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend, data, nn, optim, parallel
from minidp.backend import Device
from minidp.compress import EXAMPLES
from minidp.nn import functional as F
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.late import LateBucketedDataParallel, LateDataParallel
from minidp.parallel.naive import NaiveDataParallel
from tests import device_double
from tests.device_double import DeviceArray, DoubleDevice
from tests.leftovers import nothing_is_left

pytestmark = pytest.mark.timeout(120)

WORLDS = ("process", "virtual")
DOUBLES: dict[str, Callable[[], Any]] = {
    "seen by all": DoubleDevice,
    "its own": lambda: DoubleDevice(shareable=False),
}
PLACES = [(world, double) for world in WORLDS for double in DOUBLES]
KINDS = {**vars(parallel), "NaiveDataParallel": NaiveDataParallel}


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    with nothing_is_left():
        yield


def spawned(fn: Any, ranks: int, world: str, device: str | Device, *args: Any, servers: int = 0) -> list[Any]:
    return minidp.spawn(
        fn, ranks, *args, world=world, device=device, servers=servers, progress=False, blas_threads=1, timeout_s=20
    )


# -- models ------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self, sync: Any = None) -> None:
        self.first, self.norm, self.last = nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 4)

    def forward(self, x: Any) -> Any:
        return self.last(F.relu(self.norm(self.first(x))))


class TiedAndFrozen(nn.Module):
    def __init__(self) -> None:
        self.first, self.again, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.again.weight = self.first.weight
        self.last.bias.requires_grad = False
        self.unused = nn.Linear(2, 3)

    def forward(self, x: Any) -> Any:
        return self.last(F.relu(self.again(self.first(x))))


def model_of(name: str, comm: Any) -> nn.Module:
    """Built differently on each rank: rank 0's counts."""
    seed = comm.rank
    if name == "cnn":
        return nn.cnn((1, 8, 8), (4,), 4, seed=seed)
    if name == "gpt":
        return nn.GPT(9, 6, 8, 2, 1, dropout=0.2, seed=seed)
    if name in ("normed", "sync"):
        model: nn.Module = Normed().initialize(seed)
        return parallel.SyncBatchNorm.convert(model, comm) if name == "sync" else model
    if name == "tied":
        return TiedAndFrozen().initialize(seed)
    dtype = name if name.startswith("float") else "float32"
    masked = [] if name == "plain" else [nn.Dropout(0.1)]
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), *masked, nn.Linear(20, 4), seed=seed).astype(dtype)


@cache
def dataset(name: str) -> data.ArrayDataset:
    rng = np.random.default_rng(1)
    if name == "gpt":
        tokens = rng.integers(0, 9, (64, 7))
        return data.ArrayDataset(tokens[:, :-1], tokens[:, 1:])
    dtype = name if name.startswith("float") else "float32"
    x = rng.standard_normal((64, 1, 8, 8) if name == "cnn" else (64, 12)).astype(dtype)
    return data.ArrayDataset(x, rng.integers(0, 4, 64))


RULES: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, eps=1e-3),
}


# -- cases ------------------------------------------------------------------------------------------------------


class Case:
    def __init__(self, kind: str, model: str = "mlp", rule: str = "sgd", size: int = 17, **options: Any) -> None:
        self.kind, self.model, self.rule, self.size, self.options = kind, model, rule, size, options

    def __repr__(self) -> str:
        return f"{self.kind} {self.model} {self.rule} {self.options}"

    def build(self, comm: Any) -> Any:
        model, options = model_of(self.model, comm), dict(self.options)
        if "outer" in options:
            options["outer"] = optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        return KINDS[self.kind](model, RULES[self.rule](model.parameters()), comm, **options)

    def run(self, comm: Any, steps: int = 4) -> dict[str, np.ndarray]:
        strategy = self.build(comm)
        if comm.device.on_host:
            assert isinstance(next(iter(strategy.model.parameters())).data, np.ndarray)
        else:
            assert all(type(p.data) is DeviceArray for p in strategy.model.parameters())
            assert all(type(b) is DeviceArray for b in strategy.model.buffers())
        loader = data.DataLoader(
            dataset(self.model), global_batch_size=self.size, shard=strategy.shard, shuffle=True, seed=3
        )
        for _, (x, y) in zip(range(steps), (batch for e in range(9) for batch in loader.epoch(e))):
            for _ in range(self.options.get("accumulation_steps", 1)):
                strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
        if self.options.get("compress") == "topk:0.2+ef" and self.kind == "DataParallel":
            strategy.prune(0.5)
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
        state: dict[str, np.ndarray] = strategy.state_dict()
        assert all(type(array) is np.ndarray for array in state.values())
        strategy.load_state_dict(state)
        state = strategy.state_dict()
        slots = {} if self.kind == "ParameterServer" else strategy.optimizer_state()
        state |= {f"{s}.{k}": backend.to_numpy(v).copy() for s, of in slots.items() for k, v in of.items()}
        strategy.release()
        assert comm.device.on_host == isinstance(next(iter(strategy.model.parameters())).data, np.ndarray)
        return state


MODELS = [Case("DataParallel", model) for model in ("cnn", "gpt", "normed", "sync", "tied", "float64", "float16")]
OPTIONS = [
    Case("DataParallel"),
    Case("DataParallel", rule="adamw", clip_norm=0.3, bucket_cap_mb=0.001),
    Case("DataParallel", micro_shards=4, size=16),
    Case("DataParallel", "gpt", micro_shards=4, clip_norm=0.3, accumulation_steps=2, size=16),
    Case("DataParallel", accumulation_steps=2, checksum=True, check_finite=False),
    Case("DataParallel", "float16", clip_norm=0.3),
]
SPECS = [*EXAMPLES, *(f"{spec}+ef" for spec in EXAMPLES if "+ef" not in spec and spec != "none"), "topk:0.2+ef"]
COMPRESSED = [Case("DataParallel", "normed", compress=spec) for spec in SPECS]
COMPRESSED += [Case("DataParallel", "cnn", compress="int8+ef", clip_norm=0.3, accumulation_steps=2)]
COMPRESSED += [Case("DataParallel", "float16", compress="topk:0.3", rule="adamw")]
OTHERS = [
    Case("NaiveDataParallel", "normed", clip_norm=0.3),
    Case("NaiveDataParallel", "float16", rule="adamw"),
    *(Case("ShardedDataParallel", m, stage=s, clip_norm=0.3) for m in ("normed", "float16") for s in (1, 2)),
    Case("LocalSGD", "normed", sync_every=2),
    Case("LocalSGD", "float16", sync_every=2, clip_norm=0.3),
    Case("LocalSGD", "gpt", rule="adamw", sync_every=2, outer=True, accumulation_steps=2),
]
SERVED = [
    Case("ParameterServer", "normed"),
    Case("ParameterServer", "gpt", accumulation_steps=2),
    Case("ParameterServer", "float16", rule="adamw"),
    Case("ParameterServer", compress="topk:0.2+ef", compress_pull="int8"),
    Case("ParameterServer", "normed", compress="int8", check_finite=False),
]
SUITES = {"models": MODELS, "options": OPTIONS, "compressed": COMPRESSED, "others": OTHERS, "served": SERVED}


def run_all(comm: Any, suite: str) -> list[dict[str, np.ndarray]]:
    return [case.run(comm) for case in SUITES[suite]]


@cache
def on_the_cpu(suite: str, ranks: int, world: str) -> list[list[dict[str, np.ndarray]]]:
    return spawned(run_all, ranks, world, "cpu", suite, servers=2 * (suite == "served"))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("world", "double"), PLACES)
@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.timeout(60)
def test_a_device_has_the_bits_of_the_cpu(suite: str, world: str, double: str, ranks: int) -> None:
    if suite == "compressed" and ranks == 4 and world == "process":
        pytest.skip("four processes on two cores: the virtual world has as many ranks")
    want = on_the_cpu(suite, ranks, world)
    got = spawned(run_all, ranks, world, DOUBLES[double](), suite, servers=2 * (suite == "served"))
    for rank in range(ranks):
        for case, here, there in zip(SUITES[suite], want[rank], got[rank], strict=True):
            assert here.keys() == there.keys()
            wrong = [k for k in here if here[k].dtype != there[k].dtype or here[k].tobytes() != there[k].tobytes()]
            assert not wrong, f"{case} on rank {rank}: {wrong}"


# -- which class, and what moves ---------------------------------------------------------------------------------


def moved(comm: Any, kind: str, options: dict[str, Any]) -> tuple[str, tuple[int, int, int], int]:
    """(class, what its third step moves: (to the device beyond its batch, to the host, reads), bytes of w)."""
    s = Case(kind, "plain", **options).build(comm)
    x, y = dataset("mlp")[np.arange(16)]
    for _ in range(3):
        before = device_double.scalar_reads
        with backend.meter() as m:
            loss = s.forward_backward(x, y, F.cross_entropy)
            s.step()
        reads = device_double.scalar_reads - before
    with backend.meter() as asked:
        loss.item()
    assert (asked.to_host, asked.to_device) == (4, 0)
    return type(s).__name__, (m.to_device - x.nbytes - y.nbytes, m.to_host, reads), s.layout.nbytes


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_moves_its_batch_in_and_eight_bytes_out(ranks: int) -> None:
    for options in ({}, {"clip_norm": 0.1}, {"rule": "adamw", "bucket_cap_mb": 0}, {"check_finite": False}):
        for kind, what, _ in spawned(moved, ranks, "process", DoubleDevice(), "DataParallel", options):
            assert kind == LateDataParallel.__name__
            # What was found in the sum, and nobody reads a number.
            assert what == (0, 8 * options.get("check_finite", True), 0)


def test_buckets_move_once_each_way_where_ranks_see_no_memory_of_others() -> None:
    for options in ({}, {"clip_norm": 0.1}, {"bucket_cap_mb": 0}):
        own = DoubleDevice(shareable=False)
        for kind, what, nbytes in spawned(moved, 2, "process", own, "DataParallel", options):
            assert kind == LateBucketedDataParallel.__name__
            assert what == (nbytes, nbytes + 8, 0)


def test_servers_get_one_move_each_way() -> None:
    for options in ({}, {"compress": "topk:0.2+ef", "compress_pull": "int8"}):
        results = spawned(moved, 2, "process", DoubleDevice(), "ParameterServer", options, servers=1)
        for _, what, nbytes in results:
            assert what == (nbytes, nbytes + 4, 0), "gradients and the loss, which the log has"


# -- subclasses of users, and what can't be -----------------------------------------------------------------------


class Halved(DataParallel):
    """A user's own: gradients are halved before they are used."""

    def _reduce(self, block: Any, total: int) -> Any:
        return super()._reduce(block, total) * 0.5


class Mine(LateDataParallel):
    pass


def own_kind(comm: Any, kind: type[DataParallel]) -> tuple[dict[str, np.ndarray], str]:
    model = model_of("mlp", comm)
    s = kind(model, RULES["sgd"](model.parameters()), comm)
    x, y = dataset("mlp")[np.arange(16)]
    for _ in range(3):
        s.forward_backward(x, y, F.cross_entropy)
        s.step()
    before, said = s.state_dict(), ""
    s.forward_backward(x * np.inf, y, F.cross_entropy)
    try:
        s.step()
        s.state_dict()
    except parallel.NonFiniteGradient as error:
        said = str(error)
    assert all(before[k].tobytes() == v.tobytes() for k, v in s.state_dict().items())
    return before, said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_subclass_works_on_a_device(ranks: int) -> None:
    for kind in (Halved, Mine):
        want = spawned(own_kind, ranks, "process", "cpu", Halved if kind is Halved else DataParallel)
        got = spawned(own_kind, ranks, "process", DoubleDevice(), kind)
        for (here, says), (there, also) in zip(want, got):
            assert all(here[k].tobytes() == there[k].tobytes() for k in here)
            assert says == also != ""


@pytest.mark.parametrize("world", WORLDS)
def test_a_subclass_that_needs_shared_memory_says_so(world: str) -> None:
    with pytest.raises(minidp.RankFailed, match="Halved needs shared memory: derive it from BucketedDataParallel"):
        spawned(own_kind, 2, world, DoubleDevice(shareable=False), Halved)


def fractions(comm: Any, kind: str) -> None:
    model = model_of("mlp", comm).astype(object)
    KINDS[kind](model, RULES["sgd"](model.parameters()), comm)


def test_fractions_stay_on_the_host() -> None:
    with pytest.raises(minidp.RankFailed, match=r"Fractions.*can't lie on double.*float64"):
        spawned(fractions, 1, "virtual", DoubleDevice(), "DataParallel")
