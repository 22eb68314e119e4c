"""Optimizer: groups of parameters, their hyperparameters, and an elementwise update rule."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from numbers import Real
from typing import Any, Self

from minidp.backend import Array, array_module, current_meter
from minidp.nn import Parameter

LearningRate = float | Callable[[int], float]


class Optimizer:
    """Base class of update rules. It knows parameters, but nothing of ranks.

    `params` are Parameters, or groups ``{"params": [...], "lr": 0.01, ...}`` with hyperparameters of their
    own, as in PyTorch. `lr` is a number or a pure function of the update index t = 0, 1, 2 …

    A rule is `update`: it maps slices of weights, gradients and state to new ones, element by element. So it
    may run on a whole flat slab, on one rank's slice of it, or on a server, with equal results. Whoever runs
    it owns the state: one array per name in `slots`, of the weights' length and dtype, zeros at t = 0.
    `step` and `zero_grad` are for plain use in one process.

    Errors: ValueError for no parameters, one given twice, a negative learning rate; TypeError for an unknown
    hyperparameter, with the valid names.
    """

    slots: tuple[str, ...] = ()  # the state arrays of the rule, by PyTorch's names
    scratch: int = 1  # number of work arrays, of the weights' length and dtype, that update wants
    flops_per_element: int = 1  # of one update, for the meter

    def __init__(self, params: Iterable[Any], lr: LearningRate, **hyper: Any) -> None:
        self.defaults: dict[str, Any] = {"lr": lr, **hyper}
        given = list(params)
        if not given:
            raise ValueError(f"{type(self).__name__}: the list of parameters is empty")
        if not any(isinstance(entry, Mapping) for entry in given):
            given = [{"params": given}]
        self.groups: list[dict[str, Any]] = []
        self._group_of: dict[int, int] = {}
        for index, entry in enumerate(given):
            if not isinstance(entry, Mapping):
                raise TypeError(f"{type(self).__name__}: entry {index} is no group, but other entries are")
            self.groups.append(self._resolve(index, dict(entry)))
        self.updates = 0  # how many updates `step` has made: the index of the next
        self._states: dict[int, dict[str, Any]] = {}

    def _resolve(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """Check one group and fill in the default hyperparameters."""
        name = type(self).__name__
        params = entry.pop("params", [])
        params = [params] if isinstance(params, Parameter) else list(params)
        if not params:
            raise ValueError(f"{name}: group {index} has no parameters")
        for p in params:
            if not isinstance(p, Parameter):
                raise TypeError(f"{name}: expected nn.Parameters, found {type(p).__name__}")
            if id(p) in self._group_of:
                raise ValueError(f"{name}: a parameter of shape {p.shape} occurs twice (groups "
                                 f"{self._group_of[id(p)]} and {index})")  # fmt: skip
            self._group_of[id(p)] = index
        unknown = [key for key in entry if key not in self.defaults]
        if unknown:
            raise TypeError(
                f"{name}: unknown hyperparameter {', '.join(unknown)}; valid ones: {', '.join(self.defaults)}"
            )
        group = {"params": params, **self.defaults, **entry}
        if not callable(group["lr"]):
            _check_rate(group["lr"], name)
        self.check(group)
        return group

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError if the hyperparameters of `group` make no sense for this rule."""

    # ── the rule ────────────────────────────────────────────────────────────────────────────────────────

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
        """Write the weights after update number `t` (from 0) into `w_out`, the new state into `state_out`.

        The gradient is ``scale * g``: a rule that multiplies g anyway need not pass over it twice.

        All arrays have one shape and dtype. `w`, `g`, `state` are read; `g` and the arrays of `scratch` (as
        many as ``self.scratch``) may be overwritten; outputs may be the same arrays as their inputs. Nothing
        is allocated.
        """
        raise NotImplementedError

    def count_update(self, size: int, itemsize: int) -> None:
        """Tell the meter, if there is one, of one call of `update` on `size` elements of `itemsize` bytes.

        One operation; bytes: w and g read, w written, each state array read and written. Whoever calls `update`
        calls this beside it, so that rules stay arithmetic alone. 0.1 µs when nobody measures.
        """
        meter = current_meter()
        if meter is not None:
            meter.count(float(self.flops_per_element * size), float((3 + 2 * len(self.slots)) * size * itemsize))

    def without_parameters(self) -> Self:
        """The rule and its hyperparameters alone, for whoever runs `update` elsewhere; `hyper` works."""
        rule = copy(self)
        rule.groups = [{**group, "params": []} for group in self.groups]
        rule._group_of, rule._states = {}, {}
        return rule

    def only(self, parameters: Iterable[Parameter]) -> Self:
        """The same rule for some of its parameters, without state. Groups keep their numbers, and some may be
        empty; their hyperparameters stay those of this one's groups, also if they are changed."""
        kept = {id(p) for p in parameters}
        rule = self.without_parameters()
        mine = ({"params": [p for p in own["params"] if id(p) in kept]} for own in self.groups)
        rule.groups = [ChainMap(some, own) for some, own in zip(mine, self.groups)]  # type: ignore[misc]
        rule._group_of = {identity: group for identity, group in self._group_of.items() if identity in kept}
        return rule

    def group_of(self, parameter: Parameter) -> int:
        """Return the index of the group that holds `parameter`; KeyError if none does."""
        try:
            return self._group_of[id(parameter)]
        except KeyError:
            raise KeyError(f"{type(self).__name__} was not given the parameter {parameter!r}") from None

    def hyper(self, group_index: int, t: int) -> dict[str, Any]:
        """Return the hyperparameters of a group for update `t`, "lr" among them as a number."""
        hyper = dict(self.groups[group_index])
        del hyper["params"]
        lr = hyper["lr"]
        if type(lr) is float:  # strategies ask once a block: this is the short way
            return hyper
        if callable(lr):
            lr = lr(t)
            _check_rate(lr, type(self).__name__, f" for update {t}")
        # A NumPy scalar would widen float32 arithmetic to float64.
        hyper["lr"] = lr.item() if hasattr(lr, "item") else lr
        return hyper

    # ── plain use ───────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """Update every parameter that has a gradient, in place. Gradients stay as they are.

        Raises RuntimeError if a strategy owns the parameters, before anything is changed.
        """
        for group in self.groups:
            for p in group["params"]:
                if not getattr(p.data.flags, "writeable", True):
                    raise RuntimeError(
                        f"{type(self).__name__}.step(): the parameter of shape {p.shape} is read-only, "
                        "because a strategy owns it: use strategy.step()"
                    )
        for index, group in enumerate(self.groups):
            hyper = self.hyper(index, self.updates)
            for p in group["params"]:
                grad = p.grad
                if grad is not None and p.requires_grad:
                    own = self._state_of(p)
                    own["g"][...] = grad.data
                    self.update(
                        p.data, own["g"], own["state"], p.data, own["state"],
                        lr=hyper["lr"], t=own["t"], hyper=hyper, scratch=own["scratch"],
                    )  # fmt: skip
                    self.count_update(p.data.size, p.data.dtype.itemsize)
                    own["t"] += 1
        self.updates += 1

    def _state_of(self, p: Parameter) -> dict[str, Any]:
        """Private state and work arrays of one parameter, made when it is first updated."""
        if id(p) not in self._states:
            zeros = array_module(p.data).zeros_like
            self._states[id(p)] = {
                "t": 0,
                "g": zeros(p.data),
                "state": {slot: zeros(p.data) for slot in self.slots},
                "scratch": tuple(zeros(p.data) for _ in range(self.scratch)),
            }
        return self._states[id(p)]

    def zero_grad(self) -> None:
        """Forget all gradients: the next backward stores, it does not add."""
        for group in self.groups:
            for p in group["params"]:
                p.grad = None

    def __repr__(self) -> str:
        """The same text on every rank that built the same optimizer: no addresses of functions."""
        hyper = ", ".join(
            f"{key}={getattr(value, '__qualname__', None) or repr(value)}" for key, value in self.defaults.items()
        )
        return f"{type(self).__name__}({len(self._group_of)} parameters, {hyper})"


def _check_rate(lr: Any, name: str, when: str = "") -> None:
    if not isinstance(lr, Real) or not 0 <= float(lr) < math.inf:
        raise ValueError(f"{name}: the learning rate{when} must be a number ≥ 0, not {lr!r}")
