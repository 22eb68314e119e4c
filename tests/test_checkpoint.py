"""save and load: a resumed run is the uninterrupted one, bit for bit; a damaged file is passed over."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import data, nn, optim, parallel
from minidp.bench.leftovers import Script
from minidp.comm import comm_self
from minidp.nn import functional as F
from minidp.parallel import DamagedCheckpoint, checkpoint, checkpoint_files
from tests.test_data_parallel import same_bits
from tests.told import told

pytestmark = pytest.mark.timeout(60)

WORLDS = ("process", "virtual")
STEPS = 12  # of 8 an epoch: the second epoch is interrupted, too


class Noisy(nn.Module):
    """Dropout, a tied weight, a frozen one, a buffer."""

    def __init__(self) -> None:
        self.first, self.dropout, self.last = nn.Linear(6, 12), nn.Dropout(0.3), nn.Linear(12, 3)
        self.square, self.tied = nn.Linear(12, 12), nn.Linear(12, 12)
        self.tied.weight = self.square.weight
        self.square.bias.requires_grad = False
        self.register_buffer("seen", np.zeros(2))

    def forward(self, x: Any) -> Any:
        self.seen += len(x)
        return self.last(self.tied(F.tanh(self.square(self.dropout(F.tanh(self.first(x)))))))


RULES: dict[str, Any] = {
    "momentum": lambda p: optim.SGD(p, lr=lambda t: 0.1 / (1 + t), momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "plain": lambda p: optim.SGD(p, lr=0.1),
}


def build(comm: Any, rule: str = "adam", kind: str = "DataParallel", seed: int = 0, **options: Any) -> Any:
    model = Noisy().initialize(seed).astype("float64")
    return getattr(parallel, kind)(model, RULES[rule](model.parameters()), comm, **options)


def samples() -> data.ArrayDataset:
    rng = np.random.default_rng(0)
    return data.ArrayDataset(rng.standard_normal((60, 6)), rng.integers(0, 3, 60))


def go_on(strategy: Any, until: int, folder: Path | None = None, every: int = 1) -> None:
    """The loop of the docs: where it goes on follows from the number of updates."""
    loader = data.DataLoader(samples(), global_batch_size=8, shard=strategy.shard, shuffle=True, seed=3)
    first, step = loader.position(strategy.updates)
    for epoch in range(first, 100):
        for x, y in loader.epoch(epoch, step if epoch == first else 0):
            if strategy.updates == until:
                return
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
            if folder is not None and strategy.updates % every == 0:
                strategy.save(folder, keep=100)


def everything(strategy: Any) -> dict[str, np.ndarray]:
    """w, buffers and the optimizer's state."""
    found = {f"model.{name}": array.copy() for name, array in strategy.state_dict().items()}
    for slot, arrays in strategy.optimizer_state().items():
        found |= {f"{slot}.{name}": array.copy() for name, array in arrays.items()}
    return found


# --- bit for bit ----------------------------------------------------------------------------------------------


def saves(comm: Any, folder: Path, rule: str, kind: str, options: dict[str, Any]) -> Any:
    strategy = build(comm, rule, kind, **options)
    go_on(strategy, STEPS, folder)
    return everything(strategy)


def resumes(comm: Any, path: Path, rule: str, kind: str, options: dict[str, Any]) -> Any:
    strategy = build(comm, rule, kind, seed=5 + comm.rank, **options)  # other weights; all comes from the file
    found = strategy.load(path)
    assert (strategy.updates, found.updates, found.path, found.damaged) == (
        found.updates,
        *found_in(path),
        path,
        (),
    )
    go_on(strategy, STEPS)
    return everything(strategy)


def found_in(path: Path) -> tuple[int]:
    return (int(path.stem.split("-")[1]),)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["DataParallel", "NaiveDataParallel"])
