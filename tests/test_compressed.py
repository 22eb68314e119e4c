"""DataParallel(compress=): what a step is, on every route; who is told what; how many bytes have left."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import data, nn, optim, parallel, sim
from minidp.autograd import Tensor
from minidp.comm import comm_self
from minidp.compress import EXAMPLES, QSGD, ErrorFeedback, Int8, Pruned, get
from minidp.compress.compressor import cuts
from minidp.nn import functional as F
from tests.leftovers import nothing_is_left
from tests.test_compress_exchange import Memory, together
from tests.test_data_parallel import distance, same_bits
from tests.told import told
from tests.training import spawned

pytestmark = pytest.mark.timeout(60)

WORLDS = ("process", "virtual")
RULES: dict[str, Any] = {
    "plain": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, lr=0.01, eps=1e-3),  # the usual 1e-8 is 0 in float16
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


# -- shared by the four files ------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Batch norm, and matrices that all ranks own parts of."""

    def __init__(self) -> None:
        self.first, self.norm, self.last = nn.Linear(16, 40), nn.BatchNorm1d(40), nn.Linear(40, 8)

    def forward(self, x: Any) -> Any:
        return self.last(F.relu(self.norm(self.first(x))))


def normed(seed: int = 0, dtype: str = "float64") -> nn.Module:
    return Normed().initialize(seed).astype(dtype)


def build(comm: Any, compress: Any, rule: str = "momentum", seed: int = 0, **options: Any) -> Any:
    """Rank 0's model counts: the others' are built differently."""
    kind, dtype = options.pop("kind", "DataParallel"), options.pop("dtype", "float64")
    model = normed(seed + comm.rank, dtype)
    if compress is not None:
        options["compress"] = compress
    return getattr(parallel, kind)(model, RULES[rule](model.parameters()), comm, **options)


