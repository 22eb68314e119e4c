"""Laws of the compressors, one by one: in Fractions where that is possible, else by what the paper derives.

Sampled laws have a fixed seed and a bound of 5 deviations, which are known in closed form.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from minidp import compress
from minidp.compress import bits, get
from minidp.compress.sparsify import kept, largest_positions, largest_positions_simply

RATIONAL = ("none", "int8", "int8:stochastic", "terngrad", "sign", "topk:0.3", "topk:0.3:owners", "randomk:0.3")
REAL = ("fp16", "bf16", "bf16:truncate", "qsgd:1", "qsgd:4", "terngrad:2.5", "powersgd:2", *RATIONAL)
LOSSLESS = ("none",)


def fractions(shape: Any, seed: int, zeros: bool = True) -> np.ndarray:
    """Sevenths, some of them 0 and many of them equal in magnitude."""
    rng = np.random.default_rng([seed, 5])
    out = np.empty(shape, object)
    flat = out.reshape(-1)
    for i, number in enumerate(rng.integers(-9 if zeros else 1, 10, flat.size)):
        flat[i] = Fraction(int(number), 7)
    return out


def there_and_back(compressor: compress.Compressor, array: np.ndarray, key: str = "w") -> np.ndarray:
    return compressor.decompress(compressor.compress(array, key))


def all_fractions(array: np.ndarray) -> bool:
    return array.dtype == object and all(isinstance(v, Fraction | int) for v in array.ravel())


# -- error feedback ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", RATIONAL)
@pytest.mark.parametrize("shape", [(), (1,), (13,), (4, 5)])
def test_what_was_dropped_comes_later_exactly(spec: str, shape: Any) -> None:
    """Σ Δ + e = Σ g after every step, for each of two keys: in Fractions, ``==``."""
    compressor = get(f"{spec}+ef", seed=1)
    went_in = {key: np.full(shape, Fraction(0), object) for key in "vw"}
    came_out = {key: np.full(shape, Fraction(0), object) for key in "vw"}
    late = 0
    for step in range(8):
        for key in went_in:
            g = fractions(shape, 10 * step + ord(key))
            delta = there_and_back(compressor, g, key)
            went_in[key], came_out[key] = went_in[key] + g, came_out[key] + delta
            e = compressor.residual(key)
            assert all_fractions(np.asarray(e)), spec
            assert np.all(came_out[key] + e == went_in[key]), (step, key)
            late += np.count_nonzero(e)
    assert bool(late) == (spec not in LOSSLESS and np.zeros(shape).size > 1)


@pytest.mark.parametrize("spec", REAL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_was_dropped_comes_later_to_rounding(spec: str, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    for shape in ((), (1,), (700,), (30, 20)):
        compressor, total, out = get(f"{spec}+ef"), np.zeros(shape), np.zeros(shape)
        for _ in range(6):
            g = np.asarray(rng.standard_normal(shape) * rng.choice([0.01, 1, 100], shape)).astype(dtype)
            delta = there_and_back(compressor, g)
            total, out = total + g, out + delta
            e = np.asarray(compressor.residual("w"))
            assert (e.shape, e.dtype) == (shape, dtype)
            error = np.abs(out + e.astype(np.float64) - total).max()
            assert error <= 30 * np.finfo(dtype).eps * max(1, np.abs(total).max(), np.abs(out).max()), shape


@pytest.mark.parametrize("spec", REAL)
def test_what_is_compressed_is_the_gradient_and_the_residual(spec: str) -> None:
    """Δ = C(g + e), by a second compressor that is given g + e itself."""
    outer = get(f"{spec}+ef")
    plain = get(f"{spec}+ef").inner
    e = np.zeros((20, 30))
    for step in range(4):
        g = np.random.default_rng(step).standard_normal((20, 30))
        assert there_and_back(outer, g).tobytes() == there_and_back(plain, g + e).tobytes()
        e = outer.residual("w").copy()


def test_the_variant_for_error_feedback_makes_things_smaller() -> None:
    """Error feedback converges if E‖x − C(x)‖² < ‖x‖². Unbiased ones that are far off are not such: the more they
    drop, the larger is what they keep."""
    for spec in REAL:
        for shape, kind in itertools.product(((300,), (30, 20)), ("normal", "one large", "equal")):
            x = np.random.default_rng(1).standard_normal(shape)
            if kind == "one large":
                x[0] = 50
            if kind == "equal":
                x = np.sign(x)
            inner = get(f"{spec}+ef").inner
            errors = [np.sum((x - there_and_back(inner, x)) ** 2) for _ in range(40)]
            assert np.mean(errors) < 0.9999 * np.sum(x * x) or spec == "randomk:0.3", (spec, shape, kind)
            if spec == "randomk:0.3":  # (1 − k/d) in the mean, which may be far from the mean in 40 calls
                assert max(errors) <= np.sum(x * x)
    x = np.random.default_rng(1).standard_normal(500)
    for spec in ("qsgd:1", "terngrad", "randomk:0.1"):
        assert np.sum((x - there_and_back(get(spec), x)) ** 2) > np.sum(x * x)
    assert isinstance(get("int8+ef").inner, compress.Int8)


def test_shrunk_steps_come_nearest_in_the_mean() -> None:
    """β = ‖g‖² / E‖g'‖², in Fractions, and 0 stays 0. (g = 3, 1, −1 in steps of 3: E g'² = 9, 3, 3.)"""
    inner = get("terngrad+ef").inner
    steps, _ = inner.compress(np.array([Fraction(3), Fraction(1), Fraction(-1), Fraction(0)], object), "w").arrays
    assert list(steps) == [3 * Fraction(9 + 1 + 1, 9 + 3 + 3)]
    steps, _ = inner.compress(np.array([Fraction(0)] * 3, object), "w").arrays
    assert list(steps) == [0]


def counterexample(spec: str, steps: int = 400, rate: float = 0.01) -> tuple[np.ndarray, float]:
    """w in [−1, 1]³, each coordinate's gradient 4 in one of four steps, −1 in three: ¼ in the mean, −1 is best.

    The coordinates take turns, so that no step is the same for all. Returns the mean of the last w's.
    """
    compressor, w, lost = get(spec), np.zeros(3), 0.0
    means = []
    for step in range(steps):
        g = np.array([4.0 if (step + i) % 4 == 0 else -1.0 for i in range(3)])
        delta = there_and_back(compressor, g)
        lost += float(np.abs(delta - g).sum())
        w = np.clip(w - rate * delta, -1, 1)
        means.append(w)
    return np.mean(means[-40:], axis=0), lost


def test_sign_walks_uphill_and_error_feedback_does_not() -> None:
    uphill, _ = counterexample("sign")
    assert (uphill > 0.95).all()  # as far as it may go
    downhill, lost = counterexample("sign+ef")
    assert lost > 100  # it is compressed all the same
    assert (downhill < -0.9).all()
    plain, _ = counterexample("none")
    assert (plain < -0.9).all()


def test_with_error_feedback_w_follows_plain_sgd() -> None:
    """w − η e is the w of plain SGD: on a quadratic, how far w is away is η e, and shrinks with η."""
    rng = np.random.default_rng(0)
    target = rng.standard_normal(40)
    for spec in ("topk:0.1+ef", "sign+ef", "qsgd:1+ef", "terngrad+ef"):
        compressor, w = get(spec), np.zeros(40)
        for _ in range(800):
            w = w - 0.02 * there_and_back(compressor, w - target + 0.1 * rng.standard_normal(40))
        assert np.abs(w - target).max() < 0.25, spec


# -- whole multiples of a step ----------------------------------------------------------------------------------


def test_int8_rounds_to_the_nearest_step_exactly() -> None:
    """In Fractions: |error| ≤ step/2, ties to the even level, the largest number is what it was."""
    halves = [Fraction(n, 2) for n in (254, 1, 3, 5, -1, -3, -5, 0, 2, -254, 253)]
    out = there_and_back(get("int8"), np.array(halves, object))
    assert list(out) == [127, 0, 2, 2, 0, -2, -2, 0, 1, -127, 126]
    for seed in range(20):
        x = fractions(50, seed)
        step = max(abs(x)) / 127
        error = abs(x - there_and_back(get("int8"), x))
        assert all(error <= step / 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_int8_has_a_step_of_each_block(dtype: Any) -> None:
    """|error| ≤ max|block| / 254, to rounding; tiny blocks beside huge ones stay exact by their own measure."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(5 * 2048 + 77) * np.repeat([1, 1e-3, 100, 1, 1e-2, 8], 2048)[: 5 * 2048 + 77]).astype(
        dtype
    )
    payload = get("int8").compress(x, "w")
    out = get("int8").decompress(payload)
    assert payload.arrays[0].size == 6
    for lo in range(0, x.size, 2048):
        block, back = x[lo : lo + 2048].astype(np.float64), out[lo : lo + 2048].astype(np.float64)
        half = np.abs(block).max() / 254
        error = np.abs(block - back)
        own = np.finfo(dtype).eps * np.abs(block)  # what comes back is rounded to dtype, too
        assert (error <= half * (1 + 1e-4) + own).all()
        assert error.max() > 0.9 * half
    blocks = compress.Int8(block=7)
    assert blocks.compress(x[:22], "w").arrays[0].size == 4
    whole = compress.Int8(block=None)
    assert whole.compress(x, "w").arrays[0].size == 1


