"""Images in memory: (n, channels, height, width) from outside, channels · height · width · n inside.

With the samples innermost ("CHWN") a window that moves over the image moves whole runs of memory, the patches of
all samples at once: convolution copies runs where other layouts gather single pixels.

Operations give their results as transposed views of such arrays, as PyTorch's channels_last does. Everything else
accepts them, since elementwise operations keep the order of their input; whatever comes in another order costs
one copy.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

from minidp.backend import Array

Pair = int | tuple[int, int]


def chwn(x: Array) -> Array:
    """View (n, c, h, w) as (c, h, w, n)."""
    return x.transpose(1, 2, 3, 0)


def nchw(x: Array) -> Array:
    """View (c, h, w, n) as (n, c, h, w)."""
    return x.transpose(3, 0, 1, 2)


class Windows(NamedTuple):
    """A window of `kernel` moving by `stride` over images with `padding` on all sides: (rows, columns) each."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def padded(self) -> tuple[int, int]:
        return self.size[0] + 2 * self.padding[0], self.size[1] + 2 * self.padding[1]

    @property
    def out(self) -> tuple[int, int]:
        """How many places the window takes: ⌊(size + 2 padding − kernel) / stride⌋ + 1."""
        rows, columns = self.padded
        return (rows - self.kernel[0]) // self.stride[0] + 1, (columns - self.kernel[1]) // self.stride[1] + 1

    @property
    def apart(self) -> bool:
        """Whether no pixel is in two windows."""
        return self.stride[0] >= self.kernel[0] and self.stride[1] >= self.kernel[1]

    @property
    def cover(self) -> bool:
        """Whether every pixel is in exactly one window."""
        return self.apart and all(n * k == p for n, k, p in zip(self.out, self.kernel, self.padded))

    def pad(self, x: Array, xp: Any, fill: float = 0, dtype: Any = None) -> Array:
        """(c, h, w, n) with a margin of `fill`, contiguous: a copy unless `x` is that already."""
        dtype = x.dtype if dtype is None else dtype
        (top, left), (h, w) = self.padding, self.size
        if not (top or left):
            return xp.ascontiguousarray(x, dtype=dtype)
        out = xp.full((x.shape[0], *self.padded, x.shape[3]), fill, dtype=dtype)
        out[:, top : top + h, left : left + w] = x
        return out

    def crop(self, x: Array) -> Array:
        """Undo `pad`: the view of the image without its margin."""
        (top, left), (h, w) = self.padding, self.size
        return x[:, top : top + h, left : left + w]

    def taps(self, x: Array) -> list[Array]:
        """For each place (i, j) in the window, row by row, the pixels there of all windows: views (c, *out, n)."""
        (rows, columns), (down, right) = self.out, self.stride
        return [
            x[:, i : i + down * (rows - 1) + 1 : down, j : j + right * (columns - 1) + 1 : right]
            for i in range(self.kernel[0])
            for j in range(self.kernel[1])
        ]

    def patches(self, x: Array, xp: Any) -> Array:
        """All windows of a contiguous padded image as one view: (c, *kernel, *out, n). Copies nothing."""
        c, h, w, n = x.strides
        shape = (x.shape[0], *self.kernel, *self.out, x.shape[3])
        strides = (c, h, w, h * self.stride[0], w * self.stride[1], n)
        return xp.lib.stride_tricks.as_strided(x, shape, strides)


def windows(what: str, x: Array, kernel: Pair, stride: Pair, padding: Pair) -> Windows:
    """The windows over `x` (n, c, h, w); ValueError if there is no place for any."""
    if x.ndim != 4:
        raise ValueError(f"{what}: images must have shape (n, channels, height, width), not {x.shape}")
    if x.dtype.kind not in "biufO":
        raise TypeError(f"{what}: images must hold numbers, not {x.dtype}")
    found = Windows(x.shape[2:], pair(kernel), pair(stride), pair(padding))
    (rows, columns), (height, width) = found.kernel, found.padded
    if rows > height or columns > width:
        with_padding = f" (with padding {height}×{width})" if any(found.padding) else ""
        raise ValueError(
            f"{what}: a window of {rows}×{columns} is larger than the images of {x.shape[2]}×{x.shape[3]}"
            f"{with_padding}: take a smaller kernel_size, or more padding"
        )
    return found


def pair(value: Pair) -> tuple[int, int]:
    """(rows, columns) from one number for both, or from two."""
    rows, columns = value if isinstance(value, tuple | list) else (value, value)
    return int(rows), int(columns)


def check_window(what: str, kernel: Any, stride: Any, padding: Any) -> None:
    """ValueError unless sizes of windows are whole numbers, or pairs of them, in their range."""
    for name, value, least in (("kernel_size", kernel, 1), ("stride", stride, 1), ("padding", padding, 0)):
        numbers = value if isinstance(value, tuple | list) and len(value) == 2 else (value,)
        if not all(not isinstance(n, bool) and isinstance(n, Integral) and int(n) >= least for n in numbers):
            raise ValueError(f"{what}: {name}={value!r}: give a whole number from {least} on, or a pair of them")


def check_padding(name: str, kernel_size: Pair, padding: Pair) -> None:
    """ValueError if a window could lie in the padding alone."""
    if any(2 * p > k for k, p in zip(pair(kernel_size), pair(padding))):
        raise ValueError(
            f"{name}: padding={padding} is more than half of kernel_size={kernel_size}: windows would see no image"
        )
