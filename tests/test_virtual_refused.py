"""What the virtual world refuses: arrays that do not fit, strangers, who blocks its thread, no machines."""

from __future__ import annotations

import inspect
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.sim import Cluster, FatTree, Ring
from tests.told import told

pytestmark = pytest.mark.timeout(30)


def run(fn: Any, world_size: int, *args: Any, **options: Any) -> list[Any]:
    return minidp.spawn(fn, world_size, *args, world="virtual", **options)


# --- arrays -------------------------------------------------------------------------------------------------


def letters_that_do_not_fit(comm: Any) -> list[str]:
    if comm.rank == 0:
        for x in (np.zeros(3, np.float32), np.zeros(4), np.zeros((2, 3)), np.arange(3.0)):
            comm.send(x, 1)
        return []
    x = np.full(3, 7.0)
    said = [told(lambda: comm.recv(x, 0)) for _ in range(3)]
    assert (x == 7).all(), "nothing was written"
    said.append(told(lambda: comm.recv(x, 0)))
    assert x.tolist() == [0, 1, 2], "the next message is the next one"
    return said


def test_messages_of_another_dtype_or_size_are_a_mismatch() -> None:
    said = run(letters_that_do_not_fit, 2)[1]
    assert said[0] == "CollectiveMismatch: rank 0 sent float32[3] with tag 0; rank 1 receives float64[3]"
    assert "rank 0 sent float64[4]" in said[1]
    assert "rank 0 sent float64[6]" in said[2]
    assert said[3] == "nothing"


def refused(comm: Any) -> list[str]:
    p, r = comm.world_size, comm.rank
    x = np.ones(p)
    x.flags.writeable = False
    read_only = [
        lambda: comm.all_reduce(x),
        lambda: comm.all_reduce(x, algorithm="ring"),
        lambda: comm.all_reduce(x, async_op=True),
        lambda: comm.recv(x),
        lambda: comm.recv(x, async_op=True),
        lambda: comm.reduce_scatter(x, np.ones(p * p)),
    ]
    said = [told(call) for call in read_only]
    assert all(text.startswith("ValueError: the result can't be written to a read-only array") for text in said), (
        said
    )
    comm.broadcast(x if r == 0 else np.empty(p), 0)  # the source only reads
    comm.reduce(x if r else np.ones(p), 0)
    comm.send(x, r)
    assert comm.recv(np.empty(p), r) == r
    return [
        told(lambda: comm.all_reduce(3.0)),
        told(lambda: comm.all_reduce(np.float64(3.0))),
        told(lambda: comm.all_reduce(np.ones(3), "max")),
        told(lambda: comm.all_reduce(np.ones(3), algorithm="rings")),
        told(lambda: comm.all_reduce(np.ones(3, np.int32), minidp.ReduceOp.AVG)),
        told(lambda: comm.send(np.ones(1), p)),
        told(lambda: comm.send(np.ones(1), -1)),
        told(lambda: comm.send(np.ones(1), 0, tag=-1)),
        told(lambda: comm.recv(np.ones(1), p)),
        told(lambda: comm.recv(np.ones(1), 0, tag=-3)),
        told(lambda: comm.send([1.0], 0)),
        told(lambda: comm.recv([1.0], 0)),
        told(lambda: comm.broadcast(np.ones(1), p)),
        told(lambda: comm.all_gather(np.ones(3), np.ones(3))) if p > 1 else "ValueError",
        told(lambda: comm.all_to_all(np.ones(p + 1), np.ones(p + 1))),
        told(lambda: comm.scatter(np.ones(p + 1) if r == 0 else None, 0)) if p == 1 else "ValueError",
        told(lambda: comm.allocate(-1)),
    ]


@pytest.mark.parametrize("p", [1, 3])
def test_bad_arguments_are_refused_on_each_rank_and_nothing_is_sent(p: int) -> None:
    types = (
        ["TypeError"] * 3
        + ["ValueError", "TypeError"]
        + ["ValueError"] * 5
        + ["TypeError"] * 2
        + ["ValueError"] * 5
    )
    for said in run(refused, p):
        assert [text.partition(":")[0] for text in said] == types, said
        assert f"ranks 0 to {p - 1}" in said[5]
        assert "tags are 0 or more" in said[7]


