"""``compress``, last part: 8 virtual ranks train on a network of 1 Gb/s. Nothing here is measured: two runs are
equal to the bit, and computing, compressing too, takes what the meter counts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from minidp.bench.jobs import MLP
from minidp.bench.measure import Bar, Figure
from minidp.bench.peers.ours import strategy_of
from minidp.bench.report import Line
from minidp.bench.screen import Screen
from minidp.bench.virtual import spawned
from minidp.comm import Communicator
from minidp.nn.functional import cross_entropy
from minidp.sim import Cluster

JOB = MLP((784, 512, 512, 10), 16)
RANKS, STEPS = 8, 4  # the first step tells sizes, too: it does not count
DEFAULT, CORE = "default node", "like a core"
CLUSTERS = {
    DEFAULT: Cluster(nodes=RANKS, bandwidth_bytes_per_s=1.25e8),
    CORE: Cluster(
        nodes=RANKS, bandwidth_bytes_per_s=1.25e8, flops=1e11, memory_bytes_per_s=2e10, op_overhead_s=2e-6
    ),
}
BARS = {"int8": Bar(3), "topk:0.01+ef": Bar(15)}  # on the default nodes


def _train(comm: Communicator, job: MLP, spec: str) -> float:
    """Seconds of a step, by this rank's clock."""
    strategy = strategy_of(job, comm, compress=None if spec == "none" else spec)
    x, y = job.batch_of(comm.rank)
    seconds = []
    for _ in range(STEPS):
        comm.barrier()
        start = comm.now()
        strategy.forward_backward(x, y, cross_entropy)
        strategy.step()
        seconds.append(comm.now() - start)
    return median(seconds[1:])


def step_s(job: MLP, spec: str, cluster: Cluster) -> float:
    """Seconds of a step, of the rank that takes longest."""
    return float(max(spawned(_train, RANKS, job, spec, cluster=cluster)))


def run(screen: Screen, specs: Sequence[str], job: MLP = JOB) -> list[Line]:
    """A line for each compressor on each kind of node; the first one's is what all are compared with."""
    screen.phase("virtual ranks", len(CLUSTERS) * len(specs))
    lines = []
    for nodes, cluster in CLUSTERS.items():
        base: float | None = None
        for spec in specs:
            seconds = step_s(job, spec, cluster)
            screen.tick()
            line = Line(spec, nodes, {"ms": 1e3 * seconds, "steps_per_s": 1 / seconds}, [seconds])
            if base is None:
                base = seconds
            else:
                bar = BARS.get(spec) if nodes == DEFAULT and job == JOB else None
                line = line.compared(f"steps/s over float32's, {nodes}", Figure.of([base / seconds], bar))
            lines.append(line)
    return lines