ROUNDED = {
    "int8:stochastic": lambda: compress.Int8(stochastic=True, block=110),
    "int8:stochastic in one block": lambda: compress.Int8(stochastic=True, block=1100),
    "qsgd:1": lambda: compress.QSGD(1, block=550),
    "qsgd:4": lambda: compress.QSGD(4, block=220),
    "qsgd:30": lambda: compress.QSGD(30, block=55),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_rounding_has_the_mean_and_the_variance_of_the_formula(name: str, dtype: Any) -> None:
    """Each number becomes one of its two neighbours, the upper one with the chance f, its fraction: the mean is g,
    the variance f (1 − f) step². Counted over 500 copies of 1100 elements, whole blocks each."""
    compressor, copies = ROUNDED[name](), 500
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(1100) * rng.choice([0.02, 1, 3], 1100)).astype(dtype)
    x[[5, 700]] = 0
    levels, block = compressor.levels, compressor.block
    payload = compressor.compress(np.tile(x, copies), "w")
    out = compressor.decompress(payload).reshape(copies, 1100).astype(np.float64)
    steps = payload.arrays[0].reshape(copies, -1).astype(np.float64)
    assert (steps == steps[0]).all()
    exact = x.astype(np.float64)
    rows = exact.reshape(-1, block)
    longest = np.linalg.norm(rows, axis=1) if "qsgd" in name else np.abs(rows).max(axis=1)
    assert np.allclose(steps[0], longest / levels, rtol=1e-5, atol=0)
    step = np.repeat(steps[0], block)
    low = np.floor(exact / step)
    f = exact / step - low
    level = np.rint(out / step)
    assert np.allclose(level * step, out, rtol=1e-5, atol=0)
    up = level - low
    edge = np.minimum(f, 1 - f) < 1e-4  # a whole level, to rounding: there the neighbour may be the next one
    assert ((up == 0) | (up == 1) | edge).all()
    assert (np.abs(up.sum(axis=0) - copies * f) <= 5 * np.sqrt(copies * f * (1 - f)) + 1).all()
    chance = np.sqrt(np.sum(copies * f * (1 - f)))
    assert abs(np.sum(up - f)) <= 5 * chance + 1  # all together: a bias of each, too small to be seen alone
    variance = np.sum(f * (1 - f) * step**2)
    spread = np.sqrt(np.sum(step**4 * f * (1 - f) * (1 - 2 * f) ** 2) / copies)  # of the mean of Σ error²
    assert abs(np.mean(np.sum((out - exact) ** 2, axis=1)) - variance) <= 5 * spread + 1e-4 * variance
    assert (out[:, [5, 700]] == 0).all()
    assert len({row.tobytes() for row in out}) == copies  # no two are rounded alike


