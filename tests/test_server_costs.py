"""What an exchange with parameter servers costs, in closed form: the virtual clock shows it exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel, sim

ALPHA, BANDWIDTH, HEADER = 1e-5, 1e9, 80
ELEMENTS = 12 * 16 * 100  # of float32; lines that 2, 3, 4 and 6 servers share evenly
NBYTES = 4 * ELEMENTS
STEPS = 3


class Constant(nn.Module):
    """A model whose gradient is 1 everywhere, and costs nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(np.zeros(ELEMENTS, np.float32))

    def forward(self, x: Any) -> Any:
        return self.w


def seconds_of_a_step(comm: Any, servers: bool, steps: int = STEPS) -> tuple[float, dict[str, float]]:
    model = Constant()
    rule = optim.SGD(model.parameters(), lr=0.5)
    strategy: Any = None
    x = np.zeros(ELEMENTS, np.float32)
    if servers:
        strategy = parallel.ParameterServer(model, rule, comm)
    comm.barrier()
    start = comm.now()
    for _ in range(steps):
        if servers:
            strategy.backward(model(x).sum(), samples=1)
            strategy.step()
        else:
            comm.all_reduce(x, algorithm="ring")
    return (comm.now() - start) / steps, strategy.metrics if servers else {}


def cluster(nodes: int) -> sim.Cluster:
    return sim.Cluster(nodes=nodes, flops=1e300, latency_s=ALPHA, bandwidth_bytes_per_s=BANDWIDTH)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_servers_beside_the_workers_equal_a_ring(n: int) -> None:
    """N servers on the workers' nodes: 2 (N − 1)/N nβ + 2α, the ring's bandwidth in two rounds, not 2(N − 1)."""
    beside = cluster(n)
    (took, _), *others = minidp.spawn(seconds_of_a_step, n, True, servers=n, world="virtual", cluster=beside)
    headers = 2 * (n - 1) * HEADER / BANDWIDTH
    assert took == pytest.approx(2 * (n - 1) / n * NBYTES / BANDWIDTH + 2 * ALPHA + headers, rel=1e-12)
    assert all(other == pytest.approx(took, rel=1e-12) for other, _ in others)
    (ring, _), *_ = minidp.spawn(seconds_of_a_step, n, False, world="virtual", cluster=cluster(n))
    assert ring - took == pytest.approx(2 * (n - 2) * ALPHA - headers, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 1), (4, 1), (4, 2), (6, 3), (6, 6)])
def test_servers_of_their_own(workers: int, servers: int) -> None:
    """M ≤ N servers on nodes of their own: nN/M through the port of each, in and then out.

    One step: in several, workers that are answered early send again while the others are answered.
    """
    results = minidp.spawn(
        seconds_of_a_step, workers, True, 1, servers=servers, world="virtual", cluster=cluster(workers + servers)
    )
    headers = 2 * max(servers, workers) * HEADER / BANDWIDTH
    expected = 2 * NBYTES / BANDWIDTH * workers / servers + 2 * ALPHA
    slowest = max(took for took, _ in results)
    assert expected < slowest <= (expected + headers) * (1 + 1e-12)
    for _, metrics in results:
        assert metrics["bytes_sent"] == metrics["bytes_received"] == NBYTES


@pytest.mark.parametrize("servers", [1, 3])
def test_the_cluster_has_room(servers: int) -> None:
    """Servers get nodes of their own where there are any, else they live with workers."""
    roomy = cluster(4 + servers).with_servers(4, servers)
    assert roomy.placement is None
    tight = cluster(4).with_servers(4, servers)
    assert tight.placement is not None
    assert tight.placement[:4] == (0, 1, 2, 3)
    assert len(set(tight.placement[4:])) == servers
    with pytest.raises(ValueError, match="do not fit"):
        minidp.spawn(seconds_of_a_step, 4, True, servers=servers, world="virtual", cluster=cluster(3))
