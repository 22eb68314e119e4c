"""ParameterServer(compress=, compress_pull=): payloads go up, changes of w come down; what is lost comes later."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.autograd import Tensor
from minidp.compress import QSGD, get
from minidp.nn import functional as F
from minidp.parallel import event_log
from minidp.parallel.links import server_slices
from minidp.parallel.parcels import Parcel, parts_of
from minidp.parallel.served import ServedSlice
from minidp.replay.rerun import rerun
from tests.servers import Pot, counter, exact, served
from tests.test_compressed import RULES, SHAPES, Given, build, everything, gradients, of_model
from tests.test_data_parallel import same_bits
from tests.told import told

pytestmark = pytest.mark.timeout(60)

WORLDS = ("process", "virtual")
PUSHES = (
    "none",
    "fp16",
    "bf16",
    "int8",
    "int8+ef",
    "qsgd:4",
    "terngrad",
    "sign",
    "sign+ef",
    "topk:0.1+ef",
    "randomk:0.1",
)
PULLS = (None, "int8", "topk:0.1", "qsgd:4", "sign+ef")


def server(comm: Any, compress: Any = None, pull: Any = None, rule: str = "momentum", **options: Any) -> Any:
    return build(comm, compress, rule, kind="ParameterServer", compress_pull=pull, **options)


def halves(strategy: Any, until: int) -> Any:
    """Batches of 2, 4, 8 and 0 samples: dividing by them, and multiplying again, loses nothing."""
    rank = strategy.shard[0]
    while strategy.updates < until:
        rng = np.random.default_rng([rank, strategy.updates])
        count = (2, 4, 8, 0)[(rank + strategy.updates) % 4]
        dtype = strategy.layout.dtype
        x, y = rng.standard_normal((count, 16)).astype(dtype), rng.integers(0, 8, count)
        strategy.forward_backward(x, y, F.cross_entropy)
        strategy.step()
    return strategy


# -- the bits of others ------------------------------------------------------------------------------------------


def trained(comm: Any, compress: Any, pull: Any, rule: str, steps: int, options: dict[str, Any]) -> Any:
    return of_model(everything(halves(server(comm, compress, pull, rule, **options), steps)))


@pytest.mark.parametrize("staleness", [0, 1, None])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_none_is_no_compression(staleness: int | None, dtype: str) -> None:
    """Packing takes its time on the virtual clock, so that of several workers others would be late."""
    options = {"staleness": staleness, "dtype": dtype}
    cases = [(1, 2, "adam"), (1, 1, "momentum"), (2, 1, "momentum"), (3, 2, "momentum"), (4, 3, "adam")]
    for workers, servers, rule in cases if staleness == 0 else cases[:2]:
        plain, none = (
            served(trained, workers, servers, spec, None, rule, 6, dict(options)) for spec in (None, "none")
        )
        for a, b in zip(plain, none, strict=True):
            if workers == 1:
                assert same_bits(a, b), servers
            for name in a:  # it is divided before the sum, not after it
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5 if dtype == "float32" else 1e-12)


def by_both(comm: Any, spec: str, rule: str, servers: bool) -> Any:
    s = server(comm, spec, rule=rule) if servers else build(comm, spec, rule)
    return of_model(everything(halves(s, 6)))


@pytest.mark.parametrize("rule", ["plain", "momentum", "adam"])
@pytest.mark.parametrize("spec", ["sign", "none"])
def test_votes_of_servers_are_those_of_owners(spec: str, rule: str) -> None:
    for workers, servers in [(1, 1), (2, 2), (3, 1), (4, 3)]:
        want = minidp.spawn(by_both, workers, spec, rule, False, world="virtual", progress=False)
        found = served(by_both, workers, servers, spec, rule, True)
        if spec == "sign":
            assert all(same_bits(a, want[0]) for a in found), (workers, servers)
        for name in want[0]:
            np.testing.assert_allclose(found[0][name], want[0][name], rtol=1e-9, atol=1e-12)


# -- literally ---------------------------------------------------------------------------------------------------


def sizes_of(step: int, workers: int) -> list[int]:
    return [0 if workers > 1 and (rank + step) % 5 == 4 else 1 + (3 * rank + step) % 4 for rank in range(workers)]


def given(comm: Any, push: str | None, pull: str | None, rule: str, steps: int) -> Any:
    """w of this worker after each step, and at last the servers'."""
    model = Given(SHAPES)
    s = parallel.ParameterServer(model, RULES[rule](model.parameters()), comm, compress=push, compress_pull=pull)
    found = []
    for step in range(steps):
        samples = sizes_of(step, comm.world_size)[comm.rank]
        s.backward(model(gradients(comm.rank, step)), samples=samples)
        s.step()
        found.append({name: array.copy() for name, array in model.state_dict().items()})
    return [*found, s.state_dict()]