# --- strangers ----------------------------------------------------------------------------------------------

CALLS = {
    "barrier": lambda comm: comm.barrier(),
    "now": lambda comm: comm.now(),
    "send": lambda comm: comm.send(np.zeros(1), 0),
    "async send": lambda comm: comm.send(np.zeros(1), 0, async_op=True),
    "recv": lambda comm: comm.recv(np.zeros(1), 0),
    "all_reduce": lambda comm: comm.all_reduce(np.zeros(1)),
    "async": lambda comm: comm.all_reduce(np.zeros(1), async_op=True),
    "split": lambda comm: comm.split(0),
    "allocate": lambda comm: comm.allocate(8),
    "objects": lambda comm: comm.all_gather_object(1),
}


def in_a_thread(comm: Any) -> list[str]:
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.extend(told(lambda c=call: c(comm)) for call in CALLS.values()))
    thread.start()
    thread.join()
    assert comm.all_gather_int(comm.rank) == list(range(comm.world_size)), "the rank itself is not disturbed"
    return said


def test_a_foreign_thread_cannot_speak_for_a_rank() -> None:
    for rank, said in enumerate(run(in_a_thread, 2)):
        assert len(said) == len(CALLS)
        for text in said:
            assert text.startswith(
                f"CommError: the communicator of rank {rank} was used outside its rank's function"
            )


def test_after_the_run_a_communicator_is_closed() -> None:
    comm, child = run(lambda comm: (comm, comm.split(0)), 2)[1]
    for name, call in CALLS.items():
        for each in (comm, child):
            text = told(lambda call=call, each=each: call(each))
            assert text.startswith("CommError: "), name
            assert "is closed" in text or "after the run" in text, name


def nested(comm: Any, world: str) -> str:
    said = told(lambda: minidp.spawn(lambda inner: inner.rank, 1, world=world))
    comm.barrier()
    return said


@pytest.mark.parametrize("world", ["virtual", "process"])
def test_spawn_inside_a_rank_is_refused(world: str) -> None:
    for said in run(nested, 2, world):
        assert said.startswith("RuntimeError: spawn was called inside a worker of another spawn")


# --- who blocks outside of comm -----------------------------------------------------------------------------


def lock(comm: Any) -> None:
    held = threading.Lock()
    held.acquire()
    held.acquire()  # here


def sleep(comm: Any) -> None:
    time.sleep(60)  # here


def empty_queue(comm: Any) -> None:
    queue.Queue().get()  # here


def event(comm: Any) -> None:
    threading.Event().wait()  # here


@pytest.mark.parametrize("blocks", [lock, sleep, empty_queue, event])
def test_who_blocks_outside_of_comm_is_named_with_the_line(blocks: Any) -> None:
    def fn(comm: Any) -> None:
        comm.barrier()
        if comm.rank == 1:
            blocks(comm)
        comm.barrier()

    with pytest.raises(minidp.RankFailed, match=r"rank 1 has blocked outside of comm for 0\.5 s, at ") as caught:
        run(fn, 3, timeout_s=0.5)
    code = blocks.__code__
    source = inspect.getsource(blocks).splitlines()
    lines = [code.co_firstlineno + i for i, line in enumerate(source) if "# here" in line]
    assert f"{code.co_filename}:{lines[0]}. " in str(caught.value)
    assert isinstance(caught.value.__cause__, minidp.CommError)
    assert run(lambda comm: comm.rank, 2) == [0, 1]


def computes(comm: Any) -> int:
    end = time.thread_time() + 0.7
    while time.thread_time() < end:
        pass
    return comm.rank


def test_who_computes_for_long_is_left_alone() -> None:
    assert run(computes, 2, timeout_s=0.3) == [0, 1]


