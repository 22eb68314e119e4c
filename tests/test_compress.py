"""Compressors: what all of them promise, whatever they drop. The laws of each are in test_compress_laws.py."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from minidp import backend, compress
from minidp.compress import ErrorFeedback, Payload, bits, get
from minidp.compress.low_rank import Alone

PLAIN = (
    "none",
    "fp16",
    "bf16",
    "bf16:truncate",
    "int8",
    "int8:stochastic",
    "qsgd:1",
    "qsgd:4",
    "qsgd:127",
    "terngrad",
    "terngrad:2.5",
    "sign",
    "topk:0.3",
    "topk:0.3:owners",
    "randomk:0.3",
    "powersgd:2",
)
SPECS = PLAIN + tuple(f"{spec}+ef" for spec in PLAIN)
RANDOM = ("int8:stochastic", "qsgd:1", "qsgd:4", "qsgd:127", "terngrad", "terngrad:2.5")  # by rank
DTYPES = (np.float16, np.float32, np.float64)
each = pytest.mark.parametrize("spec", SPECS)


def normal(shape: Any, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng([seed, 77]).standard_normal(shape)).astype(dtype)


def arrays_of(dtype: Any) -> dict[str, np.ndarray]:
    """Shapes and layouts that gradients have, and some that they should never have."""
    holes = normal((6, 20), dtype)
    holes[::2, ::3] = 0
    return {
        "vector": normal(5000, dtype),  # three blocks of int8, ten buckets of QSGD
        "matrix": normal((7, 33), dtype),
        "kernel": normal((6, 2, 5, 4), dtype),
        "scalar": normal((), dtype),
        "one": normal(1, dtype),
        "one by one": normal((1, 1), dtype),
        "nothing": normal(0, dtype),
        "no columns": normal((3, 0), dtype),
        "transposed": normal((33, 7), dtype).T,
        "every other": normal((40, 30), dtype)[::2, 1::3],
        "backwards": normal((9, 9), dtype)[::-1, ::-1],
        "zeros among them": holes,
        "signed zeros": np.array([0.0, -0.0, 1.0, -0.0], dtype),
    }


def everything() -> list[tuple[str, np.ndarray]]:
    return [(f"{name} {dtype.__name__}", a) for dtype in DTYPES for name, a in arrays_of(dtype).items()]


def raw(payload: Payload) -> list[tuple[bytes, Any, Any]]:
    return [(array.tobytes(), array.dtype, array.shape) for array in payload.arrays]


def thirds(*numbers: int) -> np.ndarray:
    return np.array([Fraction(n, 3) for n in numbers], object)


# -- shape, dtype, bytes ----------------------------------------------------------------------------------------


@each
def test_shape_and_dtype_return(spec: str) -> None:
    compressor = get(spec)
    for name, array in everything():
        array.setflags(write=False)  # whoever writes to its input is told
        before = array.tobytes()
        for _ in range(3):
            payload = compressor.compress(array, name)
            out = compressor.decompress(payload)
            assert type(out) is np.ndarray, name
            assert (out.shape, out.dtype) == (array.shape, array.dtype), name
            assert (payload.shape, payload.dtype, payload.key) == (array.shape, array.dtype, name)
            assert payload.size == array.size
            assert np.isfinite(out).all(), name
            assert out.flags.writeable, name
            assert out.flags.c_contiguous, name
        assert array.tobytes() == before


@each
def test_layout_does_not_matter(spec: str) -> None:
    """A transposed or strided array is what its copy is, call after call."""
    for name, array in arrays_of(np.float64).items():
        one, other = get(spec), get(spec)
        for call in range(3):
            view, copied = one.compress(array, "w"), other.compress(array.copy(order="C"), "w")
            assert raw(view) == raw(copied), (name, call)


# Bytes of a float32 vector of d elements that holds no zero.
WIRE = {
    "none": lambda d: 4 * d,
    "fp16": lambda d: 2 * d,
    "bf16": lambda d: 2 * d,
    "bf16:truncate": lambda d: 2 * d,
    "int8": lambda d: d + 4 * math.ceil(d / 2048),
    "int8:stochastic": lambda d: d + 4 * math.ceil(d / 2048),
    "qsgd:1": lambda d: 2 * math.ceil(d / 8) + 4 * math.ceil(d / 512),
    "qsgd:2": lambda d: 3 * math.ceil(d / 8) + 4 * math.ceil(d / 512),
    "qsgd:3": lambda d: 3 * math.ceil(d / 8) + 4 * math.ceil(d / 512),
    "qsgd:4": lambda d: 4 * math.ceil(d / 8) + 4 * math.ceil(d / 512),
    "qsgd:63": lambda d: 7 * math.ceil(d / 8) + 4 * math.ceil(d / 512),
    "qsgd:64": lambda d: d + 4 * math.ceil(d / 512),
    "qsgd:127": lambda d: d + 4 * math.ceil(d / 512),
    "terngrad": lambda d: 2 * math.ceil(d / 8) + (4 if d else 0),
    "terngrad:2.5": lambda d: 2 * math.ceil(d / 8) + (4 if d else 0),
    "sign": lambda d: math.ceil(d / 8),
    "sign+ef": lambda d: math.ceil(d / 8) + 4,
    "topk:0.01": lambda d: (k := math.ceil(d / 100)) * 4 + positions(k, d),
    "topk:0.3": lambda d: (k := math.ceil(3 * d / 10)) * 4 + positions(k, d),
    "topk:1": lambda d: 4 * d,
    "randomk:0.01": lambda d: math.ceil(d / 100) * 4 + 12,
    "powersgd:2": lambda d: 4 * d,  # a vector
}


def positions(k: int, d: int) -> int:
    """The least of a bitmap, blocks of 255 in bytes, blocks of 65535 in two; nothing where nothing is open."""
    return 0 if k in (0, d) else min(math.ceil(d / 8), math.ceil(d / 255) + k, 2 * (math.ceil(d / 65535) + k))


@pytest.mark.parametrize("spec", WIRE)
def test_bytes_are_those_of_the_wire_format(spec: str) -> None:
    for d in (0, 1, 2, 7, 8, 9, 63, 255, 256, 512, 513, 2047, 2048, 2049, 5000, 70001):
        array = np.abs(normal(d)) + np.float32(0.5)
        payload = get(spec).compress(array, "w")
        assert payload.nbytes == WIRE[spec](d), d
        assert payload.nbytes == sum(len(a.tobytes()) for a in payload.arrays)
        assert all(a.ndim == 1 for a in payload.arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_other_dtypes(dtype: Any) -> None:
    """Steps are float32, or float64 of float64; values that travel as they are have the array's own dtype."""
    own, step, d = np.dtype(dtype).itemsize, max(4, np.dtype(dtype).itemsize), 5000
    array = np.abs(normal(d, dtype)) + dtype(0.5)
    want = {
        "none": own * d,
        "fp16": 2 * d,
        "bf16": 2 * d,
        "int8": d + 3 * step,
        "qsgd:4": d // 2 + 10 * step,
        "terngrad": d // 4 + step,
        "sign": d // 8,
        "sign+ef": d // 8 + step,
        "topk:0.01": 50 * own + positions(50, d),
        "randomk:0.01": 50 * own + 12,
    }
    assert {spec: get(spec).compress(array, "w").nbytes for spec in want} == want
    assert get("powersgd:3").compress(array.reshape(50, 100), "w").nbytes == 3 * 150 * step
    assert get("powersgd:3").compress(array.reshape(50, 10, 10), "w").nbytes == 3 * 150 * step