def pieces(servers: int) -> list[tuple[str, str, int, int]]:
    """(key, parameter, lo, hi): parts of parameters, cut where servers' slices begin."""
    layout = nn.Layout(Given(SHAPES))
    found = []
    for j, (lo, hi) in enumerate(server_slices(layout.size, 8, servers)):
        for segment in layout.segments:
            start, stop = max(lo, segment.offset), min(hi, segment.offset + segment.size)
            if start < stop:
                whole = stop - start == segment.size
                key = segment.name if whole else f"{segment.name}[{j}]"
                found.append((key, segment.name, start - segment.offset, stop - segment.offset))
    return found


def literally(push: str | None, pull: str | None, rule: str, workers: int, servers: int, steps: int) -> Any:
    """The servers' w, and what workers were given of it, by compressors and the optimizer's own step."""
    model = Given(SHAPES)
    optimizer = RULES[rule](model.parameters())
    pushes = [get(push or "none", rank=rank) for rank in range(workers)]
    down = get(pull or "none").for_error_feedback() if not (pull or "").endswith("+ef") else get(pull or "").inner  # type: ignore[attr-defined]
    there = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    found = []
    for step in range(steps):
        sizes = sizes_of(step, workers)
        for name, parameter in model.named_parameters():
            total = np.zeros(parameter.data.size)
            for key, of, lo, hi in pieces(servers):
                for rank, n in enumerate(sizes):
                    if of == name and n:
                        mine = n * gradients(rank, step)[name].ravel()[lo:hi]
                        if push is not None:  # this rank's share of the mean
                            mine = pushes[rank].decompress(pushes[rank].compress(mine / sum(sizes), key))
                        total[lo:hi] += mine
            if push is None:
                total /= sum(sizes)
            elif pushes[0].votes:
                total = np.sign(total)
            parameter.grad = Tensor(total.reshape(parameter.data.shape))
        optimizer.step()
        now = model.state_dict()
        for key, name, lo, hi in pieces(servers):
            w, has = now[name].reshape(-1)[lo:hi], there[name].reshape(-1)[lo:hi]
            has[...] = w if pull is None else has + down.decompress(down.compress(w - has, key))
        found.append({name: array.copy() for name, array in there.items()})
    return [*found, {name: array.copy() for name, array in model.state_dict().items()}]


@pytest.mark.parametrize("rule", ["plain", "adam"])
@pytest.mark.parametrize(
    ("push", "pull"),
    [
        ("int8", None),
        ("int8+ef", "int8"),
        ("topk:0.1+ef", "topk:0.1"),
        ("qsgd:4", "qsgd:4"),
        ("sign", "sign"),
        ("terngrad", "int8:stochastic+ef"),
        ("randomk:0.1+ef", "randomk:0.1"),
        (None, "int8"),
        (None, "sign+ef"),
        ("bf16", "none"),
    ],
)
def test_what_servers_do(push: str | None, pull: str | None, rule: str) -> None:
    """w ← rule(w, Σ C(n_i ∇L_i / Σ n_i)), and workers are given C of what is still missing of it, all the same."""
    for workers, servers in [(1, 1), (2, 3), (3, 2)]:
        want = literally(push, pull, rule, workers, servers, 5)
        for found in served(given, workers, servers, push, pull, rule, 5):
            for step, (mine, expected) in enumerate(zip(found, want, strict=True)):
                assert same_bits(mine, expected), (workers, servers, step)


