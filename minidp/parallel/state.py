"""What of a strategy outlives its steps: parameters, the optimizer's state, checkpoints; and how it lets go."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from minidp.backend import array_module, asarray
from minidp.comm import Communicator
from minidp.compress import Compressor
from minidp.nn import Layout, Module
from minidp.nn.module import checked_state
from minidp.optim import Optimizer
from minidp.parallel import checkpoint
from minidp.parallel.agreement import owners
from minidp.parallel.layer_state import LayerState
from minidp.parallel.present import Group

StateDict = dict[str, np.ndarray]


class Stateful(ABC):
    """The half of a strategy that is about state; the other half, its steps, is `Strategy`."""

    label: ClassVar[str]
    """What messages call it: the class that users write, whichever variant of it runs."""
    model: Module
    optimizer: Optimizer
    comm: Communicator
    layout: Layout
    updates: int
    seed: int
    private_state: ClassVar[bool] = False
    """Whether each rank has an optimizer's state, and a number of updates, of its own; else all have the same."""
    outer: Optimizer | None = None
    """A second optimizer, which acts on averages of ranks: its state is the same on all."""
    outer_updates: int = 0
    compressor: Compressor | None = None
    """What gradients are compressed by on this rank, if they are."""
    cut_by: str = "ranks"
    """By what the keys of compressors are cut: residuals belong to parts of parameters."""
    prunes: bool = False
    """Whether it knows masks of pruned weights."""
    _layers: LayerState
    _poison: BaseException | None = None
    _released: bool = False

    def state_dict(self) -> StateDict:
        """The full model, dotted names to host arrays, on every rank. Collective: waits for all ranks."""
        self.comm.all_gather_int(0, "state_dict")
        return self.model.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Give every rank the parameters and buffers that rank 0 was given. Collective.

        The optimizer's state and the number of updates stay. ValueError on all ranks if it does not fit.
        """
        self._check_not_released()
        self._put(self.checked_model(self.group.broadcast_object(state, 0, "load_state_dict")), None)
        self.discard()

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        position: tuple[int, int] | None = None,
        extra: Any = None,
        generators: Mapping[str, np.random.Generator] | None = None,
        keep: int = 3,
    ) -> Path:
        """Write a checkpoint to ``folder``: all that ``load`` needs to go on, bit for bit. Collective; its path.

        Rank 0 writes parameters, buffers, the optimizer's state, the number of updates and the seed of dropout.
        The file appears whole or not at all. All ranks raise what rank 0 met, such as OSError. Where ranks have
        states of their own (LocalSGD, Hogwild; residuals of compression) it writes those of all, which they send;
        and where they have parameters of their own these are averaged first (LocalSGD), which is part of the
        training.

        Args:
            position: (epoch, step) of the batch to go on with, where ``loader.position(updates)`` does not tell:
                if gradients were accumulated, or a batch was discarded.
            extra: whatever ``json`` can write.
            generators: by name, this rank's generators that are to be put back by ``load``.
            keep: this many of the folder's checkpoints stay, the newest ones.
        """
        return checkpoint.save(self, Path(folder), position, extra, generators, keep)

    def load(
        self, folder: str | os.PathLike[str], *, generators: Mapping[str, np.random.Generator] | None = None
    ) -> checkpoint.Checkpoint:
        """Go on from the newest good checkpoint of ``folder``, or from the file of that name. Collective.

        It may have been written by any number of ranks, and by another strategy; but where ranks had states of
        their own, each takes its own again, so that there must be as many (or an optimizer without state). A
        damaged one is passed over, which is said in the log and in the result. A step that has begun is discarded.
        Cost: rank 0 sends the file's content to all.

        Raises, on all ranks: FileNotFoundError, DamagedCheckpoint if none is good, ValueError if it does not fit
        model (names, shapes, dtypes), optimizer (kind, slots) or ranks. Then nothing has changed.
        """
        self._check_not_released()
        return checkpoint.load(self, Path(folder), generators)

    def restore(self, model: StateDict, state: Mapping[str, StateDict], updates: int, seed: int) -> None:
        """Go on from values that fit: ``model`` the same on all ranks, ``state`` by slot and name. Collective."""
        self._put(model, state)
        self.updates, self.seed = updates, seed
        self._layers.reseed(seed)
        self.discard()

    @property
    @abstractmethod
    def in_step(self) -> bool:
        """Whether this rank has begun a step: there was a backward, or a failure, since the last one."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the step that has begun."""

    @abstractmethod
    def optimizer_state(self) -> Mapping[str, StateDict]:
        """The optimizer's state by slot and parameter, of the last step; views where it lies. Not collective;
        where ranks hold parts of it, the whole as of the last ``consolidate``, on rank 0."""

    # -- the whole model, as files have it; where a rank holds a part of it only, its strategy says otherwise --

    def model_state(self) -> StateDict:
        """What a file has of the model, after ``consolidate``. Not collective."""
        return self.model.state_dict()

    def checked_model(self, state: Mapping[str, Any]) -> StateDict:
        """``state`` in the model's dtypes. ValueError unless it has the names and shapes of the whole model's."""
        return checked_state(self.model, state)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all trainable parameters, by the first of their names: those of the optimizer's state."""
        return {segment.name: segment.shape for segment in self.layout.segments}

    @property
    def group(self) -> Group:
        """Whom checkpoints and states are shared with."""
        return self.comm

    def server_updates(self) -> int | None:
        """How many updates servers have made; None where there are none. Not collective."""
        return None

    def restore_servers(self, updates: int | None) -> None:  # noqa: B027
        """Let servers count on from there; None: the checkpoint is of a strategy without. After ``restore``."""

    def outer_state(self) -> Mapping[str, StateDict]:
        """The state of ``outer``, as ``optimizer_state`` has it."""
        return {}

    def restore_outer(self, state: Mapping[str, StateDict], updates: int) -> None:  # noqa: B027
        """Go on with this state of ``outer``, the same on every rank; empty: zeros. After ``restore``."""

    def restore_compressor(self, state: StateDict) -> None:
        """Let ``compressor`` go on from this state of it; empty: anew. After ``restore``."""
        if self.compressor is not None:
            self.compressor.load_state_dict(state)

    def consolidate(self) -> None:  # noqa: B027
        """Make all ranks hold the same model, where they do not, and rank 0 have the whole of it and of the
        optimizer's state; ``save`` begins with it. Collective."""

    def forget(self) -> None:  # noqa: B027
        """``save`` has ended: what ``consolidate`` has brought together takes no more room. Not collective."""

    def release(self) -> None:
        """Give the model parameters of its own again; it belongs to no strategy then. Not collective.

        This strategy can't go on afterwards.
        """
        self.layout.release()
        self._layers.release()
        owners.pop(self.model, None)
        self._released = True
        self._poison = RuntimeError("the strategy has been released")

    def _check_not_released(self) -> None:
        if self._released:
            raise RuntimeError("the strategy has been released: build another one")

    def _put_rest(self, values: StateDict) -> None:
        """Replace buffers and frozen parameters: what the layout leaves outside."""
        inside = {name for segment in self.layout.segments for name in segment.names}
        targets = {name: p.data for name, p in self.model.named_parameters()} | dict(self.model.named_buffers())
        for name, target in targets.items():
            if name not in inside:
                target[...] = asarray(values[name], array_module(target))

    @abstractmethod
    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        """Replace parameters and buffers, and the optimizer's state unless None, on all ranks or on none."""