def outcomes(v: list[Fraction], step: Fraction) -> Any:
    """All that random rounding can make of v, with probabilities: up or down, each element by itself."""
    choices = []
    for x in v:
        low = math.floor(x / step)
        f = x / step - low
        choices.append([(low * step, 1 - f), ((low + 1) * step, f)] if f else [(low * step, Fraction(1))])
    for combination in itertools.product(*choices):
        yield [value for value, _ in combination], math.prod((p for _, p in combination), start=Fraction(1))


# Vectors whose length is rational, so that QSGD has a rational step.
TRIPLES = [[3, -4], [0, 5], [1, 2, -2], [2, 3, 6, 0], [1, -2, 4, 10], [-8, 9, 12], [1, 1, 1, -1], [7, 0, 0, 0]]


@pytest.mark.parametrize("v", TRIPLES, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 10])
def test_variance_of_qsgd_by_enumeration(v: list[int], levels: int) -> None:
    """(‖v‖²/s²) Σ f(1 − f), at most min(d/s², √d/s)‖v‖²: in Fractions over all outcomes. And a sample of the
    code has each outcome as often as its probability says."""
    exact = [Fraction(x) for x in v]
    squares = sum(x * x for x in exact)
    norm = Fraction(math.isqrt(int(squares)))
    assert norm * norm == squares
    fraction = [levels * x / norm - math.floor(levels * x / norm) for x in exact]
    variance = squares / levels**2 * sum(f * (1 - f) for f in fraction)
    found = list(outcomes(exact, norm / levels))
    assert sum(p for _, p in found) == 1
    assert [sum(p * out[i] for out, p in found) for i in range(len(v))] == exact  # unbiased
    assert sum(p * sum((o - x) ** 2 for o, x in zip(out, exact)) for out, p in found) == variance
    d = len(v)
    assert variance <= Fraction(d, levels**2) * squares
    assert float(variance) <= math.sqrt(d) / levels * float(squares) * (1 + 1e-12)

    copies, compressor = 3000, compress.QSGD(levels, block=d)
    out = there_and_back(compressor, np.tile(np.array(v, np.float64), copies)).reshape(copies, d)
    level = np.rint(out * levels / float(norm)).astype(int)
    assert np.allclose(level * float(norm) / levels, out, rtol=1e-5, atol=0)
    counts = Counter(map(tuple, level.tolist()))
    wanted = {tuple(int(o * levels / norm) for o in values): float(p) for values, p in found}
    # A whole level may be missed by rounding, once in a million times.
    assert sum(counts[values] for values in wanted) >= copies - 1
    for values, p in wanted.items():
        assert abs(counts[values] - copies * p) <= 5 * math.sqrt(copies * p * (1 - p)) + 1, values


