"""What a step should take, before it is taken: the strategy's own script, replayed on a described cluster."""

from __future__ import annotations

from statistics import fmean

from minidp.demo.train import Job
from minidp.nn import functional as F
from minidp.parallel.timing import rehearse, replay
from minidp.sim import Cluster


def predicted_step_s(job: Job, workers: int, cluster: Cluster) -> float:
    """Seconds of a step, the mean over an epoch, whose last batch may be short."""
    train_set, _ = job.task.load()
    full, rest = divmod(len(train_set) * job.copies, job.global_batch_size)
    times = []
    for batch, count in ((job.global_batch_size, full), (rest, int(rest > 0))):
        if count:
            x, y = train_set[: -(-batch // workers)]
            script = rehearse(job.strategy, x, y, F.cross_entropy, workers)
            times += [replay(script, cluster, workers, steps=count).step_s] * count
    return fmean(times)
