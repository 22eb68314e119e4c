"""Optimizers: groups and errors, rules against PyTorch and against themselves."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from minidp import backend, nn, optim, parallel
from minidp.comm import comm_self
from minidp.nn import functional as F

RULES = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.1}),
    ("Adam", {"betas": (0.0, 0.0)}),
    ("AdamW", {}),
    ("AdamW", {"betas": (0.5, 0.9), "weight_decay": 0.3}),
]
rules = pytest.mark.parametrize(("rule", "hyper"), RULES, ids=[f"{rule} {hyper}" for rule, hyper in RULES])


def make(rule, params, lr=0.1, **hyper):
    return getattr(optim, rule)(params, lr=lr, **hyper)


def parameters():
    rng = np.random.default_rng(0)
    return [nn.Parameter(rng.standard_normal(shape)) for shape in [(4, 3), (5,), ()]]


def gradients(step, params):
    rng = np.random.default_rng([1, step])
    return [rng.standard_normal(p.shape) for p in params]


# ── the rules ───────────────────────────────────────────────────────────────────────────────────────────


@rules
@pytest.mark.parametrize("schedule", [None, optim.cosine(0.1, 20)], ids=["constant", "cosine"])
def test_equal_to_pytorch_over_20_steps(rule, hyper, schedule):
    """Different gradients each step; the last parameter has none in some steps, as an unused layer has."""
    torch = pytest.importorskip("torch")
    params = parameters()
    theirs = [torch.nn.Parameter(torch.tensor(p.numpy())) for p in params]
    ours = make(rule, params, lr=schedule or 0.1, **hyper)
    reference = getattr(torch.optim, rule)(theirs, lr=0.1, **hyper)
    for step in range(20):
        if schedule is not None:
            for group in reference.param_groups:
                group["lr"] = schedule(step)
        for i, (p, q, g) in enumerate(zip(params, theirs, gradients(step, params))):
            unused = i == 2 and step % 3 == 0
            p.grad = None if unused else g
            q.grad = None if unused else torch.tensor(g)
        ours.step()
        reference.step()
        for p, q in zip(params, theirs):
            assert np.allclose(p, q.detach().numpy(), rtol=1e-12, atol=1e-14)


@rules
def test_first_step_of_momentum_is_the_gradient(rule, hyper):
    params = parameters()
    optimizer = make(rule, params, **hyper)
    for p, g in zip(params, gradients(0, params)):
        p.grad = g
    before = [p.numpy().copy() for p in params]
    optimizer.step()
    if rule == "SGD" and "momentum" in hyper:
        state = optimizer._states[id(params[1])]["state"]["momentum_buffer"]
        assert np.array_equal(state, gradients(0, params)[1] + hyper.get("weight_decay", 0) * before[1])
    assert all((p.numpy() != b).all() for p, b in zip(params, before))


def run(optimizer, w, double, cuts, dtype, steps=4):
    """Updates of a flat array: in place or from one of two buffers to the other, whole or slice by slice."""
    n = len(w)
    buffers = [w.copy(), np.full_like(w, np.nan)] if double else [w.copy()] * 2
    states = [{slot: np.zeros(n, dtype) for slot in optimizer.slots} for _ in range(2 if double else 1)]
    states = states if double else states * 2
    if double:
        for array in states[1].values():
            array[...] = np.nan
    now = 0
    for t in range(steps):
        g = np.random.default_rng(t).standard_normal(n).astype(dtype)
        hyper = optimizer.hyper(0, t)
        for lo, hi in pairwise([0, *cuts, n]):
            kept = [buffers[now][lo:hi].copy(), *(s[lo:hi].copy() for s in states[now].values())]
            optimizer.update(
                buffers[now][lo:hi], g[lo:hi], {k: v[lo:hi] for k, v in states[now].items()},
                buffers[1 - now][lo:hi], {k: v[lo:hi] for k, v in states[1 - now].items()},
                lr=hyper["lr"], t=t, hyper=hyper,
                scratch=tuple(np.full(hi - lo, np.nan, dtype) for _ in range(optimizer.scratch)),
            )  # fmt: skip
            if double:  # the committed buffers stay whole
                left = [buffers[now][lo:hi], *(s[lo:hi] for s in states[now].values())]
                assert all(np.array_equal(a, b) for a, b in zip(kept, left))
        now = 1 - now
    return [buffers[now], *states[now].values()]


@rules
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_in_place_equals_out_of_place_and_slices_equal_the_whole_to_the_bit(rule, hyper, dtype):
    w = np.random.default_rng(9).standard_normal(67).astype(dtype)
    optimizer = make(rule, [nn.Parameter(w)], lr=optim.cosine(0.1, 4), **hyper)
    whole = run(optimizer, w, double=False, cuts=[], dtype=dtype)
    assert all(array.dtype == dtype for array in whole)
    assert not np.array_equal(whole[0], w)
    for double in (False, True):
        for cuts in ([], [1], [16, 32], [0, 5, 66]):
            again = run(optimizer, w, double, cuts, dtype)
            assert [a.tobytes() for a in again] == [a.tobytes() for a in whole]


@rules
def test_zero_padding_stays_zero(rule, hyper):
    optimizer = make(rule, [nn.Parameter(np.ones(1))], **hyper)
    w, state = np.zeros(8), {slot: np.zeros(8) for slot in optimizer.slots}
    for t in range(3):
        h = optimizer.hyper(0, t)
        scratch = tuple(np.empty(8) for _ in range(optimizer.scratch))
        optimizer.update(w, np.zeros(8), state, w, state, lr=h["lr"], t=t, hyper=h, scratch=scratch)
    assert not any(a.any() for a in (w, *state.values()))


@rules
def test_plain_steps_equal_the_rule_on_a_slab(rule, hyper):
    params = parameters()
    optimizer = make(rule, params, **hyper)
    w = np.concatenate([p.numpy().ravel() for p in params])
    state = {slot: np.zeros_like(w) for slot in optimizer.slots}
    scratch = tuple(np.empty_like(w) for _ in range(optimizer.scratch))
    for t in range(3):
        grads = gradients(t, params)
        for p, g in zip(params, grads):
            p.grad = g
        optimizer.step()
        assert all(np.array_equal(p.grad, g) for p, g in zip(params, grads))  # left as it was
        flat = np.concatenate([g.ravel() for g in grads])
        h = optimizer.hyper(0, t)
        optimizer.update(w, flat, state, w, state, lr=h["lr"], t=t, hyper=h, scratch=scratch)
        assert np.array_equal(np.concatenate([p.numpy().ravel() for p in params]), w)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@rules
def test_an_exact_scale_has_the_bits_of_division_before_the_rule(rule, hyper):
    """1/n is exact for a power of two: η·(1/n)·Σ is η·(Σ/n), and a pass over the gradient is saved."""
    optimizer = make(rule, [nn.Parameter(np.zeros(100, np.float32))], **hyper)
    results = []
    for scaled in (True, False):
        w = np.ones(100, np.float32)
        state = {slot: np.zeros(100, np.float32) for slot in optimizer.slots}
        for t in range(3):
            g = np.random.default_rng([2, t]).standard_normal(100).astype(np.float32) * 64
            scratch = tuple(np.empty_like(w) for _ in range(optimizer.scratch))
            options = {"lr": 0.1, "t": t, "hyper": optimizer.hyper(0, t), "scratch": scratch}
            if scaled:
                optimizer.update(w, g, state, w, state, **options, scale=1 / 64)
            else:
                optimizer.update(w, g / 64, state, w, state, **options)
        results.append(w.tobytes())
    assert results[0] == results[1]


def test_momentum_correction_of_goyal_et_al():
    """v ← μ (η_{t+1}/η_t) v + η_{t+1} g, w ← w − v, their equation 10, is what we compute when η changes."""
    rates, mu = [0.1, 0.1, 0.4, 0.4, 0.05], 0.9
    p = nn.Parameter(np.array([1.0, -2.0]))
    optimizer = optim.SGD([p], lr=rates.__getitem__, momentum=mu)
    w, v, uncorrected, u = p.numpy().copy(), np.zeros(2), p.numpy().copy(), np.zeros(2)
    for t, rate in enumerate(rates):
        p.grad = g = np.random.default_rng(t).standard_normal(2)
        optimizer.step()
        v = mu * (rate / rates[t - 1] if t else 1) * v + rate * g
        u = mu * u + rate * g
        w, uncorrected = w - v, uncorrected - u
        assert np.allclose(p, w, rtol=1e-14)
    assert not np.allclose(uncorrected, w, rtol=1e-3)


def test_float32_is_not_widened_by_a_numpy_learning_rate():
    for lr in (np.float64(0.1), lambda t: np.float64(0.1)):
        p = nn.Parameter(np.ones(3, np.float32))
        q = nn.Parameter(np.ones(3, np.float32))
        p.grad = q.grad = np.full(3, 0.3, np.float32)
        optim.SGD([p], lr).step()
        optim.SGD([q], 0.1).step()
        assert p.dtype == np.float32
        assert p.numpy().tobytes() == q.numpy().tobytes()


@pytest.mark.parametrize(
    ("rule", "hyper", "flops", "passes"),  # an element
    [
        ("SGD", {}, 2, 3),  # w and g read, w written
        ("SGD", {"momentum": 0.9}, 4, 5),
        ("Adam", {}, 12, 7),
        ("AdamW", {}, 13, 7),
    ],
)
def test_updates_are_metered(rule, hyper, flops, passes):
    params = [nn.Parameter(np.zeros((4, 3), np.float32)), nn.Parameter(np.zeros(5)), nn.Parameter(np.zeros(2))]
    optimizer = make(rule, params, **hyper)
    for p in params[:2]:
        p.grad = np.ones(p.shape)
    with backend.meter() as m:
        optimizer.step()
    assert (m.operations, m.flops, m.nbytes) == (
        2,
        flops * 17,
        passes * (12 * 4 + 5 * 8),
    )  # the third has no gradient
    with backend.meter() as m:
        optimizer.count_update(10, 2)
    assert (m.operations, m.flops, m.nbytes) == (1, flops * 10, passes * 20)


# ── groups and errors ───────────────────────────────────────────────────────────────────────────────────


def test_groups_have_their_own_hyperparameters():
    a, b, c = parameters()
    optimizer = optim.SGD([{"params": [a, b], "lr": 0.5}, {"params": c, "momentum": 0.9}], lr=optim.constant(0.1))
    assert (optimizer.group_of(a), optimizer.group_of(b), optimizer.group_of(c)) == (0, 0, 1)
    assert optimizer.hyper(0, 7) == {"lr": 0.5, "momentum": 0, "nesterov": False, "weight_decay": 0}
    assert optimizer.hyper(1, 7) == {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0}
    assert optimizer.slots == ("momentum_buffer",)
    with pytest.raises(KeyError, match=r"SGD was not given.*\(2,\)"):
        optimizer.group_of(nn.Parameter([1.0, 2.0]))


def test_groups_step_with_their_own_rates():
    a, b = nn.Parameter([1.0]), nn.Parameter([1.0])
    a.grad = b.grad = np.ones(1, np.float32)
    optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.25).step()
    assert (a.item(), b.item()) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda p: optim.SGD([], 0.1), ValueError, "SGD: the list of parameters is empty"),
        (lambda p: optim.SGD([{"params": []}], 0.1), ValueError, "group 0 has no parameters"),
        (lambda p: optim.SGD([p, p], 0.1), ValueError, "twice"),
        (lambda p: optim.SGD([{"params": [p]}, {"params": [p]}], 0.1), ValueError, "twice"),
        (lambda p: optim.SGD([p, {"params": [p]}], 0.1), TypeError, "entry 0 is no group"),
        (lambda p: optim.SGD([np.ones(3)], 0.1), TypeError, r"nn\.Parameters, found ndarray"),
        (lambda p: optim.SGD([p], -0.1), ValueError, "must be a number ≥ 0, not -0.1"),
        (lambda p: optim.SGD([p], math.nan), ValueError, "nan"),
        (lambda p: optim.SGD([p], "0.1"), ValueError, "'0.1'"),
        (lambda p: optim.SGD([{"params": [p], "lr": -1}], 0.1), ValueError, "-1"),
        (lambda p: optim.SGD([p], 0.1, momentum=-1), ValueError, "momentum -1"),
        (lambda p: optim.SGD([p], 0.1, nesterov=True), ValueError, "nesterov needs a momentum"),
        (lambda p: optim.SGD([{"params": [p], "beta": 1}], 0.1), TypeError,
         "unknown hyperparameter beta; valid ones: lr, momentum, nesterov, weight_decay"),
        (lambda p: optim.Adam([{"params": [p], "momentum": 1}]), TypeError, "valid ones: lr, betas, eps"),
        (lambda p: optim.Adam([p], betas=(0.9, 1.0)), ValueError, r"Adam: betas must be in \[0, 1\)"),
        (lambda p: optim.AdamW([p], weight_decay=-1), ValueError, "AdamW: eps 1e-08 and weight_decay -1"),
    ],
)  # fmt: skip
def test_mistakes_are_told_when_the_optimizer_is_built(build, error, match):
    with pytest.raises(error, match=match):
        build(nn.Parameter([1.0]))


def test_a_schedule_that_goes_wrong_is_told_with_the_update():
    p = nn.Parameter([1.0])
    p.grad = np.ones(1)
    optimizer = optim.SGD([p], lr=lambda t: 0.1 - t)
    optimizer.step()
    with pytest.raises(ValueError, match=r"for update 1 must be a number ≥ 0, not -0\.9"):
        optimizer.step()


def test_step_refuses_read_only_parameters_before_it_changes_any():
    a, b = nn.Parameter([1.0]), nn.Parameter([1.0])
    a.grad = b.grad = np.ones(1)
    b.data.flags.writeable = False
    with pytest.raises(RuntimeError, match=r"strategy\.step\(\)"):
        optim.SGD([a, b], 0.1).step()
    assert a.item() == 1


def test_frozen_parameters_and_those_without_gradient_stay():
    a, b = nn.Parameter([1.0], requires_grad=False), nn.Parameter([1.0])
    a.grad = np.ones(1)
    optim.Adam([a, b]).step()
    assert (a.item(), b.item()) == (1, 1)


def test_two_ranks_write_their_optimizers_alike():
    def schedule(t):
        return 0.1

    def build():
        return repr(optim.SGD([nn.Parameter([1.0])], lr=lambda t: schedule(t)))

    assert build() == build()
    assert "0x" not in build()
    assert repr(optim.Adam([nn.Parameter([1.0])], lr=optim.cosine(0.1, 5))) == (
        "Adam(1 parameters, lr=Cosine(lr=0.1, steps=5, final_lr=0.0, warmup_steps=0), "
        "betas=(0.9, 0.999), eps=1e-08, weight_decay=0)"
    )


@pytest.mark.parametrize("strategy", [parallel.DataParallel, parallel.NaiveDataParallel])
def test_strategies_meter_the_updates_that_they_make(strategy):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), seed=0)
    trainer = strategy(model, optim.Adam(model.parameters()), comm_self())
    x, y = np.ones((3, 16), np.float32), np.zeros((3, 16), np.float32)
    trainer.forward_backward(x, y, F.mse_loss)
    with backend.meter() as m:
        trainer.step()
    size = 2 * (16 * 16 + 16)  # no padding: each parameter fills whole cache lines
    calls = 1 if strategy is parallel.DataParallel else 4
    assert (m.operations, m.flops, m.nbytes) == (calls, 12 * size, 7 * 4 * size)