def slow(comm: Any, push: str, steps: int) -> Any:
    """η = 1 and plain SGD: −w is the sum of what was applied."""
    model = Given(SHAPES)
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1.0), comm, compress=push)
    for step in range(steps):
        s.backward(model(gradients(comm.rank, step)), samples=3)
        s.step()
    return s.state_dict(), s.compressor.state_dict()  # type: ignore[union-attr]


@pytest.mark.parametrize("push", ["topk:0.1+ef", "int8+ef", "sign+ef", "qsgd:4+ef", "terngrad+ef"])
def test_what_is_dropped_comes_later(push: str) -> None:
    """Σ applied + the sum of residuals = Σ of exact means."""
    for workers, servers in [(1, 2), (3, 2)]:
        results = served(slow, workers, servers, push, 6)
        for name, shape in SHAPES.items():
            exact_sum = sum(gradients(r, t)[name] for r in range(workers) for t in range(6)) / workers
            left = np.zeros(int(np.prod(shape)))
            for _, state in results:
                for key, of, lo, hi in pieces(servers):
                    if of == name:
                        left[lo:hi] += state[f"residual/{key}"]
            np.testing.assert_allclose(left.reshape(shape) - results[0][0][name], exact_sum, rtol=0, atol=1e-12)


# -- every rule of staleness -------------------------------------------------------------------------------------

STALENESS: tuple[dict[str, Any], ...] = (
    {"staleness": 0},
    {"staleness": 1},
    {"staleness": None},
    {"staleness": None, "delay_compensation": 0.1, "staleness_aware": True},
    {"backup_workers": 1},
)


def seen(comm: Any, push: Any, pull: Any, steps: int, options: dict[str, Any]) -> Any:
    """w of this worker after each step, flat; the state at last, and w then; where slices are."""
    s = server(comm, push, pull, **options)
    history = []
    while s.updates < steps:
        halves(s, s.updates + 1)
        history.append(s._slabs.params[0].copy())
    state = s.state_dict()
    return history, state, s._slabs.params[0].copy(), s._links.slices, everything(s)


@pytest.fixture
def told_by_servers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, Any, Any]]:
    """(how, first element, worker, what that has now as the server thinks, w) of all that virtual servers give."""
    log: list[tuple[str, int, int, Any, Any]] = []

    def spied(how: str, real: Any) -> Any:
        def spy(self: Any, worker: int, *parcel: Any) -> Any:
            content = real(self, worker, *parcel)
            log.append((how, self.lo, worker, self.given[worker].copy(), self.w.copy()))
            return content

        return spy

    for how in ("give", "give_change"):
        monkeypatch.setattr(ServedSlice, how, spied(how, getattr(ServedSlice, how)))
    return log


