"""How N ranks add up what they have compressed: sum, gather and owners, over a reducer that lives in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from minidp import compress
from minidp.compress import Payload, get
from minidp.compress.compressor import cuts
from tests.test_compress import PLAIN, SPECS, normal, raw
from tests.test_compress_laws import all_fractions, fractions


class Board:
    """Where ranks, which are threads, lay out what others read."""

    def __init__(self, ranks: int) -> None:
        self.places: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)

    def all_gather(self, rank: int, what: Any) -> list[Any]:
        self.places[rank] = what
        self.barrier.wait()
        seen = list(self.places)
        self.barrier.wait()  # nobody lays out the next thing before all have read this one
        return seen


class Memory:
    """A `Reducer` that counts the bytes which this rank would have sent: each as if by direct messages."""

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.world_size = board, rank, len(board.places)
        self.sent = 0

    def sum(self, array: Any) -> Any:
        """In rank order. Each rank sends the others their parts, and then its part of the sum to all. As a sum in
        place would, it leaves something else in ``array``."""
        parts = np.array_split(np.arange(array.size), self.world_size)
        lengths = [part.size * array.itemsize for part in parts]
        self.sent += sum(lengths) - lengths[self.rank] + (self.world_size - 1) * lengths[self.rank]
        everybodys = self.board.all_gather(self.rank, array)
        total = everybodys[0].copy()
        for other in everybodys[1:]:
            total += other
        self.board.barrier.wait()
        array[...] = 7
        return total

    def gather(self, payload: Payload) -> list[Payload]:
        self.sent += (self.world_size - 1) * payload.nbytes
        return self.board.all_gather(self.rank, payload)

    def scatter(self, payloads: Sequence[Payload]) -> list[Payload]:
        assert len(payloads) == self.world_size
        self.sent += sum(payload.nbytes for j, payload in enumerate(payloads) if j != self.rank)
        return [of_rank[self.rank] for of_rank in self.board.all_gather(self.rank, list(payloads))]


def together(ranks: int, work: Callable[[int, Memory], Any]) -> list[Any]:
    """What ``work(rank, reducer)`` returns on each of so many threads; the first error, if one raised any."""
    board, found, errors = Board(ranks), [None] * ranks, []

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, Memory(board, rank))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def gradient(rank: int, call: int, shape: Any, dtype: Any = np.float32) -> np.ndarray:
    return normal(shape, dtype, seed=100 * rank + call)


def exchanges(
    spec: str, ranks: int, arrays: Callable[[int, int], Any], calls: int = 1, **options: Any
) -> list[Any]:
    """Of each rank: the sums, its compressor, and the bytes that it has sent."""

    def work(rank: int, reducer: Memory) -> Any:
        compressor = get(spec, rank=rank, **options)
        sums = [compressor.exchange(arrays(rank, call), "w", reducer) for call in range(calls)]
        return sums, compressor, reducer.sent

    return together(ranks, work)


def plain_sum(ranks: int, arrays: Callable[[int, int], Any], call: int = 0) -> Any:
    total = arrays(0, call)
    for rank in range(1, ranks):
        total = total + arrays(rank, call)
    return total


# -- all routes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_all_ranks_have_the_same_bits(spec: str, ranks: int) -> None:
    """More ranks than elements, no elements, parts without elements, one rank that has only zeros."""
    shapes = [(), (0,), (1,), (3,), (7, 9), (300,), (40, 13)]

    def work(rank: int, reducer: Memory) -> Any:
        compressor, found = get(spec, rank=rank), []
        for call, dtype in ((0, np.float32), (1, np.float32), (2, np.float16)):
            for shape in shapes:
                array = gradient(rank, call, shape, dtype)
                if rank == 1 and call == 1:
                    array[...] = 0
                array.setflags(write=False)
                total = compressor.exchange(array, f"{shape} {dtype}", reducer)
                assert type(total) is np.ndarray
                assert (total.shape, total.dtype) == (shape, dtype)
                assert np.isfinite(total).all()
                assert total.flags.writeable
                found.append(total.tobytes())
        return found

    found = together(ranks, work)
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_of_all_are_zero(spec: str) -> None:
    for sums, _, _ in exchanges(spec, 3, lambda rank, call: np.zeros((20, 13), np.float32), calls=2):
        assert not np.any(sums)


@pytest.mark.parametrize("spec", SPECS)
def test_the_sum_is_nobody_elses(spec: str) -> None:
    """What a rank does with the sum, or with its gradient, reaches no other rank."""

    def work(rank: int, reducer: Memory) -> Any:
        compressor, found = get(spec, rank=rank), []
        for shape in ((1,), (9,), (20, 13)):
            array = gradient(rank, 0, shape)
            total = compressor.exchange(array, str(shape), reducer)
            before = total.tobytes()
            array[...] = 1e3
            reducer.board.all_gather(rank, None)
            assert total.tobytes() == before
            total[...] = rank
            reducer.board.all_gather(rank, None)
            assert (total == rank).all()
            found.append(before)
        return found

    found = together(3, work)
    assert found[0] == found[1] == found[2]


BIASED = ("topk:0.3", "topk:0.3:owners", "powersgd:2", "terngrad:2.5", "bf16:truncate", "sign", "sign+ef")


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in (*BIASED, "qsgd:1")])
def test_it_is_about_the_sum(spec: str) -> None:
    """In the mean over 40 calls of the same gradient, of unbiased ones and of those with error feedback."""

    def same(rank: int, call: int) -> np.ndarray:
        return gradient(rank, 0, (12, 20), np.float64)

    [(sums, _, _), *_] = exchanges(spec, 2, same, 40)
    want = plain_sum(2, same)
    error = np.linalg.norm(np.mean(sums, axis=0) - want) / np.linalg.norm(want)
    # qsgd:1 has errors as long as √20 gradients, from which feedback needs the longest to recover.
    assert error < (0.6 if spec == "qsgd:1+ef" else 0.15 if spec.endswith("+ef") else 0.4)


# -- sum --------------------------------------------------------------------------------------------------------


def test_the_sum_route_adds_payloads() -> None:
    for spec in ("none", "randomk:0.3"):
        for sums, _, _ in exchanges(spec, 4, lambda rank, call: fractions((6, 7), 10 * rank + call), calls=3):
            for call, total in enumerate(sums):
                alone = [get(spec) for _ in range(4)]
                for _ in range(call):
                    for compressor in alone:
                        compressor.compress(fractions((6, 7), 0), "w")
                parts = [c.compress(fractions((6, 7), 10 * r + call), "w") for r, c in enumerate(alone)]
                assert all_fractions(total)
                assert np.all(total == sum(alone[0].decompress(part) for part in parts))


def test_fp16_is_summed_in_fp16() -> None:
    [(sums, _, _), *_] = exchanges("fp16", 3, lambda rank, call: gradient(rank, call, 50))
    halves = [gradient(rank, 0, 50).astype(np.float16) for rank in range(3)]
    assert sums[0].tobytes() == (halves[0] + halves[1] + halves[2]).astype(np.float32).tobytes()


def test_without_compression_it_is_the_sum() -> None:
    for ranks in (1, 2, 4):
        for sums, _, _ in exchanges("none", ranks, lambda rank, call: gradient(rank, call, (5, 6))):
            assert sums[0].tobytes() == plain_sum(ranks, lambda rank, call: gradient(rank, call, (5, 6))).tobytes()


# -- gather -----------------------------------------------------------------------------------------------------


def test_the_gather_route_is_the_sum_in_rank_order() -> None:
    for ranks in (1, 2, 4):
        found = exchanges("topk:0.3", ranks, lambda rank, call: gradient(rank, call, (9, 11)), calls=2)
        for sums, _, _ in found:
            for call, total in enumerate(sums):
                parts = [get("topk:0.3") for _ in range(ranks)]
                want = np.zeros((9, 11), np.float32)
                for rank, compressor in enumerate(parts):
                    want = want + compressor.decompress(compressor.compress(gradient(rank, call, (9, 11)), "w"))
                assert total.tobytes() == want.tobytes()


@pytest.mark.parametrize("spec", SPECS)
def test_combine_is_the_sum_of_what_payloads_stand_for(spec: str) -> None:
    """In rank order, for gathering and for servers; but of signs it is the vote."""
    compressor = get(spec)
    payloads = [get(spec, rank=rank).compress(gradient(rank, 0, (9, 11)), "w") for rank in range(4)]
    before = [raw(payload) for payload in payloads]
    parts = [compressor.decompress(payload) for payload in payloads]
    want = parts[0] + parts[1] + parts[2] + parts[3]
    found = compressor.combine(payloads)
    assert found.tobytes() == (np.sign(want) if spec == "sign" else want).tobytes()
    assert compressor.combine(payloads[:1]).tobytes() == parts[0].tobytes()
    assert [raw(payload) for payload in payloads] == before
    inner = getattr(compressor, "inner", compressor)
    assert inner.add(parts[0].copy(), payloads[1]).tobytes() == (parts[0] + parts[1]).tobytes()
    assert inner.subtract(parts[0].copy(), payloads[1]).tobytes() == (parts[0] - parts[1]).tobytes()


# -- owners -----------------------------------------------------------------------------------------------------


def test_parts_cover_all_and_begin_at_lines_of_64() -> None:
    for size in (0, 1, 63, 64, 65, 128, 1000, 4096, 70001):
        for ranks in (1, 2, 3, 5, 8, 70):
            parts = cuts(size, ranks)
            assert len(parts) == ranks
            assert [lo for lo, _ in parts] == [0, *(hi for _, hi in parts[:-1])]
            assert parts[-1][1] == size
            assert all(lo % 64 == 0 or lo == size for lo, _ in parts)
            lengths = [hi - lo for lo, hi in parts]
            assert max(lengths) - min(lengths) < 128
    assert [hi - lo for lo, hi in cuts(640, 5)] == [128] * 5


@pytest.mark.parametrize("spec", ["int8", "bf16", "bf16:truncate", "sign", "topk:0.3:owners"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_owners_sum_parts_and_compress_the_sum(spec: str, ranks: int) -> None:
    """By the definition, part by part: C(Σ C(g_i)), to the bit. Nothing here is random."""
    for size in (3, 200, 5000):
        found = exchanges(spec, ranks, lambda rank, call, size=size: gradient(rank, call, size))
        compressor, want = get(spec), []
        for lo, hi in cuts(size, ranks):
            if lo == hi:
                continue
            parts = [compressor.compress(gradient(rank, 0, size)[lo:hi], "w") for rank in range(ranks)]
            want.append(compressor.decompress(compressor.compress(compressor.combine(parts), "w")))
        for sums, _, _ in found:
            assert sums[0].tobytes() == np.concatenate(want).tobytes()


def test_errors_of_owners_are_bounded_exactly() -> None:
    """int8 in Fractions: half a step of each sender's part, and half a step of the sum's."""
    ranks, size = 3, 150
    [(sums, _, _), *_] = exchanges("int8", ranks, lambda rank, call: fractions(size, rank))
    want = plain_sum(ranks, lambda rank, call: fractions(size, rank))
    for lo, hi in cuts(size, ranks):
        bound = sum(max(abs(fractions(size, rank)[lo:hi])) / 254 for rank in range(ranks))
        largest_sum = max(abs(want[lo:hi])) + bound
        assert all(abs(sums[0][lo:hi] - want[lo:hi]) <= bound + largest_sum / 254)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_majority_vote(ranks: int) -> None:
    """What most say; 0 where as many say the opposite; who has 0 does not vote. In Fractions and in floats."""
    for kind in ("fractions", "floats"):

        def arrays(rank: int, call: int, kind: str = kind) -> Any:
            whole = fractions((20, 10), 7 * rank)
            return whole if kind == "fractions" else whole.astype(np.float32)

        votes = sum(np.sign(arrays(rank, 0)) for rank in range(ranks))
        if ranks > 1:
            assert sum(votes.ravel() == 0) > 5
        for sums, _, _ in exchanges("sign", ranks, arrays):
            assert np.all(sums[0] == np.sign(votes))


def test_a_tie_is_0_and_sign_with_feedback_adds() -> None:
    pairs = [np.array([1.0, 1.0, -2.0, 0.0, 0.0]), np.array([-5.0, 1.0, -1.0, 0.0, -3.0])]
    for sums, _, _ in exchanges("sign", 2, lambda rank, call: pairs[rank]):
        assert list(sums[0]) == [0, 1, -1, 0, -1]
    [(sums, _, _), *_] = exchanges("sign+ef", 2, lambda rank, call: np.full(5, [1.0, 3.0][rank]))
    assert list(sums[0]) == [4] * 5


# -- error feedback ---------------------------------------------------------------------------------------------


def of_parts(states: list[dict[str, np.ndarray]], size: int) -> np.ndarray:
    """Σ of all that any rank remembers, where it belongs: whole arrays, parts, and sums of parts."""
    ranks, total = len(states), np.full(size, Fraction(0), object)
    for rank, state in enumerate(states):
        for j, (lo, hi) in enumerate(cuts(size, ranks)):
            total[lo:hi] += state.get(f"residual/w[{j}]", 0)
            if j == rank:
                total[lo:hi] += state.get("residual/w.sum", 0)
        total += state.get("residual/w", 0)
    return total


@pytest.mark.parametrize(
    "spec", ["topk:0.2", "topk:0.2:owners", "randomk:0.2", "int8", "sign", "terngrad", "none"]
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_all_have_dropped_comes_later_exactly(spec: str, ranks: int) -> None:
    """Σ of sums + Σ over ranks of residuals = Σ of all gradients; owners remember what their sum lost."""
    size, calls = 140, 4
    found = exchanges(f"{spec}+ef", ranks, lambda rank, call: fractions(size, 10 * rank + call), calls)
    went_in = sum(fractions(size, 10 * rank + call) for rank in range(ranks) for call in range(calls))
    states = [compressor.state_dict() for _, compressor, _ in found]
    late = of_parts(states, size)
    if get(spec).route == "owners" and ranks > 1:  # the sum's own memory, and one of each part
        assert {name for name in states[0] if "residual" in name} == {
            "residual/w.sum",
            *(f"residual/w[{j}]" for j in range(ranks)),
        }
    for sums, _, _ in found:
        assert np.all(sum(sums) + late == went_in)
    assert np.any(late) or spec == "none"


def test_powersgd_gradient_is_contribution_and_residual() -> None:
    """Each rank: g_i + e = its part P Q_iᵀ of the sum + its new e; and the parts add up to the sum."""

    def work(rank: int, reducer: Memory) -> Any:
        compressor, e = get("powersgd:2+ef", rank=rank), np.zeros((20, 30))
        for call in range(4):
            g = gradient(rank, call, (20, 30), np.float64)
            total, own = compressor.exchanged(g, "w", reducer)
            part = compressor.decompress(own)
            assert np.allclose(part + compressor.residual("w"), g + e, rtol=0, atol=1e-12)
            assert np.abs(compressor.residual("w")).max() > 0.1
            parts = reducer.board.all_gather(rank, part)
            assert np.allclose(sum(parts), total, rtol=0, atol=1e-12)
            e = compressor.residual("w").copy()
        vector = gradient(rank, 0, 7, np.float64)
        total, own = compressor.exchanged(vector, "v", reducer)
        assert not compressor.residual("v").any()
        return total

    for total in together(3, work):
        assert np.allclose(total, plain_sum(3, lambda rank, call: gradient(rank, 0, 7, np.float64)))


def test_powersgd_of_ranks_is_exact_if_the_sum_has_the_rank() -> None:
    """Each rank's gradient has rank 1, their sum 3: P is made of the sum, Q is the same on all."""

    def outer(rank: int, call: int) -> np.ndarray:
        return np.outer(gradient(rank, 0, 20, np.float64), gradient(rank, 1, 30, np.float64))

    found = exchanges("powersgd:3", 3, outer, calls=2)
    want = plain_sum(3, outer)
    states = [compressor.state_dict() for _, compressor, _ in found]
    for (sums, _, _), state in zip(found, states):
        for total in sums:
            assert np.allclose(total, want, rtol=0, atol=1e-11)
        assert state["q/w"].tobytes() == states[0]["q/w"].tobytes()
    assert np.abs(exchanges("powersgd:2", 3, outer)[0][0][0] - want).max() > 0.1


