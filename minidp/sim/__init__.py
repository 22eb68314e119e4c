"""The virtual machine room: clusters that need not exist, their network, and their clock."""

from typing import Any

from minidp.sim.cluster import Cluster, Jitter
from minidp.sim.topology import FatTree, Ring, Switch, Topology

__all__ = ["Cluster", "FatTree", "Jitter", "Ring", "Switch", "Topology", "calibrate"]


def __getattr__(name: str) -> Any:
    if name == "calibrate":  # late: only who calibrates needs to start processes
        from minidp.sim.calibration import calibrate

        return calibrate
    raise AttributeError(f"module 'minidp.sim' has no attribute {name!r}")
