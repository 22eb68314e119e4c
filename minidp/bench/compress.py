"""``compress``: what it costs to make a gradient smaller, how much smaller it gets, on which network that pays.

    alone       a gradient becomes a payload, and a payload an array again: speed of each way, bytes
    together    one of 8 ranks adds up a gradient with the others: bytes that it sends, seconds that it computes
    training    8 virtual ranks on a slow network: steps/s over those of float32, in `compress_training`

What is timed runs in workers of ``minidp.spawn``, as users have them: they keep freed memory. How it looks:
`compress_report`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

import minidp
from minidp import backend
from minidp.bench import compress_training, measure
from minidp.bench.compress_peers import Peers, ring_bytes, sent_bytes
from minidp.bench.compress_report import GBITS, CompressReport
from minidp.bench.contest import Rounds
from minidp.bench.jobs import MLP
from minidp.bench.machine import Neighbours
from minidp.bench.measure import Bar, Figure
from minidp.bench.report import Line
from minidp.bench.screen import Screen
from minidp.comm import Communicator
from minidp.compress import Compressor, get

ALONE = (
    "fp16",
    "bf16",
    "bf16:truncate",
    "int8",
    "int8:stochastic",
    "qsgd:4",
    "terngrad",
    "sign",
    "topk:0.01",
    "randomk:0.01",
    "powersgd:4",
)
TOGETHER = (
    *ALONE[: ALONE.index("sign") + 1],
    "sign+ef",
    "topk:0.01+ef",
    "topk:0.01:owners+ef",
    "randomk:0.01+ef",
    "powersgd:4+ef",
)
RANKS = 8
ENCODE_BARS = {  # GB/s
    "bf16": Bar(11),
    "int8": Bar(5),
    "qsgd:4": Bar(1.5),
    "sign": Bar(6),
    "topk:0.01": Bar(2.5),
}
DECODE_BARS = {"int8": Bar(8), "sign": Bar(12)}


@dataclass(frozen=True)
class Size:
    """How much is compressed. The bars are for the default.

    Args:
        side: of the square matrix of float32.
        job: what virtual ranks train.
    """

    side: int = 2048
    job: MLP = compress_training.JOB


FULL, QUICK = Size(), Size(side=128, job=MLP((64, 128, 10), 16))


def run(rounds: Rounds, screen: Screen, size: Size = FULL) -> CompressReport:
    report = CompressReport("compress", "g' = compress(g)", rounds, {}, side=size.side, model=size.job.name)
    busy = []
    screen.phase("one call", len(ALONE))
    for spec in ALONE:
        (calls,) = minidp.spawn(alone, 1, spec, size.side, rounds, blas_threads=1, progress=False)
        report.lines += lines_alone(spec, size, calls)
        busy.append(calls.others)
        screen.tick()
    screen.phase(f"{RANKS} ranks", len(TOGETHER))
    for spec in TOGETHER:
        (exchange,) = minidp.spawn(together, 1, spec, size.side, rounds, blas_threads=1, progress=False)
        report.lines.append(line_together(spec, size, exchange))
        busy.append(exchange.others)
        screen.tick()
    known = [cores for cores in busy if cores is not None]
    report.others = sum(known) / len(known) if known else None
    report.lines += compress_training.run(screen, ("none", *TOGETHER), size.job)
    return report


def gradient(side: int) -> np.ndarray:
    """A matrix of float32 with a heavy tail: Student's t with 3 degrees of freedom, times 0.001."""
    values = backend.generator(0, "bench", "compress").standard_t(3, (side, side)) * 1e-3
    return values.astype(np.float32)


