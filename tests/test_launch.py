"""spawn: what travels to the workers and back, what the parent sees of them, what is refused, what is left."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import pickle
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import threadpoolctl

import minidp
from minidp import nn, optim, parallel
from minidp.bench.leftovers import Script, children, descriptors, gone_within
from minidp.comm import comm_self
from minidp.comm.board import Board
from minidp.launch import blas, cores, interrupts
from minidp.nn import functional as F


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    minidp.spawn(lambda comm: None, 1)  # so that the fork server is there before we count
    before = children(), descriptors()
    yield
    gc.collect()  # a communicator without spawn closes its descriptor when it is collected
    deadline = time.monotonic() + 2
    while children() - before[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children() <= before[0], "a process was left"
    assert descriptors() <= before[1], "a descriptor was left open"


def failure(fn: Callable[..., Any], *args: Any, world_size: int = 2, **options: Any) -> minidp.RankFailed:
    with pytest.raises(minidp.RankFailed) as caught:
        minidp.spawn(fn, world_size, *args, **options)
    return caught.value


# -- programs ------------------------------------------------------------------------------------------------

PROGRAM = """
import minidp
print("once")                      # nothing here may run again in a worker
OFFSET = 10
class Point:
    def __init__(self, x): self.x = x
def helper(x): return x + OFFSET
def work(comm, point, scale=lambda v: 2 * v):
    return comm.rank, helper(point.x), scale(comm.rank)
