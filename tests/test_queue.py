"""The process world's parts, all in one process: arena, board, word, queue, mailbox."""

from __future__ import annotations

import mmap
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp.comm import ANY, CollectiveMismatch, CollectiveTimeout
from minidp.comm.arena import REGION, Arena, available_bytes, round_up
from minidp.comm.board import NOBODY, Board, Wait
from minidp.comm.mailbox import Mailbox
from minidp.comm.queue import QUEUE_BYTES, SLOT_BYTES, SLOTS, ArrayQueue, Chunk, Incoming, Outgoing
from minidp.comm.traffic import Traffic
from minidp.comm.word import LINE, Word
from minidp.comm.wording import name_ranks
from minidp.comm.world import join_world, reserve_world

PAGE = mmap.ALLOCATIONGRANULARITY


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(3)
    yield arena
    arena.close()


# -- arena ---------------------------------------------------------------------------------------------------


def test_every_rank_hands_out_pieces_of_its_own_region(arena: Arena) -> None:
    assert [arena.take(0, n) for n in (1, 0, PAGE, PAGE + 1, 1)] == [0, PAGE, PAGE, 2 * PAGE, 4 * PAGE]
    assert [arena.take(2, n) for n in (10, 10)] == [2 * REGION, 2 * REGION + PAGE]
    assert arena.take(1, REGION) == REGION, "a region can be taken whole"
    with pytest.raises(
        MemoryError, match="1 bytes asked for: a rank's region of shared memory holds 1,099,511,627,776"
    ):
        arena.take(1, 1)
    assert [round_up(n, 64) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]


def test_a_mapping_is_the_same_memory_for_all(arena: Arena) -> None:
    offset = arena.take(1, 1000)
    arena.reserve(offset, 1000)
    one, other = arena.map(offset, 1000), arena.map(offset, 1000, populate=True)
    assert one.dtype == np.uint8
    assert len(one) == 1000
    assert not one.any()
    one.view(np.int64)[3] = -12345
    assert other.view(np.int64)[3] == -12345
    assert arena.peek(offset + 24) == -12345, "read without a mapping"
    assert arena.map(offset, 0).size == 0
    arena.reserve(offset, 0)


def test_memory_that_is_not_there_is_refused_before_it_is_touched(arena: Arena) -> None:
    wanted = available_bytes() + 2**30
    with pytest.raises(MemoryError) as caught:
        arena.reserve(arena.take(0, wanted), wanted)
    needed, free = re.findall(r"[\d,]{2,}\d", str(caught.value))
    assert int(needed.replace(",", "")) == wanted
    assert 0 < int(free.replace(",", "")) < wanted
    assert "use fewer ranks, a smaller model or a smaller optimizer state" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="seals are a matter of memfd (Linux)")
@pytest.mark.parametrize("size", [0, 100 * REGION])
def test_nobody_can_change_the_size(arena: Arena, size: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, size)


def test_close_twice(arena: Arena) -> None:
    mapping = arena.map(arena.take(0, 8), 8)
    arena.close()
    arena.close()
    mapping[0] = 1  # lives as long as the array


# -- board ---------------------------------------------------------------------------------------------------


@pytest.fixture
def board(arena: Arena) -> Board:
    Board.reserve(arena, 4)
    return Board(arena, 4)


def test_the_first_failure_and_the_first_verdict_stay(arena: Arena, board: Board) -> None:
    other = Board(arena, 4)
    assert other.aborted() is None
    assert other.verdict() is None
    for rank, text in ((2, "ärger " * 300), (1, "later")):
        board.abort(rank, text)
        board.condemn(text)
    rank, reason = other.aborted() or (None, "")
    assert rank == 2
    assert len(reason.encode()) <= 963  # a letter cut in two is shown as one that can't be read
    assert reason.startswith("ärger ärger ")
    assert (other.verdict() or "").startswith("ärger ärger ")