@pytest.mark.parametrize("options", STALENESS, ids=str)
@pytest.mark.parametrize("pull", PULLS)
def test_workers_have_what_servers_think(
    pull: str | None, options: dict[str, Any], told_by_servers: list[tuple[str, int, int, Any, Any]]
) -> None:
    """Exactly, after every step; and the exact w after state_dict."""
    first = "int8" if "backup_workers" in options else "int8+ef"
    for workers, servers, push in [(2, 1, first), (3, 2, "sign"), (3, 3, None)]:
        told_by_servers.clear()
        results = served(seen, workers, servers, push, pull, 5, options)
        for worker, (history, _, last, slices, _) in enumerate(results):
            for lo, hi in slices:
                mine = [e for e in told_by_servers if e[1:3] == (lo, worker)]
                if pull is not None:
                    changes = [has for how, _, _, has, _ in mine if how == "give_change"]
                    assert len(changes) == 5
                    assert all((h[lo:hi] == has).all() for h, has in zip(history, changes, strict=True))
                else:
                    assert not any(how == "give_change" for how, *_ in mine)
                assert mine[-1][0] == "give", "state_dict"
                assert (last[lo:hi] == mine[-1][4]).all(), "the exact w"
            if options == {"staleness": 0}:
                assert all((a == b).all() for a, b in zip(history, results[0][0], strict=True)), "all the same"
        for _, state, *_, whole in results:
            assert same_bits(state, results[0][1])
            assert all(whole[f"model.{name}"].tobytes() == value.tobytes() for name, value in state.items())
            assert all(np.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("options", STALENESS, ids=str)
@pytest.mark.parametrize("push", PUSHES)
def test_all_compressors_and_rules_of_staleness(push: str, options: dict[str, Any]) -> None:
    """It trains: the loss of a fixed batch falls. Stochastic ones twice: the same run, the same bits."""
    if "backup_workers" in options:
        push = push.removesuffix("+ef")  # with that it is refused
    runs = [served(falls, 2, 2, push, "qsgd:4", options) for _ in range(2 if push == "terngrad" else 1)]
    for before, after, state in runs[0]:
        assert after < before
        assert same_bits(state, runs[-1][0][2])


def falls(comm: Any, push: str, pull: str, options: dict[str, Any]) -> Any:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), seed=0).astype("float64")
    rate = 0.02 if push == "sign" else 0.1
    s = parallel.ParameterServer(
        model, optim.SGD(model.parameters(), lr=rate), comm, compress=push, compress_pull=pull, **options
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4))
    y = (x[:, 0] > 0).astype(int)
    with minidp.no_grad():
        before = float(F.cross_entropy(model(x), y))
    for _ in range(8):
        s.forward_backward(x, y, F.cross_entropy)
        s.step()
    state = s.state_dict()
    with minidp.no_grad():
        return before, float(F.cross_entropy(model(x), y)), state


def small(comm: Any, options: dict[str, Any]) -> Any:
    model = counter(9)  # two cache lines
    s = parallel.ParameterServer(
        model, optim.SGD(model.parameters(), lr=1.0), comm, compress="int8", compress_pull="int8", **options
    )
    for _ in range(3):
        model.step(s)
    return s.state_dict()["w"].tolist(), [i.hi - i.lo for i in s.servers()]


@pytest.mark.parametrize("options", [{"staleness": 0}, {"staleness": 1}, {"staleness": None}], ids=str)
def test_more_servers_than_cache_lines(options: dict[str, Any]) -> None:
    for world in WORLDS:
        for w, sizes in served(small, 2, 3, options, world=world):
            assert sorted(sizes) == [0, 8, 8]
            np.testing.assert_allclose(w, [-3.0 if options["staleness"] == 0 else -6.0] * 9, rtol=1e-12)


@pytest.mark.parametrize(
    ("push", "pull"), [("int8+ef", None), ("qsgd:4", "qsgd:4"), ("sign", "topk:0.1"), (None, "int8")]
)
def test_processes_give_the_same_bits(push: str | None, pull: str | None) -> None:
    real, virtual = (served(seen, 2, 2, push, pull, 4, {}, world=world) for world in WORLDS)
    for (history, state, last, _, whole), (theirs, same, end, _, also) in zip(real, virtual, strict=True):
        assert all((a == b).all() for a, b in zip(history, theirs, strict=True))
        assert same_bits(state, same)
        assert (last == end).all()
        assert same_bits(whole, also)


# -- checkpoints -------------------------------------------------------------------------------------------------

PAIRS: list[tuple[str | None, str | None]] = [
    ("int8", None),
    ("topk:0.1+ef", None),
    ("qsgd:4+ef", "int8"),
    ("terngrad", "qsgd:4"),
    ("randomk:0.1+ef", "randomk:0.1"),
    ("sign+ef", "sign"),
    (None, "topk:0.1"),
]


def saves(comm: Any, folder: Path, push: str | None, pull: str | None, resume: bool) -> Any:
    s = server(comm, push, pull, "adam", seed=4 if resume else 0)
    if resume:
        halves(s, 2)
        s.load(folder)
        assert s.updates == 3
    else:
        halves(s, 3)
        s.save(folder)
    first = s._slabs.params[0].copy()
    halves(s, 7)
    return first, s._slabs.params[0].copy(), everything(s)