@pytest.mark.parametrize("v", TRIPLES, ids=str)
def test_variance_of_terngrad_by_enumeration(v: list[int]) -> None:
    """s|g| − g² for each element, with s = max|g|; the code draws from these outcomes, in Fractions."""
    exact = [Fraction(x, 3) for x in v]
    s = max(map(abs, exact))
    found = list(outcomes(exact, s))
    for i, g in enumerate(exact):
        assert sum(p * out[i] for out, p in found) == g
        assert sum(p * (out[i] - g) ** 2 for out, p in found) == s * abs(g) - g * g
    copies, compressor = 700, get("terngrad", seed=2)
    drawn = there_and_back(compressor, np.array(exact * copies, object)).reshape(copies, -1)
    counts = Counter(map(tuple, drawn.tolist()))
    wanted = {tuple(out): float(p) for out, p in found}
    assert set(counts) <= set(wanted)
    for out, p in wanted.items():
        assert abs(counts[out] - copies * p) <= 5 * math.sqrt(copies * p * (1 - p)) + 1e-9


def test_the_bound_of_qsgd_on_buckets() -> None:
    """min(d/s², √d/s)‖v‖², the mean error of the code; with one level √d is nearly met: small buckets help."""
    rng = np.random.default_rng(0)
    v = rng.standard_normal(512)
    squares = np.sum(v * v)
    means = {}
    for levels, block in itertools.product((1, 4, 16, 127), (512, 64, 8)):
        compressor = compress.QSGD(levels, block=block)
        errors = [np.sum((there_and_back(compressor, v) - v) ** 2) for _ in range(100)]
        means[levels, block] = np.mean(errors) / squares
        assert means[levels, block] <= min(block / levels**2, math.sqrt(block) / levels)
    assert means[1, 512] > 0.7 * math.sqrt(512)
    assert means[1, 8] < means[1, 64] / 2 < means[1, 512] / 4


def test_qsgd_of_nothing_but_zeros_is_zero() -> None:
    """0/0: the paper's formula has none, and a bucket of zeros may stand between others."""
    v = np.ones(1536)
    v[512:1024] = 0
    for spec in ("qsgd:1", "qsgd:4", "qsgd:4+ef"):
        out = there_and_back(get(spec), v)
        assert (out[512:1024] == 0).all()
        assert out[:512].any()
        assert out[1024:].any()
        assert (there_and_back(get(spec), np.zeros((3, 4))) == 0).all()


def test_no_number_has_more_levels_than_there_are() -> None:
    """A number as long as its block, divided by the step, may be rounded beyond the last level: one of 127 would
    come back as −128, one of 1 as −2. Blocks of a single number are such, a million of them."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(300_000) * 10.0 ** rng.integers(-30, 30, 300_000)).astype(np.float32)
    for compressor in (
        compress.Int8(block=1),
        compress.Int8(stochastic=True, block=1),
        compress.QSGD(127, block=1),
        compress.QSGD(3, block=1),
        compress.QSGD(1, block=1),
    ):
        for _ in range(3):
            kept_part = there_and_back(compressor, x) / x  # 1, or by chance one level less
            assert kept_part.max() <= 1 + 1e-5
            assert kept_part.min() >= 1 - 1.01 / compressor.levels
    constant = np.full(200_000, 0.1, np.float32)
    assert (there_and_back(get("terngrad"), constant) == constant).all()
    assert (there_and_back(get("terngrad"), -constant) == -constant).all()


def test_clipping_is_biased_and_bounded() -> None:
    """terngrad:C clips to C σ first: what is within is unbiased, what is beyond comes back as C σ in the mean."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(2000)
    x[:2] = 40, -40
    bound = 2.5 * x.std()
    compressor, calls = get("terngrad:2.5"), 400
    mean = sum(there_and_back(compressor, x) for _ in range(calls)) / calls
    out = there_and_back(compressor, x)
    assert set(np.round(np.abs(out), 5)) == {0.0, np.round(bound, 5)}
    assert np.allclose(mean[:2], [bound, -bound])
    clipped = np.clip(x, -bound, bound)
    deviation = np.sqrt((bound * np.abs(clipped) - clipped**2) / calls)
    assert (np.abs(mean - clipped) <= 5 * deviation + 1e-4).all()
    plain = sum(there_and_back(get("terngrad", seed=s), x) for s in range(50)) / 50
    assert plain[0] == 40  # without clipping it keeps its length, and all others are as rough as that
    assert np.abs(mean[2:] - x[2:]).max() < 3.9


