"""A model as a chain of units, and the chain cut into the stages of a pipeline.

A unit is what a stage has whole or not at all: a layer of a Sequential, the embedding or a block of a GPT. Units
of about equal work for all stages: the cut is the one, of all, whose largest stage has the least FLOPs, as counted
in one forward pass of one sample.

`chain` may be taught other models; a model that it does not know is one unit::

    @parallel.chain.register
    def _(model: MyModel, whole_pairs: bool) -> list[Unit]:
        parts = {"front": lambda x: model.front(x), "back": lambda x: model.back(x)}
        return [Unit(name, forward, (name,)) for name, forward in parts.items()]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from minidp.autograd import no_grad
from minidp.backend import meter
from minidp.nn import GPT, Dropout, Embedding, Linear, Module, Sequential
from minidp.parallel.mesh import Mesh
from minidp.parallel.parallelize import pairs
from minidp.parallel.tensor_parallel import ParallelModule


class Unit(NamedTuple):
    """A piece of a model: what it is called, what it does, and the dotted names of the modules that it consists
    of.

    ``forward`` looks its modules up when it is called: they may have been replaced since.
    """

    name: str
    forward: Callable[[Any], Any]
    modules: tuple[str, ...]


class Elsewhere(Module):
    """In place of a module that another stage has."""

    def __init__(self, stage: int) -> None:
        self.stage = stage

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"this layer is on stage {self.stage} of the pipeline: no rank can run the model alone. Use "
            "strategy.forward_backward(x, y, loss_fn) to train, strategy.predict(x) to evaluate"
        )

    def extra_repr(self) -> str:
        return f"stage {self.stage}"


@singledispatch
def chain(model: Module, whole_pairs: bool) -> list[Unit]:
    """The units of ``model``, first to last: what one returns is given to the next.

    ``whole_pairs``: two layers that tensor parallelism cuts together are one unit.
    """
    return [Unit(type(model).__name__, model, ("",))]


@chain.register
def _(model: Sequential, whole_pairs: bool) -> list[Unit]:
    if type(model).forward is not Sequential.forward:
        return [Unit(type(model).__name__, model, ("",))]
    names = model._names
    until = dict(pairs(model)) if whole_pairs else {}
    units: list[Unit] = []
    i = 0
    while i < len(names):
        last = until.get(i, i)
        layer = model[i]
        if last == i and isinstance(layer, Sequential):
            units += [_below(names[i], unit) for unit in chain(layer, whole_pairs)]
        else:
            name = names[i] if last == i else f"{names[i]} … {names[last]}"
            units.append(Unit(name, _run(model, names[i : last + 1]), names[i : last + 1]))
        i = last + 1
    return units


@chain.register
def _(model: GPT, whole_pairs: bool) -> list[Unit]:
    if type(model).forward is not GPT.forward:
        return [Unit(type(model).__name__, model, ("",))]
    return [
        Unit("embedding", model.embed, ("token_embedding", "position_embedding")),
        *(_below("blocks", unit) for unit in chain(model.blocks, whole_pairs)),
        Unit("norm", _run(model, ("norm",)), ("norm",)),
        Unit("head", _run(model, ("head",)), ("head",)),
    ]


def _run(owner: Module, names: Sequence[str]) -> Callable[[Any], Any]:
    """One child after the other."""

    def forward(x: Any) -> Any:
        for name in names:
            x = vars(owner)[name](x)
        return x

    return forward


def _below(prefix: str, unit: Unit) -> Unit:
    names = tuple(f"{prefix}.{name}".rstrip(".") for name in unit.modules)
    return Unit(f"{prefix}.{unit.name}", unit.forward, names)


def count_flops(model: Module, units: Sequence[Unit], example: Any = None) -> list[float]:
    """FLOPs of each unit in one forward pass, in evaluation, of ``example``, or of what the first layer tells.

    ValueError if no example is given and the first layer does not tell what it takes.
    """
    x = example_for(model) if example is None else example
    modes = {module: module.training for module in model.modules()}
    model.eval()
    flops = []
    try:
        with no_grad():
            for unit in units:
                with meter() as counted:
                    x = unit.forward(x)
                flops.append(counted.flops)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return flops


def example_for(model: Module) -> np.ndarray:
    """One sample of zeros for a model that begins with a Linear or an Embedding, or is a GPT."""
    if isinstance(model, GPT):
        return np.zeros((1, model.context), np.int64)
    first = model
    while isinstance(first, Sequential) and len(first):
        first = first[0]
    if isinstance(first, Linear):
        return np.zeros((1, first.in_features), first.weight.dtype)
    if isinstance(first, Embedding):
        return np.zeros((1, 1), np.int64)
    raise ValueError(
        f"to share out the layers of a model that begins with a {type(first).__name__} their FLOPs must be "
        "counted: give example=, one batch as it will be trained on, such as x[:1]"
    )


def balanced(costs: Sequence[float], stages: int) -> list[tuple[int, int]]:
    """Cut a row of units into ``stages`` runs, none empty, whose largest sum is as small as can be: (lo, hi) each.

    Of several such cuts the one whose earlier stages are as full as can be. ValueError if there are fewer units.
    """
    units = len(costs)
    if not 1 <= stages <= units:
        raise ValueError(f"{stages} stages for {units} units: give 1 to {units}")
    sums = [0.0, *accumulate(costs)]
    # least[k][i]: the smallest largest sum of units i … in k runs.
    least = {(1, i): sums[-1] - sums[i] for i in range(units)}
    for k in range(2, stages + 1):
        for i in range(units - k + 1):
            least[k, i] = min(max(sums[j] - sums[i], least[k - 1, j]) for j in range(i + 1, units - k + 2))
    edges, bound = [0], least[stages, 0]
    for k in range(stages - 1, 0, -1):
        i = edges[-1]
        fits = (j for j in range(units - k, i, -1) if max(sums[j] - sums[i], least[k, j]) <= bound)
        edges.append(next(fits))
    return list(pairwise([*edges, units]))


def stage_bounds(model: Module, units: Sequence[Unit], mesh: Mesh, example: Any) -> list[tuple[int, int]]:
    """Which units each stage of the mesh has: (lo, hi), as rank 0 has counted FLOPs, the same on all. Collective.

    ValueError, on all ranks, if there are fewer units than stages, or no `example` where one is needed.
    """
    pp = mesh.pp
    if pp > len(units):
        names = ", ".join(unit.name for unit in units)
        pairs = ", two layers that tp cuts together counted as one" if mesh.tp > 1 else ""
        raise ValueError(
            f"pp={pp} stages, but the model is a chain of {len(units)} layers ({names}{pairs}): take pp of 1 to "
            f"{len(units)}"
        )
    if pp == 1:
        return [(0, len(units))]
    outcome: tuple[list[tuple[int, int]], str] = [], ""
    if mesh.world.rank == 0:
        try:
            outcome = balanced(count_flops(model, units, example), pp), ""
        except ValueError as error:
            outcome = [], str(error)
    bounds, problem = mesh.world.broadcast_object(outcome, 0, "HybridParallel(…) stages")
    if problem:
        raise ValueError(problem)
    return list(bounds)


def keep_stage(
    model: Module, units: Sequence[Unit], bounds: Sequence[tuple[int, int]], stage: int
) -> dict[str, int]:
    """Leave only the units of ``stage`` in the model, in place; the stage of each of the model's modules, by name.

    The other units' Parameters give up their values. ValueError if a Parameter, or a module that remembers
    something, belongs to two stages.
    """
    stage_of = {name: s for s, (lo, hi) in enumerate(bounds) for unit in units[lo:hi] for name in unit.modules}
    if len(bounds) == 1:
        return stage_of
    homes: dict[int, tuple[int, str]] = {}
    for name, parameter in model.all_named_parameters():
        home = stage_at(name, stage_of)
        before = homes.setdefault(id(parameter), (home, name))
        if before[0] != home:
            raise ValueError(
                f"{name} is tied to {before[1]}, and the one would be on stage {home}, the other on {before[0]}: "
                "untie them, or take pp=1"
            )
    for name, module in model._walk():
        if module._buffers or isinstance(module, Dropout):
            home = stage_at(name, stage_of)
            before = homes.setdefault(id(module), (home, name))
            if before[0] != home:
                raise ValueError(
                    f"{name} and {before[1]} are one {type(module).__name__}, on stages {home} and {before[0]}: "
                    "give each place one of its own, or take pp=1"
                )
    for name, s in stage_of.items():
        if s == stage:
            continue
        *path, last = name.split(".")
        owner = model
        for part in path:
            owner = vars(owner)[part]
        for parameter in vars(owner)[last].parameters():
            parameter.grad = None
            parameter.data = np.zeros(0, parameter.dtype)
        setattr(owner, last, Elsewhere(s))
    return stage_of


def check_whole(model: Module) -> None:
    """ValueError if the model has been cut before."""
    for name, module in model.named_modules():
        if isinstance(module, Elsewhere | ParallelModule):
            raise ValueError(
                f"this model has been cut already ({name} is a {type(module).__name__}): build a dense one, and "
                "give it the state_dict() of the strategy that has cut this one"
            )


def stage_at(name: str, stage_of: dict[str, int]) -> int:
    """Of a Parameter or buffer, by its dotted name: that of the module that it belongs to, or lies in."""
    at = name
    while at and at not in stage_of:
        at = at.rpartition(".")[0]
    if at not in stage_of and max(stage_of.values(), default=0):
        raise ValueError(f"{name} belongs to none of the model's units, so no stage has it: see parallel.chain")
    return stage_of.get(at, 0)