@pytest.mark.parametrize(("push", "pull"), PAIRS)
def test_resumed_is_uninterrupted(push: str | None, pull: str | None, tmp_path: Path) -> None:
    for world in WORLDS if push == "qsgd:4+ef" else ("virtual",):
        want, found = (
            served(saves, 3, 2, tmp_path / world, push, pull, resume, world=world) for resume in (False, True)
        )
        for (first, last, whole), (mine, my_last, my_whole) in zip(want, found, strict=True):
            assert (first == mine).all()
            assert (last == my_last).all()
            assert same_bits(whole, my_whole)


def other(comm: Any, folder: Path, push: str | None) -> Any:
    s = halves(server(comm, push, seed=5), 2)
    before = everything(s)
    said = told(lambda: s.load(folder))
    assert (s.updates == 2) == (said != "nothing")
    assert said == "nothing" or same_bits(before, everything(s))
    return said


def keeps(comm: Any, folder: Path) -> None:
    halves(server(comm, "topk:0.1+ef"), 3).save(folder)


def test_residuals_are_not_lost_silently(tmp_path: Path) -> None:
    served(keeps, 3, 2, tmp_path)
    for workers, push in [(2, "topk:0.1+ef"), (3, "int8"), (3, None)]:
        for said in served(other, workers, 2, tmp_path, push):
            assert said.startswith(
                "ValueError: the checkpoint holds residuals of compress='topk:0.1+ef' on 3 ranks"
            )
    assert served(other, 3, 2, tmp_path, "topk:0.1+ef") == ["nothing"] * 3


def writes(comm: Any, folder: Path, kind: str, spec: str, prunes: bool) -> None:
    s = halves(build(comm, spec, kind=kind), 2)
    if prunes:
        s.prune(0.5)
    halves(s, 3).save(folder)


def reads(comm: Any, folder: Path, kind: str, spec: str) -> Any:
    s = halves(build(comm, spec, kind=kind, seed=3), 2)
    before, w, memory = s.updates, s._slabs.params[0].copy(), s.compressor.state_dict()
    said = told(lambda: s.load(folder))
    changed = s.updates != before or (w != s._slabs.params[0]).any()
    return (
        said,
        changed or not same_bits(memory, s.compressor.state_dict()),
        told(lambda: halves(s, s.updates + 2)),
    )


@pytest.mark.parametrize(
    ("saved", "servers", "loaded", "spec"),
    [
        ("ParameterServer", 3, "ParameterServer", "topk:0.1+ef"),
        ("ParameterServer", 2, "DataParallel", "topk:0.1+ef"),
        ("ParameterServer", 2, "DataParallel", "int8+ef"),
        ("DataParallel", 0, "ParameterServer", "topk:0.1+ef"),
        ("DataParallel", 0, "ParameterServer", "int8+ef"),
    ],
)
def test_residuals_of_other_parts_would_be_lost(
    saved: str, servers: int, loaded: str, spec: str, tmp_path: Path
) -> None:
    """Parts of parameters, cut elsewhere: of other servers, of owners, or none."""
    served(writes, 3, servers, tmp_path, saved, spec, False)
    here = 2 if loaded == "ParameterServer" else 0
    for said, changed, goes_on in served(reads, 3, here, tmp_path, loaded, spec):
        assert goes_on == "nothing"
        assert said.startswith("ValueError: the checkpoint holds residuals"), said
        assert not changed


@pytest.mark.parametrize("spec", ["none", "int8", "topk:0.1+ef"])
def test_servers_do_not_know_masks(spec: str, tmp_path: Path) -> None:
    served(writes, 2, 0, tmp_path, "DataParallel", spec, True)
    for said, changed, goes_on in served(reads, 2, 1, tmp_path, "ParameterServer", spec):
        assert said.startswith("ValueError: ")
        assert "mask" in said
        assert not changed
        assert goes_on == "nothing"


# -- errors ------------------------------------------------------------------------------------------------------