@each
def test_a_payload_is_all_that_a_receiver_needs(spec: str) -> None:
    """Another rank's compressor, fresh, decodes the bytes alone: nothing was left behind at the sender."""
    sender = get(spec, seed=3, rank=1)
    for name, array in everything():
        for _ in range(2):
            payload = sender.compress(array, name)
            moved = tuple(np.frombuffer(a.tobytes(), a.dtype) for a in payload.arrays)
            received = get(spec, seed=3, rank=2).decompress(replace(payload, arrays=moved))
            assert received.tobytes() == sender.decompress(payload).tobytes(), name


@each
def test_payloads_and_results_are_nobody_elses(spec: str) -> None:
    """A gradient is overwritten by the next step, a sum by who adds to it: what was compressed stays.

    (One element is contiguous whatever its stride: what is "made contiguous" is then the array itself.)
    """
    for shape in ((), (1,), (5,), (600,), (1, 1), (9, 8), (40, 30)):
        compressor, array = get(spec), normal(shape)
        payload = compressor.compress(array, "w")
        sent, first = raw(payload), compressor.decompress(payload)
        array[...] = 7
        assert raw(payload) == sent
        again = compressor.decompress(payload)
        first[...] = 8
        assert raw(payload) == sent
        assert again.tobytes() == compressor.decompress(payload).tobytes()
        compressor.compress(normal(shape, seed=1), "w")
        assert raw(payload) == sent


