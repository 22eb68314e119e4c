"""Rewriting a dense model so that a group of ranks holds its layers together.

What is cut, of the modules of a model:

    Sequential          two Linear with nothing but elementwise layers between: columns and rows; an Embedding;
                        what it holds of the modules below. A Linear by itself stays whole: on every rank the same
    TransformerBlock    heads of its attention, features inside its MLP
    MultiHeadAttention  heads
    GPT                 tokens' rows of the embedding, the blocks, and the head by columns, its parts joined

All else is computed by every rank for itself, alike; so are subclasses that may do something else, by a forward
of their own. `cut_layers` may be taught other modules::

    @parallel.cut_layers.register
    def _(module: MyModel, comm: Communicator) -> None:
        module.up = parallel.ColumnParallelLinear.of(module.up, comm)
        module.down = parallel.RowParallelLinear.of(module.down, comm)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatch
from itertools import pairwise

from minidp.comm import Communicator
from minidp.nn import (
    GELU,
    GPT,
    Dropout,
    Embedding,
    Linear,
    Module,
    MultiHeadAttention,
    ReLU,
    Sequential,
    Tanh,
    TransformerBlock,
)
from minidp.nn.layers import Identity
from minidp.parallel.agreement import owners
from minidp.parallel.cuts import Cut
from minidp.parallel.parallel_attention import ParallelAttention, PartDropout
from minidp.parallel.parallel_embedding import VocabParallelEmbedding
from minidp.parallel.tensor_parallel import (
    ColumnParallelLinear,
    ParallelModule,
    RowParallelLinear,
    check_parts,
    put,
)

ELEMENTWISE = (ReLU, Tanh, GELU, Dropout, Identity)


def parallelize(model: Module, comm: Communicator) -> dict[str, Cut]:
    """Cut the layers of ``model`` over the ranks of ``comm``, in place. How each Parameter is cut, by its names.

    Parameters stay the objects that they are, so that an optimizer built from them goes on. Not collective.

    Raises ValueError, with the numbers that would fit, if heads or features do not divide, if there is nothing
    that could be cut, or a cut Parameter is used by a layer that is not.
    """
    if comm.world_size == 1:
        return {}
    cut_layers(model, comm)
    cuts = cuts_of(model)
    if not cuts:
        raise ValueError(
            f"tp={comm.world_size}: this model has no layers that can be cut (a GPT, a TransformerBlock, or two "
            "Linear in a Sequential with only activations between; not what stands in two places): take tp=1, or "
            "see parallel.cut_layers"
        )
    first: dict[int, str] = {}
    for name, parameter in model.all_named_parameters():
        other = first.setdefault(id(parameter), name)
        if cuts.get(name) != cuts.get(other):
            raise ValueError(
                f"{name} is tied to {other}, and the two would be cut differently, or one of them not at all: "
                "untie them, or take tp=1"
            )
    return cuts


def cuts_of(model: Module) -> dict[str, Cut]:
    """How the Parameters of a model are cut, by all their names; those that are whole are left out."""
    cuts = {}
    for prefix, module in model._walk():
        if isinstance(module, ParallelModule):
            for name, _ in module._own_parameters():
                if name in module.cuts:
                    cuts[f"{prefix}.{name}" if prefix else name] = module.cuts[name]
    return cuts


@contextmanager
def whole_or_not(model: Module) -> Iterator[None]:
    """If the block, which rewrites the model, raises, the model is what it was before."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    values = [(parameter, parameter.data, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        owners.pop(model, None)
        for parameter, data, grad in values:
            parameter._grad_slot, parameter._grad_written = None, False
            parameter.data = data
            parameter.grad = grad
        raise


@singledispatch
def cut_layers(module: Module, comm: Communicator) -> None:
    """Put parallel layers in place of the children of ``module`` that can be cut; of most there are none."""


@cut_layers.register
def _(module: Sequential, comm: Communicator) -> None:
    if type(module).forward is not Sequential.forward:
        return  # what it does with its layers is not known
    often = Counter(id(child) for _, child in module._walk())
    names = module._names
    paired: set[int] = set()
    for first, last in pairs(module):
        column, row = module[first], module[last]
        assert isinstance(column, Linear)
        assert isinstance(row, Linear)
        if any(often[id(module[i])] > 1 and not _plain(module[i]) for i in range(first, last + 1)):
            continue  # a layer that is tied to another place stays whole there, and here
        check_parts(f"layer {names[first]}, a Linear", "out_features", column.out_features, comm.world_size)
        put(module, names[first], ColumnParallelLinear.of(column, comm))
        for i in range(first + 1, last):
            layer = module[i]
            if isinstance(layer, Dropout):
                put(module, names[i], PartDropout.of(layer, -1, column.out_features, comm))
        put(module, names[last], RowParallelLinear.of(row, comm))
        paired.update(range(first, last + 1))
    for i, name in enumerate(names):
        layer = module[i]
        if i in paired or often[id(layer)] > 1:
            continue
        if type(layer) is Embedding:
            put(module, name, VocabParallelEmbedding.of(layer, comm))
        elif type(layer) is MultiHeadAttention:
            put(module, name, ParallelAttention.of(layer, comm))
        else:
            cut_layers(layer, comm)


@cut_layers.register
def _(module: TransformerBlock, comm: Communicator) -> None:
    if type(module).forward is not TransformerBlock.forward:
        return
    if type(module.self_attn) is MultiHeadAttention:
        put(module, "self_attn", ParallelAttention.of(module.self_attn, comm))
    first, last, between = module.linear1, module.linear2, (module.activation, module.dropout)
    if type(first) is type(last) is Linear and all(type(layer) in ELEMENTWISE for layer in between):
        put(module, "linear1", ColumnParallelLinear.of(first, comm))
        put(module, "dropout", PartDropout.of(module.dropout, -1, first.out_features, comm))
        put(module, "linear2", RowParallelLinear.of(last, comm))


@cut_layers.register
def _(module: GPT, comm: Communicator) -> None:
    if type(module).forward is not GPT.forward or type(module).embed is not GPT.embed:
        return
    if type(module.token_embedding) is Embedding:
        put(module, "token_embedding", VocabParallelEmbedding.of(module.token_embedding, comm))
    cut_layers(module.blocks, comm)
    if type(module.head) is Linear:
        put(module, "head", ColumnParallelLinear.of(module.head, comm, gather_output=True))


def _plain(layer: Module) -> bool:
    """Whether it does the same wherever it stands: it has no Parameters, and draws nothing."""
    return type(layer) in ELEMENTWISE and not isinstance(layer, Dropout)


def pairs(layers: Sequential) -> list[tuple[int, int]]:
    """(first, last) of each two Linear that can be cut together: elementwise layers alone lie between them."""
    found: list[tuple[int, int]] = []
    linear = [i for i, layer in enumerate(layers) if type(layer) is Linear]
    for first, last in pairwise(linear):
        between = [layers[i] for i in range(first + 1, last)]
        if all(type(layer) in ELEMENTWISE for layer in between) and (not found or found[-1][1] < first):
            found.append((first, last))
    return found
