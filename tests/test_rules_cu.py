"""The update rules as CUDA kernels: the bits of the rules written in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from minidp import nn, optim
from tests import device_double, host_cuda
from tests.device_double import xp

pytestmark = pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))

RULES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.0, "momentum": 0.5}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.3, "betas": (0.0, 0.5), "eps": 1e-3}),
    ("AdamW", {"lr": 0.3}),
    ("AdamW", {"weight_decay": 0.0}),
]


@pytest.mark.parametrize(("rule", "hyper"), RULES, ids=[f"{r} {h}" for r, h in RULES])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1, 1 / 64])
@pytest.mark.parametrize("in_place", [True, False])
def test_kernels_have_the_bits_of_the_rules(rule, hyper, dtype, scale, in_place):
    n = 1000
    rng = np.random.default_rng(0)
    optimizer = getattr(optim, rule)([nn.Parameter(np.zeros(n, dtype))], **hyper)
    w = rng.standard_normal(n).astype(dtype)
    w[:3] = np.inf, -0.0, np.nan
    state = {slot: np.zeros(n, dtype) for slot in optimizer.slots}
    device_w, device_state = xp.asarray(w), {slot: xp.zeros(n, dtype) for slot in state}
    with device_double.kernels():
        for t in range(4):
            g = (rng.standard_normal(n) * 10.0 ** rng.integers(-6, 6, n)).astype(dtype)
            device_g = xp.asarray(g)
            results = []
            for weights, gradient, slots in ((w, g, state), (device_w, device_g, device_state)):
                out = weights if in_place else weights.copy()
                slots_out = slots if in_place else {slot: array.copy() for slot, array in slots.items()}
                scratch = tuple(array.copy() for array in [weights] * optimizer.scratch)
                h = optimizer.hyper(0, t)
                with np.errstate(all="ignore"):
                    optimizer.update(
                        weights, gradient, slots, out, slots_out,
                        lr=h["lr"], t=t, hyper=h, scratch=scratch, scale=scale,
                    )  # fmt: skip
                results.append((out, slots_out))
            (w, state), (device_w, device_state) = results
            assert device_w.get().tobytes() == w.tobytes()
            for slot, array in state.items():
                assert device_state[slot].get().tobytes() == array.tobytes()


def test_a_kernel_reads_and_writes_only_its_slice():
    optimizer = optim.Adam([nn.Parameter(np.zeros(8))])
    flats = [xp.full(12, 7.0, np.float64) for _ in range(7)]
    w, g, m, v, w_out, m_out, v_out = (flat[3:9] for flat in flats)
    with device_double.kernels():
        h = optimizer.hyper(0, 0)
        optimizer.update(
            w, g, {"exp_avg": m, "exp_avg_sq": v}, w_out, {"exp_avg": m_out, "exp_avg_sq": v_out},
            lr=0.1, t=0, hyper=h, scratch=(g,),
        )  # fmt: skip
    for flat in flats:
        host = flat.get()
        assert (host[:3] == 7).all()
        assert (host[9:] == 7).all()
    assert (w_out.get() != 7).all()


def test_integers_and_halves_take_the_plain_code():
    optimizer = optim.SGD([nn.Parameter(np.zeros(3, np.float16))], lr=0.5)
    w, g = xp.asarray(np.ones(3, np.float16)), xp.asarray(np.ones(3, np.float16))
    with device_double.kernels():
        optimizer.update(w, g, {}, w, {}, lr=0.5, t=0, hyper=optimizer.hyper(0, 0), scratch=(g.copy(),))
    assert w.get().tolist() == [0.5, 0.5, 0.5]
