"""The virtual world's part of ``spawn``: all ranks in this process and thread, on a virtual clock."""

from __future__ import annotations

import gc
import logging
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import threadpoolctl

from minidp.autograd.underway import under_way
from minidp.backend import HOST, Device
from minidp.comm.endpoint import Endpoint
from minidp.comm.errors import in_words
from minidp.comm.movement import Group
from minidp.comm.post import PostOffice
from minidp.comm.traffic import Traffic
from minidp.comm.transport import on_device
from minidp.comm.venue import Venue
from minidp.comm.virtual import VirtualCommunicator
from minidp.launch.supervise import failure_of
from minidp.launch.watchdog import watching
from minidp.launch.whereabouts import place_of, telling
from minidp.sim import Cluster
from minidp.sim.loop import rank_here

_one_at_a_time = threading.Lock()  # what a run sets, and puts back, belongs to the process, not to its thread


def run(
    function: bytes,
    workers: int,
    cluster: Cluster | None,
    timeout_s: float,
    servers: int = 0,
    life_of: Callable[[Endpoint], Any] | None = None,
    device: Device = HOST,
) -> list[Any]:
    """Run the pickled (fn, args) on every rank, each with a copy of its own; what each returned, in rank order.

    ``life_of``: what each end of a run with servers does; None: as anywhere, with the function.

    Raises RankFailed for the first failure, ValueError for a cluster that the ranks do not fit into.
    """
    world_size = workers + servers
    cluster = (cluster or Cluster(nodes=world_size)).with_servers(workers, servers)
    venue = Venue(cluster, world_size, workers)
    ranks = list(range(world_size))
    group = Group(venue, ranks, "world")
    post = PostOffice(venue, ranks)
    device.start()
    ends = [VirtualCommunicator(group, post, rank, Traffic()) for rank in ranks]
    lives = [
        _life(function, comm, device) if life_of is None else partial(life_of, Endpoint(comm, workers))
        for comm in ends
    ]
    # One thread whatever was set: how BLAS cuts a sum over threads changes its bits.
    with (
        _one_at_a_time,
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        watching(venue, timeout_s),
        _few_collections(),
        _tagged_records(),
        telling(partial(_tell, venue)),
    ):
        try:
            venue.run(lives)
        finally:
            under_way.forget()
    if venue.raised:
        rank, error = venue.raised[0]
        venue.raised.clear()  # their tracebacks hold the ranks' arrays, and through them this venue
        trace = "".join(traceback.format_exception(error))
        raise failure_of(rank, venue.name_of_all(rank), in_words(error), trace, error)
    return [venue.returned[rank] for rank in range(workers)]


def _tell(venue: Venue) -> None:
    here, _ = place_of(sys._getframe())
    sys.stderr.write(f"minidp: at {venue.loop.now:g} s: {venue.where_all_are(here)}\n")
    sys.stderr.flush()


@contextmanager
def _few_collections() -> Iterator[None]:
    """A thousand ranks hold millions of objects: to look through them all for garbage costs 5 % of a step."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _tagged_records() -> Iterator[None]:
    """Log records of a rank say which, as they do in the process world."""
    make = logging.getLogRecordFactory()

    def tagged(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        rank = rank_here()
        if rank is not None:
            record.rank = rank
            record.msg = f"[rank {rank}] {record.msg}"
        return record

    logging.setLogRecordFactory(tagged)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


def _life(function: bytes, host: VirtualCommunicator, device: Device) -> Callable[[], Any]:
    def life() -> Any:
        comm = on_device(host, device)
        fn, args = pickle.loads(function)
        try:
            return fn(comm, *args)
        finally:
            comm.close()

    return life