def batch(strategy: Any, step: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's of that step: of 2 to 6 samples (one has no variance); some ranks have none in some steps."""
    rank, ranks = strategy.shard
    rng = np.random.default_rng([rank, step])
    count = 0 if ranks > 1 and (rank + step) % 4 == 3 else 2 + (rank + 2 * step) % 5
    dtype = strategy.layout.dtype
    return rng.standard_normal((count, 16)).astype(dtype), rng.integers(0, 8, count)


def go_on(strategy: Any, until: int) -> Any:
    while strategy.updates < until:
        strategy.forward_backward(*batch(strategy, strategy.updates), F.cross_entropy)
        strategy.step()
    return strategy


def everything(strategy: Any) -> dict[str, np.ndarray]:
    """w, buffers, the optimizer's state and, of this rank, the compressor's."""
    found = {f"model.{name}": array.copy() for name, array in strategy.state_dict().items()}
    for slot, arrays in strategy.optimizer_state().items():
        found |= {f"{slot}.{name}": array.copy() for name, array in arrays.items()}
    if strategy.compressor is not None:
        found |= {f"compress.{name}": array for name, array in strategy.compressor.state_dict().items()}
    return found


def of_model(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what each rank has for itself."""
    return {name: array for name, array in state.items() if not name.startswith("compress.")}


class Given(nn.Module):
    """Its gradient is what it is given, by parameter, whatever w is."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: Any = np.float64) -> None:
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(np.zeros(shape, dtype)))

    def forward(self, gradients: dict[str, np.ndarray]) -> Tensor:
        total: Any = 0
        for name in self.names:
            total = total + (getattr(self, name) * Tensor(gradients[name])).sum()
        return total  # type: ignore[no-any-return]


# -- compress="none" is no compression ---------------------------------------------------------------------------

TOTALS_OF_16 = {1: [16], 2: [5, 11], 3: [5, 3, 8], 4: [4, 2, 7, 3]}
ODD_TOTALS = {1: [7], 2: [3, 4], 3: [5, 3, 3], 4: [4, 2, 6, 3]}
ONE_IS_EMPTY = {1: [0], 2: [16, 0], 3: [5, 0, 11], 4: [4, 4, 0, 8]}


def twice(comm: Any, dtype: str, rule: str, sizes: list[int]) -> tuple[Any, Any]:
    """The same training without compress, and with "none"; rank 0 of an empty batch never calls backward."""
    found = []
    for compress in (None, "none"):
        s = build(comm, compress, rule, dtype=dtype)
        for step in range(4):
            rng = np.random.default_rng([comm.rank, step])
            count = sizes[(comm.rank + step) % len(sizes)]  # each rank has each
            x, y = rng.standard_normal((count, 16)).astype(dtype), rng.integers(0, 8, count)
            if count or comm.rank:
                s.forward_backward(x, y, F.cross_entropy)
            s.step()
        found.append(everything(s))
    return found[0], of_model(found[1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_none_is_data_parallel(dtype: str, ranks: int) -> None:
    """Where Σ n_i is a power of two bit for bit, otherwise to rounding."""
    for rule in ("momentum", "adam"):
        for exact, sizes in ((True, TOTALS_OF_16), (True, ONE_IS_EMPTY), (False, ODD_TOTALS)):
            first, *_ = found = spawned(twice, ranks, "virtual", dtype, rule, sizes[ranks])
            for plain, none in found:
                if exact:
                    assert same_bits(plain, none), (rule, sizes)
                assert same_bits(none, first[1])
                eps = float(np.finfo(dtype).eps)
                assert distance(*({k: v.astype(float) for k, v in of.items()} for of in (plain, none))) < 100 * eps


@pytest.mark.parametrize("ranks", [2, 3])
def test_none_is_data_parallel_in_processes(ranks: int) -> None:
    for plain, none in spawned(twice, ranks, "process", "float32", "adam", TOTALS_OF_16[ranks]):
        assert same_bits(plain, none)


def many(comm: Any, dtype: str) -> float:
    """The samples of a step are 70 000 tokens."""
    model = Given({"a": (4,)}, dtype)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm, compress="none")
    s.backward(model({"a": np.full(4, 2.0**-7, dtype)}), samples=35_000)
    s.step()
    return float(s.state_dict()["a"][0])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_more_samples_than_halves_reach(dtype: str) -> None:
    for moved in spawned(many, 2, "virtual", dtype):
        assert abs(moved + 2.0**-7) < 2.0**-14


# -- all ranks hold the same w -----------------------------------------------------------------------------------


def digests(comm: Any, specs: Any, rule: str, dtype: str, options: dict[str, Any]) -> list[list[str]]:
    """Of w, buffers and the optimizer's state after each of five steps, and what has been sent, by spec."""
    found = []
    for spec in specs:
        s = build(comm, spec, rule, dtype=dtype, **options)
        seen = []
        for step in range(1, 6):
            state = of_model(everything(go_on(s, step)))
            seen.append(
                sha256(b"".join(name.encode() + state[name].tobytes() for name in sorted(state))).hexdigest()
            )
            assert all(np.isfinite(array).all() for array in state.values()), spec
        assert len(set(seen)) == 5, "each step moves"
        assert (s.compressor.rank, s.compressor.seed) == (comm.rank, options.get("seed", 0)), "the seed of rank 0"
        found.append(seen)
        s.release()
    return found


CASES = (("momentum", "float64"), ("adam", "float64"), ("momentum", "float16"), ("adam", "float16"))


@pytest.mark.parametrize(("rule", "dtype"), CASES)
def test_all_ranks_are_equal_after_every_step(rule: str, dtype: str) -> None:
    for ranks in (1, 2, 3, 4) if rule == "momentum" else (3,):
        found = spawned(digests, ranks, "virtual", EXAMPLES, rule, dtype, {})
        assert all(each == found[0] for each in found)
        assert dtype == "float16" or ranks == 1 or len({seen[-1] for seen in found[0]}) == len(EXAMPLES)


@pytest.mark.parametrize(("rule", "dtype", "ranks"), [("momentum", "float64", 2), ("adam", "float16", 3)])
def test_processes_give_the_same_bits(rule: str, dtype: str, ranks: int) -> None:
    real, virtual = (spawned(digests, ranks, world, EXAMPLES, rule, dtype, {}) for world in WORLDS)
    assert all(each == real[0] for each in real)
    assert real[0] == virtual[0]


def test_two_runs_are_equal_and_seeds_differ() -> None:
    random = ("qsgd:4", "terngrad", "int8:stochastic", "randomk:0.01+ef", "powersgd:4+ef")
    runs = [spawned(digests, 3, "virtual", random, "momentum", "float64", {"seed": seed})[0] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert all(a[0] != b[0] for a, b in zip(runs[0], runs[2]))


# -- a step is rule(w, Σ exchanged) ------------------------------------------------------------------------------

SHAPES = {"a": (30, 20), "b": (7,), "zero": (90,), "c": (3, 5, 13)}


def gradients(rank: int, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([rank, step])
    found = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    found["zero"][...] = 0
    found["b"][: 1 + rank] = 0
    return found


def sizes_of(step: int, ranks: int) -> list[int]:
    """Unequal, with totals that are no powers of two; now and then a rank has none."""
    return [0 if ranks > 1 and (rank + step) % 5 == 4 else 1 + (3 * rank + step) % 4 for rank in range(ranks)]


def steps_of(comm: Any, spec: Any, rule: str, steps: int, options: dict[str, Any]) -> Any:
    """w after each step, and in the end what this rank's compressor remembers."""
    model = Given(SHAPES)
    s = parallel.DataParallel(model, RULES[rule](model.parameters()), comm, compress=spec, **options)
    found = []
    for step in range(steps):
        samples = sizes_of(step, comm.world_size)[comm.rank]
        s.backward(model(gradients(comm.rank, step)), samples=samples)
        s.step()
        found.append(s.state_dict())
    return found, s.compressor.state_dict()  # type: ignore[union-attr]


def gathered(compressors: Sequence[Any], name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Everybody's payload to everybody: the sum of what they stand for, in order of rank."""
    payloads = [compressor.compress(part, name) for compressor, part in zip(compressors, parts)]
    total = compressors[0].decompress(payloads[0])
    for payload in payloads[1:]:
        total = total + compressors[0].decompress(payload)
    return total


def owned(compressors: Sequence[Any], name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Part j of everybody's goes to rank j, which sums it, or counts votes, and compresses the sum."""
    ranks = len(compressors)
    if ranks == 1:
        (compressor,) = compressors
        return compressor.decompress(compressor.compress(parts[0], name))
    whole = []
    for j, (lo, hi) in enumerate(cuts(parts[0].size, ranks)):
        sent = [c.compress(part.reshape(-1)[lo:hi], f"{name}[{j}]") for c, part in zip(compressors, parts)]
        total = compressors[j].decompress(sent[0])
        for payload in sent[1:]:
            total = total + compressors[j].decompress(payload)
        if compressors[0].votes:
            total = np.sign(total)
        back = compressors[j].compress(total, f"{name}.sum")
        whole.append(compressors[j].decompress(back))
    return np.concatenate(whole).reshape(parts[0].shape)


def literally(spec: str, rule: str, ranks: int, steps: int, sums: Any) -> list[dict[str, np.ndarray]]:
    """The same training by N compressors in one loop, and the optimizer's own step."""
    model = Given(SHAPES)
    optimizer = RULES[rule](model.parameters())
    compressors = [get(spec, rank=rank) for rank in range(ranks)]
    found = []
    for step in range(steps):
        sizes = sizes_of(step, ranks)
        for name, parameter in model.named_parameters():
            mine = [n * gradients(rank, step)[name] / sum(sizes) for rank, n in enumerate(sizes)]
            parameter.grad = Tensor(sums(compressors, name, mine))
        optimizer.step()
        found.append({name: array.copy() for name, array in model.state_dict().items()})
    return found


@pytest.mark.parametrize("rule", ["plain", "momentum", "adam"])
@pytest.mark.parametrize(
    ("spec", "sums"),
    [
        ("topk:0.1", gathered),
        ("topk:0.1+ef", gathered),
        ("int8", owned),
        ("int8+ef", owned),
        ("int8:stochastic", owned),
        ("qsgd:4", owned),
        ("terngrad", owned),
        ("bf16", owned),
        ("sign", owned),
        ("sign+ef", owned),
        ("topk:0.1:owners+ef", owned),
    ],
)
def test_a_step_is_the_rule_of_the_exchanged_sum(spec: str, sums: Any, rule: str) -> None:
    for ranks in (1, 2, 3):
        want = literally(spec, rule, ranks, 5, sums)
        for found, _ in spawned(steps_of, ranks, "virtual", spec, rule, 5, {}):
            assert all(same_bits(a, b) for a, b in zip(found, want, strict=True)), ranks
            assert all(found[0][name].any() != (name == "zero") for name in SHAPES)


@pytest.mark.parametrize("spec", ["none", "fp16", "randomk:0.1", "randomk:0.1+ef", "powersgd:2", "powersgd:2+ef"])
def test_of_two_ranks_payloads_are_summed(spec: str) -> None:
    """By the reducer in memory, whose own tests are apart; of two the order of summing is one."""

    def work(rank: int, reducer: Memory) -> Any:
        compressor, totals = get(spec, rank=rank), []
        for step in range(5):
            sizes = sizes_of(step, 2)
            totals.append(
                {
                    name: compressor.exchange(sizes[rank] * g / sum(sizes), name, reducer)
                    for name, g in gradients(rank, step).items()
                }
            )
        return totals

    model = Given(SHAPES)
    optimizer = RULES["momentum"](model.parameters())
    for totals, (found, _) in zip(together(2, work), spawned(steps_of, 2, "virtual", spec, "momentum", 5, {})):
        for step, total in enumerate(totals):
            if totals is not None and len(found) == 5 and optimizer.updates < 5:
                for name, parameter in model.named_parameters():
                    parameter.grad = Tensor(total[name])
                optimizer.step()
                assert same_bits(found[step], model.state_dict()), step


# -- nothing is lost ---------------------------------------------------------------------------------------------


def remembered(states: Sequence[dict[str, np.ndarray]], name: str, size: int) -> np.ndarray:
    """Σ over ranks of residuals, those of parts and of owners' sums where they belong."""
    ranks, total = len(states), np.zeros(size)
    for rank, state in enumerate(states):
        total += state.get(f"residual/{name}", np.zeros(size)).ravel()
        for j, (lo, hi) in enumerate(cuts(size, ranks)):
            total[lo:hi] += state.get(f"residual/{name}[{j}]", 0)
            if j == rank:
                total[lo:hi] += state.get(f"residual/{name}.sum", 0)
    return total


@pytest.mark.parametrize(
    "spec",
    ["topk:0.1", "topk:0.1:owners", "int8", "sign", "qsgd:4", "terngrad", "randomk:0.1", "powersgd:2", "bf16"],
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_what_is_dropped_comes_later(spec: str, ranks: int) -> None:
    """Σ over steps of what was applied + residuals of all = Σ of exact means, whatever the n_i are. With η = 0.1
    and plain SGD from w = 0, −w / η is what was applied. Residuals are of n_i g_i / Σ n_i: they add up as they
    are."""
    steps = 6
    results = spawned(steps_of, ranks, "virtual", f"{spec}+ef", "plain", steps, {})
    states = [state for _, state in results]
    assert all(any("residual/" in name for name in state) for state in states)
    for name, shape in SHAPES.items():
        want = np.zeros(int(np.prod(shape)))
        for step in range(steps):
            sizes = sizes_of(step, ranks)
            want += sum(n * gradients(r, step)[name].ravel() for r, n in enumerate(sizes)) / sum(sizes)
        applied = results[0][0][-1][name].ravel() / -0.1
        left = remembered(states, name, want.size)
        np.testing.assert_allclose(applied + left, want, rtol=0, atol=1e-12)
        if spec != "powersgd:2" and name == "a":
            assert np.abs(left).max() > 1e-4, "there is something to remember"
    assert ranks > 1 or not any(".sum" in name for name in states[0])


# -- votes -------------------------------------------------------------------------------------------------------


class Voters:
    """What ranks 0 … 4 say, and with how many samples."""

    said = np.array(
        [[1, -1, 0, 0, 5], [1, -1, 0, 1, -1], [-1, -1, 0, 0, -1], [1, 2, 0, 0, -9], [-7, 3, 0, 0, 2.0]]
    )
    samples = (1, 1, 1, 1, 50)


def votes(comm: Any, samples: Sequence[int]) -> Any:
    model = Given({"w": (5,)})
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm, compress="sign")
    for _ in range(2):
        s.backward(model({"w": Voters.said[comm.rank]}), samples=samples[comm.rank])
        s.step()
    return s.state_dict()["w"].tolist()


def test_the_majority_decides_and_samples_do_not_weigh() -> None:
    for world, ranks, want in (
        ("virtual", 5, [-2, 2, 0, -2, 2]),
        ("virtual", 3, [-2, 2, 0, -2, 2]),
        ("process", 3, [-2, 2, 0, -2, 2]),
        ("virtual", 2, [-2, 2, 0, -2, 0]),  # a tie
        ("virtual", 1, [-2, 2, 0, 0, -2]),
    ):
        assert want == (-2 * np.sign(np.sign(Voters.said[:ranks]).sum(axis=0))).tolist()
        for samples in (Voters.samples, (50, 1, 1, 1, 1), (1,) * 5):
            assert spawned(votes, ranks, world, samples) == [want] * ranks
    assert spawned(votes, 3, "virtual", (0, 1, 1)) == [[0, 2, 0, -2, 2]] * 3, "who has no samples has no vote"


# -- bytes -------------------------------------------------------------------------------------------------------


def sent(comm: Any, spec: str, zeros: bool, dtype: str) -> Any:
    """Bytes of each of three steps: by metrics, and received; and what the payloads would be, by arithmetic."""
    shapes = {"a": (64, 25), "b": (400,)}
    model = Given(shapes, dtype)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm, compress=spec)
    by_metrics, before = [], (0.0, 0.0)
    for step in range(3):
        rng = np.random.default_rng([comm.rank, step])
        given = {name: (1 + rng.random(shape)).astype(dtype) for name, shape in shapes.items()}
        if zeros:
            given["b"][::2] = 0
        s.backward(model(given), samples=2)
        s.step()
        now = s.metrics["bytes_sent"], s.metrics["bytes_received"]
        by_metrics.append((int(now[0] - before[0]), int(now[1] - before[1])))
        before = now
    return by_metrics


def bits(number: int, each: int) -> int:
    """Bytes of bit planes."""
    return number if each == 8 else each * -(-number // 8)


# Of an array of d elements of so many bytes: what its payload takes.
C: dict[str, Any] = {
    "none": lambda d, item: d * item,
    "fp16": lambda d, item: 2 * d,
    "bf16": lambda d, item: 2 * d,
    "int8": lambda d, item: d + max(4, item) * -(-d // 2048),
    "int8+ef": lambda d, item: d + max(4, item) * -(-d // 2048),
    "qsgd:4": lambda d, item: bits(d, 4) + max(4, item) * -(-d // 512),
    "terngrad": lambda d, item: bits(d, 2) + max(4, item) * (d > 0),
    "randomk:0.01+ef": lambda d, item: item * math.ceil(0.01 * d),
    "topk:0.01+ef": lambda d, item: (item + 1) * math.ceil(0.01 * d) + -(-d // 255),
    "topk:0.5": lambda d, item: item * math.ceil(0.5 * d) + -(-d // 8),
    "powersgd:4+ef": lambda d, item: d * item if d == 400 else 4 * (64 + 25) * item,
    "sign": lambda d, item: -(-d // 8),
}
SUMMED = ("none", "fp16", "randomk:0.01+ef", "powersgd:4+ef")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("spec", C)
def test_bytes_of_a_step(spec: str, ranks: int) -> None:
    """After the first step, in which sizes are told: c (N−1) gathered; 2 c (N−1)/N by owners and by sums, these
    where messages cost nothing but their bytes."""
    ideal = sim.Cluster(nodes=ranks, latency_s=0.0)
    for dtype, item in (("float32", 4), ("float64", 8)):
        found = minidp.spawn(sent, ranks, spec, False, dtype, world="virtual", cluster=ideal)
        for rank, steps in enumerate(found):
            want = sum(of_route(spec, d, item, rank, ranks) for d in (1600, 400)) if ranks > 1 else 0
            assert [out for out, _ in steps[1:]] == [want] * 2, (rank, dtype)
            assert steps[0][0] >= steps[1][0]
        assert sum(out for steps in found for out, _ in steps) == sum(got for steps in found for _, got in steps)


@pytest.mark.parametrize("spec", SUMMED)
def test_sums_of_processes_are_sent_to_all(spec: str) -> None:
    """In order of rank, so that bits do not depend on the schedule: (N−1) c."""
    for steps in spawned(sent, 4, "process", spec, False, "float32"):
        assert steps == [(3 * (C[spec](1600, 4) + C[spec](400, 4)),) * 2] * 3


def of_route(spec: str, d: int, item: int, rank: int, ranks: int) -> int:
    """What a rank sends of an array of d elements."""
    c = C[spec]
    if spec in SUMMED:
        assert c(d, item) % ranks == 0
        return int(2 * c(d, item) * (ranks - 1) // ranks)
    if spec.startswith("topk"):
        return int((ranks - 1) * c(d, item))
    lengths = [c(hi - lo, item) for lo, hi in cuts(d, ranks)]
    told_first = 2 * (ranks - 1) * 8 * 3 if spec == "sign" else 0  # how many elements, and of two arrays the bytes
    return sum(lengths) - lengths[rank] + (ranks - 1) * lengths[rank] + told_first


def test_bytes_of_signs_with_zeros() -> None:
    """A second bitmap, for the array that has zeros alone. The votes of a part, too, if they are 0 somewhere."""
    for ranks in (2, 4):
        without, with_ = (spawned(sent, ranks, "virtual", "sign", zeros, "float32") for zeros in (False, True))
        for rank, (few, more) in enumerate(zip(without, with_)):
            lengths = [bits(hi - lo, 1) for lo, hi in cuts(400, ranks)]
            second = sum(lengths) - lengths[rank] + (ranks - 1) * lengths[rank]
            assert [m[0] - f[0] for f, m in zip(few, more)] == [second] * 3, rank


@pytest.mark.parametrize("spec", C)
def test_processes_send_as_many(spec: str) -> None:
    assert spawned(sent, 2, "process", spec, True, "float32") == spawned(sent, 2, "virtual", spec, True, "float32")


# -- what is not finite ------------------------------------------------------------------------------------------


def poisoned(comm: Any, spec: str, value: float, bad: bool) -> Any:
    """Rank 1's gradient of the third step is not finite; or there never was such a step."""
    s = go_on(build(comm, spec, "adam"), 2)
    said = ""
    if bad:
        before, sent_before = everything(s), s.metrics["bytes_sent"]
        weight = s.model.last.weight
        slope = np.ones(weight.shape)
        slope[3, 5] = value if comm.rank == 1 else 1.0
        with np.errstate(invalid="ignore"):
            s.backward((weight * Tensor(slope)).sum(), samples=2)
        with pytest.raises(parallel.NonFiniteGradient) as caught:
            s.step()
        error = caught.value
        said = f"{error.parameter} {error.rank} {error.step} {error.value}"
        assert same_bits(before, everything(s)), "w, the optimizer's state, residuals, counters"
        assert s.updates == 2
        assert s.metrics["bytes_sent"] == sent_before
        assert "call strategy.discard()" in told(s.step)
        s.discard()
    return said, everything(go_on(s, 5))


@pytest.mark.parametrize("spec", ["none", "int8+ef", "topk:0.1+ef", "powersgd:2+ef", "sign", "qsgd:4", "fp16"])
def test_a_nan_of_one_rank_is_told_to_all_and_leaves_no_trace(spec: str) -> None:
    for world, ranks, value in (("virtual", 2, np.nan), ("virtual", 3, np.inf), ("process", 2, -np.inf)):
        if world == "virtual" or spec == "topk:0.1+ef":
            found, want = (spawned(poisoned, ranks, world, spec, value, bad) for bad in (True, False))
            for (said, state), (_, never) in zip(found, want):
                assert said == f"last.weight 1 2 {value}"
                assert same_bits(state, never), "as if this batch had never been"


def unchecked(comm: Any, spec: str, value: float) -> None:
    model = Given(SHAPES)
    s = parallel.DataParallel(
        model, optim.SGD(model.parameters(), lr=1.0), comm, compress=spec, check_finite=False
    )
    given = gradients(comm.rank, 0)
    given["c"][1, 2, 3] = value if comm.rank == 1 else 1.0
    with np.errstate(invalid="ignore"):
        s.backward(model(given), samples=1)
    s.step()


@pytest.mark.parametrize("spec", ["none", "int8", "topk:0.1+ef", "powersgd:2", "sign+ef"])
def test_unchecked_the_compressor_names_the_parameter(spec: str) -> None:
    for world in WORLDS if spec == "int8" else ("virtual",):
        for value in (np.nan, np.inf):
            with pytest.raises(
                minidp.RankFailed, match=rf"rank 1 of 2 raised ValueError: c(\[\d\])? is {value} at element"
            ):
                spawned(unchecked, 2, world, spec, value)


def overflows(comm: Any) -> None:
    model = Given(SHAPES)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm, compress="fp16")
    given = gradients(comm.rank, 0)
    given["b"][3] = 3e5 if comm.rank == 1 else 1.0  # half of it, for the mean of two
    s.backward(model(given), samples=1)
    s.step()


def test_what_is_too_large_for_fp16() -> None:
    with pytest.raises(
        minidp.RankFailed, match=r"ValueError: b holds 150000, beyond float16's 65504: give .*bf16"
    ):
        spawned(overflows, 2, "virtual")


def sum_overflows(comm: Any) -> str:
    """Each is finite, their sum is not: the step is not committed."""
    model = Given({"a": (4,)}, "float32")
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm, compress="fp16")
    s.backward(model({"a": np.full(4, 1.2e5, np.float32)}), samples=1)
    said = told(s.step)
    assert not s.state_dict()["a"].any()
    s.discard()
    s.backward(model({"a": np.ones(4, np.float32)}), samples=1)
    s.step()
    assert (s.state_dict()["a"] == -1).all()
    return said


def test_a_sum_that_overflows() -> None:
    for said in spawned(sum_overflows, 2, "virtual"):
        assert said == "nothing" or said.startswith("NonFiniteGradient"), said


# -- what can't be -----------------------------------------------------------------------------------------------


def refused(comm: Any, options: dict[str, Any], others: dict[str, Any]) -> str:
    return told(lambda: build(comm, **(others if comm.rank else options)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compress": "int9"}, "ValueError: compress='int9' is unknown. There are: none, fp16, bf16, bf16:trunc"),
        ({"compress": "topk"}, "ValueError: compress='topk'"),
        ({"compress": "topk:2"}, "ValueError: compress='topk:2': density=2.0: give the part that is kept"),
        ({"compress": "int8+eff"}, "ValueError: compress='int8+eff' is unknown. There are: none"),
        ({"compress": 8}, "TypeError: compress=8: give a Compressor, or a name: none, fp16"),
        (
            {"compress": "int8", "micro_shards": 4},
            "ValueError: micro_shards=4 gives exact bits, compress='int8' do",
        ),
        (
            {"compress": "none", "micro_shards": 2},
            "ValueError: micro_shards=2 gives exact bits, compress='none' do",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    for world in WORLDS:
        for said in spawned(refused, 2, world, options, options):
            assert said.startswith(says), said
    if "unknown" in says:
        for name in ("qsgd:LEVELS", "sign", "terngrad", "topk:DENSITY", "randomk:DENSITY", "powersgd:RANK", "+ef"):
            assert name in said


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("int8", "qsgd:4"),
        ("int8", "int8+ef"),
        ("topk:0.1", "topk:0.2"),
        ("int8", None),
        ("none", None),
        (QSGD(4, 512), QSGD(4, 256)),
        (QSGD(4, seed=0), QSGD(4, seed=1)),
        ("terngrad", "terngrad:2.5"),
    ],
    ids=str,
)
def test_ranks_that_compress_differently(mine: Any, theirs: Any) -> None:
    for world in WORLDS if mine == "int8" else ("virtual",):
        for said in spawned(refused, 3, world, {"compress": mine}, {"compress": theirs}):
            assert said.startswith("CollectiveMismatch: rank 1 has built another DataParallel than rank 0"), said


def instances(comm: Any) -> Any:
    """A compressor of one's own, built the same on every rank: it learns whose it is."""
    found = []
    for make in (
        lambda: QSGD(4, block=64),
        lambda: ErrorFeedback(QSGD(4, block=64, seed=9)),
        lambda: Int8(block=7),
    ):
        mine = make()
        assert mine.rank == 0
        s = build(comm, mine)
        own = s.compressor
        assert own.describe() == mine.describe()
        assert own.rank == getattr(own, "inner", own).rank == comm.rank
        assert mine.rank == 0
        found.append(of_model(everything(go_on(s, 3))))
        s.release()
    return found


def test_an_instance_in_place_of_a_name() -> None:
    found = spawned(instances, 3, "virtual")
    for each in found:
        assert all(same_bits(a, b) for a, b in zip(each, found[0], strict=True))
    by_name = spawned(by_spec, 3, "virtual", "qsgd:4")[0]
    assert not same_bits(by_name, found[0][0]), "blocks of 64"


def by_spec(comm: Any, spec: str, *options: Any) -> Any:
    return of_model(everything(go_on(build(comm, spec, **dict(options)), 3)))


# -- what a step may be made of ----------------------------------------------------------------------------------


def accumulated(comm: Any, spec: str, parts: int, rule: str) -> Any:
    """The same samples at once, or in so many backwards; the last step has fewer than there may be."""
    model = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 8), seed=0).astype("float64")
    s = parallel.DataParallel(
        model, RULES[rule](model.parameters()), comm, compress=spec, accumulation_steps=parts
    )
    for step in range(4):
        rng = np.random.default_rng([comm.rank, step])
        x, y = rng.standard_normal((6 + comm.rank, 16)), rng.integers(0, 8, 6 + comm.rank)
        for rows in np.array_split(np.arange(len(x)), min(parts, 4 - step if parts > 1 else 1)):
            s.forward_backward(x[rows], y[rows], F.cross_entropy)
        s.step()
    return s.state_dict(), s.metrics["bytes_sent"]


@pytest.mark.parametrize("spec", ["none", "bf16", "topk:0.1+ef", "powersgd:2+ef"])
def test_accumulation_is_one_batch_and_travels_once(spec: str) -> None:
    for ranks in (1, 3):
        (want, bytes_sent), *_ = spawned(accumulated, ranks, "virtual", spec, 1, "momentum")
        for state, others in spawned(accumulated, ranks, "virtual", spec, 3, "momentum"):
            assert distance(want, state) < (1e-2 if spec == "bf16" else 1e-9)
            assert ranks > 1 or others == 0
        assert spawned(accumulated, ranks, "virtual", spec, 3, "momentum")[0][1] == bytes_sent


def clipped(comm: Any, spec: str, norm: float) -> Any:
    model = Given(SHAPES)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm, compress=spec, clip_norm=norm)
    before = s.state_dict()
    found = []
    for step in range(3):
        s.backward(model(gradients(comm.rank, step)), samples=1 + comm.rank)
        s.step()
        after = s.state_dict()
        found.append({name: before[name] - after[name] for name in SHAPES})
        before = after
    return found, s.compressor.state_dict()  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", ["none", "int8+ef", "topk:0.1+ef"])
def test_what_arrives_is_clipped(spec: str) -> None:
    """Clipping acts on the sum; what is exchanged, and residuals, are as without."""
    for world in WORLDS:
        free, tight = (spawned(clipped, 3, world, spec, norm) for norm in (1e6, 0.5))
        for (steps, memory), (short, same_memory) in zip(free, tight):
            assert same_bits(memory, same_memory)
            for long_one, short_one in zip(steps, short):
                norm = np.sqrt(sum((array**2).sum() for array in long_one.values()))
                assert norm > 0.5
                for name in SHAPES:
                    np.testing.assert_allclose(short_one[name], long_one[name] * 0.5 / norm, rtol=1e-5)


def discarded(comm: Any, spec: str, discards: bool) -> Any:
    s = go_on(build(comm, spec), 2)
    if discards:
        before = everything(s)
        for _ in range(2):
            s.forward_backward(*batch(s, 40), F.cross_entropy)
            assert s.in_step
            s.discard()
            assert not s.in_step
        assert same_bits(before, everything(s))
    return everything(go_on(s, 5))


@pytest.mark.parametrize("spec", ["none", "int8+ef", "topk:0.1+ef", "qsgd:4"])
def test_a_discarded_step_leaves_no_trace(spec: str) -> None:
    with_, without = (spawned(discarded, 2, "virtual", spec, discards) for discards in (True, False))
    assert all(same_bits(a, b) for a, b in zip(with_, without, strict=True))


def empty_steps(comm: Any, spec: str) -> Any:
    """Nobody has samples: the step counts, nothing moves, nothing is compressed."""
    s = go_on(build(comm, spec), 2)
    before = everything(s)
    s.step()
    s.forward_backward(np.zeros((0, 16)), np.zeros(0, int), F.cross_entropy)
    s.step()
    assert s.updates == 4
    assert same_bits(before, everything(s))
    return of_model(everything(go_on(s, 6)))


@pytest.mark.parametrize("spec", ["none", "int8+ef", "topk:0.1+ef", "sign"])
def test_steps_without_samples(spec: str) -> None:
    for world in WORLDS:
        first, *others = spawned(empty_steps, 2, world, spec)
        assert all(same_bits(first, other) for other in others)


def released(comm: Any, spec: str) -> Any:
    """A strategy after another, on one model; the first can't go on."""
    s = go_on(build(comm, spec), 2)
    state = s.state_dict()
    s.release()
    assert "released" in told(s.step)
    assert same_bits(state, s.model.state_dict())
    next(iter(s.model.parameters())).data[...] = 1.0 + comm.rank  # its own again
    again = parallel.DataParallel(s.model, RULES["momentum"](s.model.parameters()), comm, compress="int8")
    assert (next(iter(s.model.parameters())).data == 1.0).all(), "rank 0's"
    return of_model(everything(go_on(again, 3)))


def test_release() -> None:
    for world in WORLDS:
        first, second = spawned(released, 2, world, "topk:0.1+ef")
        assert same_bits(first, second)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_one_rank_alone(spec: str) -> None:
    """It sends nothing, and compresses all the same."""
    s = go_on(build(comm_self(), spec), 3)
    assert s.metrics["bytes_sent"] == s.metrics["bytes_received"] == 0
    assert same_bits(everything(s), spawned(alone, 1, "virtual", spec)[0])
    plain = go_on(build(comm_self(), None), 3)
    assert same_bits(s.state_dict(), plain.state_dict()) == (spec == "none" and len(batch(s, 0)[0]) == 2)


def alone(comm: Any, spec: str) -> Any:
    return everything(go_on(build(comm, spec), 3))


def loads(comm: Any, spec: str) -> Any:
    """load_state_dict: w of rank 0, whatever the others give; the rest goes on."""
    s = go_on(build(comm, spec), 2)
    state = {name: array + comm.rank for name, array in normed(5).state_dict().items()}
    before = {k: v for k, v in everything(s).items() if not k.startswith("model.")}
    s.load_state_dict(state)
    assert same_bits(s.state_dict(), normed(5).state_dict())
    assert same_bits(before, {k: v for k, v in everything(s).items() if not k.startswith("model.")})
    return of_model(everything(go_on(s, 4)))


def test_load_state_dict() -> None:
    for world in WORLDS:
        first, second = spawned(loads, 2, world, "topk:0.1+ef")
        assert same_bits(first, second)


# -- a death -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clean() -> Iterator[None]:
    with nothing_is_left():
        yield


def dies(comm: Any, spec: str, where: str) -> None:
    s = go_on(build(comm, spec), 3)
    if comm.rank == 1:
        if where == "between":
            os.kill(os.getpid(), signal.SIGKILL)
        calls, compress = iter(range(100)), s.compressor.compress

        def deadly(array: Any, key: str) -> Any:
            if next(calls) == 3:  # in the middle of the exchange
                os.kill(os.getpid(), signal.SIGKILL)
            return compress(array, key)

        s.compressor.compress = deadly
    go_on(s, 100)


@pytest.mark.parametrize("where", ["between", "within"])
@pytest.mark.parametrize("spec", ["int8", "topk:0.1", "none"])
def test_a_rank_that_is_killed(spec: str, where: str, clean: None) -> None:
    with pytest.raises(minidp.RankFailed, match=r"^rank 1 of 3 was killed by SIGKILL") as caught:
        spawned(dies, 3, "process", spec, where)
    assert caught.value.rank == 1


# -- it learns ---------------------------------------------------------------------------------------------------

LEARNERS = ("int8", "bf16", "qsgd:4", "topk:0.01+ef", "powersgd:4+ef")


def accuracy(comm: Any, spec: str | None, seed: int, epochs: int) -> float:
    """Digits: per cent of the test set."""
    train, test = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10), seed=seed)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, compress=spec)
    loader = data.DataLoader(train, global_batch_size=32, shard=s.shard, shuffle=True, seed=seed)
    for epoch in range(epochs):
        for x, y in loader.epoch(epoch):
            s.forward_backward(x, y, F.cross_entropy)
            s.step()
    x, y = test[:]
    with minidp.no_grad():
        return float(100 * (model(x).numpy().argmax(axis=1) == y).mean())


@pytest.mark.soak
def test_digits_are_learned_as_well() -> None:
    """Four workers, ten epochs, three seeds: in the mean within half a point of the uncompressed."""
    means = {
        spec: np.mean([spawned(accuracy, 4, "virtual", spec, seed, 10)[0] for seed in range(3)])
        for spec in (None, *LEARNERS)
    }
    assert means[None] > 95
    assert all(abs(means[spec] - means[None]) <= 0.5 for spec in LEARNERS), means


def test_digits_are_learned() -> None:
    """One seed, four epochs, the one that drops most."""
    plain, other = (spawned(accuracy, 4, "virtual", spec, 0, 4)[0] for spec in (None, "topk:0.01+ef"))
    assert plain > 88
    assert abs(other - plain) <= 2.5


# -- what a review found -----------------------------------------------------------------------------------------


def test_subclasses_do_not_ignore_it() -> None:
    class Mine(parallel.DataParallel):
        pass

    model = nn.Sequential(nn.Linear(2, 1), seed=0)
    with pytest.raises(TypeError, match="Mine does not compress: derive it from CompressedDataParallel"):
        Mine(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), compress="int8")


def half_overflow(comm: Any) -> str:
    model = nn.Sequential(nn.Linear(512, 1, bias=False), seed=0).astype("float16")
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm, compress="randomk:0.05")
    before = s.state_dict()
    x = np.full((1, 512), 6000, np.float16)
    s.backward(model(minidp.tensor(x)).sum(), samples=1)
    said = told(s.step)
    assert same_bits(before, s.state_dict())
    return said


def test_halves_that_compression_makes_infinite_are_not_committed() -> None:
    for said in spawned(half_overflow, 2, "virtual"):
        assert said.startswith("NonFiniteGradient: the gradient of '0.weight' is ")


def shared_instance(comm: Any, compressor: Any) -> Any:
    found = []
    for _ in range(2):
        s = build(comm, compressor)
        found.append(of_model(everything(go_on(s, 4))))
        s.release()
    return found


@pytest.mark.parametrize("spec", ["topk:0.1+ef", "randomk:0.3+ef", "qsgd:4"])
def test_one_compressor_serves_all_ranks_and_strategies(spec: str) -> None:
    """In the virtual world all ranks are given the same object: none may write into it."""
    given = get(spec)
    results = spawned(shared_instance, 3, "virtual", given)
    want = spawned(shared_instance, 3, "virtual", spec)
    for (first, second), (named, _) in zip(results, want, strict=True):
        assert same_bits(first, second)
        assert same_bits(first, results[0][0])
        assert same_bits(first, named)


def masked_by_hand(comm: Any, shift: bool) -> Any:
    mask = np.roll(np.arange(16 * 40) % 3 == 0, comm.rank * shift).reshape(40, 16)
    s = build(comm, Pruned(get("none"), {"first.weight": mask}))
    go_on(s, 2)
    return mask, s.state_dict()["first.weight"]


def test_masks_must_be_the_same_and_act_on_w() -> None:
    for mask, w in spawned(masked_by_hand, 2, "virtual", False):
        assert not w[~mask].any()
        assert w[mask].any()
    with pytest.raises(minidp.RankFailed, match="has built another DataParallel than rank 0"):
        spawned(masked_by_hand, 2, "virtual", True)


def test_an_overflow_does_not_stay_in_powersgd() -> None:
    compressor = get("powersgd:2")
    with np.errstate(all="ignore"):
        compressor.compress(np.full((30, 20), 3e38, np.float32), "w")
    m = np.ones((30, 20), np.float32)
    assert np.allclose(compressor.decompress(compressor.compress(m, "w")), m)
