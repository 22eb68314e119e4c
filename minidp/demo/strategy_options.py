"""The options of ``--strategy``: what they are, what they change in others, and what does not go together."""

from __future__ import annotations

import argparse
from typing import Any

from minidp.demo.hybrid_options import HYBRID
from minidp.demo.strategies import ALL, SERVERS, STALENESS, SYNC_EVERY, WAYS
from minidp.launch import cores

_WORKERS, _SLOWER, _JITTER = 4, 5.0, 0.1  # of the cluster that --strategy all is shown on
# Of which strategies an option is, and its default.
_OWN: dict[str, tuple[tuple[str, ...], int]] = {
    "servers": (tuple(name for name, way in WAYS.items() if way.served), SERVERS),
    "staleness": (("ssp",), STALENESS),
    "sync_every": (("local",), SYNC_EVERY),
}
# Of the demo that compares N workers with one.
_SYNC_ONLY = ("naive", "micro_shards", "balance", "save", "resume", "until", "trace")


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "who waits for whom (--strategy)",
        "One of them beside synchronous training, or all, each for the time that this takes: who does how much "
        "then, and who learns how much?",
    ).add_argument
    add(
        "--strategy",
        choices=(*WAYS, HYBRID, ALL),
        help="sync: gradients are averaged in each step (default); ps: the same, by parameter servers; ssp: "
        "stale-synchronous, async: asynchronous, both by servers; hogwild: one w that all write without a lock; "
        "local: replicas, averaged now and then; hybrid: the model is shared out, too, see below; all: all but "
        "that, on a virtual cluster with one slow worker",
    )
    add("--servers", type=int, metavar="M", help=f"parameter servers, of ps, ssp, async (default: {SERVERS})")
    add(
        "--staleness",
        type=int,
        metavar="s",
        help=f"of ssp: nobody is more than s steps ahead of the slowest (default: {STALENESS})",
    )
    add(
        "--sync-every",
        type=int,
        metavar="H",
        help=f"of local: steps between two averagings (default: {SYNC_EVERY})",
    )


def choose(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what depends on the strategy. ``args.compare``: whether it is another than today's usual one."""
    args.compare = args.strategy not in (None, "sync", HYBRID)
    _check(parser, args)
    for name, (_, default) in _OWN.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.world is None:
        args.world = "virtual" if args.strategy == ALL else "process"
    if args.workers is None:
        args.workers = _WORKERS if args.strategy == ALL and args.world == "virtual" else cores()
    if args.strategy == ALL and args.workers == 1:
        parser.error("--strategy all compares who waits for whom: give --workers 2 or more")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, (strategies, _) in _OWN.items():
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if args.strategy not in (*strategies, ALL):
            parser.error(f"{option} is of --strategy {', '.join(strategies)} or {ALL}: give one of them as well")
        if name == "staleness" and value == 0:
            parser.error("--staleness 0 is synchronous: that is --strategy ps; give ssp at least 1")
        if value < 1:
            parser.error(f"{option} must be at least 1")
    if args.strategy not in (None, "sync"):
        not_its = [name for name in _SYNC_ONLY if not (name == "trace" and args.hybrid)]
        given = [name for name in not_its if getattr(args, name) not in (None, False)]
        if given:
            parser.error(
                f"--{given[0].replace('_', '-')} is of synchronous training: leave it out, or --strategy "
                f"{args.strategy}"
            )


def servers(args: argparse.Namespace) -> int:
    """How many the run has, if any of its strategies needs some."""
    return args.servers if args.strategy in (*_OWN["servers"][0], ALL) else 0


def cluster(args: argparse.Namespace) -> dict[str, Any]:
    """What the virtual cluster is by default, where that depends on the strategy."""
    if not args.compare:
        return {}
    # Workers in lock step would meet at servers, and overwrite each other's w, as machines never do.
    last = (args.workers - 1) // (args.ranks_per_node or 1)
    return {"jitter": _JITTER} | ({"straggler": [(last, _SLOWER)]} if args.strategy == ALL else {})