print(minidp.spawn(work, 2, Point(5)))
OFFSET = 20                        # each run takes the globals as they are
print([point.x for point in minidp.spawn(lambda comm: Point(helper(comm.rank)), 2)])
"""


@pytest.mark.parametrize("how", ["file", "stdin", "-c"])
def test_a_program_without_a_main_guard(how: str, tmp_path: Path) -> None:
    script = Script(PROGRAM, stdin=how == "stdin", path=tmp_path / "program.py" if how == "file" else None)
    try:
        assert script.finish() == (0, "once\n[(0, 15, 0), (1, 15, 2)]\n[20, 21]\n", "")
        assert gone_within(script.token, 2) is not None, "something outlived the program"
    finally:
        script.clean()


# -- what travels --------------------------------------------------------------------------------------------


def test_arguments_travel_and_results_come_in_rank_order() -> None:
    base = np.arange(3)

    def closure(comm: Any, factor: int, *rest: Any) -> tuple[Any, ...]:
        time.sleep(0.03 * (comm.world_size - comm.rank))  # the last rank returns first
        return comm.rank, comm.local_rank, comm.world_size, (base * factor).tolist(), rest

    want = [(rank, rank, 3, [0, 2, 4], ("x", {"y": None})) for rank in range(3)]
    assert minidp.spawn(closure, 3, 2, "x", {"y": None}) == want


@pytest.mark.parametrize("world_size", [1, np.int64(2)])
def test_any_whole_number_of_ranks(world_size: Any) -> None:
    assert minidp.spawn(lambda comm: comm.rank, world_size, timeout_s=np.float64(9)) == list(range(world_size))


def test_each_run_starts_afresh() -> None:
    def leave_a_trace(comm: Any) -> int:
        blas.trace_of_a_run = getattr(blas, "trace_of_a_run", 0) + 1  # type: ignore[attr-defined]
        return blas.trace_of_a_run  # type: ignore[attr-defined, no-any-return]

    assert [minidp.spawn(leave_a_trace, 2) for _ in range(4)] == [[1, 1]] * 4
    assert not hasattr(blas, "trace_of_a_run")


def test_environment_folder_and_search_path_are_the_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_script.py").write_text("ANSWER = 42\n")
    monkeypatch.setenv("MINIDP_TEST_NEW", "set after the server's start")
    monkeypatch.delenv("PATH")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "--flag"])

    def look(comm: Any) -> tuple[Any, ...]:
        import beside_the_script  # type: ignore[import-not-found]

        return (
            os.environ["MINIDP_TEST_NEW"],
            "PATH" in os.environ,
            os.getcwd(),
            sys.argv,
            beside_the_script.ANSWER,
        )

    want = ("set after the server's start", False, str(tmp_path), ["program", "--flag"], 42)
    assert minidp.spawn(look, 2) == [want, want]


# -- threads, runs, servers ----------------------------------------------------------------------------------


def test_spawn_in_threads() -> None:
    """Not in the main thread, and two at a time; __main__ is hidden while workers start, and must come back."""
    main, results = sys.modules["__main__"], {}

    def several(name: str) -> None:
        results[name] = [minidp.spawn(lambda comm, i: (name, i, comm.rank), 2, i) for i in range(6)]

    threads = [threading.Thread(target=several, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [[(name, i, 0), (name, i, 1)] for i in range(6)] for name in "ab"}
    assert sys.modules["__main__"] is main


SERVER = """
import os, signal, minidp
from multiprocessing import forkserver
for _ in range(3):
    print(minidp.spawn(lambda comm: comm.rank, 2))
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
"""


def test_a_killed_server_is_replaced() -> None:
    script = Script(SERVER)
    try:
        assert script.finish() == (0, "[0, 1]\n" * 3, "")
        assert gone_within(script.token, 2) is not None
    finally:
        script.clean()


# -- BLAS threads --------------------------------------------------------------------------------------------


def blas_threads(comm: Any) -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    pools = threadpoolctl.threadpool_info()
    return {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}


@pytest.mark.parametrize(
    ("world_size", "asked", "threads"),
    [(1, None, cores()), (2, None, max(1, cores() // 2)), (1, 3, 3), (2, np.int64(1), 1)],
)
def test_blas_threads(
    world_size: int, asked: int | None, threads: int, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")  # the argument decides, not what was set for this process
    if not blas_threads(None):
        pytest.skip("threadpoolctl knows no BLAS in this NumPy")
    with caplog.at_level(logging.INFO, "minidp.launch"):
        assert minidp.spawn(blas_threads, world_size, blas_threads=asked) == [{threads}] * world_size
    said = "1 worker process, " if world_size == 1 else f"{world_size} worker processes, "
    said += "1 BLAS thread each" if threads == 1 else f"{threads} BLAS threads each"
    assert caplog.records[0].getMessage() == said
    assert caplog.records[0].levelno == logging.INFO


@pytest.mark.parametrize(("there", "warns"), [(1, True), (2, False)])
def test_more_workers_than_cores_is_said(
    there: int, warns: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "cores", lambda: there)
    minidp.spawn(lambda comm: None, 2)
    want = "2 worker processes, 1 BLAS thread each on 1 cores: they take turns, so timings mean nothing"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [want] * warns


# -- prints and log records ----------------------------------------------------------------------------------


def test_prints_come_out_where_the_parent_prints() -> None:
    def speak(comm: Any) -> None:
        print("one", comm.rank)
        print("two", comm.rank, file=sys.stderr)
        print("three\nfour", comm.rank, end="")  # the last line has no end
        os.write(1, b"")  # the descriptor is there as well

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        minidp.spawn(speak, 2)
    assert sorted(re.findall(r"one \d\n|three\n|four \d", out.getvalue())) == sorted(
        ["one 0\n", "one 1\n", "three\n", "three\n", "four 0", "four 1"]
    )
    assert len(out.getvalue()) == 2 * len("one 0\nthree\nfour 0"), "each once, nothing else"
    assert sorted(err.getvalue().splitlines()) == ["two 0", "two 1"]


class Collector(logging.Handler):
    """A handler of the parent: it must get the workers' records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def texts(self, rank: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.rank == rank]  # type: ignore[attr-defined]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Listens to logger "loud" at INFO, which hands nothing on to pytest's."""
    collector, logger = Collector(), logging.getLogger("loud")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(collector)
    yield collector
    logger.removeHandler(collector)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def test_log_records_reach_the_parents_handlers(collector: Collector) -> None:
    def log(comm: Any) -> None:
        logger = logging.getLogger("loud")
        logger.debug("below the parent's level")
        logger.info("%s of %d", "hundred % sure", comm.rank)
        logging.getLogger("loud.child").warning(threading.Lock())  # what can't be pickled is formatted there
        try:
            [][comm.rank]
        except IndexError:
            logger.exception("oops")

    minidp.spawn(log, 2)
    for rank in (0, 1):
        first, second, third = collector.texts(rank)
        assert first == f"[rank {rank}] hundred % sure of {rank}"
        assert second.startswith(f"[rank {rank}] <unlocked _thread.lock")
        assert third.startswith(f"[rank {rank}] oops\nTraceback")
        assert "IndexError: list index out of range" in third
    assert [record.levelname for record in collector.records if record.name == "loud.child"] == ["WARNING"] * 2


class Slow(io.StringIO):
    """A terminal that does not keep up: much has been said and not yet printed when the other rank dies."""

    def write(self, text: str) -> int:
        time.sleep(0.002)
        return super().write(text)


def test_nothing_of_a_survivor_is_lost(collector: Collector, tmp_path: Path) -> None:
    def talk_or_die(comm: Any, done: Path, count: int) -> None:
        if comm.rank == 0:
            for i in range(count):
                logging.getLogger("loud").info(i)
                print(i)
            done.touch()
            while True:
                sum(range(100))
        while not done.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.redirect_stdout(Slow()) as out:
        assert failure(talk_or_die, tmp_path / "done", 400).rank == 1
    assert collector.texts(0) == [f"[rank 0] {i}" for i in range(400)]
    assert out.getvalue() == "".join(f"{i}\n" for i in range(400))


# -- bad arguments -------------------------------------------------------------------------------------------


def nothing(comm: Any, *args: Any) -> None: ...


@pytest.mark.parametrize(
    ("fn", "world_size", "options", "error", "says"),
    [
        (nothing, 0, {}, ValueError, "world_size=0: at least one rank is needed"),
        (nothing, -1, {}, ValueError, "world_size=-1: at least one"),
        (nothing, 1.5, {}, TypeError, "world_size must be a whole number, not 1.5"),
        (nothing, True, {}, TypeError, "world_size must be a whole number, not True"),
        (nothing, None, {}, TypeError, "world_size must be a whole number, not None"),
        (nothing, 2, {"world": "mpi"}, ValueError, "unknown world 'mpi'; valid: 'process'"),
        (nothing, 2, {"device": "tpu"}, ValueError, "unknown device 'tpu'; valid: 'cpu'"),
        (nothing, 2, {"timeout_s": 0}, ValueError, "timeout_s=0: give a positive number of seconds"),
        (nothing, 2, {"timeout_s": -1.0}, ValueError, "timeout_s=-1.0"),
        (nothing, 2, {"timeout_s": float("nan")}, ValueError, "timeout_s=nan"),
        (nothing, 2, {"timeout_s": "60"}, ValueError, "timeout_s='60'"),
        (nothing, 2, {"blas_threads": 0}, ValueError, "blas_threads=0: give a whole number, at least 1, or None"),
        (nothing, 2, {"blas_threads": 1.5}, ValueError, "blas_threads=1.5"),
        (nothing, 2, {"blas_threads": True}, ValueError, "blas_threads=True"),
        (42, 2, {}, TypeError, "fn must be a function of (comm, *args), not int"),
    ],
    ids=lambda x: x.split(":")[0] if isinstance(x, str) else "",
)
def test_bad_arguments(
    fn: Any, world_size: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        minidp.spawn(fn, world_size, **options)
    assert says in str(caught.value)


@pytest.mark.parametrize("what", ["lock", "file", "communicator", "closure"])
def test_what_cannot_travel(what: str, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        thing = {"lock": threading.Lock(), "file": file, "communicator": comm_self()}.get(what)
        lock = threading.Lock()
        fn = (lambda comm: lock) if what == "closure" else nothing
        with pytest.raises(TypeError) as caught:
            minidp.spawn(fn, 2, thing)
    assert "and its arguments can't be sent to the workers" in str(caught.value)
    assert "make them inside the function" in str(caught.value)
    assert fn.__qualname__ in str(caught.value)


def returns_a_lock(comm: Any) -> Any:
    return {"lock": threading.Lock()}


def returns_its_communicator(comm: Any) -> Any:
    return comm


def returns_nonsense(comm: Any) -> Any:
    class Nonsense:
        def __reduce__(self) -> Any:
            return int, ("x",)

    return Nonsense()


def spawns(comm: Any) -> Any:
    return minidp.spawn(nothing, 1)


def collective_after_the_return(comm: Any) -> Any:
    class Late:
        def __reduce__(self) -> Any:  # called when what the function returned is pickled: the function has ended
            comm.barrier()

    return Late()


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (returns_a_lock, "returned can't be pickled (cannot pickle '_thread.lock' object): return arrays"),
        (returns_its_communicator, "returned can't be pickled (a communicator can't be pickled: it belongs to"),
        (spawns, "raised RuntimeError: spawn was called inside a worker of another spawn"),
        (collective_after_the_return, "this communicator is closed: it lives as long as the function"),
        (lambda: None, "takes 0 positional arguments but 1 was given"),
    ],
    ids=["lock", "communicator", "nested spawn", "late collective", "no parameter"],
)
def test_functions_that_cannot_work(fn: Any, says: str) -> None:
    error = failure(fn)
    assert says in str(error)
    assert str(error).startswith(f"rank {error.rank} of 2 raised ")


def test_a_result_that_cannot_be_unpickled_names_its_rank() -> None:
    with pytest.raises(TypeError, match="what rank 0 returned can't be unpickled here: ValueError"):
        minidp.spawn(returns_nonsense, 2)


def test_no_operation_on_a_closed_communicator() -> None:
    def try_all(comm: Any) -> list[str]:
        x = np.ones(4)
        group = comm.split(0)
        comm.close()
        messages = []
        for c in (comm, group):
            for call in (
                c.barrier,
                lambda c=c: c.all_reduce(x),
                lambda c=c: c.all_reduce(x, algorithm="ring"),
                lambda c=c: c.all_reduce(x, async_op=True).wait(),
                lambda c=c: c.all_gather(np.ones(8), x),
                lambda c=c: c.reduce_scatter(np.ones(2), x),
                lambda c=c: c.broadcast(x, 0),
                lambda c=c: c.reduce(x),
                lambda c=c: c.gather(x),
                lambda c=c: c.scatter(np.ones((2, 2)) if c.rank == 0 else None),
                lambda c=c: c.all_to_all(np.ones((2, 2)), np.ones((2, 2))),
                lambda c=c: c.broadcast_object("x"),
                lambda c=c: c.all_gather_object("x"),
                lambda c=c: c.send(x, c.rank),
                lambda c=c: c.recv(x, c.rank),
                lambda c=c: c.split(0),
                lambda c=c: c.allocate(8),
            ):
                try:
                    call()
                    messages.append("nothing")
                except minidp.CommError as error:
                    messages.append(str(error)[:28])
        return messages

    for messages in minidp.spawn(try_all, 2, timeout_s=10):
        assert messages == ["this communicator is closed:"] * 34


# -- exceptions ----------------------------------------------------------------------------------------------


class Plain(Exception):
    pass


class OddConstructor(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class HoldsALock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class EndsWhoUnpicklesIt(Exception):
    def __reduce__(self) -> Any:
        return sys.exit, (7,)


@pytest.mark.parametrize(
    ("error", "says", "has_cause"),
    [
        (Plain("some", "words"), "Plain: ('some', 'words')", True),
        (ExceptionGroup("two", [Plain(1), KeyError("k")]), "ExceptionGroup: two (2 sub-exceptions)", True),
        (OddConstructor(1, 2), "OddConstructor: 1 and 2", False),
        (HoldsALock("text"), "HoldsALock: text", False),
        (NoText(), "NoText: (its __str__ raised RuntimeError)", True),
        (EndsWhoUnpicklesIt("text"), "EndsWhoUnpicklesIt: text", False),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_any_exception_arrives(error: Exception, says: str, has_cause: bool) -> None:
    """By value if it can; in any case with its type's name, text and the worker's traceback."""
    kind, args = type(error), error.args
    numbers = (1, 2) if kind is OddConstructor else args

    def fail_deep_inside(comm: Any) -> None:
        if comm.rank == 1:
            raise kind(*numbers)
        comm.barrier()

    failed = failure(fail_deep_inside)
    assert str(failed) == f"rank 1 of 2 raised {says}"
    assert failed.rank == 1
    assert [note for note in failed.__notes__ if "Traceback of rank 1:" in note and "in fail_deep_inside" in note]
    assert (type(failed.__cause__).__name__ == kind.__name__) == has_cause
    again = pickle.loads(pickle.dumps(failed))
    assert (type(again), str(again), again.rank) == (minidp.RankFailed, str(failed), 1)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("greedy", "nbytes"), [("all", 10**12), ("rank 1", 10**13)])
def test_more_memory_than_there_is(greedy: str, nbytes: int) -> None:
    """MemoryError in bytes on all ranks, whoever asked; they go on together."""

    def ask(comm: Any) -> tuple[str, bool]:
        try:
            comm.allocate(nbytes if greedy == "all" or comm.rank == 1 else 64)
        except MemoryError as error:
            views = comm.allocate(64)
            return str(error), len(views) == comm.world_size
        return "nothing", False

    for message, goes_on in minidp.spawn(ask, 3, timeout_s=10):
        number = int(re.match(r"([\d,]+) bytes of shared memory are needed", message)[1].replace(",", ""))  # type: ignore[index]
        assert number >= nbytes * (3 if greedy == "all" else 1)
        assert re.search(r"and [\d,]+ are available: use fewer ranks", message)
        assert goes_on


def test_one_rank_whose_memory_can_not_be_had_stops_all() -> None:
    """What one rank finds out by itself, after all have agreed that there is enough, reaches the others."""

    def ask(comm: Any) -> str:
        with patch("minidp.comm.process.available_bytes", lambda: 10**15), pytest.raises(MemoryError) as caught:
            comm.allocate(2 * 10**12 if comm.rank == 1 else 64)
        comm.barrier()
        return str(caught.value)

    want = "2,000,000,000,000 bytes asked for: a rank's region of shared memory holds 1,099,511,627,776"
    assert minidp.spawn(ask, 2, timeout_s=10) == [want, want]


def test_a_run_that_does_not_fit_takes_nothing() -> None:
    with pytest.raises(MemoryError, match=r"[\d,]+ bytes of shared memory are needed and [\d,]+ are available"):
        minidp.spawn(nothing, 10_000_000)


# -- progress ------------------------------------------------------------------------------------------------

PROGRESS = """
import logging, sys, threading, time
import numpy as np
import minidp
from minidp import nn, optim, parallel
from minidp.nn import functional as F
logging.basicConfig(level=logging.INFO)          # to standard error, where the bars are
def train(comm):
    model = nn.Sequential(nn.Linear(3, 2), seed=0)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    comm.progress(0, 12, "[epoch 1]")            # the total stays, while step() counts
    for step in range(12):
        strategy.forward_backward(np.ones((4, 3), np.float32), np.zeros(4, int), F.cross_entropy)
        strategy.step()
        time.sleep(0.12)
        logging.getLogger("w").info("step %d", step)
    print("printed [bold] by", comm.rank)
    print("unfinished", comm.rank, end="")
    sys.stdout.flush()
    time.sleep(0.3)                              # long enough for bars below it
