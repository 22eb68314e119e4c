"""N workers × M servers: gradients go to servers, which own w, and w comes back (article 3.3.2, 3.4.2, 4.5).

    worker i                                    server j, which owns slice j of w
    backward        n_i ∇L_i
    push            slice j of it to server j   w ← rule(w, …)
    pull            slice j of w back           … when the rule of staleness lets worker i go on

The rule is one number (`clocks.py`): 0 is synchronous training, s lets workers run s steps ahead of the slowest,
None lets nobody wait. What a server does: `serve.py`, `session.py`, `served.py`; what travels: `wire.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np

from minidp import trace
from minidp.autograd import Tensor
from minidp.backend import array_module, asarray, to_numpy
from minidp.backend.device import Later
from minidp.comm import CollectiveMismatch, Communicator, RankLost
from minidp.compress import Compressor, ErrorFeedback, resolved
from minidp.nn import Module
from minidp.optim import Optimizer
from minidp.parallel.blocks import first_not_finite, share_of_mean
from minidp.parallel.buckets import runs
from minidp.parallel.delay import Correction
from minidp.parallel.links import Links
from minidp.parallel.mirror import Mirror
from minidp.parallel.parcels import checked_for_servers
from minidp.parallel.present import Group, Present
from minidp.parallel.served import Rule
from minidp.parallel.server_options import ServerOptions
from minidp.parallel.session import Opening
from minidp.parallel.slabs import Flat
from minidp.parallel.strategy import StateDict, Strategy
from minidp.parallel.wire import Op, Reply, Request, Status


class ServerInfo(NamedTuple):
    """What a server says of itself: its process, its elements of the flat parameters, updates so far, gradients
    applied, Σ τ over these, and of each worker the version of w that it was given last."""

    pid: int
    lo: int
    hi: int
    version: int
    applied: int
    staleness_sum: int
    pulled: tuple[int, ...]


class ParameterServer(Strategy):
    """Parameters live on servers (``spawn(..., servers=M)``), workers push gradients and pull w.

    Args:
        model, optimizer: built alike on every worker; the rule, any of ``optim``, runs on the servers.
        comm: the workers that train together.
        staleness: 0: synchronous, one update a clock, with the bits of ``DataParallel``. s ≥ 1: stale-synchronous
            (SSP), and None: asynchronous; then each push is one update, w ← w − η ∇L_i, weighted n_i / n̄. So
            N workers' pushes move w about N times as far as one synchronous step: take η / N to compare.
        staleness_aware: a gradient that is τ updates late moves w by η / τ (τ ≥ 1).
        delay_compensation: λ of DC-ASGD, or a `Correction` of your own (see ``delay.py``).
        backup_workers: b; with staleness 0: a clock is over when N − b gradients have come. Later ones are
            dropped, and their workers go on with the others. The first server decides who is late; so a step
            takes two round trips, if there are several. At most 62 workers.
        nominal_batch: n̄, the number of samples that counts as one gradient; default: the mean of the workers'
            first batches, of those that have pushed so far. Not for staleness 0, which divides by Σ n_i.
        compress: a ``minidp.compress.Compressor`` or the name of one: what gradients are pushed as. Not PowerSGD.
        compress_pull: the same for what comes back, which then is by how much w has changed since the last time.
            What compression has dropped is in the next change; this worker's w is near the servers', not equal.
        accumulation_steps: backwards that may be added up before a push.
        check_finite: NonFiniteGradient rather than a push that holds NaN or infinity: with staleness 0 on all
            workers, otherwise on this one alone. The servers know nothing of such a gradient then. (Sums of finite
            gradients that overflow are not looked for, as ``DataParallel`` does.)

    Guarantees: with staleness s, workers that compute are at most s steps apart, and the w of step c holds all
    updates of steps up to c − s − 1, and this worker's own. A gradient is applied once or, if its worker dies
    before all of it has left for a server, not at all there. Where gradients need not wait for each other
    (s ≥ 1, None, backup workers) the run goes on without a worker that has died. A server's death ends it.

    Cost of a step, n bytes of parameters: n sent and n received a worker, 2nN/M through each server, in one round
    trip. Memory of a server: its slice of w and of the state, and N slices more: of gradients with staleness 0,
    otherwise (and with ``compress_pull``) of what each worker was given; and up to N of gradients that have come
    while another one is handled. With ``compress`` c bytes of payloads are sent in place of n.
    Servers are the host's: of a model on a device n bytes a step move out, and n in; the host compresses.

    Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014; for SSP
    Ho et al., NIPS 2013; for backup workers Chen et al., "Revisiting Distributed Synchronous SGD", 2016.

    Raises ValueError if the run has no servers, and for options that do not fit each other.
    """

    label = "ParameterServer"

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        *,
        staleness: int | None = 0,
        staleness_aware: bool = False,
        delay_compensation: float | Correction | None = None,
        backup_workers: int = 0,
        nominal_batch: float | None = None,
        compress: Compressor | str | None = None,
        compress_pull: Compressor | str | None = None,
        accumulation_steps: int = 1,
        check_finite: bool = True,
    ) -> None:
        endpoint = comm.endpoint
        if endpoint is None or not endpoint.servers:
            raise ValueError(
                "ParameterServer needs servers, and this run has none: start it by spawn(..., servers=1) or more"
            )
        self.options = options = ServerOptions.checked(
            comm.world_size, staleness, staleness_aware, delay_compensation, backup_workers, nominal_batch
        )
        self.together = options.together
        self.cut_by = f"{len(endpoint.servers)} servers"
        push = checked_for_servers(compress, "compress", backup_workers)
        pull = checked_for_servers(compress_pull, "compress_pull")
        self._compress = push, pull
        super().__init__(model, optimizer, comm, accumulation_steps, None, check_finite)
        self._losses: list[tuple[Later, int]] = []  # of this step's backwards, and of how many samples
        self._slabs = self._replicate(())
        self._mirror = Mirror(self._slabs, self.comm.device)
        w = self._mirror.look()
        number = self.comm.broadcast_object(endpoint.next_session(), 0, "ParameterServer session")
        ranks = self.comm.all_gather_int(endpoint.comm.rank, "ParameterServer ranks")
        turn = self.comm.rank * len(endpoint.servers) // self.comm.world_size
        if compress is not None:
            self._mean = np.empty_like(w)
            self.compressor = resolved(compress, self.seed, self.comm.rank)
        if pull is not None:
            # What a worker has not been given yet is remembered by the servers, in every case.
            pull = pull.inner if isinstance(pull, ErrorFeedback) else pull.for_error_feedback()
        self._links = Links(endpoint, number, self.layout, turn, self.compressor, pull)
        if self.comm.rank == 0:
            openings = [self._opening(tuple(ranks), j, *slice_) for j, slice_ in enumerate(self._links.slices)]
            self._links.open(openings, w)
        self._present = Present(self._links, self.comm.rank, self.comm.world_size)
        self.comm.barrier()
        self._endpoint = endpoint
        endpoint.join(not self.together)

    def _opening(self, ranks: tuple[int, ...], server: int, lo: int, hi: int) -> Opening:
        layout, optimizer, options = self.layout, self.optimizer, self.options
        groups = [optimizer.group_of(segment.parameter) for segment in layout.segments]
        names = layout.names_at(lo, hi)
        return Opening(
            workers=ranks,
            lo=lo,
            hi=hi,
            runs=tuple(runs(layout, groups, [(lo, hi)])),
            dtype=layout.dtype,
            digest=self._links.digest,
            rule=Rule(optimizer.without_parameters(), options.staleness_aware, options.correction, self._votes),
            staleness=options.staleness,
            backups=options.backup_workers,
            nominal_batch=options.nominal_batch,
            follows=options.backup_workers > 0 and server > 0,
            push=None if self._links.push is None else self._links.push[server],
            shares=self.compressor is not None and self.together,
            pull=None if self._links.pull is None else self._links.pull[server],
            turn=server * len(ranks) // len(self._links.slices),
            holds=shorten(
                f"elements {lo} to {hi} of the parameters: {', '.join(names) or 'none'}", 120, placeholder=" …"
            ),
        )

    def _options(self) -> tuple[Any, ...]:
        compress = [None if each is None else each.describe() for each in self._compress]
        return (*super()._options(), *self.options.describe(), *compress)

    @property
    def _votes(self) -> bool:
        return self.compressor is not None and self.compressor.votes

    # -- a step ------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, samples: int, gradient: Any = None) -> None:
        super().backward(loss, samples)
        self._losses.append((self.comm.device.later(loss.data), samples))

    def _start_gradients(self) -> None:
        self._losses.clear()
        self.layout.clear_written()

    def _reduce_and_update(self, samples: int) -> None:
        self.layout.zero_unwritten(self._slabs.grads[0])
        gradient = self._mirror.gradient()
        if self.compressor is not None and self.together:
            # Before anybody's residual has taken part in this step. What travels is n_i ∇L_i / Σ n_i.
            total = sum(self._all_finite(samples, gradient))
            gradient = share_of_mean(gradient, max(1, total), self._mean)
        element = first_not_finite(gradient) if self.check_finite and samples else -1
        if element >= 0 and not self.together:
            raise self._not_finite(element, self.comm.rank, float(gradient[element]))
        if self._layers.gathers:
            total = sum(self.comm.all_gather_int(samples, "step/samples")) if self.together else samples
            if total:
                self._layers.gather(self.check_finite, self.updates)
        request = Request(
            Op.PUSH,
            0,
            samples,
            element=element,
            loss=sum(float(loss.get()) * n for loss, n in self._losses) / max(1, samples),
            value=float(gradient[element]) if element >= 0 else 0.0,
        )
        with trace.span("push and pull", "wait"):
            # With backup workers it is the first server that tells who is late.
            exchange = self._links.exchange_in_turn if self.options.backup_workers else self._links.exchange
            replies = exchange(request, gradient if samples else None, self._mirror.w)
        self._read(replies)
        self._mirror.show()

    def _read(self, replies: list[Reply]) -> None:
        """Raise what a server has refused; count what has travelled, and how late it was, on each server."""
        for reply in replies:
            if reply.status == Status.NOT_FINITE:
                raise self._not_finite(reply.element, reply.worker, reply.value)
            if reply.status == Status.DIED:
                raise RankLost(
                    f"rank {reply.worker} has died, and so have others: with backup_workers="
                    f"{self.options.backup_workers} step #{self.updates + 1} can't do without as many",
                    reply.worker,
                )
            if reply.status == Status.LEFT:
                raise CollectiveMismatch(
                    f"rank {reply.worker} has returned, or released its strategy; rank {self.comm.rank} waits in "
                    f"step #{self.updates + 1}, which with staleness=0 is one of all ranks: all must make the "
                    "same number of steps"
                )
            if reply.status == Status.FOREIGN:
                raise CollectiveMismatch(
                    f"rank {self.comm.rank} has pushed the gradients of another model than the servers hold"
                )
        self._staleness.update(reply.staleness for reply in replies if reply.staleness >= 0)
        self._exchanged.bytes_sent = self._links.bytes_sent
        self._exchanged.bytes_received = self._links.bytes_received
        self._exchanged.messages_sent += len(replies)

    # -- state -------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """The servers' model, on every worker. Collective: waits for all that live and have not returned.

        Afterwards this worker computes from that w. Where workers do not step together, batch norm's statistics
        are the mean of theirs.
        """
        self.consolidate()
        return self.model.state_dict()

    def consolidate(self) -> None:
        """Give this worker the servers' w, and all workers the same buffers. Collective, as ``state_dict`` is."""
        buffers = {} if self.together else dict(self.model.named_buffers())
        mine = {name: to_numpy(buffer) for name, buffer in buffers.items()}
        present = self._present.all_gather_object(mine, w=self._mirror.w)
        self._mirror.show()
        for name, buffer in buffers.items():
            all_of_them = np.stack([theirs[name] for theirs in present])
            one = all_of_them.max(axis=0) if buffer.dtype.kind in "biu" else all_of_them.mean(axis=0)
            buffer[...] = asarray(one, array_module(buffer))

    def optimizer_state(self) -> Mapping[str, StateDict]:
        flats = self._links.state(self.optimizer.slots)
        names = [segment.name for segment in self.layout.segments]
        return {slot: dict(zip(names, self.layout.views(flat))) for slot, flat in flats.items()}

    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        self._put_rest(values)
        self._slabs.stage(values)
        self._slabs.flip()
        self._present.all_gather_int(0)  # nobody has anything on its way
        if self._present.rank == 0:
            flats = None if state is None else {slot: self._flat(of_slot) for slot, of_slot in state.items()}
            self._links.put(self._mirror.look(), flats, None)
        self._present.all_gather_int(0)

    @property
    def group(self) -> Group:
        return self.comm if self.together else self._present

    def server_updates(self) -> int:
        """The most that a server has made: without staleness all have made as many."""
        return max(server.version for server in self.servers())

    def restore_servers(self, updates: int | None) -> None:
        if updates is None:
            # A strategy whose steps are updates of all ranks; here, unless these go together, each makes its own.
            updates = self.updates * (1 if self.options.staleness == 0 else self.comm.world_size)
        if self._present.rank == 0:
            self._links.put(self._mirror.look(), None, updates)
        self._present.all_gather_int(0)

    def _flat(self, values: StateDict) -> Flat:
        flat = np.zeros(self.layout.size, self.layout.dtype)
        for segment, view in zip(self.layout.segments, self.layout.views(flat)):
            view[...] = values[segment.name]
        return flat

    def servers(self) -> list[ServerInfo]:
        """What each server says of itself now. Not collective."""
        return [
            ServerInfo(pid, lo, hi, version, applied, late, tuple(pulled))
            for (lo, hi), (pid, version, applied, late, *pulled) in zip(self._links.slices, self._links.info())
        ]

    def release(self) -> None:
        if not self._released:
            self._links.close()
            self._endpoint.part(not self.together)
        super().release()
