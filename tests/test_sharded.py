"""ShardedDataParallel (ZeRO, stages 1 and 2): DataParallel's bits, in the memory that the paper promises."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.comm import comm_self
from minidp.nn import functional as F
from minidp.parallel.buckets import PIECE
from minidp.parallel.checkpoint_files import read
from minidp.parallel.departures import StepLost
from minidp.parallel.sharded import ShardedDataParallel
from tests.test_bucketed import SPOILT, Turned, odd_model, spoilt, told
from tests.test_data_parallel import dataset, distance, same_bits, small_model
from tests.training import go_on, spawned

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: optim.SGD(p, lr=lambda t: 0.1 / (1 + t)),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: optim.Adam(p, lr=0.01, eps=1e-3),  # the usual 1e-8 is 0 in float16
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-3),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bucket_cap_mb": 0, "check_finite": False},
    {"clip_norm": 0.3, "bucket_cap_mb": 0.004},
]
WORLDS = ("process", "virtual")


class Wide(nn.Module):
    """Parameters of several pieces, so that slices begin inside of them; dropout; statistics of batches."""

    def __init__(self) -> None:
        self.first, self.norm, self.drop = nn.Linear(6, 500), nn.BatchNorm1d(500), nn.Dropout(0.2)
        self.second, self.last = nn.Linear(500, 11), nn.Linear(11, 3)

    def forward(self, x: Any) -> Any:
        return self.last(F.tanh(self.second(self.drop(F.tanh(self.norm(self.first(x)))))))


def wide_model(seed: int, dtype: str) -> nn.Module:
    return Wide().initialize(seed).astype(dtype)


MODELS = {"wide": wide_model, "odd": odd_model}


def sharded(model: nn.Module, optimizer: optim.Optimizer, comm: Any, stage: int | None, **options: Any) -> Any:
    """Stage None: DataParallel."""
    if stage is None:
        return parallel.DataParallel(model, optimizer, comm, **options)
    return ShardedDataParallel(model, optimizer, comm, stage, **options)


def two_groups(model: nn.Module, optimizer: str) -> optim.Optimizer:
    first, *rest = model.parameters()
    return OPTIMIZERS[optimizer]([{"params": rest}, {"params": [first], "lr": 0.02}])  # type: ignore[no-any-return]


def history(comm: Any, stage: int | None, make: Any, optimizer: str, dtype: str, options: Any) -> list[Any]:
    """w after each of six steps, of unequal shards: some have no samples, or do not call backward."""
    model = make(comm.rank, dtype)
    s = sharded(model, two_groups(model, optimizer), comm, stage, **options)
    x, y = dataset(dtype).arrays
    states = []
    for step in range(6):
        # 16 in the first step: 1/16 is exact, and the division is left to the update. Later totals are odd.
        n = comm.world_size
        sizes = [16 // n if step == 0 else (3 * r + step) % 5 + 2 for r in range(n)]
        if step in (1, 4) and n > 1:
            sizes[-1] = 0
        if step == 3:
            sizes = [0] * n
        lo = sum(sizes[: comm.rank])
        rows = np.arange(lo, lo + sizes[comm.rank])
        if step != 4 or comm.rank == 0:  # nobody else calls backward
            for part in np.array_split(rows, options.get("accumulation_steps", 1)):
                s.forward_backward(x[part], y[part], F.cross_entropy)
        s.step()
        states.append(s.state_dict())
    s.release()
    return states


def differences(comm: Any, full: bool) -> list[str]:
    """The cases that have not the bits of DataParallel."""
    bad = []
    cases = [
        (name, optimizer, dtype, options)
        for name in MODELS
        for dtype in ("float32", "float64", "float16")
        for i, optimizer in enumerate(OPTIMIZERS)
        for j, options in enumerate(OPTIONS)
        if full or (i + j) % 4 == len(name) % 2
    ]
    for name, *case in cases:
        want = history(comm, None, MODELS[name], *case)
        moves = not same_bits(want[0], want[1])
        for stage in (1, 2):
            got = history(comm, stage, MODELS[name], *case)
            if not (moves and all(same_bits(a, b) for a, b in zip(want, got, strict=True))):
                bad.append(f"stage {stage} {name} {case}")
    return bad


@pytest.mark.parametrize(
    ("world", "ranks"),
    [("process", 1), ("process", 2), ("process", 4), *(("virtual", n) for n in (1, 2, 3, 4, 8))],
)
def test_the_bits_of_data_parallel(world: str, ranks: int) -> None:
    assert spawned(differences, ranks, world, ranks == 2) == [[]] * ranks


def accumulated(comm: Any, stage: int | None, parts: int, calls: bool) -> dict[str, np.ndarray]:
    model = small_model()
    s = sharded(model, optim.Adam(model.parameters(), lr=0.01), comm, stage, accumulation_steps=parts)
    x, y = dataset().arrays
    x, y = x[comm.rank :: comm.world_size], y[comm.rank :: comm.world_size]
    for _ in range(3):
        rows = np.array_split(np.arange(len(x)), parts)
        if calls:  # as many backwards as there are ranks before; the last rank makes one
            rows = [rows[0]] if comm.rank else rows
        for part in rows:
            s.forward_backward(x[part], y[part], F.cross_entropy)
        s.step()
    return s.state_dict()


@pytest.mark.parametrize("calls", [False, True])
def test_accumulation_adds_what_each_backward_sends(calls: bool) -> None:
    """Also where ranks make different numbers of backwards."""
    for world, ranks, parts in (("process", 2, 3), ("virtual", 3, 2), ("virtual", 1, 4)):
        want = spawned(accumulated, ranks, world, None, parts, calls)[0]
        assert same_bits(want, spawned(accumulated, ranks, world, 1, parts, calls)[0])
        for state in spawned(accumulated, ranks, world, 2, parts, calls):
            assert distance(want, state) <= 1e-9


# -- clipping ------------------------------------------------------------------------------------------------


def clipped(comm: Any, stage: int | None, own: bool) -> dict[str, np.ndarray]:
    model = wide_model(0, "float64")
    s = sharded(model, OPTIMIZERS["momentum"](model.parameters()), comm, stage, clip_norm=0.1)
    if own:
        s.comm.all_reduce = lambda squares: None
    x, y = dataset().arrays
    s.forward_backward(x[comm.rank :: comm.world_size], y[comm.rank :: comm.world_size], F.cross_entropy)
    s.step()
    return s.state_dict()  # type: ignore[no-any-return]


def test_a_norm_of_the_own_slices_alone_is_another_one() -> None:
    want = spawned(clipped, 2, "virtual", None, False)[0]
    for stage in (1, 2):
        assert same_bits(want, spawned(clipped, 2, "virtual", stage, False)[0])
        assert distance(want, spawned(clipped, 2, "virtual", stage, True)[0]) > 1e-4


# -- memory and traffic --------------------------------------------------------------------------------------

LAYERS, SIDE = 6, 128  # of 128 × 128 parameters: 16 pieces each


def even_model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)), seed=0)


def traced(comm: Any, stage: int, bias: bool) -> dict[str, Any]:
    """What a rank says it holds, and what it has allocated and kept: before backward, after it, after the step."""
    model = even_model()
    if bias:
        model = nn.Sequential(model, nn.Linear(SIDE, 1001), seed=0)
    rng = np.random.default_rng(comm.rank)
    x, y = rng.standard_normal((4, SIDE), np.float32), rng.integers(0, 100, 4)
    tracemalloc.start()
    cap = SIDE * SIDE * 4 / 2**20
    s = ShardedDataParallel(model, optim.Adam(model.parameters()), comm, stage, bucket_cap_mb=cap)
    del model
    s.forward_backward(x, y, F.cross_entropy)
    s.step()  # buffers of the communicator, too
    held, told_, peaks = [], [], []
    for call in (lambda: s.forward_backward(x, y, F.cross_entropy), s.step):
        base = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        now, peak = tracemalloc.get_traced_memory()
        held.append(now)
        peaks.append(peak - base)
        told_.append(s.memory())
    tracemalloc.stop()
    return {"held": held, "told": told_, "peaks": peaks, "size": s.layout.size, "buckets": len(s.buckets)}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_is_that_of_the_paper(stage: int, ranks: int) -> None:
    """Exactly what the formulas say, in ``memory`` and by the allocator's own count."""
    bucket = SIDE * SIDE * 4
    for result in spawned(traced, ranks, "process", stage, False):
        psi = result["size"]
        assert psi == LAYERS * SIDE * SIDE
        assert result["buckets"] == LAYERS
        for memory, held in zip(result["told"], result["held"], strict=True):
            assert memory == {
                "parameters": 4 * psi,
                "gradients": 4 * psi if stage == 1 else 4 * psi // ranks,
                "optimizer": 8 * psi // ranks,
                "communication": bucket + bucket // ranks,
            }
            # Python's own objects besides; the full gradients would be 384 KB more.
            assert 0 <= held - sum(memory.values()) < 100_000
        if stage == 2:  # nor are they there for a moment: two of six layers' are, and the copies on their way
            assert result["peaks"][0] < 4 * bucket


