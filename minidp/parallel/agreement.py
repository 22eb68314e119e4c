"""What must fit before a strategy starts: a free model, its optimizer, and every rank's to those of the others."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

from minidp.backend import Device
from minidp.comm import CollectiveMismatch, Communicator
from minidp.nn import Layout, Module
from minidp.optim import Optimizer
from minidp.parallel.sync_batch_norm import SyncBatchNorm

# Which strategy trains a model, as long as that strategy lives and has not released it.
owners: WeakKeyDictionary[Module, ReferenceType[Any]] = WeakKeyDictionary()


def check_free(model: Module) -> None:
    owner = owners.get(model)
    bound = any(parameter._grad_slot is not None for parameter in model.parameters())
    if bound or (owner is not None and owner() is not None):
        raise ValueError(
            "the model belongs to another strategy already: build one strategy a model, or call release() on the "
            "other one first"
        )


def check_alone(model: Module, label: str) -> None:
    """Where ranks make steps of their own, no layer may wait for all of them."""
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm):
            raise ValueError(
                f"{label} with a SyncBatchNorm ({name}): its forward waits for all ranks, and here each makes "
                "steps of its own. Use nn.BatchNorm1d or 2d"
            )


def check_norms(model: Module, ranks: int) -> None:
    """On a mesh the whole batch is that of the ranks along dp."""
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm) and module.world_size != ranks:
            raise ValueError(
                f"{name} is a SyncBatchNorm over {module.world_size} ranks, and there are {ranks} along dp: build "
                "it with comm=mesh.data"
            )


def check_numbers(model: Module, device: Device) -> None:
    """What lies on a device are numbers of its own kinds."""
    for name, parameter in model.named_parameters():
        if parameter.data.dtype.hasobject:
            raise TypeError(
                f"{name} holds Python objects (Fractions), which can't lie on {device.name}: convert them by "
                'model.astype("float64"), or run on the processor, device="cpu"'
            )


def check_parameters(model: Module, optimizer: Optimizer) -> None:
    """The optimizer must hold exactly the model's trainable parameters."""
    held = {id(p) for group in optimizer.groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lacking:
        raise ValueError(
            f"the optimizer lacks the parameters {', '.join(lacking)}: give it model.parameters(), or freeze "
            "them by requires_grad=False"
        )
    if any(identity not in names for identity in held):
        raise ValueError(
            "the optimizer holds a parameter that is not the model's: build it from this model's parameters()"
        )


def describe(optimizer: Optimizer, layout: Layout) -> tuple[Any, ...]:
    """Groups with the names of their parameters and their hyperparameters, a schedule by its first rate."""
    names = {id(segment.parameter): segment.name for segment in layout.segments}
    groups = [
        (tuple(names.get(id(p), "frozen") for p in group["params"]), tuple(optimizer.hyper(i, 0).items()))
        for i, group in enumerate(optimizer.groups)
    ]
    return (repr(optimizer), *groups)


def agree(comm: Communicator, mine: tuple[Any, ...], label: str) -> None:
    """See that all ranks have built the same: each applies its own rule, to its own w or its slice of it.

    Of p descriptions on p ranks p² would be unpickled, so they are exchanged only where their digests differ.

    Args:
        mine: the layout's description first, then what else must be equal.
        label: the strategy's name, for messages.

    Raises CollectiveMismatch on all ranks, with the first thing in which two differ.
    """
    call = f"{label}(…)"
    digest = int.from_bytes(blake2b(repr(mine).encode(), digest_size=7).digest())  # fits an int64
    if len(set(comm.all_gather_int(digest, call))) > 1:
        everybody = comm.all_gather_object(mine, call)
        for rank, theirs in enumerate(everybody):
            if theirs != everybody[0]:
                raise CollectiveMismatch(
                    f"rank {rank} has built another {label} than rank 0: {_difference(everybody[0], theirs)}. "
                    "All ranks must build the same model, optimizer and strategy"
                )


def _difference(reference: tuple[Any, ...], other: tuple[Any, ...]) -> str:
    """In words, the first thing in which two ranks' descriptions differ."""
    parameters, *rest = zip(reference, other)
    for want, found in zip(*parameters):
        if want != found:
            return "{} {} {} instead of {} {} {}".format(*found, *want)
    if len(parameters[0]) != len(parameters[1]):
        return f"{len(parameters[1])} trainable parameters instead of {len(parameters[0])}"
    return next(f"{found} instead of {want}" for want, found in rest if want != found)
