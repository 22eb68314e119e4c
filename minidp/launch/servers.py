"""The ends of a run with servers: what each of them lives through, in every world."""

from __future__ import annotations

import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

from minidp.backend import Device
from minidp.comm.endpoint import Endpoint
from minidp.comm.transport import on_device


def live(endpoint: Endpoint, function: bytes, record: Path | None, device: Device) -> Any:
    """A worker runs the pickled (fn, args) and takes its leave of the servers; a server serves. Collective.

    Workers' arrays lie on ``device``, which they have started; a server's slices on the host.

    Returns what the function has returned; None on a server. With ``record`` servers write their events there.
    """
    # Late: a run without servers needs nothing of it.
    from minidp.parallel import serve
    from minidp.parallel.event_log import Recorder
    from minidp.parallel.links import say_goodbye

    comm = endpoint.worker_group()
    if comm is None:
        index = endpoint.comm.rank - endpoint.workers
        if record is None:
            serve(endpoint)
        else:
            with closing(Recorder(record, index)) as recorder:
                serve(endpoint, observers=[recorder])
        return None
    placed = on_device(comm, device)
    fn, args = pickle.loads(function)
    try:
        value = fn(placed, *args)
        device.synchronize()
    except BaseException:
        placed.close()
        raise
    comm.close()
    say_goodbye(endpoint)
    return value