def test_shares_differ_by_the_pieces_that_slices_are_made_of() -> None:
    for stage, ranks in ((1, 2), (2, 3), (2, 4)):
        results = spawned(traced, ranks, "virtual", stage, True)
        psi, buckets = results[0]["size"], results[0]["buckets"]
        told_ = [result["told"][-1] for result in results]
        assert sum(memory["optimizer"] for memory in told_) == 8 * psi
        sharded_gradients = [memory["gradients"] for memory in told_]
        assert sum(sharded_gradients) == (4 * psi if stage == 2 else 4 * psi * ranks)
        for memory in told_:
            assert memory["parameters"] == 4 * psi
            assert abs(memory["optimizer"] - 8 * psi / ranks) <= 8 * PIECE * buckets


def slab_memory(comm: Any) -> tuple[dict[str, int], int]:
    model = even_model()
    s = parallel.DataParallel(model, optim.Adam(model.parameters()), comm)
    return s._slabs.memory(comm.rank), s.layout.size


def test_memory_of_shared_slabs() -> None:
    """laws.md: all ranks together 8Ψ parameters, 4ΨN gradients, 16Ψ state; a lone rank has one buffer of each."""
    for ranks in (1, 2, 4):
        results = spawned(slab_memory, ranks, "process")
        psi, copies = results[0][1], min(ranks, 2)
        total = {key: sum(memory[key] for memory, _ in results) for key in results[0][0]}
        assert total == {
            "parameters": copies * 4 * psi,
            "gradients": 4 * psi * ranks,
            "optimizer": copies * 8 * psi,
        }
        assert all(set(memory.values()) == {0, 4 * psi} for memory, _ in results[1:])


