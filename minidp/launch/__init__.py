"""Starting ranks, supervising them, and leaving nothing behind."""

from minidp.launch.blas import cores
from minidp.launch.spawn import spawn

__all__ = ["cores", "spawn"]
