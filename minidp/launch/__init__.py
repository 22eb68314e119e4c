"""Starting ranks, supervising them, and leaving nothing behind."""

from minidp.launch.spawn import spawn

__all__ = ["spawn"]