# -- sign -------------------------------------------------------------------------------------------------------


def test_sign_is_minus_1_0_or_1() -> None:
    x = np.array([3.0, -0.5, 0.0, -0.0, 1e-300, -1e-300, 7, 8, 9, -10])
    assert list(there_and_back(get("sign"), x)) == [1, -1, 0, 0, 1, -1, 1, 1, 1, -1]
    out = there_and_back(get("sign"), fractions(40, 1))
    assert list(out) == list(np.sign(fractions(40, 1)))


def test_zeros_travel_only_if_there_are_any() -> None:
    x = np.arange(1.0, 1001.0)
    for spec, more in (("sign", 0), ("sign+ef", 8)):
        assert get(spec).compress(x, "w").nbytes == 125 + more
        x[-1] = 0
        assert get(spec).compress(x, "w").nbytes == 250 + more
        x[-1] = -1


def test_sign_with_error_feedback_is_times_the_mean() -> None:
    x = np.array([Fraction(n, 3) for n in (1, -2, 6, 0)], object)
    assert list(there_and_back(get("sign+ef"), x)) == [Fraction(3, 4), Fraction(-3, 4), Fraction(3, 4), 0]
    for dtype in (np.float16, np.float32, np.float64):
        x = np.full(3000, 60000, dtype)  # the sum is beyond float16
        assert (there_and_back(get("sign+ef"), x) == x).all()


def test_a_parameter_without_gradient_never_moves() -> None:
    for spec in ("sign", "sign+ef", "topk:0.3+ef", "qsgd:4+ef", "terngrad", "int8"):
        compressor = get(spec)
        for step in range(5):
            g = np.random.default_rng(step).standard_normal(20)
            g[7] = 0
            assert there_and_back(compressor, g)[7] == 0


# -- top-k ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "size", "k"),
    [
        (0.01, 100, 1), (0.01, 101, 2), (0.01, 1, 1), (0.01, 0, 0), (0.1, 30, 3), (0.07, 100, 7), (0.3, 10, 3),
        (1.0, 7, 7), (1, 0, 0), (0.999, 5, 5), (0.5, 5, 3), (1e-12, 5, 1), (1e-6, 10**9, 1000), (0.29, 100, 29),
    ],
)  # fmt: skip
def test_k_is_the_density_rounded_up(density: float, size: int, k: int) -> None:
    assert kept(density, size) == k
    if size < 1000:
        for spec in (f"topk:{density:g}", f"randomk:{density:g}"):
            assert get(spec).compress(np.ones(size), "w").arrays[0].size == k


def by_definition(x: np.ndarray, k: int) -> list[int]:
    return sorted(sorted(range(x.size), key=lambda i: (-abs(x[i]), i))[:k])


def test_top_k_is_exact_and_breaks_ties_by_position() -> None:
    for seed in range(30):
        x = fractions(23, seed)  # nineteen different values: ties everywhere
        for density in (0.01, 0.2, 0.5, 0.9, 1):
            out, k = there_and_back(get(f"topk:{density}"), x), kept(density, 23)
            want = [x[i] if i in by_definition(x, k) else 0 for i in range(23)]
            assert list(out) == want
            lost, all_ = sum((x - out) ** 2), sum(x**2)
            assert lost <= (1 - Fraction(k, 23)) * all_  # δ = k/d
    equal = np.full(20, Fraction(-1, 3), object)
    lost = sum((equal - there_and_back(get("topk:0.25"), equal)) ** 2)
    assert lost == (1 - Fraction(5, 20)) * sum(equal**2)  # and no better


