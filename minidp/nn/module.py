"""Module: a tree of layers whose leaves are Parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Self

import numpy as np

from minidp.autograd import Tensor
from minidp.autograd.underway import under_way
from minidp.backend import Array, Device, array_module, array_types, asarray, generator, get_device, to_numpy
from minidp.nn.layout import Layout
from minidp.nn.parameter import Parameter


class Module:
    """Base class of layers and models: assign Parameters and Modules to attributes, write `forward`.

    Names are dotted paths of attributes ("0.weight", "body.2.bias"), as in PyTorch. A Parameter or Module
    that occurs twice in the tree is tied: it counts once, under the name that comes first.
    """

    training: bool = True
    init_seed: int = 0  # what `initialize` was called with; a strategy's dropout masks grow from it too
    _path: str = ""  # dotted name of this module in the tree that it was last assigned to
    _buffers: tuple[str, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward method")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = under_way.module
        if caller is None:
            under_way.model = self
        under_way.module = self
        try:
            return self.forward(*args, **kwargs)
        finally:
            under_way.module = caller
            if caller is None:
                under_way.model = None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Module):
            value._rename(_join(self._path, name))
        elif isinstance(value, list | tuple) and any(isinstance(v, Module | Parameter) for v in value):
            raise TypeError(
                f"{type(self).__name__}.{name} is a {type(value).__name__} of modules or parameters, which "
                "would not be found: use nn.Sequential(*layers) (it can be indexed), or one attribute each"
            )
        object.__setattr__(self, name, value)

    def _rename(self, path: str) -> None:
        object.__setattr__(self, "_path", path)
        for name, child in self._children():
            child._rename(f"{path}.{name}")

    def register_buffer(self, name: str, array: Array) -> None:
        """Make `array` the attribute `name`: state that is saved with the model but not learnt."""
        if name not in self._buffers:
            self._buffers = (*self._buffers, name)
        setattr(self, name, array)

    # ── walking the tree ────────────────────────────────────────────────────────────────────────────────

    def _children(self) -> list[tuple[str, Module]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Module)]

    def _own_parameters(self) -> list[tuple[str, Parameter]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Parameter)]

    def _walk(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """All modules of the tree in depth-first order, tied ones at each of their places."""
        yield prefix, self
        for name, child in self._children():
            yield from child._walk(_join(prefix, name))

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) for this module ("") and all below it, tied ones once."""
        return _once(self._walk())

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def all_named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (dotted name, parameter), a tied parameter under each of its names."""
        for prefix, module in self._walk():
            for name, parameter in module._own_parameters():
                yield _join(prefix, name), parameter

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (dotted name, parameter), each tied parameter once, under its first name."""
        return _once(self.all_named_parameters())

    def parameters(self) -> Iterator[Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Yield (dotted name, array) for all buffers; those of a tied module once."""
        for prefix, module in self.named_modules():
            for name in module._buffers:
                yield _join(prefix, name), getattr(module, name)

    def buffers(self) -> Iterator[Array]:
        return (array for _, array in self.named_buffers())

    # ── modes ───────────────────────────────────────────────────────────────────────────────────────────

    def train(self, mode: bool = True) -> Self:
        """Switch the whole tree to training (dropout drops), or to evaluation with ``train(False)``."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Switch the whole tree to evaluation."""
        return self.train(False)

    # ── values ──────────────────────────────────────────────────────────────────────────────────────────

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray | None:
        """Return the initial value of this module's own parameter `name`, or None to leave it as it is."""
        return None

    def initialize(self, seed: int = 0) -> Self:
        """Give every parameter the initial value that belongs to (seed, its dotted name).

        The same seed gives the same model on every rank, in whatever order it was built.
        """
        self.init_seed = seed
        done: set[int] = set()
        for prefix, module in self._walk():
            for name, parameter in module._own_parameters():
                if id(parameter) in done:
                    continue
                done.add(id(parameter))
                value = module.initial(name, generator(seed, "init", _join(prefix, name)))
                if value is not None:
                    _check_writable(parameter, _join(prefix, name))
                    parameter.data[...] = asarray(value, array_module(parameter.data), parameter.dtype)
        return self

    def astype(self, dtype: Any) -> Self:
        """Convert all parameters and floating-point buffers, in place, to "float16", "float32" or "float64".

        ``astype(object)`` makes them exact Fractions, on which the laws of the tests hold with ``==``.
        Gradients are dropped. Raises RuntimeError while a strategy owns the parameters.
        """
        dtype = np.dtype(dtype)
        if dtype.kind not in "fO":
            raise TypeError(f"parameters can be float16, float32 or float64, not {dtype}")
        self._replace(lambda array: _convert(array, dtype) if array.dtype.kind in "fO" else array)
        return self

    def _replace(self, change: Callable[[Array], Array]) -> None:
        """Put ``change(array)`` in place of every parameter's data and every buffer."""
        for name, parameter in self.named_parameters():
            _check_writable(parameter, name)
            if parameter._grad_slot is not None:
                raise RuntimeError(f"{name} is bound to a slab of {parameter.dtype}: unbind() the model first")
        for parameter in self.parameters():
            parameter.grad = None
            parameter.data = change(parameter.data)
        for module in self.modules():
            for name in module._buffers:
                setattr(module, name, change(getattr(module, name)))

    def to(self, device: str | Device) -> Self:
        """Move all parameters and buffers, in place, to ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. Strategies do, too.

        Gradients are dropped. RuntimeError while a strategy owns the parameters, DeviceUnavailable without one.
        """
        device = get_device(device)
        device.start()
        self._replace(device.asarray)
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return name → copy on the host of every parameter and buffer, tied ones under all their names."""
        state = {name: np.array(to_numpy(p.data)) for name, p in self.all_named_parameters()}
        for prefix, module in self._walk():
            for name in module._buffers:
                state[_join(prefix, name)] = np.array(to_numpy(getattr(module, name)))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Overwrite parameters and buffers with the arrays of `state` (any array, or PyTorch's CPU tensors).

        All or nothing: ValueError lists every missing or unexpected name, every shape that differs and tied
        names with different values, and then nothing has been written.
        """
        _load(self, state)

    # ── slabs ───────────────────────────────────────────────────────────────────────────────────────────

    def bind(self, params: Array | None = None, grads: Array | None = None) -> Layout:
        """Point every trainable parameter's data at its place in `params`, its gradient slot into `grads`.

        Both are flat 1-d arrays of ``Layout(self).size`` elements; None leaves that side as it is. Values are
        not copied: `Layout.pack` does that. If `params` is read-only, so are the parameters. Returns the
        layout; with its `views` and `point` a later re-pointing costs 0.1 µs a parameter.
        """
        layout = Layout(self)
        views = None if params is None else layout.views(params)
        slots = None if grads is None else layout.views(grads)
        if views is not None:
            layout.point(views)
        if slots is not None:
            layout.point_grads(slots)
        return layout

    def unbind(self) -> None:
        """Give every parameter private copies of its data and gradient: undo `bind`."""
        for parameter in self.parameters():
            parameter.release()

    def __repr__(self) -> str:
        children = self._children()
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        lines = [f"  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in children]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def extra_repr(self) -> str:
        """What stands between the parentheses of this layer's repr."""
        return ""


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _once(pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The pairs whose object has not come before."""
    seen: set[int] = set()
    for name, thing in pairs:
        if id(thing) not in seen:
            seen.add(id(thing))
            yield name, thing


def _convert(array: Array, dtype: np.dtype) -> Array:
    if dtype.kind != "O" or array.dtype.kind == "O":
        return array.astype(dtype)
    exact = np.empty(array.shape, dtype=object)
    exact.ravel()[...] = [Fraction(float(v)) for v in array.ravel()]
    return exact


def _check_writable(parameter: Parameter, name: str) -> None:
    if not getattr(parameter.data.flags, "writeable", True):
        raise RuntimeError(
            f"{name} is read-only: a strategy owns this model's parameters; "
            "use strategy.load_state_dict(...) to change them"
        )


def _load(module: Module, state: Mapping[str, Any]) -> None:
    """Check everything, convert everything, then write everything."""
    values = checked_state(module, state)
    for name, parameter in module.named_parameters():
        _check_writable(parameter, name)
    targets = state_targets(module)
    for name, value in values.items():
        targets[name][...] = value


def state_targets(module: Module) -> dict[str, Array]:
    """The arrays behind the names of `state_dict`, tied ones under each name."""
    targets: dict[str, Array] = {}
    for name, parameter in module.all_named_parameters():
        targets[name] = parameter.data
    for prefix, child in module._walk():
        targets.update({_join(prefix, name): getattr(child, name) for name in child._buffers})
    return targets


def _equal(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same; NaN is as good as NaN."""
    same = a == b
    return bool((same | ((a != a) & (b != b))).all())


def checked_state(module: Module, state: Mapping[str, Any]) -> dict[str, Array]:
    """Return `state` as arrays of the module's dtypes; ValueError lists everything that does not fit."""
    return fitted(state_targets(module), state)


def fitted(targets: Mapping[str, Array], state: Mapping[str, Any]) -> dict[str, Array]:
    """`checked_state` for what is described by arrays of its shapes and dtypes; names of one array are tied."""
    problems = [f"missing {name}" for name in targets if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in targets]
    values: dict[str, Array] = {}
    first: dict[int, str] = {}
    for name, target in targets.items():
        if name not in state:
            continue
        given = state[name]
        given = given.data if isinstance(given, Tensor) else given
        if type(given) not in array_types:
            given = np.asarray(given)
        if given.shape != target.shape:
            problems.append(f"{name} has shape {tuple(given.shape)}, the model's has {target.shape}")
            continue
        values[name] = asarray(given, array_module(target), target.dtype)
        other = first.setdefault(id(target), name)
        if other != name and other in values and not _equal(values[other], values[name]):
            problems.append(f"{other} and {name} are tied, but their values differ")
    if problems:
        raise ValueError("this state does not fit the model: " + "; ".join(problems))
    return values