def poisoned(comm: Any, push: str, pull: str | None, bad: bool, options: dict[str, Any]) -> Any:
    """Rank 1's gradient of the third step is NaN; or there never was such a step."""
    s = halves(server(comm, push, pull, "adam", **options), 2)
    said = ""
    if bad:
        memory, w = s.compressor.state_dict(), s._slabs.params[0].copy()
        weight = s.model.last.weight
        slope = np.full(weight.shape, np.nan if comm.rank == 1 else 1.0)
        s.backward((weight * Tensor(slope)).sum(), samples=2)
        said = told(s.step)
        if said != "nothing":
            assert same_bits(memory, s.compressor.state_dict())
            assert (w == s._slabs.params[0]).all()
            assert s.updates == 2
            s.discard()
    return said, everything(halves(s, 5))


@pytest.mark.parametrize(
    ("push", "pull"), [("int8+ef", None), ("topk:0.1+ef", "int8"), ("sign", None), ("qsgd:4", "qsgd:4")]
)
def test_a_nan_of_one_worker(push: str, pull: str | None) -> None:
    """Together: told to all, and no trace of it. Apart: its own affair."""
    for world in WORLDS if push == "int8+ef" else ("virtual",):
        found, want = (served(poisoned, 3, 2, push, pull, bad, {}, world=world) for bad in (True, False))
        for (said, state), (_, never) in zip(found, want, strict=True):
            assert said.startswith("NonFiniteGradient: ")
            assert "last.weight" in said
            assert "rank 1" in said
            assert same_bits(state, never)
    results = served(poisoned, 3, 2, push, pull, True, {"staleness": None})
    assert [said.partition(":")[0] for said, _ in results] == ["nothing", "NonFiniteGradient", "nothing"]
    assert all(np.isfinite(value).all() for _, state in results for value in state.values())


def unchecked(comm: Any, staleness: int | None) -> None:
    model = Given(SHAPES)
    s = parallel.ParameterServer(
        model,
        optim.SGD(model.parameters(), lr=1.0),
        comm,
        staleness=staleness,
        compress="int8+ef",
        check_finite=False,
    )
    bad = gradients(comm.rank, 0)
    bad["c"][1, 2, 3] = np.nan if comm.rank == 1 else 1.0
    s.backward(model(bad), samples=1)
    s.step()


@pytest.mark.parametrize("staleness", [0, None])
def test_unchecked_the_compressor_names_the_parameter(staleness: int | None) -> None:
    with pytest.raises(minidp.RankFailed, match=r"rank 1 of 2 raised ValueError: c(\[\d\])? is nan at element"):
        served(unchecked, 2, 2, staleness)


def refused(comm: Any, mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    return told(
        lambda: build(comm, kind="ParameterServer", **({"compress": None} | (theirs if comm.rank else mine)))
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compress": "powersgd:4"}, "ValueError: compress='powersgd:4': PowerSGD needs the sum of all ranks' P"),
        ({"compress": "powersgd:4+ef"}, "ValueError: compress='powersgd:4+ef': PowerSGD needs the sum"),
        ({"compress_pull": "powersgd:4"}, "ValueError: compress_pull='powersgd:4': PowerSGD needs the sum"),
        ({"compress_pull": "powersgd:1+ef"}, "ValueError: compress_pull='powersgd:1+ef': PowerSGD needs"),
        ({"compress": "int9"}, "ValueError: compress='int9' is unknown. There are: none, fp16"),
        ({"compress_pull": "int9"}, "ValueError: compress_pull='int9' is unknown. There are: none, fp16"),
        ({"compress": 1}, "TypeError: compress=1: give a Compressor, or a name"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    for world in WORLDS:
        for said in served(refused, 2, 1, options, options, world=world):
            assert said.startswith(says), said


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"compress": "int8"}, {"compress": "qsgd:4"}),
        ({"compress": "int8"}, {"compress_pull": "int8"}),
        ({"compress_pull": "topk:0.1"}, {"compress_pull": "topk:0.2"}),
        ({"compress": QSGD(4, 64)}, {"compress": QSGD(4, 128)}),
        ({"compress": "int8"}, {}),
    ],
    ids=str,
)
def test_workers_that_compress_differently(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for said in served(refused, 2, 1, mine, theirs):
        assert said.startswith("CollectiveMismatch: rank 1 has built another ParameterServer than rank 0"), said


def of_fractions(comm: Any, options: dict[str, Any]) -> str:
    model = Pot(exact([1, 2]))
    return told(
        lambda: parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, **options)
    ).partition("\n")[0]


