"""Meshes of a transformer: what is counted equals what the engine does, what is timed equals the virtual world."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend, nn, optim, parallel
from minidp.comm import Communicator
from minidp.nn import functional as F
from minidp.parallel import HybridParallel, pipeline_schedules
from minidp.parallel.parallelize import parallelize
from minidp.plan import MeshPoint, Transformer, mesh_options, rank_meshes
from minidp.plan.__main__ import main
from minidp.plan.axes import Clock, Mesh
from minidp.plan.mesh_step import OPTIMIZERS, Work, run, stages_of
from minidp.plan.meshes import all_meshes, why_not
from minidp.plan.transformer import Part, divisors, in_words
from minidp.sim import Cluster, FatTree

SMALL = Transformer(layers=4, embed=32, heads=4, context=16, vocab=60)
ROOM = Cluster(
    nodes=8,
    flops=1e10,
    latency_s=5e-6,
    bandwidth_bytes_per_s=1e9,
    ranks_per_node=2,
    local_latency_s=1e-6,
    local_bandwidth_bytes_per_s=1e10,
)
FREE = replace(
    ROOM,
    latency_s=0.0,
    bandwidth_bytes_per_s=float("inf"),
    local_latency_s=0.0,
    local_bandwidth_bytes_per_s=float("inf"),
)


def point(mesh: Sequence[int], cluster: Cluster = ROOM, model: Transformer = SMALL, **options: Any) -> MeshPoint:
    dp, tp, pp = mesh
    options = {"global_batch": 32, "micro_batches": 4, **options}
    ((found,), impossible) = rank_meshes(model, cluster, dp * tp * pp, meshes=[mesh], **options)
    assert impossible == []
    return found


# --- what is counted --------------------------------------------------------------------------------------


def base(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def kept_bytes(loss: Any, parameters: list[np.ndarray]) -> int:
    """Of all arrays that the graph holds, besides parameters: saved ones, and what operations were given."""
    not_counted = {id(base(array)) for array in parameters}
    found: dict[int, np.ndarray] = {}

    def add(value: Any) -> None:
        if isinstance(value, tuple | list):
            for each in value:
                add(each)
        elif isinstance(value, np.ndarray) and id(base(value)) not in not_counted:
            found[id(base(value))] = base(value)

    seen, frontier = set(), [loss.grad_fn]
    while frontier:
        fn = frontier.pop()
        if fn in seen:
            continue
        seen.add(fn)
        add(getattr(fn, "saved", None))
        for x in fn.inputs:
            add(x if isinstance(x, np.ndarray) else getattr(x, "data", None))
            if getattr(x, "grad_fn", None) is not None:
                frontier.append(x.grad_fn)
    return sum(array.nbytes for array in found.values())


def measured(model: nn.GPT, samples: int) -> tuple[int, float, float, int]:
    """Parameters, FLOPs each way, bytes kept."""
    tokens = np.zeros((samples, model.context), np.int64)
    labels = tokens.copy()
    with backend.meter() as meter:
        loss = F.cross_entropy(model(tokens), labels)
        forward = meter.flops
        kept = kept_bytes(loss, [p.data for p in model.parameters()])
        loss.backward()
    return sum(p.size for p in model.parameters()), forward, meter.flops - forward, kept


def told(model: Transformer, tp: int, samples: int) -> tuple[int, float, float, int]:
    parts: list[Part] = [model.embedding(tp, samples), model.norm(samples), model.head(tp, samples)]
    parts += [model.block(tp, samples)] * model.layers
    return (
        sum(part.parameters for part in parts),
        sum(part.forward_flops for part in parts),
        sum(part.backward_flops for part in parts),
        sum(4 * part.kept + part.kept_indices for part in parts),
    )


def gpt(model: Transformer) -> nn.GPT:
    return nn.GPT(model.vocab, model.context, model.embed, model.heads, model.layers)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "sizes", [(4, 32, 4, 16, 60), (1, 8, 1, 4, 7), (3, 24, 3, 10, 101), (2, 16, 16, 8, 5), (2, 8, 2, 1, 5)]
)
def test_one_rank_exactly(sizes: tuple[int, ...], samples: int) -> None:
    """Parameters, FLOPs each way and kept bytes are those of `nn.GPT` in this engine, to the last."""
    model = Transformer(*sizes)
    assert told(model, 1, samples) == measured(gpt(model), samples)
    assert model.parameters == sum(p.size for p in gpt(model).parameters())
    assert model.flops(samples) == sum(told(model, 1, samples)[1:3])


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("vocab", [60, 61])
def test_tensor_parallel_ranks_exactly(tp: int, vocab: int) -> None:
    """The first rank's parts are the fullest, where the vocabulary does not divide."""
    model = replace(SMALL, vocab=vocab)

    def train(comm: Communicator) -> tuple[int, float, float, int]:
        dense = gpt(model)
        parallelize(dense, comm)
        return measured(dense, 2)

    every = minidp.spawn(train, tp, world="virtual")
    assert every[0] == told(model, tp, 2)
    assert max(every) == every[0]