@pytest.mark.parametrize("spec", [f"{spec}+ef" for spec in PLAIN])
def test_remembering_does_not_change_what_is_sent(spec: str) -> None:
    """Payload and residual are made of one array, g + e: what is taken from the one stays in the other."""
    for shape in ((), (1,), (5,), (9, 8)):
        compressor, array = get(spec), normal(shape)
        payload = compressor.compress(array, "w")
        whole = compressor.decompress(payload) + compressor.residual("w")
        assert np.allclose(whole, array, rtol=1e-5, atol=1e-6), shape


# -- determinism ------------------------------------------------------------------------------------------------


def history(spec: str, calls: int = 3, key: str = "w", **who: int) -> list[Any]:
    compressor = get(spec, **who)
    found = [compressor.compress(normal((60, 50), seed=call), key) for call in range(calls)]
    return [(raw(payload), compressor.decompress(payload).tobytes()) for payload in found]


@each
def test_same_seed_rank_and_calls_have_the_same_bits(spec: str) -> None:
    assert history(spec, seed=5, rank=2) == history(spec, seed=5, rank=2)


@each
def test_keys_do_not_disturb_each_other(spec: str) -> None:
    alone, mixed = get(spec), get(spec)
    for call in range(3):
        want = alone.compress(normal((20, 30), seed=call), "w")
        mixed.compress(normal((20, 30), seed=9 + call), "v")
        mixed.compress(normal(11, seed=9 + call), "u")
        assert raw(mixed.compress(normal((20, 30), seed=call), "w")) == raw(want)


def test_what_is_random_depends_on_seed_key_and_call_and_rounding_on_the_rank() -> None:
    array = normal((60, 50))
    for spec in SPECS:
        base = spec.removesuffix("+ef")

        def first(key: str = "w", before: int = 0, spec: str = spec, **who: int) -> Any:
            compressor = get(spec, **who)
            for _ in range(before):
                compressor.compress(np.zeros_like(array), key)  # leaves no residual
            return compressor.decompress(compressor.compress(array, key)).tobytes()

        same = first()
        assert (first(rank=1) != same) == (base in RANDOM), spec
        of_seed = base in (*RANDOM, "randomk:0.3", "powersgd:2")
        assert (first(seed=1) != same) == of_seed, spec
        assert (first(key="v") != same) == of_seed, spec
        assert (first(before=1) != same) == (base in (*RANDOM, "randomk:0.3")), spec


@each
def test_no_global_generator_is_touched(spec: str) -> None:
    outcomes = []
    for seed in (0, 1):
        np.random.seed(seed)
        random.seed(seed)
        before = random.getstate(), np.random.get_state()
        outcomes.append(history(spec))
        get(spec).exchange(normal((9, 8)), "w", Alone())
        after = random.getstate(), np.random.get_state()
        assert before[0] == after[0]
        assert before[1][2:] == after[1][2:]
        assert (before[1][1] == after[1][1]).all()
    assert outcomes[0] == outcomes[1]


