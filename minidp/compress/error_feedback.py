"""Error feedback: what compression has dropped is not lost, but added to the next gradient."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minidp import backend
from minidp.backend import Array, to_numpy
from minidp.compress.bits import like
from minidp.compress.compressor import Compressor, Payload, Reducer, State, chosen
from minidp.compress.wrapper import Wrapper


class ErrorFeedback(Wrapper):
    """``"…+ef"``: any compressor with a memory of its errors, the residual e, one for each key.

        p = g + e        Δ = C(p) is what the others get        e = p − Δ

    So Σ Δ + e = Σ g, over all calls of a key: nothing is lost, it comes later. The sequence w − η e follows plain
    SGD. Compressors that are unbiased but far off, or have no scale, are used in a variant that shrinks the error
    (`Compressor.for_error_feedback`). Memory: one array a key.

    Where owners sum parts, each part's sender remembers what was lost in sending, and the owner what was lost of
    the sum. Source: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al.,
    "Error Feedback Fixes SignSGD", ICML 2019; for owners Tang et al., "DoubleSqueeze", ICML 2019.
    """

    def __init__(self, inner: Compressor) -> None:
        if not isinstance(inner, Compressor):
            raise TypeError(f"ErrorFeedback({inner!r}): give a Compressor, or a name with +ef to get()")
        if isinstance(inner, Wrapper):
            raise ValueError(
                f"{inner!r} in ErrorFeedback: it has error feedback already, or is Pruned, which goes around it"
            )
        super().__init__(inner.for_error_feedback())
        self._residuals: dict[str, Array] = {}

    def compress(self, array: Array, key: str) -> Payload:
        p = self._corrected(array, key)
        payload = self.inner.compress(p, key)
        self._residuals[key] = self.inner.subtract(p, payload)
        return payload

    def exchanged(self, array: Array, key: str, reducer: Reducer) -> tuple[Array, Payload | None]:
        if self.route == "owners" and reducer.world_size > 1:
            return super().exchanged(array, key, reducer)  # part by part, each by ``compress``
        p = self._corrected(array, key)
        total, mine = self.inner.exchanged(p, key, reducer)
        assert mine is not None
        self._residuals[key] = self.inner.subtract(p, mine)
        return total, mine

    def residual(self, key: str) -> Array:
        """e of this key: what its next gradient will be corrected by."""
        return self._residuals[key]

    def _corrected(self, array: Array, key: str) -> Array:
        """g + e, in an array of its own: if compressing fails, e is still what it was."""
        residual, p = self._residuals.get(key), array.copy()
        if residual is None:
            return p
        if residual.shape != array.shape:
            raise ValueError(f"{key} had shape {residual.shape} before, and now {array.shape}: give it a new key")
        p += like(residual, array)
        backend.count(float(p.size), 5.0 * p.nbytes)
        return p

    def state_dict(self) -> State:
        residuals = {f"residual/{key}": to_numpy(e).copy() for key, e in self._residuals.items()}
        return self.inner.state_dict() | residuals

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        residuals = chosen(state, "residual")
        self.inner.load_state_dict({name: value for name, value in state.items() if name not in residuals})
        self._residuals = {name.removeprefix("residual/"): value.copy() for name, value in residuals.items()}

    @property
    def spec(self) -> str:
        return f"{self.inner.spec}+ef"
