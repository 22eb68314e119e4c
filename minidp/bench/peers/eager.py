"""PyTorch, one process, eager mode: the yardstick of ``step``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from minidp.bench.jobs import LEARNING_RATE, Training
from minidp.bench.peers.serve import Contestant, leave, serve

torch: Any = import_module("torch")  # untyped here, so that mypy says the same with and without PyTorch


def limit_threads() -> None:
    torch.set_num_threads(1)


def build(job: Training, rank: int) -> tuple[Any, Any, Any]:
    """The model with the job's weights, and the rank's batch (x, y)."""
    layers: list[Any] = []
    for inputs, outputs in zip(job.widths, job.widths[1:]):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    model.load_state_dict({name: torch.from_numpy(array) for name, array in job.state().items()})
    x, y = job.batch_of(rank)
    return model, torch.from_numpy(x), torch.from_numpy(y)


def training_step(model: Any, x: Any, y: Any, exchange: Callable[[], object] | None = None) -> Callable[[], Any]:
    """zero_grad, forward, loss, backward, ``exchange`` if any, update; all of PyTorch's own defaults."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    cross_entropy = torch.nn.functional.cross_entropy

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(x), y)
        loss.backward()
        if exchange is not None:
            exchange()
        optimizer.step()
        return loss.detach()

    return step


class Eager(Contestant):
    """PyTorch alone."""

    def threads(self) -> int:
        return int(torch.get_num_threads())

    def training(self, job: Training) -> Callable[[], Any]:
        return training_step(*build(job, self.rank))


def main(socket: str, world_size: int) -> None:
    assert world_size == 1, world_size
    limit_threads()
    serve(Eager(), socket)
    leave()