class Repeated:
    """A contender of `measure.compare`."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def burst(self, repeats: int, warm_up: int = 0) -> float:
        for _ in range(warm_up):
            self._call()
        start = time.perf_counter()
        for _ in range(repeats):
            self._call()
        return time.perf_counter() - start


# --- alone ------------------------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """What a worker has found of one compressor by itself.

    Args:
        nbytes: of the payload.
        encode_s, decode_s: of a call, in every round.
        others: cores' worth of time that other processes took meanwhile.
    """

    nbytes: int
    encode_s: list[float]
    decode_s: list[float]
    others: float | None


def alone(comm: Communicator, spec: str, side: int, rounds: Rounds) -> Calls:
    """Runs in a worker."""
    neighbours = Neighbours({os.getpid()})
    compressor, x = get(spec), gradient(side)
    payload = compressor.compress(x, "w")
    contenders = {
        "encode": Repeated(lambda: compressor.compress(x, "w")),
        "decode": Repeated(lambda: compressor.decompress(payload)),
    }
    samples = measure.compare(contenders, rounds.pairs, rounds.burst_s)
    return Calls(payload.nbytes, samples["encode"], samples["decode"], neighbours.cores())


def lines_alone(spec: str, size: Size, calls: Calls) -> list[Line]:
    """One for each way."""
    nbytes = 4 * size.side**2
    lines = []
    for who, seconds, bars in (("encode", calls.encode_s, ENCODE_BARS), ("decode", calls.decode_s, DECODE_BARS)):
        rates = [nbytes / each / 1e9 for each in seconds]
        figures = {
            "payload_bytes": calls.nbytes,
            "smaller": nbytes / calls.nbytes,
            "GB_per_s": median(rates),
        }
        bar = bars.get(spec) if size.side == FULL.side else None
        lines.append(Line(spec, who, figures, seconds).compared(f"{who} GB/s", Figure.of(rates, bar)))
    return lines


# --- together ---------------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """What a worker has found of one compressor among ranks.

    Args:
        route: how payloads are added up.
        error: ‖x − C(x)‖ / ‖x‖ of the first call; None where payloads have no length.
        sent: bytes that a rank sends, by the number of ranks: 2 and `RANKS`.
        seconds: that one of `RANKS` computes, in every round.
        others: as in `Calls`.
    """

    route: str
    error: float | None
    sent: dict[int, float]
    seconds: list[float]
    others: float | None


def together(comm: Communicator, spec: str, side: int, rounds: Rounds) -> Exchange:
    """Runs in a worker."""
    neighbours = Neighbours({os.getpid()})
    x = gradient(side)
    sent = {ranks: sent_bytes(spec, x, ranks) for ranks in (2, RANKS)}
    compressor, peers = get(spec), Peers(spec, RANKS, x)
    contender = Repeated(lambda: compressor.exchange(x, "w", peers))
    samples = measure.compare({spec: contender}, rounds.pairs, rounds.burst_s)
    return Exchange(compressor.route, error_of(spec, x), sent, samples[spec], neighbours.cores())


def error_of(spec: str, x: np.ndarray) -> float | None:
    """‖x − C(x)‖ / ‖x‖; None for signs, which say nothing of length."""
    compressor: Compressor = get(spec)
    if compressor.votes:
        return None
    lost = x - compressor.decompress(compressor.compress(x, "w"))
    return float(np.linalg.norm(lost) / np.linalg.norm(x))


def line_together(spec: str, size: Size, exchange: Exchange) -> Line:
    nbytes, computing_s = 4 * size.side**2, median(exchange.seconds)
    raw, sent = ring_bytes(nbytes, RANKS), exchange.sent[RANKS]
    figures = {
        **{f"sent_bytes_{ranks}": each for ranks, each in exchange.sent.items()},
        "computing_ms": 1e3 * computing_s,
        "break_even_Gb_per_s": 8e-9 * max(0.0, raw - sent) / computing_s,
        **{f"times_{gbits}_Gb_per_s": times(raw, sent, computing_s, gbits) for gbits in GBITS},
    }
    if exchange.error is not None:
        figures["error"] = exchange.error
    return Line(spec, exchange.route, figures, exchange.seconds)


def times(raw: float, sent: float, computing_s: float, gbits: float) -> float:
    """How many times sooner the exchange ends than float32's, at so many Gb/s; no latency on either side."""
    per_s = gbits * 1e9 / 8
    return raw / per_s / (sent / per_s + computing_s)