@pytest.mark.parametrize("world", WORLDS)
def test_resumed_is_uninterrupted_at_every_update(world: str, kind: str, rule: str, tmp_path: Path) -> None:
    uninterrupted = minidp.spawn(saves, 2, tmp_path, rule, kind, {}, world=world)[0]
    paths = checkpoint_files.files(tmp_path)
    assert [found_in(path)[0] for path in paths] == list(range(STEPS, 0, -1))
    for path in paths if world == "virtual" else paths[::4]:
        for resumed in minidp.spawn(resumes, 2, path, rule, kind, {}, world=world):
            assert same_bits(resumed, uninterrupted), path


def test_another_number_of_ranks_and_another_world_may_go_on(tmp_path: Path) -> None:
    """With micro-shards the bits are the same, too."""
    options = {"micro_shards": 4}
    found = {}
    for n, world in ((1, "process"), (2, "process"), (4, "virtual")):
        folder = tmp_path / f"{n}"
        found[n] = minidp.spawn(saves, n, folder, "adam", "DataParallel", options, world=world)[0]
        del found[n]["model.seen"]  # a buffer of rank 0's own: how many samples that rank has seen
        for m, other in ((1, "virtual"), (2, "virtual"), (2, "process"), (4, "process")):
            path = folder / "update-00000005.safetensors"
            resumed = minidp.spawn(resumes, m, path, "adam", "DataParallel", options, world=other)[0]
            assert same_bits({k: resumed[k] for k in found[n]}, found[n]), (n, world, m, other)
    assert same_bits(found[1], found[2])
    assert same_bits(found[1], found[4])


def drawing(comm: Any, folder: Path, how: str) -> Any:
    strategy = build(comm, "plain")
    noise = np.random.default_rng(comm.rank)
    old = np.random.Generator(np.random.MT19937(comm.rank))
    both = {"noise": noise, "old": old}
    if how == "save":
        noise.standard_normal(3)
        old.random(3)
        strategy.save(folder, position=(4, 7), extra={"best": [1, 2.5, None]}, generators=both)
    else:
        found = strategy.load(folder, generators=both)
        assert (found.position, found.extra) == ((4, 7), {"best": [1, 2.5, None]})
    return [noise.standard_normal(5).tolist(), old.standard_normal(5).tolist()]


@pytest.mark.parametrize("world", WORLDS)
def test_generators_position_and_extra_come_back(world: str, tmp_path: Path) -> None:
    assert minidp.spawn(drawing, 2, tmp_path, "save", world=world) == minidp.spawn(
        drawing, 2, tmp_path, "load", world=world
    )
    with pytest.raises(minidp.RankFailed, match="holds generators of 2 ranks, here are 3: give none"):
        minidp.spawn(drawing, 3, tmp_path, "load", world="virtual")


# --- files ----------------------------------------------------------------------------------------------------


def test_several_are_kept_and_nothing_else(tmp_path: Path) -> None:
    strategy = build(comm_self())
    for _ in range(5):
        strategy.step()
        path = strategy.save(tmp_path / "deep" / "down", keep=2)
    names = sorted(each.name for each in path.parent.iterdir())
    assert names == ["update-00000004.safetensors", "update-00000005.safetensors"]
    strategy.save(path.parent, keep=2)  # again: the same name
    assert sorted(each.name for each in path.parent.iterdir()) == names


