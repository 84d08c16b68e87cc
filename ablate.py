"""A grid of settings over several seeds, as one table: python3 ablate.py --config CONFIG --name NAME --grid KEY=A,B."""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from utils.config import Config, different_keys, dump_config, load_config
from utils.errors import UserError, run_script

SCRIPTS = {"DeepLab": "cross_teacher_contr.py", "DeepLabv3+": "cross_teacher_deeplabv3+.py"}
PROJECT = Path(__file__).resolve().parent


@dataclass(frozen=True, eq=False)
class Job:
    """One run: a cell of the grid (``KEY=VALUE`` settings) with a seed, in ``folder``."""

    cell: tuple[str, ...]
    seed: int
    folder: Path
    config: Config
    command: tuple[str, ...]

    def result(self) -> dict | None:
        """The result of the finished run of just this configuration, or None."""
        for path in sorted(self.folder.glob("*/result.json"), reverse=True):
            try:
                result, trained = (json.loads((path.parent / n).read_text()) for n in ("result.json", "config.json"))
            except (OSError, ValueError):  # cut off by a kill: not finished
                continue
            same = not different_keys(trained, dump_config(self.config))
            if same and result["step"] == self.config.training.num_iterations:
                return result
        return None


def main() -> int:
    args = parse_args()
    if args.jobs < 1 or not re.fullmatch(r"\w[\w.+-]*", args.name):
        raise UserError("--jobs must be at least 1, and --name made of letters, digits and . _ + -")
    if any(setting.startswith("seed=") for setting in [*args.set, *args.grid]):
        raise UserError("the seeds are given with --seeds, not with --set or --grid")
    study = Path(load_config(args.config, overrides=args.set).utils.checkpoint_dir) / args.name
    # Every configuration is checked here, before the first run starts.
    jobs = [plan(args, cell, seed, study) for seed in args.seeds for cell in cells(args.grid)]
    if len({job.folder for job in jobs}) < len(jobs):
        raise UserError("two runs of this grid would share a folder; name each value and each seed once")
    study.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if job.result() is None]
    steps = sorted({job.config.training.num_iterations for job in jobs})
    length = " or ".join(map(str, steps))
    print(f"{len(jobs)} runs of {length} steps, {len(jobs) - len(waiting)} already done; logs in {study}")
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [
            job
            for job, status in zip(waiting, pool.map(lambda job: execute(job, args.jobs), waiting), strict=True)
            if status
        ]
    table = report(jobs, " ".join(sys.argv))
    (study / "report.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nwritten to {study / 'report.md'}")
    for job in failed:
        print(f"failed: {job.folder / 'output.txt'}", file=sys.stderr)
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train every cell of a grid with every seed, go on after interruptions, and make one table.",
    )
    add = parser.add_argument
    add("-c", "--config", type=Path, required=True, help="JSON file that all runs start from")
    add("-n", "--name", required=True, help="name of the study; everything goes to <checkpoint_dir>/<name>")
    add(
        "--grid",
        metavar="KEY=V1,V2",
        action="append",
        default=[],
        help="values of a dotted key; several: all combinations",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every cell; default 0 1 2")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key in all runs")
    add("--jobs", type=int, default=1, help="runs at a time, default 1; they share the CPU's cores")
    return parser.parse_args()


def cells(grid: list[str]) -> list[tuple[str, ...]]:
    """["a=1,2", "b=3"] -> [("a=1", "b=3"), ("a=2", "b=3")]."""
    axes = []
    for axis in grid:
        key, equals, values = axis.partition("=")
        if not equals or not values:
            raise UserError(f"--grid {axis}: expected KEY=V1,V2")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def plan(args: argparse.Namespace, cell: tuple[str, ...], seed: int, study: Path) -> Job:
    parts = [f"{key.rpartition('.')[2]}={value}" for key, _, value in (setting.partition("=") for setting in cell)]
    folder = study / re.sub(r"[^\w.=+-]", "_", "-".join([*parts, f"seed={seed}"]))
    settings = [*args.set, *cell, f"seed={seed}", f"utils.checkpoint_dir={json.dumps(str(folder))}"]
    config = load_config(args.config, overrides=settings)
    command = [sys.executable, str(PROJECT / SCRIPTS[config.model]), "--config", str(args.config)]
    command += ["--name", "run", "--resume", "auto", *(f"--set={setting}" for setting in settings)]
    return Job(cell, seed, folder, config, tuple(command))


def execute(job: Job, jobs: int) -> int:
    """Run one job, its output in a file; its exit status."""
    job.folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    print("start " + job.folder.name, flush=True)
    with (job.folder / "output.txt").open("ab") as output:
        status = subprocess.run(
            job.command, stdout=output, stderr=output, env={"OMP_NUM_THREADS": str(threads), **os.environ}
        ).returncode
    print(f"{'done ' if status == 0 else 'FAILED'} {job.folder.name}", flush=True)
    return status


def report(jobs: list[Job], command: str) -> str:
    """A Markdown table: a row a cell, mean and spread over its seeds. Refuses results that cannot be compared."""
    results = {job: result for job in jobs if (result := job.result()) is not None}
    for key in ("protocol", "split hash", "labeled hash", "commit"):
        values = {result[key] for result in results.values()}
        if len(values) > 1:
            raise UserError(f"these runs cannot share a table: {key} is {' and '.join(map(str, sorted(values)))}")
    rows = []
    for cell in dict.fromkeys(job.cell for job in jobs):
        done = [result for job, result in results.items() if job.cell == cell]
        ensemble = [100 * result["models"]["ensemble"]["mean_iou"] for result in done]
        students = [
            100 * statistics.mean(result["models"][f"student_{own}"]["mean_iou"] for own in (0, 1)) for result in done
        ]
        each = ", ".join(f"{score:.1f}" for score in ensemble)
        rows.append(f"| {', '.join(cell) or 'default'} | {spread(ensemble)} | {spread(students)} | {each} |")
    about = next(iter(results.values()), {})
    facts = ", ".join(
        f"{key} {about[key]}"
        for key in ("dataset", "split", "split hash", "labeled", "labeled hash", "protocol", "step", "commit")
        if key in about
    )
    head = "| setting | ensemble, mIoU % | one student, mIoU % | ensemble, each seed |\n| --- | --- | --- | --- |\n"
    return (
        f"`{command}`\n\n{facts}; mean ± standard deviation over seeds, last checkpoint\n\n{head}"
        + "\n".join(rows)
        + "\n"
    )


def spread(values: list[float]) -> str:
    if not values:
        return "no result"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    run_script(main)