def test_who_waits_where_in_one_sentence(arena: Arena, board: Board) -> None:
    other = Board(arena, 4)
    for rank in range(4):
        board.running(rank, 1000 + rank)
    assert other.where_all_are() == "ranks 0, 1, 2, 3 compute"
    wait = Wait(7, 2, 4096, 5, "all_reduce #412")
    for rank in (3, 0, 1):
        board.wait(rank, wait)
    assert other.where_all_are() == "rank 2 computes; ranks 0, 1, 3 wait in all_reduce #412"
    now = time.monotonic_ns()
    other.seen(2, "forward, layer 3 (conv2)", now - 1_200_000_000, now)
    assert (
        other.where_all_are() == "rank 2: forward, layer 3 (conv2), 1.2 s; ranks 0, 1, 3 wait in all_reduce #412"
    )
    other.seen(2, "forward, layer 3 (conv2)", now - 9_000_000_000, now - 4_000_000_000)
    assert re.fullmatch(r"forward, layer 3 \(conv2\), last seen 4\.\d s ago", other.whereabouts(2) or "")
    assert not other.all_wait_or_returned()
    board.returned(2)
    assert other.where_all_are() == "rank 2 returned; ranks 0, 1, 3 wait in all_reduce #412"
    assert other.all_wait_or_returned()
    board.waits_no_more(0)
    board.wait(1, Wait(8, NOBODY, 0, 0, "recv"))
    assert (
        other.where_all_are()
        == "rank 2 returned; rank 0 computes; rank 1 waits in recv; rank 3 waits in all_reduce #412"
    )
    assert other.waiting(3) == wait
    assert other.waiting(0) is None
    assert [other.pid(rank) for rank in range(4)] == [1000, 1001, 1002, 1003]
    assert name_ranks([4]) == "rank 4"
    assert name_ranks([0, 2], "are late") == "ranks 0, 2 are late"


def test_of_many_ranks_only_the_ends_are_named() -> None:
    assert name_ranks([*range(8)]) == "ranks 0, 1, 2, 3, 4, 5, 6, 7"
    assert name_ranks([*range(9)]) == "ranks 0 to 8"
    assert name_ranks([0, *range(2, 99), 101, 102], "compute") == "ranks 0, 2 to 98, 101, 102 compute"
    assert name_ranks([*range(20)], servers_from=10) == "ranks 0 to 9 and servers 0 to 9"


def test_progress(arena: Arena, board: Board) -> None:
    other = Board(arena, 4)
    assert other.progress_of(1) == (0, 0, "")
    board.progress(1, 3, 10, "epoch 1")
    board.progress(1, 4, 0, None)
    assert other.progress_of(1) == (4, 10, "epoch 1"), "what is not said again stays"
    board.progress(1, 5, 20, "")
    assert other.progress_of(1) == (5, 20, "")
    assert other.progress_of(0) == other.progress_of(2) == (0, 0, ""), "each has its own record"
    board.notice(3)
    assert [other.noticed(rank) for rank in range(4)] == [False, False, False, True]


# -- word ----------------------------------------------------------------------------------------------------


def test_a_sleeper_is_woken_or_wakes_by_itself(arena: Arena) -> None:
    arena.reserve(arena.take(0, LINE), LINE)
    mine, theirs = (Word(arena.map(0, LINE), 0, 0) for _ in range(2))
    assert not theirs.reached(1)
    assert not theirs.sleep(1), "back after 2 ms, so that it can look whether anybody lives"
    thread = threading.Timer(0.02, mine.publish, [5])
    thread.start()
    while not theirs.sleep(4):
        pass
    thread.join()
    assert theirs.reached(5)
    assert not theirs.reached(6)
    assert theirs.sleep(3), "no sleep if it is there"


# -- queue ---------------------------------------------------------------------------------------------------


def two_ends(arena: Arena) -> tuple[ArrayQueue, ArrayQueue]:
    """The sender's and the receiver's view of one queue, in memory of their own mappings."""
    offset = arena.take(0, QUEUE_BYTES)
    arena.reserve(offset, QUEUE_BYTES)
    return ArrayQueue(arena, offset, 0, 1), ArrayQueue(arena, offset, 0, 1)