DAMAGES: dict[str, Any] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "header only": lambda data: data[:8],
    "a flipped bit": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "a flipped bit of a fact": lambda data: data.replace(b'\\"updates\\": 3', b'\\"updates\\": 2'),
    "a flipped bit of a name": lambda data: data.replace(b"model.last.bias", b"model.last.biar"),
    "something else": lambda data: b"This is a letter to my grandmother." * 100,
    "the garbage of a disk": lambda data: bytes(np.random.default_rng(0).integers(0, 256, len(data), np.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_passed_over_and_it_is_said(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = build(comm_self())
    go_on(strategy, 3, tmp_path)
    newest, before, *_ = checkpoint_files.files(tmp_path)
    content = newest.read_bytes()
    newest.write_bytes(DAMAGES[damage](content))
    assert newest.read_bytes() != content
    other = build(comm_self(), seed=1)
    with caplog.at_level(logging.WARNING, "minidp.parallel"):
        found = other.load(tmp_path)
    assert (found.path, found.updates, other.updates) == (before, 2, 2)
    assert [newest.name in text for text in found.damaged] == [True]
    assert newest.name in caplog.text
    assert f"going on from the one before, {before.name}" in caplog.text
    go_on(other, 3)
    assert same_bits(everything(other), everything(strategy))


def test_if_all_are_damaged_nothing_changes(tmp_path: Path) -> None:
    strategy = build(comm_self())
    go_on(strategy, 2, tmp_path)
    for path in reversed(checkpoint_files.files(tmp_path)):  # so that the newest stays that
        path.write_bytes(path.read_bytes()[:-1])
    before = everything(strategy)
    with pytest.raises(DamagedCheckpoint, match=r"update-00000002.*; .*update-00000001"):
        strategy.load(tmp_path)
    assert same_bits(everything(strategy), before)
    assert strategy.updates == 2


def test_a_half_written_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the error arrives, the temporary file goes, the checkpoint before stays."""
    strategy = build(comm_self())
    go_on(strategy, 1, tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    strategy.step()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            strategy.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000001.safetensors"]
    strategy.step()  # it goes on
    assert strategy.save(tmp_path).name == "update-00000003.safetensors"


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("no")


def fails_everywhere(comm: Any, folder: Path) -> list[str]:
    """Of errors that rank 0 alone could have met, all ranks hear; then they go on together."""
    strategy = build(comm)
    (folder / "file").touch()
    said = [
        told(lambda: strategy.save(folder / "file" / "below")),
        told(lambda: strategy.load(folder / "nowhere")),
        told(lambda: strategy.load(folder / "file")),
        told(lambda: strategy.save(folder, extra={1, 2})),
        told(lambda: strategy.save(folder, keep=0)),
    ]
    x, y = samples()[: 8 + comm.rank]
    if comm.rank:
        strategy.forward_backward(x, y, F.cross_entropy)
    said.append(told(lambda: strategy.save(folder)))
    strategy.discard()
    path = strategy.save(folder)
    said += [
        told(lambda: build(comm, "momentum").load(path)),
        told(lambda: build(comm, "plain").load(path)),
        told(lambda: strategy.load(path, generators={"g": np.random.default_rng()})),
        told(lambda: strategy.save(folder, position=5)),
        told(lambda: strategy.save(folder, extra=Unpicklable())),
    ]
    model = nn.Linear(6, 3)
    other = parallel.DataParallel(model, optim.Adam(model.parameters()), comm)
    said.append(told(lambda: other.load(path)))
    assert (other.updates, strategy.updates) == (0, 0)
    strategy.step()
    return said


@pytest.mark.parametrize("world", WORLDS)
def test_errors_reach_all_ranks_and_say_what_to_do(world: str, tmp_path: Path) -> None:
    first, second = minidp.spawn(fails_everywhere, 2, tmp_path, world=world)
    assert first == second
    starts = (
        "NotADirectoryError",
        "FileNotFoundError: no checkpoint: there is no file or folder",
        "DamagedCheckpoint",
        "TypeError: Object of type set is not JSON serializable",
        "ValueError: keep=0",
        "RuntimeError: save in the middle of a step",
        "ValueError: the checkpoint is of Adam with the state",
        "ValueError: the checkpoint is of Adam with the state ['exp_avg', 'exp_avg_sq'], the strategy has SGD",
        "ValueError: the checkpoint holds no generator 'g' (PCG64); it holds none",
        "ValueError: position=5: give (epoch, step), as loader.position does",
        "TypeError: Object of type Unpicklable is not JSON serializable",
        "ValueError: this state does not fit the model: missing weight",
    )
    assert len(first) == len(starts)
    for text, start in zip(first, starts):
        assert text.startswith(start), text


def test_what_bits_depend_on_is_recorded_and_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strategy = build(comm_self())
    path = strategy.save(tmp_path)
    facts = json.loads(nn.read_file(path)[1]["minidp"])
    assert facts["surroundings"]["numpy"] == np.__version__
    assert "blas" in facts["surroundings"]
    strategy.load(path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "minidp.parallel"):
        checkpoint.compare_surroundings({**facts["surroundings"], "numpy": "1.2.3"})
    assert f"numpy 1.2.3 → {np.__version__}" in caplog.text
    assert "bits may differ" in caplog.text


def test_position_of_a_loader() -> None:
    loader = data.DataLoader(samples(), global_batch_size=8)
    assert [loader.position(n) for n in (0, 7, 8, 20)] == [(0, 0), (0, 7), (1, 0), (2, 4)]
    with pytest.raises(ValueError, match="batches must be at least 0"):
        loader.position(-1)


# --- odd ones ---------------------------------------------------------------------------------------------------


def test_nan_comes_back(tmp_path: Path) -> None:
    model = Noisy().initialize(0)
    model.first.weight.data[0, 0] = np.nan
    strategy = parallel.DataParallel(model, RULES["adam"](model.parameters()), comm_self(), check_finite=False)
    strategy.load(strategy.save(tmp_path))
    strategy.load_state_dict(strategy.state_dict())
    assert np.isnan(model.first.weight.data[0, 0])


def test_a_run_that_has_gone_back_goes_on_from_what_it_wrote_last(tmp_path: Path) -> None:
    """Files of the branch that was given up have larger numbers."""
    strategy = build(comm_self())
    for _ in range(6):
        strategy.step()
        strategy.save(tmp_path, keep=10)
        time.sleep(0.02)  # clocks of file systems are coarse
    strategy.load(tmp_path / "update-00000002.safetensors")
    for _ in range(2):
        strategy.step()
        strategy.save(tmp_path, keep=3)
        time.sleep(0.02)
    assert strategy.load(tmp_path).updates == 4
    assert [checkpoint_files.updates_of(path) for path in checkpoint_files.files(tmp_path)] == [4, 3, 6]


def test_other_dtypes_are_told(tmp_path: Path) -> None:
    path = build(comm_self()).save(tmp_path)
    model = Noisy().initialize(0)
    strategy = parallel.DataParallel(model, RULES["adam"](model.parameters()), comm_self())
    before = everything(strategy)
    with pytest.raises(
        ValueError, match=r'is float64 in the checkpoint, and float32 .* model.astype\("float64"\)'
    ):
        strategy.load(path)
    assert same_bits(everything(strategy), before)


def test_arrays_of_another_byte_order_are_saved_as_numbers(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("big", np.array([1.0, 2.0], ">f8"))
    strategy = parallel.DataParallel(model, RULES["plain"](model.parameters()), comm_self())
    path = strategy.save(tmp_path)
    assert checkpoint_files.read_one(path).arrays["model.big"].tolist() == [1.0, 2.0]
    model.big[...] = 0
    strategy.load(path)
    assert model.big.tolist() == [1.0, 2.0]
    assert model.big.dtype == np.dtype(">f8")


def test_a_file_that_can_not_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = build(comm_self())
    go_on(strategy, 2, tmp_path)
    newest, before = checkpoint_files.files(tmp_path)
    (tmp_path / "update-00000009.safetensors").mkdir()  # whatever that is
    read = checkpoint_files.read_file

    def bad_sector(path: Path) -> Any:
        if path == newest:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint_files, "read_file", bad_sector)
    found = strategy.load(tmp_path)
    assert found.path == before
    assert "can't be read" in found.damaged[0]
    with pytest.raises(OSError, match="Input/output error"):
        strategy.load(newest)


def one_rank_has_other_generators(comm: Any, folder: Path) -> str:
    strategy = build(comm)
    strategy.save(folder, generators={"g": np.random.default_rng(0)})
    odd: Any = np.random.Generator(np.random.MT19937(0))
    strategy.step()
    before = everything(strategy)
    said = told(lambda: strategy.load(folder, generators={"g": odd if comm.rank else np.random.default_rng(0)}))
    assert same_bits(everything(strategy), before)
    return said


@pytest.mark.parametrize("world", WORLDS)
def test_what_fits_on_one_rank_only_is_loaded_by_none(world: str, tmp_path: Path) -> None:
    for said in minidp.spawn(one_rank_has_other_generators, 2, tmp_path, world=world):
        assert said.startswith("ValueError: the checkpoint holds no generator 'g' (MT19937); it holds g (PCG64)")


WRITES_FOR_EVER = """
import os, sys, time
from pathlib import Path
from minidp import nn
os.fsync = lambda _: (print("writing", flush=True), time.sleep(60))
nn.save_file({}, Path(sys.argv[1]))
"""


def test_unfinished_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    script = Script(WRITES_FOR_EVER, str(tmp_path / "update-1.safetensors"))
    try:
        script.wait_for_line("writing")
        (part,) = tmp_path.iterdir()
        other = tmp_path / ".not ours"
        other.touch()
        strategy = build(comm_self())
        strategy.save(tmp_path)
        assert part.exists(), "somebody is writing it"
        script.process.kill()
        script.process.wait()
        strategy.save(tmp_path)
        assert not part.exists()
        assert other.exists()
    finally:
        script.clean()


def test_a_file_that_is_taken_for_a_dead_ones_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a file and its lock somebody else may delete it."""
    lock, locked = fcntl.flock, []

    def late(handle: Any, how: int) -> None:
        locked.append(handle)
        if len(locked) == 1:
            for part in tmp_path.glob(".*.part"):
                part.unlink()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    nn.save_file({"a": np.ones(2)}, tmp_path / "file")
    assert len(locked) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert nn.load_file(tmp_path / "file")["a"].tolist() == [1.0, 1.0]


def test_a_released_strategy_lets_the_model_alone(tmp_path: Path) -> None:
    model = Noisy().initialize(0)
    first = parallel.DataParallel(model, RULES["adam"](model.parameters()), comm_self(), micro_shards=4)
    path = first.save(tmp_path)
    first.release()
    second = parallel.DataParallel(model, RULES["adam"](model.parameters()), comm_self())
    before = everything(second)
    for call in (first.discard, lambda: first.load(path), lambda: first.load_state_dict(second.state_dict())):
        assert "the strategy has been released" in told(call)
    assert same_bits(everything(second), before)
    second.forward_backward(*samples()[:8], F.cross_entropy)
    second.step()
    assert not same_bits(everything(second), before)


# --- states of each rank's own --------------------------------------------------------------------------------

APART = ("mean", "outer", "outer adam")


def apart(comm: Any, rule: str, how: str, seed: int = 0, every: int = 3) -> Any:
    model = Noisy().initialize(seed).astype("float64")
    options: dict[str, Any] = {}
    if how == "outer":
        options["outer"] = optim.SGD(model.parameters(), lr=lambda t: 0.7 / (1 + t), momentum=0.9, nesterov=True)
    elif how == "outer adam":
        options["outer"] = optim.Adam(model.parameters(), lr=0.02)
    elif how == "outer plain":
        options["outer"] = optim.SGD(model.parameters(), lr=0.7)
    return parallel.LocalSGD(model, RULES[rule](model.parameters()), comm, every, **options)


def all_of_it(strategy: Any) -> dict[str, np.ndarray]:
    outer = {f"{slot}.{name}": a.copy() for slot, of in strategy.outer_state().items() for name, a in of.items()}
    return everything(strategy) | {f"outer.{name}": a for name, a in outer.items()}


def saves_apart(comm: Any, folder: Path, rule: str, how: str, until: int) -> Any:
    strategy = apart(comm, rule, how)
    go_on(strategy, 4)  # one step after an averaging
    before = strategy.state_dict()
    strategy.save(folder)
    assert how != "mean" or same_bits(before, strategy.state_dict()), "what it was the mean of, it is"
    go_on(strategy, until)
    return all_of_it(strategy), strategy.model.state_dict(), strategy.outer_updates


def resumes_apart(comm: Any, folder: Path, rule: str, how: str, until: int) -> Any:
    strategy = apart(comm, rule, how, seed=5 + comm.rank)
    go_on(strategy, 2)  # whatever was before is forgotten
    assert strategy.load(folder).updates == strategy.updates == 4
    go_on(strategy, until)
    return all_of_it(strategy), strategy.model.state_dict(), strategy.outer_updates


@pytest.mark.parametrize("how", APART)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("world", WORLDS)
def test_replicas_resume_as_if_never_interrupted(world: str, rule: str, how: str, tmp_path: Path) -> None:
    """Parameters, buffers, dropout, each rank's own state, the outer one's, and when the next averaging is due."""
    for until in (4, 6, STEPS):  # 6: two steps after the averaging that was part of saving
        folder = tmp_path / f"{until}"
        want = minidp.spawn(saves_apart, 2, folder, rule, how, until, world=world)
        found = minidp.spawn(resumes_apart, 2, folder, rule, how, until, world=world)
        for rank in (0, 1):
            assert same_bits(found[rank][0], want[rank][0]), (until, rank)
            assert same_bits(found[rank][1], want[rank][1]), (until, rank)
            assert found[rank][2] == want[rank][2]
        if RULES[rule](nn.Linear(1, 1).parameters()).slots:
            (slot, *_) = RULES[rule](nn.Linear(1, 1).parameters()).slots
            name = f"{slot}.first.weight"
            assert want[0][0][name].tobytes() != want[1][0][name].tobytes(), "each rank has its own"


def test_the_file_holds_every_ranks_own_state(tmp_path: Path) -> None:
    minidp.spawn(saves_apart, 3, tmp_path, "momentum", "outer", 4, world="virtual")
    arrays, facts = checkpoint_files.read_one(tmp_path / "update-00000004.safetensors")
    names = [f"momentum_buffer@{rank}.first.weight" for rank in range(3)]
    assert len({arrays[name].tobytes() for name in names}) == 3
    assert {"model.first.weight", "outer.momentum_buffer.first.weight"} < arrays.keys()
    assert not {"momentum_buffer.first.weight", "momentum_buffer@3.first.weight"} & arrays.keys()
    assert facts["private_updates"] == [4, 4, 4]
    assert facts["outer"] == {"optimizer": "SGD", "slots": ["momentum_buffer"], "updates": 2}


def exchanged(comm: Any, folder: Path, what: str) -> list[str]:
    """Between strategies that have one state and those in which each rank has its own."""
    kind, rule, how, other = what.split("/")
    alone = comm.split(comm.rank)
    strategy = apart(comm, rule, how) if kind == "LocalSGD" else build(comm, rule, kind)
    go_on(strategy, 4)
    strategy.save(folder)
    want = all_of_it(strategy)
    said = []
    for here, ranks in ((comm, 2), (alone, 1)):
        model = Noisy().initialize(1).astype("float64")
        loads: Any = (
            apart(here, rule, other.removeprefix("LocalSGD "), seed=1)
            if other.startswith("LocalSGD")
            else getattr(parallel, other)(model, RULES[rule](model.parameters()), here)
        )
        go_on(loads, 3)  # whatever was before is forgotten
        before = all_of_it(loads)
        said.append(told(lambda loads=loads: loads.load(folder)))
        if said[-1] == "nothing":
            assert loads.updates == 4
            found = all_of_it(loads)
            shared = {name for name in want if name.startswith("model") or kind == "DataParallel" or ranks == 2}
            assert same_bits(*({name: of[name] for name in shared & found.keys()} for of in (found, want)))
            assert not any(found[name].any() for name in found.keys() - want.keys()), "outer states begin at 0"
        else:
            assert same_bits(all_of_it(loads), before)
    return said


FINE = "nothing"
ONE_FOR_ALL = (
    "ValueError: the checkpoint holds a state of Adam for each of 2 ranks, here all ranks have one together"
)
ONE_RANK = (
    "ValueError: the checkpoint holds a state of Adam for each of 2 ranks, here are 1: load it by the same "
    "strategy on 2 ranks, or give its parameters alone, model.<name> of nn.load_file(…), to strategy.load_state"
)
NO_OUTER, ANOTHER = (
    f"ValueError: the checkpoint is of outer SGD with the state ['momentum_buffer'], the strategy has {what}"
    for what in (
        "no outer optimizer: load it by LocalSGD(…, outer=…), or give",
        "outer Adam with ['exp_avg', 'exp",
    )
)
# Saved by / with the rule / and this outer one / loaded by: what is said on as many ranks, and on one.
EXCHANGES = {
    "DataParallel/adam/-/LocalSGD mean": (FINE, FINE),
    "DataParallel/adam/-/LocalSGD outer": (FINE, FINE),
    "DataParallel/plain/-/Hogwild": (FINE, FINE),
    "LocalSGD/plain/mean/DataParallel": (FINE, FINE),
    "LocalSGD/plain/mean/LocalSGD mean": (FINE, FINE),
    "LocalSGD/plain/mean/LocalSGD outer": (FINE, FINE),
    "LocalSGD/plain/outer/LocalSGD outer": (FINE, FINE),
    "LocalSGD/plain/outer plain/LocalSGD mean": (FINE, FINE),
    "LocalSGD/plain/outer plain/DataParallel": (FINE, FINE),
    "LocalSGD/adam/mean/LocalSGD mean": (FINE, ONE_RANK),
    "LocalSGD/adam/mean/DataParallel": (ONE_FOR_ALL, ONE_FOR_ALL),
    "LocalSGD/plain/outer/LocalSGD mean": (NO_OUTER, NO_OUTER),
    "LocalSGD/plain/outer/DataParallel": (NO_OUTER, NO_OUTER),
    "LocalSGD/plain/outer/LocalSGD outer adam": (ANOTHER, ANOTHER),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("what", EXCHANGES)
def test_what_can_be_loaded_by_what(world: str, what: str, tmp_path: Path) -> None:
    for found in minidp.spawn(exchanged, 2, tmp_path, what, world=world):
        for said, start in zip(found, EXCHANGES[what], strict=True):
            assert said.startswith(start), said


def walks_alone(comm: Any, folder: Path, how: str) -> Any:
    """Ranks of Hogwild make different numbers of steps, each with a state of its own."""
    strategy = build(comm, "momentum", "Hogwild", seed=3)
    if how == "save":
        go_on(strategy, 3 + 2 * comm.rank)
        strategy.save(folder)
    else:
        assert strategy.load(folder).updates == 3, "rank 0's"
    state = strategy.optimizer_state()["momentum_buffer"]
    return strategy.updates, {name: array.copy() for name, array in state.items()}, strategy.state_dict()


def test_each_rank_goes_on_from_its_own_step(tmp_path: Path) -> None:
    saved, loaded = (minidp.spawn(walks_alone, 2, tmp_path, how, world="virtual") for how in ("save", "load"))
    assert [updates for updates, *_ in loaded] == [3, 5]
    for (_, mine, _), (_, again, _) in zip(saved, loaded):
        assert same_bits(mine, again)
    assert not same_bits(loaded[0][1], loaded[1][1])
    assert same_bits(saved[0][2], loaded[0][2])


def test_files_of_before_there_were_such_states_are_read(tmp_path: Path) -> None:
    strategy = build(comm_self())
    go_on(strategy, 2)
    path = strategy.save(tmp_path)
    arrays, facts = checkpoint_files.read_one(path)
    old = {name: value for name, value in facts.items() if name not in ("private_updates", "outer")}
    assert len(old) == len(facts) - 2
    path = checkpoint_files.write(tmp_path / "old", checkpoint_files.Content(arrays, old), 1)
    for other in (build(comm_self(), seed=1), apart(comm_self(), "adam", "mean", seed=1)):
        other.load(path)
        assert same_bits(everything(other), everything(strategy))
        assert other.updates == 2