@each
def test_settings_of_numpy_stay(spec: str) -> None:
    before = np.geterr(), np.getbufsize()
    history(spec)
    with pytest.raises(ValueError, match="w is nan"):
        get(spec).compress(np.array([np.nan]), "w")
    assert (np.geterr(), np.getbufsize()) == before


# -- zeros, denormals, huge numbers -----------------------------------------------------------------------------


@each
def test_zero_is_zero(spec: str) -> None:
    compressor = get(spec)
    for dtype in DTYPES:
        for shape in ((), (1,), (2100,), (40, 30)):
            for zero in (0.0, -0.0):
                array = np.full(shape, zero, dtype)
                for _ in range(2):
                    out = compressor.decompress(compressor.compress(array, f"{shape}"))
                    assert (out == 0).all()
                    assert (compressor.exchange(array, f"{shape} x", Alone()) == 0).all()
    back = compressor.decompress(compressor.compress(normal((40, 30), np.float64), "(40, 30)"))
    assert back.any()  # zeros before are no sentence for ever


@each
def test_a_block_of_zeros_beside_others_is_zero(spec: str) -> None:
    array = normal(3 * 2048)
    array[2048:4096] = 0
    assert (get(spec).decompress(get(spec).compress(array, "w"))[2048:4096] == 0).all()


@each
def test_denormals(spec: str) -> None:
    """The smallest numbers that there are: no division by 0, and nothing that is far larger than what went in."""
    for dtype in (np.float32, np.float64):
        least = np.finfo(dtype).smallest_subnormal
        for units in ([1], [1, -1, 0], [3, 127, -5, 1], [1] * 600, [254, 1, -254], [2**20, 1, -7]):
            array, compressor = np.array(units, dtype) * least, get(spec)
            for _ in range(3):
                out = compressor.decompress(compressor.compress(array, "w"))
                assert np.isfinite(out).all()
                if spec != "sign":  # which knows no magnitude
                    assert np.abs(out).max() <= (40 * np.linalg.norm(units) + 130) * least
            if spec in ("none", "topk:0.3+ef", "terngrad", "int8"):
                assert abs(out[0]) == array[0] or len(units) > 1


HUGE = {
    "largest": lambda top, dtype: np.array([top, -top, 3, 0], dtype),
    "many": lambda top, dtype: np.full(600, top / 4, dtype),
    "all magnitudes": lambda top, dtype: np.array([top / 8, 1, -np.finfo(dtype).tiny, -top / 9, -1, 1e-3], dtype),
}


@each
@pytest.mark.parametrize("name", HUGE)
def test_huge_numbers_are_carried_or_refused(spec: str, name: str) -> None:
    """Finite in, finite out, and no warning; or a ValueError that begins with the key, from those whose format (or
    sum of squares) it is beyond."""
    for dtype, top in ((np.float16, 65504.0), (np.float32, float(np.finfo(np.float32).max)), (np.float64, 1e300)):
        array, compressor = HUGE[name](top, dtype), get(spec)
        try:
            out = compressor.decompress(compressor.compress(array, "w"))
        except ValueError as error:
            refusal = str(error)
            assert re.match(r"w\b", refusal)
            assert spec.startswith(("fp16", "bf16", "randomk", "qsgd", "terngrad:2.5", "int8", "powersgd"))
        else:
            assert np.isfinite(out).all()


def test_squares_may_overflow_where_numbers_do_not() -> None:
    """Looking for NaN by the sum of squares is quick, and must be silent (warnings are errors here)."""
    for dtype, value in ((np.float16, 300), (np.float32, 1e25), (np.float64, 1e200)):
        array = np.full(9, value, dtype)
        assert (get("topk:1").decompress(get("topk:1").compress(array, "w")) == array).all()


def test_fp16_tells_what_is_beyond_it_and_who_takes_it() -> None:
    with pytest.raises(ValueError, match=r"layer\.w holds 1e\+06, beyond float16's 65504: give compress=\"bf16\""):
        get("fp16").compress(np.array([1.0, -1e6]), "layer.w")
    most = np.array([65504.0, -65504.0, 65519.0])  # the last is rounded down
    assert (get("fp16").decompress(get("fp16").compress(most, "w")) == [65504, -65504, 65504]).all()