def payload(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def test_full_and_empty(arena: Arena) -> None:
    sender, receiver = two_ends(arena)
    assert receiver.empty()
    for i in range(SLOTS):
        assert not sender.full()
        sender.put(Chunk(i, 5, 5, "uint8[5]"), payload(i, 5))
    assert sender.full(), "back-pressure: the sender must wait"
    assert not receiver.empty()
    out = np.empty(5, np.uint8)
    receiver.take(out)
    assert not sender.full()
    assert np.array_equal(out, payload(0, 5))
    for i in range(1, SLOTS):
        assert receiver.peek().tag == i
        receiver.take(out)
    assert receiver.empty()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([0, 1, 63, 64, 65, SLOT_BYTES - 1, SLOT_BYTES])), max_size=60
    )
)
def test_a_queue_is_a_bounded_first_in_first_out(operations: list[tuple[bool, int]]) -> None:
    """Whatever the order of puts and takes, around the end of the slots and again; against a deque."""
    arena = Arena.create(1)
    sender, receiver = two_ends(arena)
    model: deque[tuple[Chunk, np.ndarray]] = deque()
    for i, (put, size) in enumerate(operations):
        assert sender.full() == (len(model) == SLOTS)
        assert receiver.empty() == (not model)
        if put and not sender.full():
            chunk = Chunk(i - 30, 10**12 + i, size, f"float32[{size}] ä")
            sender.put(chunk, payload(i, size))
            model.append((chunk, payload(i, size)))
        elif not put and model:
            want, data = model.popleft()
            assert receiver.peek() == want
            out = np.empty(want.chunk_bytes, np.uint8)
            receiver.take(out)
            assert np.array_equal(out, data)
    arena.close()