def test_q_is_drawn_alike_on_all_ranks() -> None:
    """Otherwise P = Σ M_i Q_i is no product with any matrix: the first step of a rank-1 sum would not be exact."""
    u, v = normal(20, np.float64), normal(30, np.float64, seed=1)
    for sums, _, _ in exchanges("powersgd:1", 4, lambda rank, call: (rank - 1.4) * np.outer(u, v)):
        assert np.allclose(sums[0], 0.4 * np.outer(u, v), atol=1e-12)


def test_a_state_goes_on_among_ranks() -> None:
    """Saved by each rank, loaded into fresh compressors: the next sums have the same bits."""
    for spec in [f"{s}+ef" for s in PLAIN]:

        def work(rank: int, reducer: Memory, spec: str = spec) -> None:
            one, other = get(spec, rank=rank), get(spec, seed=8, rank=rank)
            for call in range(2):
                one.exchange(gradient(rank, call, (20, 13)), "w", reducer)
            other.load_state_dict(one.state_dict())
            for call in range(2, 4):
                a, b = (c.exchange(gradient(rank, call, (20, 13)), "w", reducer) for c in (one, other))
                assert a.tobytes() == b.tobytes()

        together(3, work)


# -- what it costs ----------------------------------------------------------------------------------------------

COSTS = {
    # route: bytes that a rank sends, of c bytes of payload and N ranks
    "sum": lambda c, n: 2 * (n - 1) * c / n,
    "gather": lambda c, n: (n - 1) * c,
    "owners": lambda c, n: 2 * (n - 1) * c / n,
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("spec", "route", "once"),
    [
        ("none", "sum", 0), ("fp16", "sum", 0), ("bf16", "owners", 0), ("int8", "owners", 0),
        ("qsgd:4", "owners", 0),
        ("sign", "owners", 0), ("topk:0.25", "gather", 0), ("topk:0.25:owners", "owners", 0),
        ("randomk:0.25", "sum", 12), ("topk:0.25+ef", "gather", 0), ("int8+ef", "owners", 0),
        ("randomk:0.25+ef", "sum", 12),
    ],
)  # fmt: skip
def test_bytes_that_move(spec: str, route: str, once: int, ranks: int) -> None:
    """Exactly, where parts are even: 16384 = 8 · 2048 elements. Of random-k all know seed and call."""
    size = 16384
    even = np.arange(1, size + 1, dtype=np.float32) / size  # no zeros: signs of these need a bit each
    assert get(spec).route == route
    payload = get(spec).compress(even, "w")
    for _, _, sent in exchanges(spec, ranks, lambda rank, call: even):
        want = COSTS[route](payload.nbytes - once, ranks)
        if spec.startswith("topk:0.25:owners") and ranks > 1:  # positions within parts are shorter
            assert 0.8 * want < sent <= want
        else:
            assert sent == want