def traffic(comm: Any, stage: int, even: bool, parts: int) -> tuple[dict[str, float], list[int], int]:
    model = even_model() if even else wide_model(0, "float32")
    s = sharded(
        model, OPTIMIZERS["adam"](model.parameters()), comm, stage, bucket_cap_mb=0.02, accumulation_steps=parts
    )
    x = np.ones((4, SIDE if even else 6), np.float32)
    before = s.metrics["bytes_sent"]
    for _ in range(2):
        for _ in range(parts):
            s.forward_backward(x, np.zeros(4, int), F.cross_entropy)
        s.step()
    assert before == 0
    return s.metrics, [s._shares.width(k) for k in range(len(s.buckets))], s.layout.nbytes


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_of_a_step(world: str) -> None:
    """2(N−1)/N Ψs, as of an all-reduce; where slices are not equal, those of the longest of each bucket."""
    for ranks in (1, 2, 4):
        for metrics, _, nbytes in spawned(traffic, ranks, world, 1, True, 1):
            assert metrics["bytes_sent"] == metrics["bytes_received"] == 2 * 2 * (ranks - 1) * nbytes // ranks
    for stage, parts, times in ((1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 3)):
        for metrics, widths, _ in spawned(traffic, 3, world, stage, False, parts):
            assert len(widths) > 2
            assert metrics["bytes_sent"] == 2 * times * 2 * sum(widths) * 4
            assert metrics["steps"] == 2


# -- what leaves, and when -----------------------------------------------------------------------------------


def diary(model: nn.Module, stage: int, **options: Any) -> tuple[Any, list[str]]:
    """What happens from now on: a name when that gradient is complete, "#2" when bucket 2 leaves."""
    s = ShardedDataParallel(model, OPTIMIZERS["sgd"](model.parameters()), comm_self(), stage, **options)
    log: list[str] = []
    for segment in s.layout.segments:
        segment.parameter.register_post_accumulate_grad_hook(lambda p, name=segment.name: log.append(name))
    reduce = s._rows.reduce
    s._rows.reduce = lambda k: log.append(f"#{k}") or reduce(k)
    return s, log