def test_a_step_of_real_optimizers() -> None:
    parameter = list(nn.Linear(3, 3).parameters())
    rules: dict[str, optim.Optimizer] = {
        "sgd": optim.SGD(parameter, lr=0.1),
        "momentum": optim.SGD(parameter, lr=0.1, momentum=0.9),
        "adam": optim.Adam(parameter),
    }
    for name, rule in rules.items():
        assert (len(rule.slots), rule.flops_per_element) == OPTIMIZERS[name]
        with backend.meter() as meter:
            rule.count_update(100, 4)
        update = Work(SMALL, 1, 1, "1f1b", name, 4, 25).update(100)
        assert update == (meter.operations, meter.flops, meter.nbytes)


def test_memory_by_hand() -> None:
    alone = point((1, 1, 1), optimizer="adam")
    held = 4 * SMALL.parameters
    assert (alone.parameter_bytes, alone.gradient_bytes, alone.state_bytes) == (held, held, 2 * held)
    assert alone.activation_bytes == told(SMALL, 1, 8)[3], "one micro-batch of 8 samples at a time"
    gpipe = point((1, 1, 1), schedule="gpipe", optimizer="momentum", element_bytes=2)
    indices = SMALL.embedding(1, 8).kept_indices + SMALL.head(1, 8).kept_indices
    assert gpipe.activation_bytes == 4 * ((alone.activation_bytes - indices) // 2 + indices)
    assert gpipe.state_bytes == gpipe.parameter_bytes == held // 2
    assert point((1, 1, 1), optimizer="sgd").state_bytes == 0


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_activations_of_stages(schedule: str) -> None:
    """Of the fullest stage, times what its schedule lets be under way."""
    deep = replace(SMALL, layers=8)
    found = point((1, 1, 4), model=deep, schedule=schedule, optimizer="sgd", micro_batches=8)
    work = Work(deep, 32, 8, schedule, "sgd", 4, 25)
    stages = stages_of(work, Clock(ROOM, 4), Mesh(1, 1, 4))
    actions = pipeline_schedules.get(schedule, 4, 8)
    needs = [
        (2 * 4 * stage.parameters + actions.most_in_flight()[s] * stage.kept_bytes(4), stage.blocks)
        for s, stage in enumerate(stages)
    ]
    assert found.memory_bytes == max(needs)[0]
    assert [blocks for _, blocks in needs] == list(found.stages)
    assert sum(found.stages) == 8
    assert stages[0].output == 4 * 16 * 32, "its result, kept to begin backward with"
    assert stages[-1].output == 0


# --- what is timed ----------------------------------------------------------------------------------------


def train(comm: Communicator, mesh: Sequence[int], schedule: str) -> dict[str, Any]:
    """The second step of the real strategy, with a global batch of 32 and Adam."""
    model = gpt(SMALL)
    dp, tp, pp = mesh
    strategy = HybridParallel(
        model,
        optim.Adam(model.parameters()),
        parallel.Mesh(comm, dp=dp, tp=tp, pp=pp),
        micro_batches=4,
        schedule=schedule,
    )
    x = np.zeros((32 // dp, SMALL.context), np.int64)
    for _ in range(2):
        comm.barrier()
        start = comm.now()
        strategy.forward_backward(x, x, F.cross_entropy)
        strategy.step()
    memory = strategy.memory()
    return {
        "step_s": comm.now() - start,
        "held": memory["parameters"] + memory["gradients"] + memory["optimizer"],
        "bounds": strategy.bounds,
    }


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(
    ("mesh", "within"),
    [
        ((1, 1, 1), 1e-4),
        ((4, 1, 1), 1e-4),
        ((1, 4, 1), 1e-3),  # what is told in single numbers takes latencies
        ((1, 1, 4), 1e-3),
        ((1, 1, 7), 2e-3),
        ((2, 2, 1), 1e-3),
        ((1, 2, 2), 1e-3),
        ((2, 1, 2), 0.03),  # the stages share a port along dp, and do not come to it at the same time
        ((2, 2, 2), 3e-3),
        ((4, 2, 2), 5e-3),
    ],
)
def test_equals_the_strategy_itself(mesh: tuple[int, int, int], within: float, schedule: str) -> None:
    """Stages, memory and time of `HybridParallel` in the virtual world."""
    found = point(mesh, schedule=schedule)
    ranks = minidp.spawn(train, np.prod(mesh).item(), mesh, schedule, world="virtual", cluster=ROOM)
    assert max(rank["step_s"] for rank in ranks) == pytest.approx(found.step_s, rel=within)
    bounds = ranks[0]["bounds"]
    assert found.stages == tuple(sum(1 <= unit <= SMALL.layers for unit in range(lo, hi)) for lo, hi in bounds)
    held = found.memory_bytes - found.activation_bytes
    if schedule == "1f1b":  # else the rank that needs most need not be the one that holds most
        assert max(rank["held"] for rank in ranks) == pytest.approx(held, rel=3e-3), "arrays begin at 64 bytes"


def collectives(comm: Communicator, mesh: Mesh, length: int) -> list[float]:
    """Seconds of an all-reduce along tp, one along dp, an all-gather along tp; all groups at once."""
    _, tp, pp = mesh
    tensor = comm.split(comm.rank // tp)
    data = comm.split(comm.rank % (tp * pp))
    assert tensor is not None
    assert data is not None
    x, parts = np.zeros(length, np.float32), np.zeros(length * tp, np.float32)
    seconds = []
    for each in (lambda: tensor.all_reduce(x), lambda: data.all_reduce(x), lambda: tensor.all_gather(parts, x)):
        comm.barrier()
        start = comm.now()
        each()
        seconds.append(comm.now() - start)
    return seconds


@pytest.mark.parametrize("length", [3, 10_000])
@pytest.mark.parametrize(
    ("mesh", "room", "within"),
    [
        (Mesh(4, 2, 2), ROOM, 1e-9),
        (Mesh(2, 4, 2), replace(ROOM, ranks_per_node=8), 1e-9),
        (Mesh(2, 8, 1), replace(ROOM, ranks_per_node=4), 1e-9),
        (Mesh(2, 3, 2), replace(ROOM, ranks_per_node=4), 0.25),  # groups lie across nodes: who comes first?
        (Mesh(4, 1, 3), replace(ROOM, ranks_per_node=8), 1e-9),
        (Mesh(16, 1, 1), replace(ROOM, ranks_per_node=4), 1e-9),
        (Mesh(4, 2, 2), replace(ROOM, topology=FatTree(2, 4)), 1e-9),
        (Mesh(4, 2, 1), replace(ROOM, topology="ring", ranks_per_node=1), 1e-9),
        (Mesh(66, 1, 1), replace(ROOM, nodes=40), 1e-9),
    ],
    ids=lambda value: str(value) if isinstance(value, Mesh) else None,
)
def test_collectives_take_what_they_take_in_the_virtual_world(
    mesh: Mesh, room: Cluster, within: float, length: int
) -> None:
    """To rounding, also where several groups want a node's one port."""
    world_size = mesh.dp * mesh.tp * mesh.pp
    clock = Clock(room, world_size)
    seconds = [
        clock.tensor(mesh.tp, "all_reduce", length, 4),
        clock.data(mesh.dp, length, 4),
        clock.tensor(mesh.tp, "all_gather", length * mesh.tp, 4),
    ]
    ranks = minidp.spawn(collectives, world_size, mesh, length, world="virtual", cluster=room)
    assert [max(column) for column in zip(*ranks)] == pytest.approx(seconds, rel=within, abs=1e-15)


def test_messages_between_stages() -> None:
    """Two stages of two ranks on a node of four: every second boundary lies between nodes, who share ports."""
    room = replace(ROOM, ranks_per_node=4)
    across, inside = 5e-6 + 2 * 1000 / 1e9, 1e-6 + 1000 / 1e10
    for backwards in (False, True):
        assert Clock(room, 16).messages(2, 4, 1000, backwards) == pytest.approx([inside, across, inside])
    assert Clock(room, 16).messages(2, 1, 1000) == []


def test_idle_share_is_the_law() -> None:
    """Equal stages and free links: (p − 1)/(m + p − 1), in both schedules; each of units, so pp = 1 has none."""
    blocks = Transformer(layers=64, embed=64, heads=2, context=64, vocab=2)
    for schedule in pipeline_schedules.SCHEDULES:
        for p, m in [(1, 4), (2, 4), (4, 8), (8, 4)]:
            found = point((1, 1, p), FREE, blocks, schedule=schedule, micro_batches=m, optimizer="sgd")
            assert found.idle_s / found.step_s == pytest.approx((p - 1) / (m + p - 1), abs=0.01)
            assert found.data_s == found.tensor_s == 0


def test_what_stages_do_is_the_timetables() -> None:
    """The last backward of each, and the most micro-batches under way."""
    work = Work(SMALL, 32, 4, "1f1b", "sgd", 4, 25)
    stages = stages_of(work, Clock(ROOM, 4), Mesh(1, 1, 4))
    for name in pipeline_schedules.SCHEDULES:
        schedule = pipeline_schedules.get(name, 4, 4)
        forward, backward = [stage.forward_s for stage in stages], [stage.backward_s for stage in stages]
        spans = pipeline_schedules.timetable(schedule, forward, backward, 1e-5)
        for s, each in enumerate(run(schedule, stages, [1e-5] * 3, [1e-5] * 3)):
            own = [span for span in spans if span.action.stage == s]
            assert (each.last_backward, each.end) == (own[-1].start, own[-1].end)
            assert each.most == schedule.most_in_flight()[s]


def test_parts_add_up_and_one_rank_is_ideal() -> None:
    points, _ = rank_meshes(SMALL, ROOM, 16, global_batch=64, micro_batches=2)
    assert len(points) == len({found.mesh for found in points}) == 9
    for found in points:
        parts = found.compute_s + found.tensor_s + found.idle_s + found.data_s
        assert parts == pytest.approx(found.step_s, rel=1e-12)
        assert min(found.compute_s, found.tensor_s, found.idle_s, found.data_s) >= 0
        assert (found.tensor_s > 0, found.idle_s > 0) == (found.tp > 1, found.pp > 1)
        assert found.data_s > 0 or found.dp == 1
        assert found.samples_per_s == 64 / found.step_s
        assert 0 < found.efficiency < 1
    assert [found.step_s for found in points] == sorted(found.step_s for found in points)
    alone = point((1, 1, 1))
    assert alone.efficiency == pytest.approx(1, rel=1e-3), "places are looked up once a micro-batch"
    assert alone.compute_s == pytest.approx(alone.step_s, rel=1e-12)
    assert point((1, 1, 1), micro_batches=1).efficiency == pytest.approx(1, rel=1e-12)


# --- which are possible -----------------------------------------------------------------------------------


def test_all_meshes() -> None:
    assert len(all_meshes(64)) == 28
    assert {mesh.dp * mesh.tp * mesh.pp for mesh in all_meshes(60)} == {60}
    assert len(set(all_meshes(60))) == len(all_meshes(60)) == 54
    assert all_meshes(1) == [Mesh(1, 1, 1)]


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ((1, 1, 1), None),
        ((1, 8, 1), "4 heads can't be cut into tp = 8 equal parts: 1, 2, 4 would do"),
        ((1, 3, 1), "4 heads can't be cut into tp = 3 equal parts: 1, 2, 4 would do"),
        ((1, 1, 7), None),
        ((1, 1, 8), "embedding, 4 layers, norm and head make no pp = 8 stages: at most 7 would do"),
        ((5, 1, 1), "32 samples do not divide into dp = 5 equal shards: 1, 2, 4, 8, 16, 32 would do"),
        ((64, 1, 1), "32 samples do not divide into dp = 64 equal shards: 1, 2, 4, 8, 16, 32 would do"),
        ((16, 1, 1), "2 samples a replica, with dp = 16, make no 4 equal micro-batches: 1, 2 would do"),
    ],
)
def test_why_not(mesh: tuple[int, int, int], says: str | None) -> None:
    assert why_not(SMALL, Mesh(*mesh), 32, 4) == says


def test_the_strategy_refuses_the_same() -> None:
    for mesh in [(1, 8, 1), (1, 1, 8), (8, 1, 1)]:
        assert (why_not(SMALL, Mesh(*mesh), 32, 4) is None) == (mesh == (8, 1, 1))
        if mesh != (8, 1, 1):
            with pytest.raises(minidp.CommError, match=r"ValueError: .*(4 heads|num_heads=4|chain of 7)"):
                minidp.spawn(train, 8, mesh, "1f1b", world="virtual", cluster=ROOM)


def test_impossible_ones_by_reason() -> None:
    points, impossible = rank_meshes(SMALL, ROOM, 16, global_batch=32)
    assert len(points) + sum(len(each.meshes) for each in impossible) == len(all_meshes(16))
    assert len({each.reason for each in impossible}) == len(impossible)


def test_what_does_not_fit_comes_last() -> None:
    free, _ = rank_meshes(SMALL, ROOM, 16, global_batch=64, micro_batches=2)
    memory = sorted(found.memory_bytes for found in free)[5]
    points, _ = rank_meshes(SMALL, ROOM, 16, global_batch=64, micro_batches=2, memory_per_rank=memory)
    fits = [found.memory_bytes <= memory for found in points]
    assert fits == [found.fits for found in points] == sorted(fits, reverse=True)
    assert any(fits)
    assert not all(fits)
    for some in (points[: sum(fits)], points[sum(fits) :]):
        assert [found.step_s for found in some] == sorted(found.step_s for found in some)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cluster": replace(ROOM, jitter=0.1)}, "without jitter and stragglers"),
        ({"cluster": replace(ROOM, stragglers={1: 2.0})}, "without jitter and stragglers"),
        ({"optimizer": "lion"}, "optimizer='lion': there are 'sgd', 'momentum', 'adam'"),
        ({"schedule": "zb"}, "schedule='zb': there are '1f1b', 'gpipe'"),
        ({"micro_batches": 0}, "at least 1"),
        ({"global_batch": 0}, "give at least 1"),
        ({"meshes": [(2, 2, 2)]}, "2×2×2 is 8 ranks, not 16"),
        ({"meshes": [(-4, -4, 1)]}, "not 16"),
        ({"world_size": 17}, "17 ranks do not fit"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    arguments = {"cluster": ROOM, "world_size": 16, "global_batch": 32, **options}
    with pytest.raises(ValueError, match=re.escape(says)):
        rank_meshes(SMALL, **arguments)


@pytest.mark.parametrize("name", ["layers", "embed", "heads", "context", "vocab"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_wrong_sizes(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*: give a whole number of at least 1"):
        replace(SMALL, **{name: value})
    with pytest.raises(ValueError, match="embed=32 is not cut evenly by heads=5: 1, 2, 4, 8, 16, 32 would do"):
        replace(SMALL, heads=5)


def test_numbers_in_words() -> None:
    assert [divisors(n) for n in (1, 12, 49)] == [[1], [1, 2, 3, 4, 6, 12], [1, 7, 49]]
    assert in_words([1, 2]) == "1, 2"
    assert in_words(divisors(720)).endswith("9, 10, 12, 15, … 720")


# --- the command ------------------------------------------------------------------------------------------

SIZES = "layers=24,embed=2048,heads=16,context=1024,vocab=50304"
ASKED = ("--transformer", SIZES, "--ranks", "64", "--global-batch", "512", "--ranks-per-node", "8")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, width: int = 80) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        assert main([*ASKED, *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= width
    return out


def rows(out: str) -> list[list[str]]:
    table = out.partition("dp×tp×pp    ")[2].partition("\n\n")[0]
    return [line.split() for line in table.splitlines()[1:] if line.strip()[0].isdigit()]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    out = plan(capsys, "--memory-per-rank", "80e9", "--json", str(path))
    text = " ".join(out.split())
    assert "24 layers, 2,048 features, 16 heads, vocabulary 50,304: 1.417 billion parameters" in text
    assert "512 samples a step, 8 micro-batches a replica, 1f1b; adam, 4 bytes an element" in text
    assert "inside a node α = 5.00 µs, 1/β = 300 GB/s a rank" in text
    data = json.loads(path.read_text())
    points = data["points"]
    assert len(points) + sum(len(each["meshes"]) for each in data["impossible"]) == 28
    assert data["transformer"]["parameters"] == 1_416_795_264
    table = rows(out)
    assert len(table) == 10
    for words, found in zip(table, points):
        assert words[0] == f"{found['dp']}×{found['tp']}×{found['pp']}"
        assert f"{found['efficiency']:.1%}" in words
    assert "… and 12 more: --top 22 shows all" in out
    assert f"{table[0][0]} is the fastest" in out
    assert "6 meshes can't be:" in out
    assert "16 heads can't be cut into tp = 32 equal parts" in out


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--top", "100"),
        ("--top", "100", "--memory-per-rank", "30e9", "--schedule", "gpipe", "--optimizer", "sgd"),
        ("--flops", "1e3", "--bandwidth", "1", "--latency", "100", "--top", "100"),
        ("--flops", "1e30", "--bandwidth", "1e30", "--latency", "0", "--local-bandwidth", "1e30", "--top", "100"),
        ("--topology", "fat_tree", "--memory", "2e12", "--meshes", "8x8x1,64x1x1,1x16x4,1x64x1"),
    ],
)
def test_fits(arguments: tuple[str, ...], width: int, capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, *arguments, width=width)
    assert not re.search(r"nan|inf\b|(?<!e)-0", out.replace("minidp", ""))
    assert len({line.count("×") for line in out.splitlines() if line.startswith("dp×")}) == 1
    assert rows(out)
    if "--top" in arguments:
        assert len(rows(out)) == 22
        assert "…" not in out


def test_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--memory-per-rank", "30e9", "--top", "30")
    assert "✗ more than a rank has" in " ".join(out.split())
    marked = [words[-1] == "✗" for words in rows(out)]
    assert marked == sorted(marked)
    assert 0 < sum(marked) < len(marked)
    none = " ".join(plan(capsys, "--memory-per-rank", "1e9").split())
    assert re.search(r"No mesh fits into 1\.00 GB a rank\. \d+×\d+×\d+ needs the least, [\d.]+ GB", none)
    assert "None of these meshes can be." in plan(capsys, "--meshes", "1x64x1")
    assert "✗" not in plan(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--ranks 8..64", "--ranks: give one number with --transformer, not 4"),
        ("--ranks 4096", "--ranks 4096: give at most 2,048 with --transformer"),
        ("--ranks 256 --topology ring", "--ranks 256: give at most 128 in a ring with --transformer"),
        ("--meshes 8x8", "argument --meshes: '8x8': give dp x tp x pp as 8x8x1, a list of these, or all"),
        ("--meshes 8x8x0", "'8x8x0': give dp x tp x pp"),
        ("--meshes 8x8x1,", "'': give dp x tp x pp"),
        ("--meshes 8x8x2", "--meshes 8×8×2: 8 × 8 × 2 is 128 ranks, and --ranks 64"),
        ("--transformer layers=24", "embed, heads, context, vocab missing: give it as layers=24,embed=2048"),
        ("--transformer x=1", "'x' is unknown; there are layers, embed, heads, context, vocab: give it as"),
        (f"--transformer {SIZES},layers=2", "'layers' is twice: give it as"),
        (f"--transformer {SIZES.replace('24', '0')}", "layers=0: give a whole number, 1 to 1e+09"),
        (f"--transformer {SIZES.replace('24', '1e3')}", "layers=1000: give at most 256"),
        (f"--transformer {SIZES.replace('24', 'many')}", "layers=many: give a whole number"),
        (f"--transformer {SIZES.replace('heads=16', 'heads=5')}", "embed=2048 is not cut evenly by heads=5: 1, 2"),
        ("--params 7e9", "--params does not go with --transformer, which plans meshes: leave one away"),
        ("--layers 32", "--layers does not go with --transformer"),
        ("--jitter 0", "--jitter does not go with --transformer"),
        ("--worth 0.5", "--worth does not go with --transformer"),
        ("--plot x.png", "--plot does not go with --transformer"),
        ("--micro-batches 1000", "--micro-batches 1000: give at most 512"),
        ("--micro-batches 0", "argument --micro-batches: '0': give a whole number"),
        ("--schedule zb", "argument --schedule: invalid choice: 'zb'"),
        ("--memory-per-rank 0", "argument --memory-per-rank: '0': give a positive number"),
        ("--top 0", "argument --top: '0': give a whole number"),
        ("--json /", "--json /: give a file"),
    ],
)
def test_bad_arguments(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*ASKED, *arguments.split()])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize("name", sorted(mesh_options.DEFAULTS))
def test_only_with_transformer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = "--" + name.replace("_", "-")
    value = {"meshes": "all", "schedule": "1f1b", "optimizer": "adam"}.get(name, "4")
    with pytest.raises(SystemExit):
        main(["--params", "7e9", "--flops-per-sample", "4.2e13", "--ranks", "8", option, value])
    assert f"{option} describes meshes of a transformer: give --transformer too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--transformer", SIZES, "--ranks", "8"])
    assert "--transformer needs --global-batch" in capsys.readouterr().err