def test_fractions_have_no_bytes() -> None:
    for options in ({"compress": "int8"}, {"compress_pull": "int8"}):
        for said in served(of_fractions, 2, 1, options):
            assert said.startswith("TypeError: what goes to servers compressed is packed to bytes")


# -- an end, a log, bytes ----------------------------------------------------------------------------------------


def dies(comm: Any, push: str, pull: str | None) -> Any:
    s = halves(server(comm, push, pull, staleness=None), 3)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    halves(s, 12)
    return s.state_dict(), s.updates


@pytest.mark.parametrize(("push", "pull"), [("int8+ef", "topk:0.1"), ("sign", None)])
def test_the_others_go_on_without_a_dead_worker(push: str, pull: str | None) -> None:
    first, lost, third = served(dies, 3, 2, push, pull, world="process", timeout_s=20)
    assert lost is None
    assert first[1] == third[1] == 12
    assert same_bits(first[0], third[0])
    assert all(np.isfinite(value).all() for value in first[0].values())


def recorded(comm: Any, push: str, pull: str | None, options: dict[str, Any]) -> Any:
    return halves(server(comm, push, pull, dtype="float32", **options), 8).state_dict()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("push", "pull", "options"),
    [
        ("int8+ef", "int8", {"staleness": None}),
        ("qsgd:4", "qsgd:4", {"staleness": 1}),
        ("sign", "topk:0.1", {"staleness": None}),
        ("topk:0.1", None, {"backup_workers": 1}),
        ("terngrad", "sign", {"staleness": 0}),
    ],
)
def test_a_recorded_run_is_run_again(
    push: str, pull: str | None, options: dict[str, Any], world: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.log"
    served(recorded, 2, 2, push, pull, options, world=world, record=path, timeout_s=20)
    log = event_log.read(path)
    assert log.whole
    assert len(log.ends) == 2
    assert rerun(log).ends == log.ends


def traffic(comm: Any, push: str | None, pull: str | None, staleness: int | None) -> Any:
    model = Given({"a": (50, 40), "b": (300,)}, "float32")
    s = parallel.ParameterServer(
        model, optim.SGD(model.parameters(), lr=1.0), comm, staleness=staleness, compress=push, compress_pull=pull
    )
    comm.barrier()
    before = comm.traffic.bytes_sent, comm.traffic.bytes_received
    for samples in (1, 0, 2):
        s.backward(model({"a": np.ones((50, 40), "f4"), "b": np.ones(300, "f4")}), samples=samples)
        s.step()
    moved = comm.traffic.bytes_sent - before[0], comm.traffic.bytes_received - before[1]
    comm.barrier()
    return moved, (s.metrics["bytes_sent"], s.metrics["bytes_received"]), s._links.slices


def parcel(spec: str | None, slices: Sequence[tuple[int, int]]) -> int:
    """Bytes of a push, or a pull: a (2000 elements) and b (300, from 2000 on), cut where servers' slices are."""
    if spec is None:
        return 4 * slices[-1][1]
    total = 0
    for lo, hi in slices:
        for start, stop in ((0, 2000), (2000, 2300)):
            d = min(hi, stop) - max(lo, start)
            if d <= 0:
                continue
            total += {
                "none": 4 * d,
                "fp16": 2 * d,
                "bf16": 2 * d,
                "int8": d + 4 * -(-d // 2048),
                "qsgd:4": 4 * -(-d // 8) + 4 * -(-d // 512),
                "terngrad": 2 * -(-d // 8) + 4,
                "topk:0.5": 4 * -(-d // 2) + -(-d // 8),
                "sign": -(-d // 8) + 2 * 4,  # how long each of two arrays is goes in front
                "randomk:0.5": 4 * -(-d // 2) + 12,
            }[spec]
    return total


@pytest.mark.parametrize("staleness", [0, None])
@pytest.mark.parametrize(
    ("push", "pull"),
    [
        ("none", "none"),
        ("fp16", None),
        ("int8", "int8"),
        ("qsgd:4", "bf16"),
        ("terngrad", "topk:0.5"),
        ("sign", "randomk:0.5"),
        (None, "qsgd:4"),
        ("topk:0.5", None),
    ],
)
def test_bytes_of_steps(push: str | None, pull: str | None, staleness: int | None) -> None:
    """Two pushes, three pulls; and headers, which are not counted as gradients."""
    for world in WORLDS if push == "sign" else ("virtual",):
        for servers in (1, 2, 3):
            for moved, counted, slices in served(traffic, 2, servers, push, pull, staleness, world=world):
                assert counted == (2 * parcel(push, slices), 3 * parcel(pull, slices))
                headers = 3 * servers * 80
                told_before = 3 * 8 * 2 if staleness == 0 and push is not None else 0
                assert moved[1] - headers - counted[1] in (0, told_before)
                assert moved[0] - headers - counted[0] in (0, told_before)


# -- what a review found -----------------------------------------------------------------------------------------


def flushed(comm: Any, staleness: int | None) -> Any:
    """w after steps of very different sizes, and then as many without a gradient as the residuals need."""
    model = Given(SHAPES)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    nominal = None if staleness == 0 else 50.0
    s = parallel.ParameterServer(
        model, optimizer, comm, staleness=staleness, compress="topk:0.1+ef", nominal_batch=nominal
    )
    want = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(8):
        sizes = [(1, 99), (70, 3)][step % 2]
        for rank, n in enumerate(sizes):
            for name, g in gradients(rank, step).items():
                want[name] -= n * g / (sum(sizes) if staleness == 0 else 50)
        s.backward(model(gradients(comm.rank, step)), samples=sizes[comm.rank])
        s.step()
    for _ in range(40):
        s.backward(model({name: np.zeros(shape) for name, shape in SHAPES.items()}), samples=50)
        s.step()
    return want, s.state_dict()


@pytest.mark.parametrize("staleness", [0, 1, None])
def test_nothing_is_lost_when_batches_differ(staleness: int | None) -> None:
    """What waits is a part of the mean, and is not weighted once more by the batch with which it leaves."""
    for want, found in served(flushed, 2, 2, staleness):
        for name in want:
            np.testing.assert_allclose(found[name], want[name], rtol=1e-9, atol=1e-9)


def test_late_gradients_leave_no_errors_behind() -> None:
    for said in served(refused_backups, 2, 1):
        assert said.startswith("ValueError: compress='topk:0.1+ef', backup_workers=1: late gradients are dropped")


def refused_backups(comm: Any) -> str:
    model = Given(SHAPES)
    return told(
        lambda: parallel.ParameterServer(
            model, optim.SGD(model.parameters(), lr=1.0), comm, backup_workers=1, compress="topk:0.1+ef"
        )
    )


def signed(comm: Any) -> Any:
    model = Given(SHAPES)
    s = parallel.ParameterServer(
        model, optim.SGD(model.parameters(), lr=0.5), comm, staleness=None, compress="sign", nominal_batch=7
    )
    for step, samples in enumerate((1, 30, 7)):
        s.backward(model(gradients(0, 0)), samples=samples)
        s.step()
        assert s.updates == step + 1
    return s.state_dict()


def test_a_sign_is_a_whole_step_whatever_its_batch() -> None:
    (found,) = served(signed, 1, 1)
    for name, g in gradients(0, 0).items():
        assert (found[name] == -1.5 * np.sign(g)).all()


def test_padding_of_parcels_is_zero() -> None:
    layout = nn.Layout(Given(SHAPES))
    parcel = Parcel(get("none"), parts_of(layout, 0, 0, layout.size), layout.dtype)
    packed = parcel.pack(np.ones(layout.size))
    out = parcel.unpack(packed, np.full(layout.size, np.nan))
    inside = np.zeros(layout.size, bool)
    for segment in layout.segments:
        inside[segment.offset : segment.offset + segment.size] = True
    assert (out == inside).all()
    assert not inside.all()