def test_clipping_leaves_an_array_without_spread() -> None:
    """One element, or equal ones, have no deviation from their mean. They are gradients all the same."""
    for array in (np.full(1, 2.0), np.full((), -3.0), np.full(50, 4.0)):
        compressor = get("terngrad:2.5")
        assert any(compressor.decompress(compressor.compress(array, "w")).any() for _ in range(30))


def test_random_k_in_float16_does_not_overflow_by_the_factor() -> None:
    """d/k times a number fits, d times it does not."""
    array = np.full(70000, 2, np.float16)
    compressor = get("randomk:0.5")
    assert set(compressor.decompress(compressor.compress(array, "w"))) == {np.float16(0), np.float16(4)}


# -- what is refused --------------------------------------------------------------------------------------------


@each
def test_nan_and_infinity_are_rejected_by_name(spec: str) -> None:
    """And nothing has happened: what comes next has the bits that it would have had."""
    compressor, other = get(spec), get(spec)
    compressor.compress(normal((6, 7)), "layer.w")
    other.compress(normal((6, 7)), "layer.w")
    for dtype in DTYPES:
        for element, bad in ((0, np.nan), (20, np.inf), (41, -np.inf)):
            array = normal((6, 7), dtype, seed=1)
            array.reshape(-1)[element] = bad
            for call in (compressor.compress, lambda a, k: compressor.exchange(a, k, Alone())):
                with pytest.raises(
                    ValueError, match=rf"^layer\.w is {bad} at element {element}: NaN and infinity"
                ):
                    call(array, "layer.w")
    after = normal((6, 7), seed=2)
    assert raw(compressor.compress(after, "layer.w")) == raw(other.compress(after, "layer.w"))
    assert state_bytes(compressor) == state_bytes(other)


def test_only_a_nan_among_many_large_numbers_is_one() -> None:
    array = np.full(1000, 1e30, np.float32)
    get("none").compress(array, "w")
    array[[700, 900]] = np.nan, np.inf
    with pytest.raises(ValueError, match="w is nan at element 700"):
        get("none").compress(array, "w")


@each
def test_other_numbers_are_a_type_error_by_name(spec: str) -> None:
    for dtype in (np.int64, np.uint8, bool, np.complex64, np.complex128):
        for array in (np.ones((3, 4), dtype), np.ones((), dtype), np.ones(0, dtype)):
            with pytest.raises(TypeError, match=rf"^layer\.w is {np.dtype(dtype)}: gradients that are compressed"):
                get(spec).compress(array, "layer.w")


@pytest.mark.parametrize("what", [[1.0, 2.0], 1.0, None])
def test_what_is_no_array_is_a_type_error(what: Any) -> None:
    for spec in PLAIN:
        with pytest.raises(TypeError, match="expected an array"):
            get(spec).compress(what, "w")


def test_fractions_are_taken_where_no_root_is_needed() -> None:
    array = thirds(1, -2, 0, 7, 5).reshape(1, 5)
    for spec in (
        "none",
        "int8",
        "int8:stochastic",
        "terngrad",
        "sign",
        "topk:0.3",
        "randomk:0.3",
        "topk:0.3:owners",
    ):
        for feedback in ("", "+ef"):
            out = get(spec + feedback).decompress(get(spec + feedback).compress(array, "w"))
            assert out.dtype == object
            assert out.shape == (1, 5)
            assert all(isinstance(v, Fraction | int) for v in out.ravel()), spec
    for spec in ("qsgd:4", "powersgd:1", "qsgd:4+ef", "powersgd:1+ef"):
        with pytest.raises(TypeError, match="square roots"):
            get(spec).compress(np.full((9, 9), Fraction(1, 3), object), "w")


# -- names ------------------------------------------------------------------------------------------------------

LIST = "none, fp16, bf16, bf16:truncate, int8, int8:stochastic, qsgd:LEVELS, sign, terngrad, terngrad:CLIP, "
LIST += "topk:DENSITY, topk:DENSITY:owners, randomk:DENSITY, powersgd:RANK"


