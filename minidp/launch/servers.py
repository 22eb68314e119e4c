"""The ends of a run with servers: what each of them lives through, in every world."""

from __future__ import annotations

import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

from minidp.comm.endpoint import Endpoint


def live(endpoint: Endpoint, function: bytes, record: Path | None) -> Any:
    """A worker runs the pickled (fn, args) and takes its leave of the servers; a server serves. Collective.

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
    fn, args = pickle.loads(function)
    try:
        value = fn(comm, *args)
    finally:
        comm.close()
    say_goodbye(endpoint)
    return value
