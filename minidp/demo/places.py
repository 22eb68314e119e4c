"""Where workers compute, and which way their arrays go, if that is not the processor."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter

import minidp
from minidp.backend import DeviceUnavailable
from minidp.comm import Communicator
from minidp.comm.on_device import DeviceCommunicator
from minidp.demo.words import listed, number


def look(comm: Communicator) -> tuple[str, str]:
    """(device, transport), as this rank sees them."""
    assert isinstance(comm, DeviceCommunicator)
    return comm.device.describe(), comm.transport.name


def place(args: Namespace) -> str:
    """Two lines for the demo's header; "" on the processor. All ranks start their devices for it, so that what
    does not work is known before anything is promised."""
    if args.device.on_host:
        return ""
    try:
        found = minidp.spawn(
            look, args.workers, world=args.world, device=args.device, cluster=args.cluster, progress=False
        )
    except minidp.RankFailed as failed:
        if isinstance(failed.__cause__, DeviceUnavailable):
            raise
        raise DeviceUnavailable(  # a driver may even end the process
            f"device={args.device.name!r} can't be used: {str(failed).partition(chr(10))[0]}. "
            "python -m minidp.doctor tells more"
        ) from failed
    return describe([device for device, _ in found], found[0][1])


def describe(devices: list[str], transport: str) -> str:
    """``devices``: of each worker."""
    workers = Counter(devices)
    places = [f"{device} ({number(count, 'worker')})" for device, count in sorted(workers.items())]
    text = f"  on    {listed(places)}\n"
    if len(devices) > 1:
        text += f"        between workers: {transport}\n"
    return text