@pytest.mark.parametrize(
    "spec", ["", "gzip", "INT8", "int8 ", "+ef", "int8+", "int8+fe", "int8+ef+ef", "ef", ":4"]
)
def test_unknown_names_are_answered_by_those_that_there_are(spec: str) -> None:
    with pytest.raises(ValueError, match=f'compress={re.escape(repr(spec))} is unknown.*{LIST}.*"\\+ef"'):
        get(spec)


@pytest.mark.parametrize("spec", [None, 4, 0.01, b"int8", ["int8"]])
def test_what_is_no_name(spec: Any) -> None:
    for function in (get, compress.resolved):
        with pytest.raises(TypeError, match=f"give a Compressor, or a name: {LIST}"):
            function(spec)


BAD = {
    "fp16:3": "",
    "none:3": "",
    "none:": "",
    "sign:1": "",
    "sign:scaled": "",
    "bf16:x": "only 'truncate' may follow",
    "bf16:truncate:truncate": "only 'truncate' may follow",
    "int8:": "only 'stochastic' may follow",
    "int8:4": "only 'stochastic' may follow",
    "qsgd": "give it a number of levels",
    "qsgd:": "'' is no number of levels",
    "qsgd:4:4": "give it a number of levels",
    "qsgd:4.5": "'4.5' is no number of levels",
    "qsgd:0": "levels=0: give a whole number from 1 to 127",
    "qsgd:-4": "levels=-4: give a whole number from 1 to 127",
    "qsgd:128": "levels=128: give a whole number from 1 to 127",
    "terngrad:x": "'x' is no number",
    "terngrad:0": "clip=0.0: give a positive number",
    "terngrad:-1": "clip=-1.0: give a positive number",
    "terngrad:nan": "clip=nan: give a positive number",
    "terngrad:inf": "clip=inf: give a positive number",
    "topk": "is no density",
    "topk:x": "'x' is no density",
    "topk:0": "density=0.0: give the part that is kept, above 0, at most 1",
    "topk:-0.1": "density=-0.1: give the part",
    "topk:1.01": "density=1.01: give the part",
    "topk:nan": "density=nan: give the part",
    "topk:0.1:owner": "only 'owners' may follow",
    "topk:0.1:owners:owners": "only 'owners' may follow",
    "topk::owners": "is no density",
    "randomk": "give it a density",
    "randomk:0": "density=0.0: give the part",
    "randomk:2": "density=2.0: give the part",
    "randomk:0.1:owners": "give it a density",
    "powersgd": "give it a number of columns",
    "powersgd:0": "approximation_rank=0: give a whole number",
    "powersgd:-1": "approximation_rank=-1: give a whole number",
    "powersgd:2.5": "'2.5' is no number of columns",
}