print("before")
if not sys.stdout.isatty():
    threading.Timer(1, print, ["from another thread"]).start()
minidp.spawn(train, 2, progress=True)
print("after")
"""


def in_a_terminal(source: str, path: Path, stdout: Path | None) -> tuple[int, str]:
    """Run it with standard error, and output if no file is given, on a terminal of 100 columns."""
    path.write_text(source)
    master, slave = pty.openpty()
    try:
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(stdout.open("w")) if stdout else slave
            environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(
                [sys.executable, str(path)], stdin=subprocess.DEVNULL, stdout=out, stderr=slave, env=environment
            )
        os.close(slave)
        slave, data = -1, b""
        with contextlib.suppress(OSError):  # Linux: EIO when the last process has closed its end
            while piece := os.read(master, 65536):
                data += piece
        return process.wait(20), data.decode()
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)
        with contextlib.suppress(NameError):
            process.kill()
            process.wait()


def replay(data: str) -> list[str]:
    """What stands on the terminal in the end: text, returns, line feeds, cursor up, erase line."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for argument, command, control, char in re.findall(r"\x1b\[([\d;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n])", data):
        if command == "A":
            row -= int(argument or 1)
            assert row >= 0, "the cursor left the screen"
        elif command == "K":
            assert argument == "2"
            lines[row] = []
        elif control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [[]] * (row == len(lines))
        elif char:
            lines[row] = [*lines[row], *" " * (column - len(lines[row]))]
            lines[row][column : column + 1] = [char]
            column += 1
        else:
            assert command in "mhl", f"unknown command {command}"
    return [text for text in ("".join(line).rstrip() for line in lines) if text]


@pytest.mark.parametrize("redirected", [False, True])
def test_progress_in_a_terminal(redirected: bool, tmp_path: Path) -> None:
    """Bars while it runs; in the end the terminal, or the file, holds what was printed and logged, and no more."""
    file = tmp_path / "out.txt" if redirected else None
    code, data = in_a_terminal(PROGRESS, tmp_path / "program.py", file)
    assert code == 0
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", data)
    for rank in (0, 1):
        assert re.search(rf"rank {rank} \S+ +\d+/12 \d+ steps/s \[epoch 1\]", shown), "a bar with total and note"
    assert "2 worker processes, " in shown
    if not redirected:
        assert data.rindex("\x1b[?25h") > data.rindex("\x1b[?25l"), "the cursor is shown again"
    screen = replay(data)
    assert not [line for line in screen if "━" in line]
    printed = file.read_text().splitlines() if file else screen
    logged = re.findall(r"INFO:w:\[rank \d\] step \d+", "\n".join(screen))
    assert sorted(logged) == sorted(f"INFO:w:[rank {rank}] step {step}" for rank in (0, 1) for step in range(12))
    spoken = re.findall(r"printed \[bold\] by \d|unfinished \d", "\n".join(printed))
    assert sorted(spoken) == ["printed [bold] by 0", "printed [bold] by 1", "unfinished 0", "unfinished 1"]
    assert printed.count("from another thread") == redirected, "bars do not send it elsewhere"
    assert printed[0] == "before"
    assert printed[-1].endswith("after")


def test_progress_is_for_terminals_and_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    from minidp.launch.progress import wanted

    file, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", file)
    assert [wanted(asked) for asked in (None, True, False)] == [False, False, False]
    monkeypatch.setattr(sys, "stderr", terminal)
    assert [wanted(asked) for asked in (None, True, False)] == [True, True, False]


def test_steps_of_a_strategy_are_its_progress() -> None:
    comm = comm_self()
    model = nn.Sequential(nn.Linear(3, 2), seed=0)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    board: Board = comm._rendezvous.watch.board
    comm.progress(0, 9, "epoch 1")
    for _ in range(4):
        strategy.forward_backward(np.ones((4, 3), np.float32), np.zeros(4, int), F.cross_entropy)
        strategy.step()
    assert board.progress_of(0) == (4, 9, "epoch 1")
    comm.close()


def test_signals_that_the_program_handles_wait_until_workers_are_started() -> None:
    came: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append("handled"))
    try:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            came.append("started")
        assert came == ["started", "handled"]
    finally:
        signal.signal(signal.SIGTERM, before)
