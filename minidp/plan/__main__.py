"""``python -m minidp.plan --params 7e9 --flops-per-sample 4.2e13 --ranks 8..16384``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console

from minidp.plan import picture, report
from minidp.plan.options import parse
from minidp.plan.study import pays_up_to, study


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(highlight=False)
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
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"Figures: {args.json}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
