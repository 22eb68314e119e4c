"""PyTorch, one process, eager mode: the yardstick of ``step``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

from minidp.bench.jobs import CNN, LEARNING_RATE, MLP, Training, Transformer
from minidp.bench.peers.serve import Contestant, leave, serve

torch: Any = import_module("torch")  # untyped here, so that mypy says the same with and without PyTorch


def limit_threads() -> None:
    torch.set_num_threads(1)


def build(job: Training, rank: int) -> tuple[Any, Any, Any]:
    """The model with the job's weights, and the rank's batch (x, y)."""
    model: Any
    match job:
        case MLP(widths):
            layers: list[Any] = []
            for inputs, outputs in pairwise(widths):
                layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
            model = torch.nn.Sequential(*layers[:-1])
        case CNN(channels, side):
            model = cnn(channels, side, job.classes)
        case Transformer():
            from minidp.bench.peers.gpt import GPT

            model = GPT(job)
        case _:
            raise TypeError(f"nobody knows how to build {job}")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in job.state().items()})
    x, y = job.batch_of(rank)
    return model, torch.from_numpy(x), torch.from_numpy(y)


def cnn(channels: tuple[int, ...], side: int, classes: int) -> Any:
    """What ``nn.cnn`` is, in PyTorch."""
    inputs, layers = 1, []
    for outputs in channels:
        layers += [torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        inputs, side = outputs, side // 2
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(inputs * side * side, classes))


def training_step(model: Any, x: Any, y: Any, exchange: Callable[[], object] | None = None) -> Callable[[], Any]:
    """zero_grad, forward, loss, backward, ``exchange`` if any, update; all of PyTorch's own defaults."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    cross_entropy = torch.nn.functional.cross_entropy

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        logits = model(x)
        loss = cross_entropy(logits.flatten(0, -2), y.flatten())  # classes last: of text, too
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
