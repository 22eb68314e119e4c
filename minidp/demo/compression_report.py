"""What ``--compress SPEC`` adds to the report: what is sent, what that saves, and what it does to w."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minidp.demo import compressors
from minidp.demo.words import number

if TYPE_CHECKING:
    from minidp.demo.report import Outcome
    from minidp.demo.train import Job

WHERE = (
    "Workers of one machine read each other's memory: there bytes cost little, and compressing takes time. What "
    "it is for are slow networks: try --world virtual --bandwidth 1.25e8 (1 Gb/s), or --compress all."
)


def sent(job: Job) -> str:
    """What travels in place of gradients; and η, if it is another with that."""
    assert job.compress is not None
    text = f"  sent  {job.compress}: {compressors.about(job.compress)}\n"
    if job.compress.endswith("+ef"):
        text += "        +ef: what this drops is added to the next gradient (error feedback)\n"
    if job.lr_workers != job.lr:
        text += (
            "        It moves w by η whatever the gradient's length, so the workers' η\n"
            f"        is smaller: {compressors.SIGN_LR:g} × {job.lr:g} = {job.lr_workers:g}\n"
        )
    return text


def compressed(result: Outcome, chance: float) -> str:
    """What compression has saved, and what it has done to w. ``chance``: the loss of guessing."""
    workers, spec = number(result.workers, "worker"), result.compress
    if result.bytes_per_step > 0:
        part = result.bytes_per_step / result.bytes_per_step_float32
        text = f"As {spec} a worker sends {part:.3g} of the bytes of float32.\n"
        if part < 0.1:
            text = f"As {spec} a worker sends 1/{1 / part:.3g} of the bytes of float32.\n"
    else:
        text = "Who is alone sends nothing; gradients are compressed all the same.\n"
    if not result.loss < chance:
        return f"{text}[yellow]With it nothing was learnt: try a smaller --lr than {result.lr:g}.[/]"
    if spec == "none" and result.relative_difference < 1e-3:
        return f"{text}{workers} and one end at the same w, but for float32's rounding of sums."
    points = 100 * (result.test_accuracy - result.test_accuracy_one_worker)
    return (
        f"{text}{workers} and one began at the same w and end at different ones, as they must: with {spec} each "
        "step's gradient is a little another. So equality is no test here, but what was learnt is: test accuracy "
        f"is {points:+.1f} points from one worker's, the loss {result.loss:.4f} against "
        f"{result.loss_one_worker:.4f}."
    )
