"""What compressors remember, in checkpoints: residuals, counters of calls, PowerSGD's Q, masks.

Each rank has errors of its own, so each takes its own again. Where there are none, such as with ``int8`` alone,
any number of ranks can go on.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from minidp.comm import Communicator

if TYPE_CHECKING:
    from minidp.parallel.present import Group
    from minidp.parallel.state import Stateful

Arrays = dict[str, np.ndarray]


def gathered(strategy: Stateful) -> tuple[Arrays, dict[str, Any] | None]:
    """By the names of the file, on rank 0, and the facts of it; ({}, None) without compression. Collective."""
    if strategy.compressor is None:
        return {}, None
    everybody = _everybodys(strategy.group, strategy.compressor.state_dict())
    arrays = {f"compress@{r}.{name}": array for r, state in enumerate(everybody) for name, array in state.items()}
    facts = {"spec": strategy.compressor.spec, "ranks": strategy.group.world_size, "cut_by": strategy.cut_by}
    return arrays, facts


def of_compressor(arrays: Mapping[str, np.ndarray], strategy: Stateful, facts: dict[str, Any] | None) -> Arrays:
    """This rank's, for ``Compressor.load_state_dict``; ValueError if what others have not got would be lost."""
    if facts is None:
        return {}
    rank, ranks = strategy.group.rank, strategy.group.world_size
    errors = any("residual/" in name for name in arrays if name.startswith("compress@"))
    here = None if strategy.compressor is None else strategy.compressor.spec
    then, now = (facts["ranks"], facts["cut_by"]), (ranks, strategy.cut_by)
    fits = here == facts["spec"] and (then == now or not errors)
    pruned = any("mask/" in name for name in arrays if name.startswith("compress@"))
    if (errors and not fits) or (pruned and not strategy.prunes):
        what = " and ".join(["residuals"] * errors + ["masks of pruned weights"] * pruned)
        cut = [f", cut by {by}" * (facts["cut_by"] != strategy.cut_by) for _, by in (then, now)]
        raise ValueError(
            f"the checkpoint holds {what} of compress={facts['spec']!r} on {facts['ranks']} ranks{cut[0]}, here "
            f"is compress={here!r} on {ranks}{cut[1]}: load it by the same, or give its parameters alone, "
            "model.<name> of nn.load_file(…), to strategy.load_state_dict"
        )
    if strategy.cut_by != facts["cut_by"]:
        return _counters(arrays) if fits else {}
    prefix = f"compress@{rank if ranks == facts['ranks'] else 0}."
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return own if fits else {name: a for name, a in own.items() if name.startswith(("mask/", "shape/"))}


def _counters(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """What ranks can go on with that are other ranks' neighbours now: the same for all, for they draw together."""
    found: Arrays = {}
    for name, array in arrays.items():
        place, _, what = name.partition(".")
        if place.startswith("compress@") and (what == "seed" or what.startswith("calls/")):
            found[what] = np.maximum(found.get(what, array), array)
    return found


def _everybodys(group: Group, obj: Any) -> list[Any]:
    """Everybody's, in rank order, on rank 0; nothing elsewhere. Collective."""
    if not isinstance(group, Communicator):
        everybody = group.all_gather_object(obj, "save compressors")
        return everybody if group.rank == 0 else []
    data = np.frombuffer(pickle.dumps(obj), np.uint8)
    sizes = group.all_gather_int(len(data), "save compressors")
    if group.rank:
        group.send(data, 0)
        return []
    arrived = [data]
    for src, size in enumerate(sizes[1:], 1):
        arrived.append(np.empty(size, np.uint8))
        group.recv(arrived[-1], src)
    return [pickle.loads(each.tobytes()) for each in arrived]