def forward_backward(s: Any, rows: slice = slice(0, 8)) -> None:
    x, y = dataset(str(s.layout.dtype)).arrays
    s.forward_backward(x[rows], y[rows], F.cross_entropy)


def test_buckets_leave_in_order_in_backward_or_in_step() -> None:
    s, log = diary(small_model(), 2, bucket_cap_mb=0)
    forward_backward(s)
    assert [entry for entry in log if entry[0] == "#"] == [f"#{k}" for k in range(6)]
    assert log.index("#1") < log.index("2.weight") < log.index("#3") < log.index("0.weight")
    assert all(p.grad is None for p in s.model.parameters())
    assert all(p._hooks is not None and len(p._hooks) == 1 for p in s.model.parameters()), "the test's own"
    s.step()
    s, log = diary(Turned().initialize(0).astype("float64"), 2, bucket_cap_mb=0)
    forward_backward(s)
    assert log.index("last.weight") < log.index("first.weight")
    assert log[-2:] == ["#2", "#3"], "complete long before, but not their turn"
    s, log = diary(small_model(), 1, bucket_cap_mb=0)
    forward_backward(s)
    assert not any(entry[0] == "#" for entry in log)
    s.step()
    assert log[-6:] == [f"#{k}" for k in range(6)]


def test_a_gradient_that_has_not_left_is_no_silent_error() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    s = sharded(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), 2, accumulation_steps=2)
    x, y = np.ones((2, 4), np.float32), np.zeros(2, int)
    s.forward_backward(x, y, F.cross_entropy)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="gradients that have not left"):
        s.step()
    s.discard()
    s.forward_backward(x, y, F.cross_entropy)
    s.step()


def test_a_backward_inside_of_backward_is_no_silent_error() -> None:
    for of in (2, 0):  # in the middle, and when all have left
        model = small_model()
        s = ShardedDataParallel(model, OPTIMIZERS["sgd"](model.parameters()), comm_self(), 2, bucket_cap_mb=0)
        last, seen = list(model.parameters())[-1], list(model.parameters())[of]
        remove = seen.register_post_accumulate_grad_hook(lambda p, last=last: (last * last).sum().backward())
        with pytest.raises(RuntimeError, match="came after its bucket had left"):
            forward_backward(s)
        remove()
        before = s.state_dict()
        s.discard()
        forward_backward(s)
        s.step()
        assert not same_bits(before, s.state_dict())


# -- steps that are not made ---------------------------------------------------------------------------------


def not_finite(comm: Any, stage: int | None, cap: float) -> list[str]:
    said = []
    for dtype in ("float32", "float16", "float64"):
        model = small_model(dtype=dtype)
        s = sharded(model, OPTIMIZERS["momentum"](model.parameters()), comm, stage, bucket_cap_mb=cap)
        for what in (*SPOILT, "inf in the first"):
            before = s.state_dict()
            spoilt(s, what, comm.rank)
            says = told(s.step)
            assert same_bits(before, model.state_dict()) == (says != "nothing")
            said.append(f"{dtype} {what}: {says}")
            s.discard()
            forward_backward(s, slice(comm.rank, 7))  # the next step knows nothing of it
            s.step()
        assert all(np.isfinite(value).all() for value in s.state_dict().values())
    return said


@pytest.mark.parametrize("world", WORLDS)
def test_non_finite_gradients_give_the_same_text_on_all_ranks(world: str) -> None:
    for ranks in (1, 2, 3) if world == "virtual" else (2,):
        want = spawned(not_finite, ranks, world, None, 25)
        assert "NonFiniteGradient: the gradient of '0.weight' is" in want[0][0]
        for stage in (1, 2):
            for cap in (25, 0):
                assert spawned(not_finite, ranks, world, stage, cap) == want


def batch_statistics(comm: Any, stage: int | None) -> str:
    model = wide_model(0, "float32")
    s = sharded(model, OPTIMIZERS["adam"](model.parameters()), comm, stage)
    x, y = dataset("float32").arrays
    x = x.copy()
    x[0] = np.nan if comm.rank == 1 else 1
    before = s.state_dict()
    s.forward_backward(x[:4], y[:4], F.cross_entropy)
    said = told(s.step)
    assert same_bits(before, s.state_dict())
    return said


