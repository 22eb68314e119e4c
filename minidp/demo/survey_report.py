"""What ``--compress all`` says: what will be compared; then a table, and why the figures are as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from minidp import compress
from minidp.demo import compressors, report
from minidp.demo.train import Job
from minidp.demo.words import in_bytes, listed, number, seconds
from minidp.sim import Cluster

if TYPE_CHECKING:
    from minidp.demo.compare_compressors import Figures, Survey


def introduce(
    console: Console, job: Job, workers: int, cluster: Cluster, seeds: int, names: list[str], place: str = ""
) -> None:
    console.print(
        f"[bold]minidp[/]: {number(workers, 'worker')}, how small may gradients be?\n\n{report.material(job)}"
        f"  step  of each worker: B/N = {job.global_batch_size}/{workers} samples; {report.rate(job)}\n"
        f"        {number(job.epochs, 'epoch')}, with each of {seeds} seeds\n",
        highlight=False,
    )
    if place:
        console.print(place, highlight=False, markup=False)
    console.print(report.describe(cluster), highlight=False)
    wide = 1 + max(map(len, names))
    for name in names:
        text = "as they are: the usual DataParallel" if name == compressors.FLOAT32 else compressors.about(name)
        if name.endswith("+ef") and name.removesuffix("+ef") in names:
            text = "the same, with error feedback"
            if not compressors.has_scale(name.removesuffix("+ef")):
                text = f"{compressors.about(name)}, with error feedback"
        console.print(f"  [bold]{name:{wide}}[/] {text}", highlight=False)
    console.print("\n  +ef, error feedback: what is dropped is added to the next gradient.\n", highlight=False)


def title(result: Survey) -> str:
    network = f"{result.bandwidth_bytes_per_s * 8 / 1e9:g} Gb/s"
    task = f"{number(result.epochs, 'epoch')} of {result.dataset}"
    return f"{number(result.workers, 'worker')}, a network of {network}, {task}"


def show(console: Console, result: Survey) -> None:
    table = Table(
        title=f"{result.steps} steps on the virtual clock, means of {number(result.seeds, 'seed')}",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    headers = ("sent in\na step", "times\nless", "time", "× as\nfast", "test acc.\n(points)", "loss\nL(w)", "")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for each in result.compressors:
        on = (each.compressor in result.front_bytes) + (each.compressor in result.front_seconds)
        points = round(each.points, 1) + 0.0  # without the sign of −0.0
        table.add_row(
            each.compressor,
            in_bytes(each.bytes_per_step),
            f"{each.times_less:.3g}",
            seconds(each.seconds),
            f"{each.times_faster:.2f}" if each.times_faster < 10 else f"{each.times_faster:.3g}",
            f"{each.test_accuracy:.1%} {points:+.1f}"
            if abs(points) < 10
            else f"{each.test_accuracy:.1%} {points:+.0f}",
            f"{each.loss:.4f}",
            ("", "◇", "◆")[on],
            style="bold" if on else "",
        )
    console.print(table)
    for note in explain(result):
        console.print(f"\n{note}", highlight=False, markup=False)


def explain(result: Survey) -> Iterator[str]:
    """Why the figures are as they are, a paragraph each."""
    by_name = {each.compressor: each for each in result.compressors}
    base = by_name[compressors.FLOAT32]
    spread = 100 * (max(base.test_accuracies) - min(base.test_accuracies))
    yield (
        f"{_fronts(result)} One test sample is {100 / result.test_samples:.2g} points, and from seed to seed "
        f"float32's own accuracy differs by {spread:.1f}: what is less than that may be chance, even where it is "
        "a gain."
    )
    yield _sent(result)
    yield _time(result, by_name)
    yield _feedback(result, by_name)
    blind = [each for each in result.compressors if each.lr != base.lr]
    if blind:
        yield (
            f"{blind[0].compressor} moves each number of w by η, whatever the gradient: here η is "
            f"{compressors.SIGN_LR:g} × {base.lr:g} = {blind[0].lr:g}, or w would only jump about. It never "
            "comes to rest, since its steps do not become shorter; with error feedback signs have a length."
        )


def _fronts(result: Survey) -> str:
    text = "On the Pareto front is who is beaten by nobody: none of the others is as accurate and "
    if result.front_bytes == result.front_seconds:
        return f"{text}sends less, or is as accurate and quicker: {listed(result.front_bytes)} (◆)."
    return (
        f"{text}sends less: {listed(result.front_bytes)}; or is as accurate and quicker: "
        f"{listed(result.front_seconds)} (◆ both, ◇ one of the two)."
    )


def _by_route(result: Survey, route: str) -> list[str]:
    specs = [each.compressor for each in result.compressors if each.compressor != compressors.FLOAT32]
    return [spec for spec in specs if compress.get(spec).route == route]


def _sent(result: Survey) -> str:
    n, text = result.workers, "Sent:"
    if names := _by_route(result, "sum"):
        text += (
            f" {listed(names)} are added up as they travel, which takes 2(N−1)/N = {2 * (n - 1) / n:.3g} times "
            f"what is to be sent (small arrays go to all at once, {n - 1} times: more bytes in fewer messages)."
        )
    if names := _by_route(result, "owners"):
        text += (
            f" {listed(names)} can't be: each rank adds up a part for all, and compresses the sum once more, as "
            "many bytes."
        )
    if names := _by_route(result, "gather"):
        text += (
            f" {listed(names)}: every rank keeps other numbers, so all send all to all, {n - 1} times, and the "
            "more workers there are, the more it is."
        )
    if names := [each.compressor for each in result.compressors if each.compressor.startswith("powersgd:")]:
        text += f" {listed(names)} makes (n + m) R numbers of a matrix of n × m, and leaves vectors alone."
    return text


def _time(result: Survey, by_name: dict[str, Figures]) -> str:
    base = by_name[compressors.FLOAT32]
    most = base.seconds / result.computing_s
    text = (
        f"Time: {seconds(result.computing_s)} of float32's {seconds(base.seconds)} is computing, which no "
        f"compressor makes less: at most it is {most:.3g} times as fast."
    )
    if (none := by_name.get("none")) is not None:
        slower = 100 * (none.seconds / base.seconds - 1)
        text += (
            f" Payloads leave after backward, each of {result.parameter_arrays} parameter arrays by itself, and "
            f"every rank updates all of w: so none, which does only that, takes {slower:.0f} % more time."
        )
    told = [spec for spec in by_name if spec != compressors.FLOAT32 and not compress.get(spec).steady]
    text += (
        f" Small messages cost their latency, {seconds(result.latency_s)}, rather than their bytes; there are the "
        "more of them where parts have owners"
    )
    if told:
        text += f", and most with {listed(told)}, whose sizes vary and are told first"
    return (
        f"{text}. Compressing counts two FLOPs a number and an operation a call: a real processor may take longer."
    )


def _feedback(result: Survey, by_name: dict[str, Figures]) -> str:
    text = "Error feedback: nothing is lost, it only comes later."
    sparse = [spec for spec in by_name if spec.startswith("randomk:") and spec.endswith("+ef")]
    if sparse:
        density = float(sparse[0].removesuffix("+ef").split(":")[1])
        text += (
            f" {sparse[0]} takes numbers by chance, so each waits {1 / density:.0f} steps in the mean, and in "
            f"{result.steps} steps has its turn {result.steps * density:.2g} times: late."
        )
    if any(spec.startswith("topk:") for spec in by_name):
        text += " topk takes those that matter most, and what waits grows until it is among them."
    text += " Compressors that are unbiased (qsgd, terngrad) do without: their errors cancel out over steps."
    if result.optimizer.startswith("adam"):
        text += (
            " But Adam divides by the length of what arrives, noise included: the noisier, the smaller its steps."
        )
    return text
