"""The ends of a run with servers: what each of them lives through, in every world."""

from __future__ import annotations

import pickle
from typing import Any

from minidp.comm.endpoint import Endpoint


def live(endpoint: Endpoint, function: bytes) -> Any:
    """A worker runs the pickled (fn, args) and takes its leave of the servers; a server serves. Collective.

    Returns what the function has returned; None on a server.
    """
    comm = endpoint.worker_group()
    if comm is None:
        from minidp.parallel import serve  # late: a run without servers needs nothing of it

        serve(endpoint)
        return None
    fn, args = pickle.loads(function)
    try:
        value = fn(comm, *args)
    finally:
        comm.close()
    from minidp.parallel.links import say_goodbye

    say_goodbye(endpoint)
    return value