def test_statistics_of_batches_are_looked_at_before_anything_is_written() -> None:
    want = spawned(batch_statistics, 2, "virtual", None)
    assert "batch's statistics of 'norm' is nan on rank 1" in want[0]
    for stage in (1, 2):
        assert spawned(batch_statistics, 2, "virtual", stage) == want


def _fails(parameter: Any) -> None:
    raise ZeroDivisionError("in a hook")


def agreeing(comm: Any, stage: int | None) -> tuple[list[str], dict[str, np.ndarray]]:
    """All discard; or one fails before anything has left; or new parameters come in the middle of a step."""
    model = small_model()
    s = sharded(model, OPTIMIZERS["adam"](model.parameters()), comm, stage, bucket_cap_mb=0, accumulation_steps=1)
    x, y = dataset().arrays
    one, said = comm.rank == 1, []

    def good(lo: int = 0) -> None:
        forward_backward(s, slice(lo + comm.rank, lo + 9))

    good()
    s.step()
    good(3)
    s.discard()  # on all ranks
    comm.barrier()
    good(6)
    s.step()
    good(7)
    s.discard()
    s.step()  # a step of no samples
    for again in (False, True):
        said.append(told(lambda: s.forward_backward(x[:8], y[:8] + 5 * one, F.cross_entropy)).split(":")[0])
        if one:
            said.append(told(s.step).split(":")[0])
            s.discard()
            if again:
                good(15)
        s.step()
    good(18)
    s.load_state_dict(s.state_dict())  # in the middle of a step
    good(21)
    s.step()
    s.discard()
    good(1)
    s.step()
    return said, s.state_dict()


@pytest.mark.parametrize("world", WORLDS)
def test_what_costs_nobody_else_anything(world: str) -> None:
    for ranks in (2, 3):
        want = spawned(agreeing, ranks, world, None)
        for stage in (1, 2):
            for (said, state), (says, other) in zip(want, spawned(agreeing, ranks, world, stage), strict=True):
                assert said == says
                assert same_bits(state, other)


LOST = {
    # what rank 1 does in place of a backward and a step, others making theirs
    "and makes no other": lambda s, good: (good(), s.discard()),
    "and makes another": lambda s, good: (good(), s.discard(), good()),
    "twice": lambda s, good: (good(), s.discard(), good(), s.discard(), good()),
    "in the middle": lambda s, good: (failing(s, good), s.discard()),
    "in the middle, and makes another": lambda s, good: (failing(s, good), s.discard(), good()),
}


def failing(s: Any, good: Any) -> None:
    remove = next(iter(s.model.parameters())).register_post_accumulate_grad_hook(_fails)
    with pytest.raises(ZeroDivisionError):
        good()
    remove()
    assert all(p.grad is None for p in s.model.parameters())
    with pytest.raises(RuntimeError, match=r"call strategy\.discard"):
        s.step()