def test_powersgd_moves_two_narrow_matrices() -> None:
    for ranks in (1, 2, 4):
        for _, _, sent in exchanges("powersgd:4", ranks, lambda rank, call: gradient(rank, call, (64, 128))):
            assert sent == 2 * (ranks - 1) * (64 + 128) * 4 * 4 / ranks


def ring(arrays: list[np.ndarray], compressor: compress.Compressor) -> np.ndarray:
    """A ring that requantises: each chunk goes from rank to rank, who adds its own and compresses the sum."""
    ranks = len(arrays)
    chunks = [np.array_split(array, ranks) for array in arrays]
    whole = []
    for chunk in range(ranks):
        total = chunks[(chunk + 1) % ranks][chunk]
        for hop in range(2, ranks + 1):
            arrived = compressor.decompress(compressor.compress(total, "w"))
            total = arrived + chunks[(chunk + hop) % ranks][chunk]
        whole.append(compressor.decompress(compressor.compress(total, "w")))
    return np.concatenate(whole)


def test_requantising_at_every_hop_grows_with_the_ranks_and_owners_do_not() -> None:
    """Relative error of the sum, squared. A ring's hop h rounds by a step that is √h times as long: N/2 in all
    against the sum's own; owners round each gradient once and the sum once: 2, whatever N."""
    size = 16 * 1024
    of_ring, of_owners = {}, {}
    for ranks in (2, 4, 16):
        arrays = [gradient(rank, 0, size, np.float64) for rank in range(ranks)]
        want = sum(arrays)
        scale = np.sum(want**2)
        of_ring[ranks] = np.sum((ring(arrays, get("int8")) - want) ** 2) / scale
        [(sums, _, _), *_] = exchanges("int8", ranks, lambda rank, call, arrays=arrays: arrays[rank])
        of_owners[ranks] = np.sum((sums[0] - want) ** 2) / scale
    assert of_ring[4] > 1.4 * of_ring[2]
    assert of_ring[16] > 4 * of_ring[2]
    assert max(of_owners.values()) < 1.5 * min(of_owners.values())
    assert of_owners[16] < of_ring[16] / 3


def test_a_rank_that_fails_is_told_and_the_helper_does_not_hang() -> None:
    def work(rank: int, reducer: Memory) -> Any:
        array = gradient(rank, 0, 300)
        if rank == 1:
            array[100] = np.nan
        return get("int8", rank=rank).exchange(array, "w", reducer)

    with pytest.raises(ValueError, match=r"w\[\d\] is nan at element \d+: NaN and infinity"):
        together(3, work)


def test_payloads_of_all_ranks_have_one_size_where_it_says_so() -> None:
    """Steady: a receiver knows from the shape how many bytes come."""
    for spec in SPECS:
        compressor = get(spec)
        for shape in ((), (1,), (300,), (30, 20)):
            sizes = set()
            for seed in range(3):
                array = normal(shape, seed=seed)
                if seed == 2:
                    array[...] = 0
                payload = compressor.compress(array, f"{shape}")
                sizes.add(tuple((a.size, a.dtype) for a in payload.arrays))
                moved = replace(payload, key="other") if "randomk" not in spec else payload
                compressor.decompress(moved)
            assert len(sizes) == 1 or not compressor.steady, spec
    assert not get("sign").steady
    assert not get("sign+ef").steady
    assert get("int8+ef").steady
