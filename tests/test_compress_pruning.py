"""Pruning: which weights stay, and compressors that are given only these."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from minidp.compress import ErrorFeedback, Pruned, compressor, get, magnitude_masks
from minidp.compress.low_rank import Alone
from tests.test_compress import PLAIN, SPECS, normal, raw, state_bytes
from tests.test_compress_exchange import Memory, gradient, plain_sum, together
from tests.test_compress_laws import fractions


def weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {
        "0.weight": normal((20, 30), dtype),
        "0.bias": normal(20, dtype),
        "1.weight": 3 * normal((8, 3, 5, 5), dtype, seed=1),
        "1.scale": normal((), dtype),
        "2.weight": normal((1, 8), dtype, seed=2),
    }


# -- which weights stay -----------------------------------------------------------------------------------------


def test_the_largest_stay() -> None:
    w = {"a": np.array([[1.0, -5.0], [2.0, 0.0]]), "b": np.array([[-3.0, 4.0]]), "bias": np.array([9.0, 9.0])}
    masks = magnitude_masks(w, 0.5)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [[False, True], [False, False]],
        "b": [[True, True]],
    }
    masks = magnitude_masks(w, 0.5, "each")
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [[False, True], [True, False]],
        "b": [[False, True]],
    }


@pytest.mark.parametrize("density", [0.01, 0.1, 0.37, 0.5, 0.999, 1])
def test_as_many_stay_as_the_density_says(density: float) -> None:
    w = weights()
    matrices = {name: a for name, a in w.items() if a.ndim >= 2}
    together_, each = magnitude_masks(w, density), magnitude_masks(w, density, "each")
    assert list(together_) == list(each) == ["0.weight", "1.weight", "2.weight"]
    for name, array in matrices.items():
        for masks in (together_, each):
            assert (masks[name].dtype, masks[name].shape) == (bool, array.shape)
        assert each[name].sum() == max(1, round(density * array.size))
    size = sum(a.size for a in matrices.values())
    assert sum(mask.sum() for mask in together_.values()) == round(density * size)
    stay = np.concatenate([np.abs(a[together_[name]]) for name, a in matrices.items()])
    go = np.concatenate([np.abs(a[~together_[name]]) for name, a in matrices.items()])
    assert density == 1 or stay.min() >= go.max()
    if density == 0.1:  # the kernel's weights are three times as large: of all together it keeps more
        assert together_["1.weight"].mean() > each["1.weight"].mean() > together_["0.weight"].mean()


def test_ties_are_broken_by_position() -> None:
    ones = {"a": np.ones((3, 4)), "b": -np.ones((2, 4))}
    masks = magnitude_masks(ones, 0.7)  # 14 of 20: all of a, and the first two of b
    assert masks["a"].all()
    assert masks["b"].ravel().tolist() == [True] * 2 + [False] * 6
    masks = magnitude_masks(ones, 0.5, "each")
    assert masks["a"].ravel().tolist() == [True] * 6 + [False] * 6
    big = magnitude_masks({"w": np.full((100, 100), 0.5, np.float32)}, 0.01)["w"].ravel()
    assert big[:100].all()
    assert not big[100:].any()


def test_equal_weights_have_equal_masks() -> None:
    """A function of the numbers: not of their layout, nor of who has them, nor of anything random."""
    for scope in ("global", "each"):
        want = magnitude_masks(weights(), 0.3, scope)
        for other in (
            {name: a.copy() for name, a in weights().items()},
            {name: np.asfortranarray(a) for name, a in weights().items()},
            {name: a.astype(np.float64) for name, a in weights().items()},
            {name: -a for name, a in weights().items()},
        ):
            np.random.seed(0)
            found = magnitude_masks(other, 0.3, scope)
            assert all((found[name] == mask).all() for name, mask in want.items())
            assert list(found) == list(want)


def test_nothing_to_prune() -> None:
    assert magnitude_masks({}, 0.5) == {}
    assert magnitude_masks({"bias": np.ones(3), "scale": np.ones(())}, 0.5) == {}
    assert magnitude_masks({"w": np.ones((0, 3))}, 0.5)["w"].shape == (0, 3)
    assert all(mask.all() for mask in magnitude_masks(weights(), 1).values())


def test_what_is_refused() -> None:
    for density in (0, -0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"density=.*the part that is kept"):
            magnitude_masks(weights(), density)
    with pytest.raises(ValueError, match=r"scope='all': give \"global\" or \"each\""):
        magnitude_masks(weights(), 0.5, "all")


# -- a compressor of the rest -----------------------------------------------------------------------------------


def pruned(spec: str, seed: int = 0, rank: int = 0) -> Pruned:
    return Pruned(get(spec, seed=seed, rank=rank), magnitude_masks(weights(), 0.3))


def gradients(call: int) -> dict[str, np.ndarray]:
    return {name: normal(array.shape, seed=50 + call) for name, array in weights().items()}


def given(outer: Pruned, g: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """What is compressed: the kept numbers as a vector, or for PowerSGD a matrix in which the others are 0."""
    if mask is None:
        return g
    return np.where(mask, g, 0) if outer.needs_shape(g.shape) else g[mask]


def of_kept(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return array[mask] if mask is not None and array.shape == mask.shape else array


def test_powersgd_compresses_what_is_left() -> None:
    """As a vector it would travel as it is: 4800 numbers instead of 960."""
    w = normal((120, 120))
    outer = Pruned(get("powersgd:4+ef"), magnitude_masks({"w": w}, 1 / 3))
    assert outer.compress(w, "w").nbytes == (120 + 120) * 4 * 4


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_pruned_does_not_travel(spec: str) -> None:
    """What the mask keeps is compressed as one vector; arrays without a mask are given as they are."""
    outer, inner = pruned(spec), get(spec)
    for call in range(3):
        for name, g in gradients(call).items():
            g.setflags(write=False)
            payload = outer.compress(g, name)
            mask = outer.masks.get(name)
            own = inner.compress(given(outer, g, mask), name)
            assert raw(payload) == raw(own)
            assert payload.nbytes == own.nbytes
            assert (payload.shape, payload.dtype, payload.key) == (g.shape, g.dtype, name)
            out = outer.decompress(payload)
            assert (out.shape, out.dtype) == (g.shape, g.dtype)
            want = inner.decompress(own)
            assert of_kept(out, mask).tobytes() == of_kept(want, mask).tobytes()
            assert mask is None or not out[~mask].any()


@pytest.mark.parametrize("spec", SPECS)
def test_exchange_is_that_of_what_is_kept(spec: str) -> None:
    masks = magnitude_masks(weights(), 0.3)

    def work(rank: int, reducer: Memory) -> Any:
        outer, inner, found = pruned(spec, rank=rank), get(spec, rank=rank), []
        for call in range(2):
            for name, w in weights().items():
                g = gradient(rank, call, w.shape)
                total = outer.exchange(g, name, reducer)
                mask = masks.get(name)
                want = inner.exchange(given(outer, g, mask), name, reducer)
                assert (total.shape, total.dtype) == (w.shape, g.dtype)
                assert of_kept(total, mask).tobytes() == of_kept(want, mask).tobytes()
                assert mask is None or not total[~mask].any()
                found.append(total.tobytes())
        return found

    found = together(3, work)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("spec", SPECS)
def test_combine_and_own_part(spec: str) -> None:
    outer, masks = pruned(spec), magnitude_masks(weights(), 0.3)
    payloads = [pruned(spec, rank=r).compress(gradient(r, 0, (20, 30)), "0.weight") for r in range(3)]
    total = outer.combine(payloads)
    parts = [outer.decompress(p) for p in payloads]
    want = parts[0] + parts[1] + parts[2]
    assert total.tobytes() == (np.sign(want) if spec == "sign" else want).tobytes()
    assert not total[~masks["0.weight"]].any()
    total, own = outer.exchanged(gradient(0, 0, (20, 30)), "0.weight", Alone())
    assert own.shape == total.shape == (20, 30)
    assert np.allclose(outer.decompress(own), total)


@pytest.mark.parametrize("spec", ["topk:0.2", "randomk:0.2", "int8", "sign", "terngrad"])
def test_what_was_dropped_of_the_kept_comes_later_exactly(spec: str) -> None:
    """Fractions: Σ Δ + e = Σ g where the mask keeps; elsewhere nothing is remembered, and nothing ever comes."""
    mask = fractions((8, 9), 99).astype(float) > 0
    outer = Pruned(get(f"{spec}+ef"), {"w": mask})
    total, out = np.full((8, 9), Fraction(0), object), np.full((8, 9), Fraction(0), object)
    for call in range(5):
        g = fractions((8, 9), call)
        out = out + outer.decompress(outer.compress(g, "w"))
        total = total + g
        e = outer.inner.residual("w")
        assert e.shape == (mask.sum(),)
        assert np.all(out[mask] + e == total[mask])
        assert not np.any(out[~mask])
    assert np.any(e)


def test_an_array_of_which_all_or_nothing_is_kept() -> None:
    masks = {"all": np.ones((3, 4), bool), "nothing": np.zeros((3, 4), bool)}
    for spec in SPECS:
        outer, plain = Pruned(get(spec), masks), get(spec)
        g = normal((3, 4))
        out = outer.decompress(outer.compress(g, "all"))
        assert out.tobytes() == plain.decompress(plain.compress(g.reshape(-1), "all")).tobytes()
        payload = outer.compress(g, "nothing")
        assert not outer.decompress(payload).any()
        assert payload.nbytes <= 12
        assert not outer.exchange(g, "nothing", Alone()).any()


def test_nan_is_told_by_the_name_and_a_mask_of_another_shape_too() -> None:
    outer = Pruned(get("int8"), {"w": np.ones((3, 4), bool)})
    with pytest.raises(ValueError, match="w is nan"):
        outer.compress(np.full((3, 4), np.nan), "w")
    for array in (np.ones((4, 3)), np.ones(12)):
        message = re.escape(f"w has shape {array.shape}, its mask (3, 4)")
        for call in (outer.compress, lambda a, k: outer.exchange(a, k, Alone())):
            with pytest.raises(ValueError, match=message):
                call(array, "w")


def test_it_is_what_its_inner_one_is() -> None:
    for spec in SPECS:
        outer, inner = pruned(spec), get(spec)
        assert (outer.spec, outer.route, outer.steady) == (spec, inner.route, inner.steady)
        outer.belong_to(3)
        assert outer.rank == outer.inner.rank == 3
        want = get(spec, rank=3).compress(normal(20), "0.bias")
        assert raw(outer.compress(normal(20), "0.bias")) == raw(want)


@pytest.mark.parametrize("spec", SPECS)
def test_a_loaded_state_brings_its_masks_and_goes_on_to_the_bit(spec: str) -> None:
    def work(one: compressor.Compressor, calls: range) -> list[Any]:
        return [raw(one.compress(g, name)) for call in calls for name, g in gradients(call).items()]

    one = pruned(spec, seed=4)
    work(one, range(2))
    state = one.state_dict()
    assert all(type(value) is np.ndarray for value in state.values())
    assert state["mask/0.weight"].nbytes == 75  # a bit a number
    assert state["mask/2.weight"].nbytes == 1
    want, ends = work(one, range(2, 4)), state_bytes(one)
    for other in (Pruned(get(spec, seed=9), {}), Pruned(get(spec), {"v": np.zeros((2, 3), bool)})):
        other.load_state_dict(state)
        assert list(other.masks) == list(one.masks)
        assert all((other.masks[name] == mask).all() for name, mask in one.masks.items())
        assert work(other, range(2, 4)) == want
        assert state_bytes(other) == ends


def test_a_state_with_masks_is_refused_by_one_without() -> None:
    with pytest.raises(ValueError, match=r"has no mask/0\.weight, .*load it by the compressor that saved it"):
        get("int8").load_state_dict(pruned("int8").state_dict())


def test_exchange_without_compression_is_the_sum_of_the_kept() -> None:
    mask = magnitude_masks(weights(), 0.3)["0.weight"]
    for total in together(2, lambda rank, r: pruned("none").exchange(gradient(rank, 0, (20, 30)), "0.weight", r)):
        want = plain_sum(2, lambda rank, call: gradient(rank, 0, (20, 30)))
        assert total.tobytes() == np.where(mask, want, np.float32(0)).tobytes()


def test_pruned_bytes_are_the_density_of_all() -> None:
    g = normal((20, 30))
    for spec in PLAIN:
        if spec.startswith(("none", "fp16", "bf16")):
            kept = magnitude_masks(weights(), 0.3)["0.weight"].sum()
            assert pruned(spec).compress(g, "0.weight").nbytes == kept * (4 if spec == "none" else 2)


def test_pruning_goes_around_error_feedback() -> None:
    """The other way round owners' parts would find no mask, and all would travel."""
    with pytest.raises(ValueError, match="or is Pruned, which goes around it"):
        ErrorFeedback(pruned("topk:0.1"))
