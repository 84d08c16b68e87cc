"""Several processes on this machine against one: python3 -m benchmarks.scaling --help.

Strong scaling shares one batch among the processes; weak scaling gives each process the batch of one. Every row is
benchmarks/step.py under torchrun, each process with its own share of the CPU's cores or its own GPU. Efficiency: images
per second of N processes over N times those of one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Column, Row, add_device, parser, report, start
from utils.errors import UserError, run_script

COLUMNS = (
    Column("kind", "scaling"),
    Column("processes", "processes"),
    Column("batch", "batch"),
    Column("seconds", "s/step", ".3f"),
    Column("images_per_second", "images/s", ".2f"),
    Column("efficiency", "efficiency %", ".0f", 100),
    Column("beside_networks", "beside the networks %", ".1f", 100),
)


def main() -> int:
    args = parse_args()
    device = start(args)
    if args.batch % max(args.processes):
        raise UserError(f"--batch {args.batch}: cannot be shared among {max(args.processes)} processes")
    with tempfile.TemporaryDirectory() as folder:
        one = measure(args, 1, args.batch, Path(folder))
        rows = [row("both", 1, args.batch, one, one)]
        for count in args.processes:
            for kind, batch in (("strong", args.batch), ("weak", args.batch * count)):
                rows.append(row(kind, count, batch, measure(args, count, batch, Path(folder)), one))
    title = f"{args.model} {args.backbone}, {args.size}, {args.setting}, {args.threads or 1} threads a process"
    report(args, title, COLUMNS, rows, device=device)
    return 0


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, rounds=5)
    add = made.add_argument
    add("--processes", type=int, nargs="+", default=[2], help="numbers of processes beside one; default 2")
    add("--model", choices=("DeepLab", "DeepLabv3+"), default="DeepLab")
    add("--backbone", default="resnet101")
    add("--size", default="321,321", help='"h,w" of the crops, default 321,321')
    add("--batch", type=int, default=8, help="of one process, and of all in strong scaling; default 8")
    add("--setting", default="fp32", help="one of those of benchmarks/step.py; default fp32")
    add_device(made)
    return made.parse_args()


def measure(args: argparse.Namespace, processes: int, batch: int, folder: Path) -> Row:
    """The one row of benchmarks/step.py for so many processes."""
    numbers = folder / f"{processes}_{batch}.json"
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    options = {"--model": args.model, "--backbone": args.backbone, "--size": args.size, "--batch": batch,
               "--settings": args.setting, "--rounds": args.rounds, "--threads": args.threads or 1,
               "--device": args.device, "--json": numbers}  # fmt: skip
    command = [sys.executable, *launch, "-m", "benchmarks.step", "--no-memory"]
    command += [str(part) for pair in options.items() for part in pair]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"benchmarks.step with {processes} processes failed: {done.stderr[-2000:]}")
    (found,) = json.loads(numbers.read_text(encoding="utf-8"))["rows"]
    return dict(found)


def row(kind: str, processes: int, batch: int, found: Row, one: Row) -> Row:
    efficiency = found["images_per_second"] / one["images_per_second"] / processes
    return {**found, "kind": kind, "processes": processes, "batch": batch, "efficiency": efficiency}


if __name__ == "__main__":
    run_script(main)
