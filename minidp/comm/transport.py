"""Which way the arrays of a device go between ranks: chosen once, by all together, and told."""

from __future__ import annotations

import logging

import numpy as np

from minidp.backend import Device
from minidp.comm.communicator import Communicator
from minidp.comm.device_memory import Peers, SharedMemory, all_or_none, make_peers, share
from minidp.comm.on_device import DeviceCommunicator
from minidp.comm.staged import Staged

_log = logging.getLogger("minidp.comm")


def on_device(host: Communicator, device: Device) -> Communicator:
    """``host`` for ranks whose arrays lie on ``device``, which each has started; ``host`` itself for the host.

    Collective. Logged at INFO: which GPUs, which transport, and why not a faster one.
    """
    if device.on_host:
        return host
    places = host.all_gather_object((device.identity(), device.describe()), "devices")
    devices = sorted(dict(places).values())
    transport, why = choose_transport(host, device, [identity for identity, _ in places])
    if host.rank == 0:
        ranks = f"{host.world_size} rank{'s' * (host.world_size > 1)}"
        _log.info("%s on %s; between them %s%s", ranks, "; ".join(devices), transport.name, why and f" ({why})")
    return DeviceCommunicator(host, device, transport)


def choose_transport(host: Communicator, device: Device, identities: list[str]) -> tuple[Staged, str]:
    """The transport of all ranks, and the reason why it is no faster one, or "". Collective."""
    if not host.shares_memory:
        return Staged(host, device), ""
    if host.world_size == 1:
        return SharedMemory(host, device, Peers(device, 0, (None,))), ""
    why = ""
    if len(set(identities)) == len(identities):
        from minidp.comm.nccl import Nccl, library  # late: it needs CuPy

        try:
            all_or_none(host, library)
            return Nccl(host, device), ""
        except OSError as error:
            why = f"no NCCL: {error}"
    try:
        return SharedMemory(host, device, _peers(host, device)), why
    except (MemoryError, OSError) as error:
        return Staged(host, device), "; ".join(filter(None, (why, str(error))))


def _peers(host: Communicator, device: Device) -> Peers:
    """The events of all ranks, once it is seen that memory and order really are shared. Collective, and so are its
    errors."""
    peers = make_peers(host, device)
    cells = share(host, device, 8)
    cells[host.rank].view(np.int64)[...] = host.rank + 1
    peers.meeting()
    host.barrier()
    peers.met()

    def look() -> None:
        seen = [int(cell.view(np.int64)[0]) for cell in cells]
        if seen != list(range(1, host.world_size + 1)):
            raise OSError(f"memory shared through {device.name} holds {seen}: it is not the same on all ranks")

    all_or_none(host, look)
    return peers
