"""``python -m minidp.plan --params 7e9 --flops-per-sample 4.2e13 --ranks 8..16384``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from minidp.plan import mesh_report, picture, report
from minidp.plan.meshes import rank_meshes
from minidp.plan.options import parse
from minidp.plan.study import pays_up_to, study


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False)
    if args.transformer is not None:
        return _meshes(console, args)
    report.introduce(console, args.job, args.cluster)
    points = study(args.job, args.cluster, args.ranks, steps=20 if args.jitter else 1)
    report.show(console, points, args.worth)
    if args.plot:
        picture.draw(args.job, points, args.worth, args.plot)
        console.print(f"Picture: {args.plot}", markup=False, soft_wrap=True)
    if args.json:
        figures: dict[str, Any] = {
            "job": asdict(args.job),
            "worth": args.worth,
            "pays_up_to": pays_up_to(points, args.worth),
            "points": [asdict(point) for point in points],
        }
        _write(console, args.json, figures)
    return 0


def _meshes(console: Console, args: argparse.Namespace) -> int:
    mesh_report.introduce(console, args)
    with console.status("timing meshes …"):
        points, impossible = rank_meshes(
            args.transformer,
            args.cluster,
            args.ranks[0],
            global_batch=args.global_batch,
            meshes=args.meshes,
            micro_batches=args.micro_batches,
            schedule=args.schedule,
            optimizer=args.optimizer,
            element_bytes=args.element_bytes,
            memory_per_rank=args.memory_per_rank,
            bucket_mb=args.bucket_mb,
        )
    mesh_report.show(console, points, impossible, args)
    if args.json:
        _write(console, args.json, mesh_report.figures(points, impossible, args))
    return 0


def _write(console: Console, path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"Figures: {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