CHARACTERS = {
    "normal": lambda rng, d: rng.standard_normal(d),
    "heavy tails": lambda rng, d: rng.standard_cauchy(d),
    "constant": lambda rng, d: np.full(d, -3.0),
    "zeros": lambda rng, d: np.zeros(d),
    "few": lambda rng, d: np.where(rng.random(d) < 0.001, rng.standard_normal(d), 0),
    "two values": lambda rng, d: np.where(rng.random(d) < 0.5, 1.0, -2.0),
    "ten values": lambda rng, d: rng.integers(-5, 6, d) / 4,
    "rising": lambda rng, d: np.arange(d) / d,
    "falling": lambda rng, d: -np.arange(d)[::-1] / d,
    "large where no sample is": lambda rng, d: np.where(
        np.arange(d) % max(1, d // 16384), 2.0 + rng.random(d), 1e-3
    ),
    "large where samples are": lambda rng, d: np.where(np.arange(d) % max(1, d // 16384), 1e-3, 2.0),
    "denormal": lambda rng, d: rng.integers(-9, 10, d) * 5e-324,
}


@pytest.mark.parametrize("name", CHARACTERS)
def test_quick_selection_is_the_simple_one(name: str) -> None:
    """By a sample, or by sorting all: the same positions, for every size, with ties and where samples mislead."""
    for d in (1, 2, 100, 4095, 4096, 4097, 16383, 33000, 70001, 140000):
        for dtype in (np.float32, np.float64, np.float16) if d < 40000 else (np.float32,):
            with np.errstate(over="ignore"):
                x = CHARACTERS[name](np.random.default_rng(d), d).astype(dtype)
            order = np.lexsort((np.arange(d), -np.abs(x.astype(np.float64))))
            for k in sorted(
                {1, 2, 10, d // 1000, d // 100, d // 16, d // 16 + 1, d // 8, d // 2, d} & set(range(d + 1))
            ):
                quick = largest_positions(x, k)
                assert quick.dtype == np.int64
                assert np.array_equal(quick, np.sort(order[:k])), (d, dtype, k)
                if d < 5000:
                    assert np.array_equal(largest_positions_simply(x, k), quick)
    assert largest_positions(np.ones(5000), 0).size == 0


def test_a_sample_that_sees_only_large_ones() -> None:
    """More are wanted than there are large ones, all of which are where the sample looks: the rest counts, too."""
    d = 300_000
    x = np.full(d, 1e-3, np.float32)
    x[:: d // 16384] = 2
    x[5] = 1
    large = np.flatnonzero(x >= 1)
    k = d // 16
    assert large.size < k
    where = largest_positions(x, k)
    small = np.flatnonzero(x < 1)[: k - large.size]
    assert np.array_equal(where, np.sort(np.concatenate([large, small])))


# -- random-k ---------------------------------------------------------------------------------------------------


def test_random_k_is_unbiased_over_all_choices() -> None:
    """Of five choose two: each of the ten choices comes about equally often, and their mean is x, in Fractions."""
    x = fractions(5, 3, zeros=False)
    compressor, calls = get("randomk:0.4"), 3000
    by_choice: dict[tuple[int, ...], list[Fraction]] = {}
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(calls):
        out = there_and_back(compressor, x)
        where = tuple(int(i) for i in np.flatnonzero(out))
        counts[where] = counts.get(where, 0) + 1
        assert by_choice.setdefault(where, list(out)) == list(out)
    assert set(by_choice) == set(itertools.combinations(range(5), 2))
    assert [sum(column) / 10 for column in zip(*by_choice.values())] == list(x)
    assert all(abs(n - calls / 10) <= 5 * math.sqrt(calls * 0.1 * 0.9) for n in counts.values())
    feedback = get("randomk:0.4+ef")
    payload = feedback.compress(x, "w")
    assert sorted(feedback.decompress(payload)) == sorted([*payload.arrays[0], 0, 0, 0])  # no factor
    assert np.all(feedback.residual("w") + feedback.decompress(payload) == x)


def test_random_k_chooses_the_same_on_all_ranks_and_others_each_time() -> None:
    def positions(rank: int, seed: int = 0, key: str = "w") -> list[tuple[int, ...]]:
        compressor = get("randomk:0.1", seed=seed, rank=rank)
        return [tuple(np.flatnonzero(there_and_back(compressor, np.ones(1000), key))) for _ in range(4)]

    assert positions(0) == positions(5)
    assert len({*positions(0), *positions(0, seed=1), *positions(0, key="v")}) == 12
    assert all(len(where) == 100 for where in positions(0))


# -- PowerSGD ---------------------------------------------------------------------------------------------------


def of_rank(r: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = shape[0]
    return (rng.standard_normal((rows, r)) @ rng.standard_normal((r, math.prod(shape) // rows))).reshape(shape)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (12, 3, 5, 5), (40, 2, 6)])
def test_powersgd_is_exact_up_to_its_rank(shape: tuple[int, ...]) -> None:
    for true, columns in ((1, 1), (1, 3), (2, 2), (2, 3), (3, 3)):
        m = of_rank(true, shape)
        compressor = compress.PowerSGD(columns)
        for _ in range(3):
            assert np.allclose(there_and_back(compressor, m), m, rtol=0, atol=1e-11)
    m = of_rank(4, shape)
    assert np.abs(there_and_back(compress.PowerSGD(3), m) - m).max() > 0.1


def test_what_travels_is_an_orthonormal_p_and_q() -> None:
    m = np.random.default_rng(0).standard_normal((20, 30))
    p, q = (a.reshape(-1, 3) for a in get("powersgd:3").compress(m, "w").arrays)
    assert (p.shape, q.shape) == ((20, 3), (30, 3))
    assert np.allclose(p.T @ p, np.eye(3))
    assert np.allclose(q, m.T @ p)
    for columns in (1, 2, 3):  # more columns than the matrix has rank: still orthonormal
        p = compress.PowerSGD(columns).compress(of_rank(1, (20, 30)), "w").arrays[0].reshape(20, -1)
        assert np.allclose(p.T @ p, np.eye(columns))


def spectrum(values: list[float]) -> np.ndarray:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in (24, 31))
    return (u * values) @ v.T


def test_only_a_warm_start_converges_to_the_best_of_its_rank() -> None:
    """A fixed matrix, call after call: with the last call's Q the error falls to that of the best approximation
    (the singular values left out); with a Q drawn anew it does not."""
    m = spectrum([5, 4.5, 3, 2.5, 2, 1.5, 1, 0.5])
    best = math.sqrt(3**2 + 2.5**2 + 2**2 + 1.5**2 + 1 + 0.25)

    def errors(fresh: bool) -> np.ndarray:
        warm, found = compress.PowerSGD(2), []
        for call in range(40):
            compressor = compress.PowerSGD(2, seed=call) if fresh else warm
            found.append(np.linalg.norm(m - there_and_back(compressor, m)))
        return np.array(found)

    warm, cold = errors(fresh=False), errors(fresh=True)
    assert warm[-1] == pytest.approx(best, rel=1e-6)
    assert (np.diff(warm) <= 1e-9).all()
    assert cold[-20:].min() > best * 1.01
    assert cold[-20:].mean() > best * 1.08
    assert (warm >= best * (1 - 1e-12)).all()


def test_a_warm_start_is_of_its_key() -> None:
    one, other = compress.PowerSGD(2), compress.PowerSGD(2)
    m, n = spectrum([5, 4, 3, 2, 1]), spectrum([1, 2, 3, 4, 5]).T.copy()
    for _ in range(5):
        want = there_and_back(one, m, "m")
        got = there_and_back(other, m, "m")
        there_and_back(other, n, "n")
        assert got.tobytes() == want.tobytes()


def test_zeros_do_not_kill_q() -> None:
    """Q = Mᵀ P of zeros is 0, from which no power method finds anything again."""
    m = of_rank(2, (20, 30))
    for zeros_first in (True, False):
        compressor = compress.PowerSGD(2)
        if not zeros_first:
            there_and_back(compressor, m)
        for _ in range(3):
            assert not there_and_back(compressor, np.zeros((20, 30))).any()
        assert np.allclose(there_and_back(compressor, m), m)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1, 1e12, 1e25])
def test_powersgd_at_any_scale(scale: float) -> None:
    """A warm start is as long as the gradient, and M Q as long as its square: float32 has numbers up to 3e38."""
    m = (spectrum([5, 4.5, 1, 0.5]) * scale).astype(np.float32)
    compressor = compress.PowerSGD(2)
    for _ in range(12):
        out = there_and_back(compressor, m)
    error = np.linalg.norm((m - out).astype(np.float64) / scale)
    assert error == pytest.approx(math.sqrt(1.25), rel=1e-3)


def test_vectors_and_small_matrices_travel_as_they_are() -> None:
    rng = np.random.default_rng(0)
    for shape in ((), (0,), (7,), (5000,), (4, 4), (1, 9), (9, 1), (8, 2, 1), (4, 0)):
        for dtype in (np.float16, np.float32, np.float64):
            x = np.asarray(rng.standard_normal(shape)).astype(dtype)
            payload = get("powersgd:2").compress(x, "w")
            assert payload.nbytes == x.nbytes
            assert get("powersgd:2").decompress(payload).tobytes() == x.tobytes()
            assert get("powersgd:2").exchange(x, "w", compress.low_rank.Alone()).tobytes() == x.tobytes()
    just = rng.standard_normal((5, 5))  # 2 (5 + 5) < 25
    assert get("powersgd:2").compress(just, "w").nbytes == 20 * 8


# -- casts ------------------------------------------------------------------------------------------------------


def test_bfloat16_is_the_nearest_with_8_bits() -> None:
    """Between 1 and 2 the steps are 2⁻⁷; ties go to the even one. Truncation goes towards 0."""
    unit = 2.0**-7
    x = np.array(
        [1, 1 + unit / 2, 1 + 3 * unit / 2, 1 + unit * 0.51, 1 + unit * 0.49, -1 - unit * 0.99, 0.0, -0.0]
    )
    nearest = [1, 1, 1 + 2 * unit, 1 + unit, 1, -1 - unit, 0, 0]
    cut = [1, 1, 1 + unit, 1, 1, -1, 0, 0]
    for dtype in (np.float32, np.float64):
        assert list(there_and_back(get("bf16"), x.astype(dtype))) == nearest
        assert list(there_and_back(get("bf16:truncate"), x.astype(dtype))) == cut
    assert np.signbit(there_and_back(get("bf16"), x)[-1])


def test_errors_of_casts() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(300_000) * 10.0 ** rng.integers(-30, 30, 300_000)).astype(np.float32)
    error = np.abs(there_and_back(get("bf16"), x) - x) / np.abs(x)
    assert 0.99 * 2**-8 < error.max() <= 2**-8  # of 8 bits half the last one
    out = there_and_back(get("bf16:truncate"), x)
    error = np.abs(out - x) / np.abs(x)
    assert 0.99 * 2**-7 < error.max() < 2**-7
    assert (np.abs(out) <= np.abs(x)).all()
    small = x[np.abs(x) < 60000]
    out = there_and_back(get("fp16"), small)
    assert (out == small.astype(np.float16)).all()


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    upper = get("bf16:truncate").compress(x, "w").arrays[0]
    assert upper.dtype == np.uint16
    assert (upper == x.view(np.uint32) >> 16).all()
    every = np.arange(2**16, dtype=np.uint32)
    finite = (every << 16).view(np.float32)
    finite = finite[np.isfinite(finite)]
    for spec in ("bf16", "bf16:truncate"):  # what is one already stays
        assert there_and_back(get(spec), finite).tobytes() == finite.tobytes()


# -- bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(1, 9))
def test_pack_and_unpack(width: int) -> None:
    for count in (*range(40), 255, 256, 1000):
        codes = np.random.default_rng([width, count]).integers(0, 2**width, count).astype(np.uint8)
        data = bits.pack(codes, width)
        assert data.dtype == np.uint8
        assert data.nbytes == (count if width == 8 else width * math.ceil(count / 8))
        back = bits.unpack(data, width, count)
        assert back.dtype == np.uint8
        assert np.array_equal(back, codes)


def test_the_first_number_is_in_the_highest_bit_and_planes_begin_with_the_lowest() -> None:
    assert list(bits.pack(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], np.uint8), 1)) == [128, 128]
    assert list(bits.pack(np.array([2, 1], np.uint8), 2)) == [64, 128]
    assert list(bits.pack(np.array([4, 3, 0], np.uint8), 3)) == [64, 64, 128]


def least(k: int, d: int) -> int:
    forms = (math.ceil(d / 8), math.ceil(d / 255) + k, 2 * (math.ceil(d / 65535) + k))
    return 0 if k in (0, d) else min(forms)


def check_positions(where: Any, d: int) -> np.ndarray:
    where = np.asarray(where, np.int64)
    data = bits.pack_positions(where, d)
    assert data.ndim == 1
    assert data.nbytes == least(where.size, d)
    back = bits.unpack_positions(data, where.size, d)
    assert back.dtype == np.int64
    assert np.array_equal(back, where)
    return data


def test_positions_of_all_subsets_of_few() -> None:
    for d in range(10):
        for k in range(d + 1):
            for where in itertools.combinations(range(d), k):
                check_positions(where, d)


def test_positions_of_all_counts() -> None:
    rng = np.random.default_rng(0)
    for d in (31, 64, 254, 255, 256, 511, 700):
        for k in range(d + 1):
            check_positions(np.sort(rng.choice(d, k, replace=False)), d)


def test_the_three_forms_of_positions() -> None:
    """Each where it is the shortest, at edges of blocks, with blocks that are empty and blocks that are full."""
    seen = set()
    rng = np.random.default_rng(0)
    for d in (254, 255, 256, 3000, 65534, 65535, 65536, 131070, 131071, 200_000):
        for k in (1, 2, 3, 7, 255, d // 1000, d // 200, d // 20, d // 8 - d // 255, d // 2, d - 1):
            if not 0 < k < d:
                continue
            for where in (
                np.arange(k),
                np.arange(d - k, d),
                np.sort(rng.choice(d, k, replace=False)),
                np.arange(min(255, d - k), min(255, d - k) + k),
            ):
                data = check_positions(where, d)
                seen.add("bitmap" if data.dtype == np.uint8 and data.size == -(-d // 8) else str(data.dtype))
    assert seen == {"bitmap", "uint8", "uint16"}
    d = 20_000_000  # here a full block of 65535 is still the shortest
    data = check_positions([*range(65535, 2 * 65535), d - 1], d)
    assert data.dtype == np.uint16
    assert data[1] == 65535
