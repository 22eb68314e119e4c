"""The update rules, written as they stand in the papers, in place and without a temporary array.

Where CUDA kernels run, each is one kernel (``rules.cu``), with the bits of what is written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minidp.backend import Array, Kernels, array_module
from minidp.optim.optimizer import LearningRate, Optimizer

KERNELS = Kernels(Path(__file__).with_name("rules.cu"), "sgd", "adam")


class SGD(Optimizer):
    """w ← w − η g, with momentum and weight decay as in PyTorch. Exact on Fractions.

        g ← g + λ w            weight_decay λ
        m ← μ m + g            momentum μ: state "momentum_buffer"; the step is then m,
        g ← g + μ m            or, with nesterov, this
        w ← w − η g

    η is outside of the momentum buffer, so when it changes from η_t to η_{t+1} the old velocity η m changes
    with it: the "momentum correction" of Goyal et al. 2017 (section 3) is built in.
    """

    flops_per_element = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate,
        momentum: float = 0,
        nesterov: bool = False,
        weight_decay: float = 0,
    ) -> None:
        super().__init__(params, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        if any(group["momentum"] for group in self.groups):
            self.slots = ("momentum_buffer",)
            self.flops_per_element = 4

    def check(self, group: dict[str, Any]) -> None:
        if group["momentum"] < 0 or group["weight_decay"] < 0:
            raise ValueError(
                f"SGD: momentum {group['momentum']} and weight_decay {group['weight_decay']} must be ≥ 0"
            )
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("SGD: nesterov needs a momentum > 0")

    def update(
        self,
        w: Array,
        g: Array,
        state: Mapping[str, Array],
        w_out: Array,
        state_out: Mapping[str, Array],
        *,
        lr: Any,
        t: int,
        hyper: Mapping[str, Any],
        scratch: tuple[Array, ...],
        scale: Any = 1,
    ) -> None:
        xp = array_module(w)
        decay, momentum = hyper["weight_decay"], hyper["momentum"]
        kernels = KERNELS.on(xp, w.dtype)
        if kernels is not None:
            m, m_out = (s["momentum_buffer"] if momentum else w for s in (state, state_out))
            kernels.each(
                "sgd", w.size, w, g, m, w_out, m_out,
                float(lr), float(scale), float(decay), float(momentum), int(hyper["nesterov"]),
            )  # fmt: skip
            return
        if not decay and not momentum:
            xp.multiply(g, lr * scale, out=scratch[0])
            xp.subtract(w, scratch[0], out=w_out)
            return
        if scale != 1:
            xp.multiply(g, scale, out=g)
        step = g
        if decay:
            xp.multiply(w, decay, out=scratch[0])
            xp.add(g, scratch[0], out=g)
        if momentum:
            m = state_out["momentum_buffer"]
            xp.multiply(state["momentum_buffer"], momentum, out=m)
            xp.add(m, g, out=m)
            if hyper["nesterov"]:
                xp.multiply(m, momentum, out=scratch[0])
                xp.add(g, scratch[0], out=g)
            else:
                step = m
        xp.multiply(step, lr, out=g)
        xp.subtract(w, g, out=w_out)


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015), as PyTorch computes it; weight decay is added to the gradient.

        g ← g + λ w
        m ← β₁ m + (1 − β₁) g           state "exp_avg"
        v ← β₂ v + (1 − β₂) g²          state "exp_avg_sq"
        w ← w − η m̂ / (√v̂ + ε)          with m̂ = m / (1 − β₁ᵗ⁺¹), v̂ = v / (1 − β₂ᵗ⁺¹), t from 0

    m and v start at 0; the division undoes what that takes from them.
    """

    slots = ("exp_avg", "exp_avg_sq")
    flops_per_element = 12
    decoupled = False  # True: AdamW

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def check(self, group: dict[str, Any]) -> None:
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"{type(self).__name__}: betas must be in [0, 1), not {group['betas']}")
        if group["eps"] < 0 or group["weight_decay"] < 0:
            raise ValueError(
                f"{type(self).__name__}: eps {group['eps']} and weight_decay {group['weight_decay']} must be ≥ 0"
            )

    def update(
        self,
        w: Array,
        g: Array,
        state: Mapping[str, Array],
        w_out: Array,
        state_out: Mapping[str, Array],
        *,
        lr: Any,
        t: int,
        hyper: Mapping[str, Any],
        scratch: tuple[Array, ...],
        scale: Any = 1,
    ) -> None:
        xp = array_module(w)
        beta1, beta2 = hyper["betas"]
        decay, work = hyper["weight_decay"], scratch[0]
        m, v = state_out["exp_avg"], state_out["exp_avg_sq"]
        # η m̂ / (√v̂ + ε) = (η √c₂ / c₁) m / (√v + ε √c₂) with c_i = 1 − β_iᵗ⁺¹: one pass fewer.
        c1, root_c2 = 1 - beta1 ** (t + 1), math.sqrt(1 - beta2 ** (t + 1))
        kernels = KERNELS.on(xp, w.dtype)
        if kernels is not None:
            coupled, keep = (0.0, 1 - lr * decay) if self.decoupled else (decay, 1.0)
            kernels.each(
                "adam", w.size, w, g, state["exp_avg"], state["exp_avg_sq"], w_out, m, v,
                float(scale), float(coupled), float(keep), float(beta1), float(beta2),
                float(hyper["eps"] * root_c2), float(lr * root_c2 / c1),
            )  # fmt: skip
            return
        if scale != 1:
            xp.multiply(g, scale, out=g)
        if decay and not self.decoupled:
            xp.multiply(w, decay, out=work)
            xp.add(g, work, out=g)
        xp.multiply(g, 1 - beta1, out=work)
        xp.multiply(state["exp_avg"], beta1, out=m)
        xp.add(m, work, out=m)
        xp.multiply(g, g, out=g)
        xp.multiply(g, 1 - beta2, out=g)
        xp.multiply(state["exp_avg_sq"], beta2, out=v)
        xp.add(v, g, out=v)
        xp.sqrt(v, out=work)
        xp.add(work, hyper["eps"] * root_c2, out=work)
        xp.divide(m, work, out=g)
        xp.multiply(g, lr * root_c2 / c1, out=g)
        if decay and self.decoupled:
            xp.multiply(w, 1 - lr * decay, out=w_out)
            xp.subtract(w_out, g, out=w_out)
        else:
            xp.subtract(w, g, out=w_out)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): w ← (1 − η λ) w − η m̂ / (√v̂ + ε)."""

    decoupled = True
    flops_per_element = 13

    def __init__(
        self,
        params: Iterable[Any],
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)