@pytest.mark.parametrize("size", [0, 1, SLOT_BYTES, SLOT_BYTES + 1, 20 * SLOT_BYTES + 7])
def test_a_message_is_cut_into_chunks(size: int, arena: Arena) -> None:
    sender, receiver = two_ends(arena)
    data = payload(size, size)
    leaving = Outgoing(3, "uint8", data)
    arriving: Incoming | None = None
    chunks = 0
    while arriving is None or not arriving.done:
        moved = leaving.push(sender)
        assert moved == (not receiver.empty()) or leaving.done
        assert leaving.done or sender.full()
        arriving = arriving or Incoming.aside(0, receiver.peek())
        arriving.pull(receiver)
        chunks += 1
    assert leaving.done
    assert not leaving.push(sender), "nothing is sent twice"
    assert receiver.empty()
    assert chunks == max(1, -(-size // SLOT_BYTES)), "an empty message is one empty chunk"
    assert np.array_equal(arriving.data, data)


# -- mailbox -------------------------------------------------------------------------------------------------


@pytest.fixture
def boxes() -> Iterator[tuple[Mailbox, Mailbox, Mailbox]]:
    """Three ranks of one world, all in this process: nothing moves unless somebody pumps."""
    arena = reserve_world(3)
    comms = [join_world(arena, rank, 3, timeout_s=0.3) for rank in range(3)]
    yield tuple(comm._mailbox for comm in comms)  # type: ignore[misc]
    arena.close()


Boxes = tuple[Mailbox, Mailbox, Mailbox]


def test_a_posted_receive_gets_the_bytes_at_once(boxes: Boxes) -> None:
    a, b, _ = boxes
    got = np.zeros((3, 4), np.float32)
    receiving = b.recv(got, 0, 7)
    assert not receiving.done
    assert b.busy
    sending = a.send(np.arange(12, dtype=np.float32).reshape(3, 4), 1, 7)
    assert sending.done, "it fits into the queue"
    b.pump()
    assert receiving.done
    assert receiving.wait() == 0
    assert np.array_equal(got, np.arange(12).reshape(3, 4))
    assert not a.busy
    assert not b.busy


def test_messages_wait_aside_until_they_are_asked_for_in_any_order_of_tags(boxes: Boxes) -> None:
    a, b, _ = boxes
    for tag, value in ((1, 10), (2, 20), (1, 11), (3, 30)):
        a.send(np.array([value]), 1, tag)
    b.pump()
    got = np.zeros(1, np.int64)
    for tag, want in ((3, 30), (1, 10), (2, 20), (1, 11)):  # one tag: in the order of sending
        assert b.recv(got, 0, tag).wait() == 0
        assert got[0] == want


def test_a_receive_may_be_posted_while_its_message_arrives(boxes: Boxes) -> None:
    a, b, _ = boxes
    data = payload(1, 30 * SLOT_BYTES)
    sending = a.send(data, 1, 5)
    assert not sending.done, "longer than the queue: back-pressure"
    b.pump()  # begins to lie aside
    got = np.zeros_like(data)
    receiving = b.recv(got, ANY, 5)
    while not receiving.done:
        assert a.pump() | b.pump(), "nobody moves"
    assert sending.done
    assert np.array_equal(got, data)


def test_from_any_rank_and_to_oneself(boxes: Boxes) -> None:
    a, b, c = boxes
    got = np.zeros(2)
    b.send(np.full(2, 1.0), 0, 4)
    c.send(np.full(2, 2.0), 0, 4)
    a.send(np.full(2, 0.0), 0, 4)
    a.send(np.full(2, 9.0), 0, 8)
    seen = {a.recv(got, ANY, 4).wait(): got[0] for _ in range(3)}
    assert seen == {0: 0.0, 1: 1.0, 2: 2.0}
    assert a.recv(got, 0, 8).wait() == 0
    assert got[0] == 9.0


@pytest.mark.parametrize("posted_first", [True, False])
def test_another_dtype_or_size_is_told(boxes: Boxes, posted_first: bool) -> None:
    a, b, _ = boxes

    def exchange() -> None:
        if posted_first:
            b.recv(np.zeros(3, np.float32), 0, 1)
        a.send(np.zeros(4, np.float32), 1, 1)
        b.pump()
        b.recv(np.zeros(3, np.float32), 0, 1)

    with pytest.raises(
        CollectiveMismatch, match=r"rank 0 sent float32\[4\] with tag 1; rank 1 receives float32\[3\]"
    ):
        exchange()


@pytest.mark.parametrize(
    "array",
    [
        np.array(5.0),
        np.zeros((0, 3)),
        np.arange(12).reshape(3, 4).T,
        np.arange(10)[::-3],
        np.array([1, 2], ">i4"),
        np.array(["2026-11-23"], "datetime64[D]"),
        np.array([b"ab"]),
        np.array([(1, 2.0)], np.dtype([(f"field {'x' * 20} {i}", "f8") for i in range(2)])),
        np.array([(1,) * 9], np.dtype([(f"size {i}", "i8") for i in range(9)])),
        np.array([(1,) * 9], np.dtype([(f"Größe {i}", "i8") for i in range(9)])),
    ],
    ids=lambda a: str(a.dtype)[:20],
)
def test_any_dtype_and_shape(array: np.ndarray, boxes: Boxes) -> None:
    a, b, _ = boxes
    got = np.zeros(array.shape[::-1], array.dtype).T  # not contiguous, if that is possible
    a.send(array, 1, 0)
    assert b.recv(got, 0, 0).wait() == 0
    assert got.tolist() == array.tolist()


def test_a_wait_that_nobody_ends_names_the_absent(boxes: Boxes) -> None:
    a, b, _ = boxes
    with pytest.raises(CollectiveTimeout, match=r"rank 1 did not come to recv from rank 1, tag 3 \(int64\[2\]\)"):
        a.recv(np.zeros(2, np.int64), 1, 3).wait()
    with pytest.raises(CollectiveTimeout, match=r"rank 0 did not come to send to rank 0, tag 0 \(uint8\["):
        b.send(payload(0, 20 * SLOT_BYTES), 0, 0).wait()


def test_bytes_are_counted_where_they_move(boxes: Boxes) -> None:
    a, b, _ = boxes
    data = payload(0, 12 * SLOT_BYTES)
    sending = a.send(data, 1, 0)
    assert (a.traffic.bytes_sent, a.traffic.messages_sent) == (0, 0), "it has not left yet"
    receiving = b.recv(np.empty_like(data), 0, 0)
    while not receiving.done:
        b.pump()
        a.pump()
    assert sending.done
    assert (a.traffic.bytes_sent, a.traffic.messages_sent, a.traffic.bytes_received) == (len(data), 1, 0)
    assert (b.traffic.bytes_received, b.traffic.bytes_sent) == (len(data), 0)
    a.send(data[:5], 0, 1)
    assert a.traffic.bytes_sent == len(data), "to oneself nothing moves"


def test_traffic_counts_for_the_group_and_for_its_origin() -> None:
    world = Traffic()
    group = Traffic(parent=Traffic(parent=world))
    group.add(10, 20)
    world.add(1)
    counts: list[Any] = [(t.bytes_sent, t.bytes_received, t.messages_sent) for t in (group, world)]
    assert counts == [(10, 20, 1), (11, 20, 2)]