@pytest.mark.parametrize("spec", BAD)
@pytest.mark.parametrize("feedback", ["", "+ef"])
def test_numbers_that_do_not_fit(spec: str, feedback: str) -> None:
    with pytest.raises(ValueError, match=f"^compress='{re.escape(spec + feedback)}': .*{BAD[spec]}") as told:
        get(spec + feedback)
    assert "__init__" not in str(told.value)  # words for users


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: compress.TopK(0), ValueError, "density=0"),
        (lambda: compress.TopK(1.5), ValueError, "density=1.5"),
        (lambda: compress.TopK(None), TypeError, "density=None: give a number"),
        (lambda: compress.TopK("many"), TypeError, "density='many': give a number"),
        (lambda: compress.RandomK(-1), ValueError, "density=-1"),
        (lambda: compress.RandomK([]), TypeError, r"density=\[\]"),
        (lambda: compress.QSGD(True), ValueError, "levels=True"),
        (lambda: compress.QSGD(4.0), ValueError, "levels=4.0"),
        (lambda: compress.QSGD(4, block=0), ValueError, "block=0"),
        (lambda: compress.QSGD(4, block=1.5), ValueError, "block=1.5"),
        (lambda: compress.Int8(block=-1), ValueError, "block=-1"),
        (lambda: compress.TernGrad(-2.5), ValueError, "clip=-2.5"),
        (lambda: compress.PowerSGD(0), ValueError, "approximation_rank=0"),
        (lambda: compress.PowerSGD(True), ValueError, "approximation_rank=True"),
        (lambda: compress.PowerSGD(2.0), ValueError, "approximation_rank=2.0"),
        (lambda: ErrorFeedback(get("int8+ef")), ValueError, "int8.* has error feedback already"),
    ],
)
def test_constructors_refuse_what_does_not_fit(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    assert compress.QSGD(np.int64(4)).spec == "qsgd:4"
    assert compress.PowerSGD(np.int32(4)).spec == "powersgd:4"
    assert compress.TopK(np.float32(0.5)).spec == "topk:0.5"
    assert compress.TopK(1).spec == "topk:1"


@pytest.mark.parametrize(
    "spec",
    [*SPECS, *compress.EXAMPLES, "topk:1", "topk:0.001", "topk:1e-05", "topk:0.123456789", "terngrad:2.7182818"],
)
def test_a_spec_makes_such_a_one(spec: str) -> None:
    made = get(spec)
    assert made.spec == spec
    assert repr(made) == f"compress={spec!r}"
    assert isinstance(made, ErrorFeedback) == spec.endswith("+ef")


def test_examples_are_one_of_each_kind() -> None:
    kinds = {type(c.inner if isinstance(c, ErrorFeedback) else c) for c in map(get, compress.EXAMPLES)}
    assert kinds == {type(get(spec)) for spec in PLAIN}


def test_resolved_is_of_this_rank_and_keeps_its_seed() -> None:
    """A copy without memory: what was given is a description, for all ranks and any number of strategies."""
    given = get("qsgd:4+ef", seed=7)
    given.compress(normal(9), "w")
    mine = compress.resolved(given, seed=1, rank=3)
    assert (given.rank, given.inner.rank) == (0, 0)
    assert (mine.seed, mine.rank, mine.inner.seed, mine.inner.rank) == (7, 3, 7, 3)
    assert set(mine.state_dict()) == {"seed"}
    made = compress.resolved("qsgd:4+ef", seed=7, rank=3)
    assert raw(made.compress(normal(9), "w")) == raw(mine.compress(normal(9), "w"))


# -- what it remembers ------------------------------------------------------------------------------------------


def state_bytes(compressor: compress.Compressor) -> dict[str, Any]:
    return {name: (value.tobytes(), value.shape) for name, value in compressor.state_dict().items()}


def work(compressor: compress.Compressor, calls: range) -> list[Any]:
    found = []
    for call in calls:
        for key, shape in (("0.weight", (30, 20)), ("0.bias", (30,)), ("scale", ())):
            payload = compressor.compress(normal(shape, seed=call), key)
            found.append((raw(payload), compressor.decompress(payload).tobytes()))
    return found


@each
def test_a_loaded_state_goes_on_to_the_bit(spec: str) -> None:
    one = get(spec, seed=4, rank=1)
    work(one, range(3))
    state = one.state_dict()
    assert all(type(value) is np.ndarray for value in state.values())
    want = work(one, range(3, 6))
    ends = state_bytes(one)
    other = get(spec, seed=99, rank=1)
    work(other, range(2))  # it has a history of its own, which is forgotten
    for _ in range(2):  # and the state is still what it was after one has worked on with it
        other.load_state_dict(state)
        assert work(other, range(3, 6)) == want
        assert state_bytes(other) == ends
    if spec not in (
        "none",
        "none+ef",
        "fp16",
        "bf16",
        "bf16:truncate",
        "int8",
        "sign",
        "topk:0.3",
        "topk:0.3:owners",
    ):
        assert work(get(spec, seed=4, rank=1), range(3, 6)) != want  # it does depend on what was before


def test_a_state_of_another_is_refused() -> None:
    for one, other, names in (
        ("int8+ef", "int8", "residual/w"),
        ("powersgd:1", "topk:0.3", "q/w"),
        ("powersgd:1+ef", "topk:0.3+ef", "q/w"),
        ("powersgd:1+ef", "sign", "q/w, residual/w"),
    ):
        saved = get(one)
        saved.compress(normal((9, 9)), "w")
        before = state_bytes(loading := get(other, seed=3))
        with pytest.raises(ValueError, match=rf"has no {names}: load it by the compressor that saved it"):
            loading.load_state_dict(saved.state_dict())
        assert state_bytes(loading) == before


def test_a_state_without_a_seed_keeps_the_seed() -> None:
    one, other = get("qsgd:4", seed=6), get("qsgd:4", seed=6)
    for compressor in (one, other):
        compressor.compress(normal(50), "w")
    calls = {name: value for name, value in one.state_dict().items() if name != "seed"}
    one.load_state_dict(calls)
    assert one.seed == 6
    assert raw(one.compress(normal(50), "w")) == raw(other.compress(normal(50), "w"))


@pytest.mark.parametrize("spec", ["fp16+ef", "fp16"])
def test_if_compressing_fails_nothing_has_been_remembered(spec: str) -> None:
    one, other = get(spec), get(spec)
    for compressor in (one, other):
        compressor.compress(normal(20), "w")
    with pytest.raises(ValueError, match="beyond float16"):
        one.compress(np.full(20, 1e9, np.float32), "w")
    assert raw(one.compress(normal(20, seed=1), "w")) == raw(other.compress(normal(20, seed=1), "w"))
    for name in (n for n in one.state_dict() if n.startswith("residual")):
        assert one.state_dict()[name].tobytes() == other.state_dict()[name].tobytes()


def test_a_residual_belongs_to_a_key_and_to_a_shape() -> None:
    compressor = get("topk:0.3+ef")
    compressor.compress(normal((4, 5)), "w")
    compressor.compress(normal((4, 5), seed=1), "v")
    assert not np.array_equal(compressor.residual("w"), compressor.residual("v"))
    with pytest.raises(ValueError, match=r"w had shape \(4, 5\) before, and now \(5, 4\): give it a new key"):
        compressor.compress(normal((5, 4)), "w")
    with pytest.raises(KeyError):
        compressor.residual("u")


@each
def test_exchange_of_one_rank_is_there_and_back(spec: str) -> None:
    one, other = get(spec), get(spec)
    for call in range(3):
        for shape in ((), (0,), (5,), (30, 20)):
            array = normal(shape, np.float64, seed=call)
            there = other.compress(array, f"{shape}")
            back = one.exchange(array, f"{shape}", Alone())
            assert (back.shape, back.dtype) == (array.shape, array.dtype)
            want = other.decompress(there)
            assert np.allclose(back, want, rtol=1e-12, atol=1e-12)
            assert back.tobytes() == want.tobytes() or "powersgd" in spec  # a matrix product, from another layout


def test_the_meter_is_told_of_the_traffic() -> None:
    for spec in PLAIN[:-1]:
        compressor = get(spec)
        for dtype in (np.float32, np.float64):
            with backend.meter() as m:
                payload = compressor.compress(normal(5000, dtype), "w")
            assert m.operations == 1
            assert m.nbytes == compressor.bytes_per_element * 5000 * np.dtype(dtype).itemsize / 4
            with backend.meter() as m:
                compressor.decompress(payload)
            assert m.operations == 1
            assert m.nbytes == payload.nbytes + 5000 * np.dtype(dtype).itemsize
    with backend.meter() as m:
        get("powersgd:2").compress(normal((50, 40)), "w")
    assert (m.flops, m.nbytes) == (4 * 2000 * 2, compress.PowerSGD.bytes_per_element * 2000)


def test_packed_bytes() -> None:
    """Each bit plane is filled up to whole bytes; eight bits are the numbers themselves."""
    want = {(0, 3): 0, (1, 3): 3, (8, 3): 3, (9, 3): 6, (9, 8): 9, (17, 1): 3}
    assert {(n, width): bits.pack(np.ones(n, np.uint8), width).nbytes for n, width in want} == want
