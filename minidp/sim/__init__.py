"""The virtual machine room: clusters that need not exist, their network, and their clock."""

from minidp.sim.cluster import Cluster, Jitter
from minidp.sim.topology import FatTree, Ring, Switch, Topology

__all__ = ["Cluster", "FatTree", "Jitter", "Ring", "Switch", "Topology"]