def lost(comm: Any, what: str, parts: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """A good step, one that is lost, two good ones."""
    model = small_model()
    s = sharded(model, OPTIMIZERS["adam"](model.parameters()), comm, 2, bucket_cap_mb=0, accumulation_steps=parts)
    said = []

    def good(lo: int = 0) -> None:
        forward_backward(s, slice(lo + comm.rank, lo + 9))

    good()
    s.step()
    if comm.rank == 1:
        LOST[what](s, good)
    else:
        for _ in range(parts):
            good(5)
    if parts == 1 and what in ("and makes no other", "in the middle"):
        comm.barrier()  # a backward, failed or not, has let nobody wait
    before = model.state_dict()
    said.append(told(s.step))
    said.append(told(s.step).split(":")[0])  # it is to be discarded first
    assert same_bits(before, model.state_dict())
    assert s.updates == 1
    s.discard()
    for lo in (9, 12):
        good(lo)
        s.step()
    return said, s.state_dict()


def never_lost(comm: Any) -> dict[str, np.ndarray]:
    model = small_model()
    s = sharded(model, OPTIMIZERS["adam"](model.parameters()), comm, None)
    for lo in (0, 9, 12):
        forward_backward(s, slice(lo + comm.rank, lo + 9))
        s.step()
    return s.state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", LOST)
@pytest.mark.parametrize("world", WORLDS)
def test_what_has_left_can_not_be_called_back(world: str, what: str) -> None:
    """All ranks are told in the step, nothing is changed, and all go on as if there had been no such step."""
    for ranks in (2, 3) if world == "virtual" else (2,):
        want = spawned(never_lost, ranks, world)[0]
        for parts in (1, 2):
            for said, state in spawned(lost, ranks, world, what, parts):
                assert said[0].startswith("StepLost: this step is lost: rank 1 discarded gradients")
                assert "call strategy.discard() on every rank and go on with the next batch" in said[0]
                assert said[1] == "RuntimeError"
                assert same_bits(want, state)


def alone_again() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """w after three steps, and after as many that an interrupt in the middle of a backward precedes."""
    states = []
    for interrupted in (False, True):
        model = small_model()
        s = sharded(model, OPTIMIZERS["momentum"](model.parameters()), comm_self(), 2, bucket_cap_mb=0)
        if interrupted:
            remove = next(iter(model.parameters())).register_post_accumulate_grad_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                forward_backward(s)
            remove()
            s.discard()
        for _ in range(3):
            forward_backward(s)
            s.step()
        states.append(s.state_dict())
    return states[0], states[1]


def _interrupt(parameter: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_round_is_ended() -> None:
    assert same_bits(*alone_again())
    assert issubclass(StepLost, RuntimeError)
    assert "ranks 1, 2 discarded" in str(StepLost([1, 2]))


def spoken_out_of_turn(comm: Any) -> str:
    model = small_model()
    s = sharded(model, OPTIMIZERS["sgd"](model.parameters()), comm, 2)
    if comm.rank == 0:
        forward_backward(s)
    return told(s.state_dict if comm.rank else s.step)


def test_another_collective_in_place_of_a_backward_is_a_mismatch() -> None:
    with pytest.raises(minidp.RankFailed, match=r"CollectiveMismatch.*state_dict"):
        spawned(spoken_out_of_turn, 2, "process")


# -- state ---------------------------------------------------------------------------------------------------


def kept(comm: Any, stage: int | None, rule: str, seed: int = 0) -> Any:
    model = wide_model(seed, "float64")
    return sharded(model, OPTIMIZERS[rule](model.parameters()), comm, stage, bucket_cap_mb=0.004)


def writes(comm: Any, stage: int | None, folder: Path, rule: str) -> dict[str, np.ndarray]:
    """w after six steps; the third and the sixth are kept."""
    s = kept(comm, stage, rule)
    for updates in (3, 6):
        go_on(s, dataset(), 12, updates)
        s.save(folder)
    assert stage is None or not any(s.optimizer_state().values()), "forgotten"
    return s.state_dict()  # type: ignore[no-any-return]


def goes_on(comm: Any, stage: int | None, file: Path, rule: str) -> tuple[dict[str, np.ndarray], int]:
    s = kept(comm, stage, rule, seed=5)
    go_on(s, dataset(), 12, 1)
    s.load(file)
    go_on(s, dataset(), 12, 6)
    return s.state_dict(), s.updates


@pytest.mark.parametrize(
    ("world", "rule"), [("process", "adam"), ("virtual", "sgd"), ("virtual", "momentum"), ("virtual", "adam")]
)
def test_checkpoints_are_those_of_data_parallel(world: str, rule: str, tmp_path: Path) -> None:
    """The same files; each goes on from the other's, on as many ranks and on others."""
    files, ends = {}, {}
    for stage in (None, 1, 2):
        folder = tmp_path / str(stage)
        ends[stage] = spawned(writes, 2, world, stage, folder, rule)[0]
        files[stage], last = sorted(folder.iterdir())
        arrays, facts = read(last)[0]
        if stage is not None:
            want, also = read(sorted((tmp_path / "None").iterdir())[-1])[0]
            assert same_bits(dict(want), dict(arrays))
            assert {**facts, "surroundings": 0} == {**also, "surroundings": 0}
            assert len(arrays) == len(ends[stage]) + len(facts["slots"]) * 8
    for ranks in (2, 3):
        want, _ = spawned(goes_on, ranks, world, None, files[None], rule)[0]
        assert ranks != 2 or same_bits(want, ends[None])
        for reader in (1, 2):
            for state, updates in spawned(goes_on, ranks, world, reader, files[3 - reader], rule):
                assert updates == 6
                assert same_bits(want, state)
        assert same_bits(want, spawned(goes_on, ranks, world, None, files[2], rule)[0][0])
        assert same_bits(want, spawned(goes_on, ranks, world, 2, files[None], rule)[0][0])


def consolidated(comm: Any, stage: int) -> tuple[int, int, int]:
    s = kept(comm, stage, "adam")
    go_on(s, dataset(), 12, 1)
    before = s.memory()["optimizer"]
    s.consolidate()
    during = s.memory()["optimizer"]
    s.forget()
    assert s.memory()["optimizer"] == before
    return during - before, 2 * s.layout.nbytes, sum(map(len, s.optimizer_state().values()))


def test_only_rank_0_holds_the_whole_state_and_only_while_it_saves() -> None:
    for stage in (1, 2):
        first, *others = spawned(consolidated, 3, "virtual", stage)
        assert first == (first[1], first[1], 0)
        assert [more for more, _, _ in others] == [0, 0]


def loads(comm: Any, stage: int) -> bool:
    model = wide_model(comm.rank, "float64")
    s = sharded(model, OPTIMIZERS["adam"](model.parameters()), comm, stage)
    forward_backward(s)
    s.step()
    wanted = {k: v + comm.rank for k, v in wide_model(5, "float64").state_dict().items()}
    forward_backward(s)
    s.load_state_dict(wanted)  # in the middle of a step
    same = same_bits(s.state_dict(), wide_model(5, "float64").state_dict())  # rank 0's
    with pytest.raises(ValueError, match="read-only"):
        model.first.weight.data[0, 0] = 1.0
    forward_backward(s)
    s.step()
    moved = not same_bits(s.state_dict(), wide_model(5, "float64").state_dict())
    before = s.state_dict()
    s.release()
    model.first.weight.data[0, 0] = 1.0
    for call in (s.discard, s.step):
        with pytest.raises(RuntimeError, match="released"):
            call()
    again = parallel.DataParallel(model, OPTIMIZERS["adam"](model.parameters()), comm)
    changed = {k for k, v in again.state_dict().items() if v.tobytes() != before[k].tobytes()}
    return same and moved and changed == {"first.weight"}


@pytest.mark.parametrize("world", WORLDS)
def test_values_are_replaced_and_given_back(world: str) -> None:
    for stage in (1, 2):
        assert all(spawned(loads, 2, world, stage))


# -- construction --------------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    model = small_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match=r"stage=3: 1 \(the optimizer's state is sharded\) or 2"):
        ShardedDataParallel(model, optimizer, comm_self(), 3)
    s = ShardedDataParallel(model, optimizer, comm_self(), 2)
    with pytest.raises(ValueError, match="belongs to another strategy"):
        ShardedDataParallel(model, optimizer, comm_self(), 2)
    forward_backward(s)
    with pytest.raises(RuntimeError, match="accumulation_steps=2"):
        forward_backward(s)
    s.step()
    F.cross_entropy(model(dataset().arrays[0]), dataset().arrays[1]).backward()
    with pytest.raises(RuntimeError, match=r"call strategy.backward\(loss, samples=n\)"):
        s.step()
    assert parallel.ShardedDataParallel is ShardedDataParallel


def other_stage(comm: Any) -> str:
    model = small_model()
    return told(lambda: sharded(model, OPTIMIZERS["sgd"](model.parameters()), comm, 1 + comm.rank))


def test_ranks_must_agree_about_the_stage() -> None:
    for said in spawned(other_stage, 2, "virtual"):
        assert said.startswith("CollectiveMismatch: rank 1 has built another ShardedDataParallel than rank 0")


def test_a_model_without_trainable_parameters() -> None:
    """Nothing to send, nothing to update: a step is a meeting."""
    for stage in (1, 2):
        model = small_model()
        frozen = list(model.parameters())
        opt = optim.SGD(frozen, lr=0.1)
        for p in frozen:
            p.requires_grad = False
        s = ShardedDataParallel(model, opt, comm_self(), stage)
        s.step()
        s.discard()
        assert (s.metrics["bytes_sent"], s.updates, sum(s.memory().values())) == (0, 1, 0)
