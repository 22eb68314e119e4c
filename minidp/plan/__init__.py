"""``python -m minidp.plan``: how far does a model scale on machines that one does not have, and on which mesh?"""

from minidp.plan.meshes import Impossible, MeshPoint, rank_meshes
from minidp.plan.transformer import Transformer

__all__ = ["Impossible", "MeshPoint", "Transformer", "rank_meshes"]