def test_who_was_stopped_has_not_blocked() -> None:
    """Ctrl-Z, and later fg: the clock went on, and nobody computed."""
    code = "import tests.test_virtual_refused as t; print(flush=True); print(t.run(t.computes, 1, timeout_s=0.2))"
    home = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=home)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.7)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "[0]\n"


# --- machines that can't be ---------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: bad}, name)
        for name in ("bandwidth_bytes_per_s", "flops")
        for bad in (0, -1.0, NAN, None, "5", True)
    ),
    *(({name: bad}, name) for name in ("memory_bytes_per_s", "reduce_bytes_per_s") for bad in (0, -1.0, NAN, "5")),
    *(
        ({name: bad}, name)
        for name in ("latency_s", "jitter", "op_overhead_s")
        for bad in (-1e-9, NAN, INF, None, True)
    ),
    *(({"nodes": bad}, "nodes") for bad in (0, -1, 2.0, True, None, "2")),
    *(({"ranks_per_node": bad}, "ranks_per_node") for bad in (0, 1.0, True)),
    *(({"seed": bad}, "seed") for bad in (-1, None, 0.5)),
    ({"local_bandwidth_bytes_per_s": 0}, "local_bandwidth"),
    ({"flops": 10**400}, "flops=1000"),
    ({"latency_s": 1j}, "latency_s=1j"),
    ({"latency_s": "1"}, "latency_s='1'"),
    ({"nodes": np.array([2])}, "give a whole number"),
    ({"latency_s": np.ones(1)}, "latency_s"),
    ({"stragglers": {4: 2.0}}, "straggler 4 is beyond the cluster: its nodes are 0 to 3"),
    ({"stragglers": {-1: 2.0}}, "straggler"),
    ({"stragglers": {1.0: 2.0}}, "straggler"),
    *(({"stragglers": {1: bad}}, "factor of straggler 1") for bad in (0, -2.0, NAN, None)),
    ({"stragglers": [3]}, "give a mapping"),
    ({"topology": "torus"}, "unknown topology 'torus'; valid: 'switch', 'ring', 'fat_tree'"),
    ({"topology": FatTree}, "unknown topology"),
    ({"topology": "fat_tree"}, "groups of leaf=8 nodes do not fit"),
    ({"topology": FatTree(3)}, "groups of leaf=3 nodes do not fit: they must divide 4 nodes"),
    ({"topology": Ring(), "nodes": 1}, "at least 2 nodes"),
]


@pytest.mark.parametrize(("options", "says"), IMPOSSIBLE, ids=[str(options) for options, _ in IMPOSSIBLE])
def test_a_machine_that_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Cluster(**{"nodes": 4, **options})


@pytest.mark.parametrize("leaf", [0, -1, 2.0, True, None])
def test_a_fat_tree_needs_whole_groups(leaf: Any) -> None:
    with pytest.raises(ValueError, match="leaf"):
        FatTree(leaf)


@pytest.mark.parametrize("ratio", [0.5, 0, -1, NAN, INF, "4", None])
def test_a_fat_tree_needs_a_finite_oversubscription(ratio: Any) -> None:
    with pytest.raises(ValueError, match="oversubscription"):
        FatTree(4, ratio)


def test_spawn_refuses_what_does_not_fit() -> None:
    f = lambda comm: comm.rank  # noqa: E731
    with pytest.raises(ValueError, match="5 ranks do not fit into a cluster of 2 nodes × 2 ranks"):
        run(f, 5, cluster=Cluster(2, ranks_per_node=2))
    with pytest.raises(ValueError, match="cluster= describes a virtual world; this one is 'process'"):
        minidp.spawn(f, 2, cluster=Cluster(2))
    with pytest.raises(ValueError, match="blas_threads=2"):
        run(f, 2, blas_threads=2)
    for wrong in ({"nodes": 2}, Cluster, 2):
        with pytest.raises(TypeError, match=r"cluster must be a minidp\.sim\.Cluster"):
            run(f, 2, cluster=wrong)
    assert run(f, 3, cluster=Cluster(2, ranks_per_node=2), blas_threads=1) == [0, 1, 2], "fewer ranks than room"
