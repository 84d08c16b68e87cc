"""What all benchmarks share: options, rounds in turn, peak memory, the machine, a table and its JSON file."""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler is silent about the graphics card it did not find

import torch

from utils.run import choose_device, code_version, processor_name

Key = TypeVar("Key", bound=Hashable)
Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: the row's key, the head, how a value is written, what it is multiplied with before."""

    key: str
    head: str
    format: str = ""
    factor: float = 1


def parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; ``description``: the benchmark's docstring."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"medians of so many rounds; default {rounds}")
    made.add_argument("--threads", type=int, help="of torch in this process; default: torch's")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def start(args: argparse.Namespace) -> torch.device:
    """Set the threads; the device to measure on."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    return choose_device(getattr(args, "device", "cpu"))


def in_turn(works: Mapping[Key, Callable[[], object]], *, rounds: int, device: torch.device) -> dict[Key, list[float]]:
    """Seconds of each work in each round. They take turns: a shared machine's speed changes from minute to minute."""
    seconds: dict[Key, list[float]] = {key: [] for key in works}
    for _ in range(rounds):
        for key, work in works.items():
            seconds[key].append(timed(work, device))
    return seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, to the end of what a graphics card was given to do."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Of neighbours in time, which a machine that others use too served alike."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that ``work`` had at once, beside those that were there before; exact, not the process's size.

    On the CPU from every allocation and release that torch's profiler notes, those inside an operation too.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    notes = [event["args"] for event in events if event.get("name") == "[memory]"]
    if not notes:
        return 0
    notes.sort(key=lambda note: note["Ev Idx"])
    before = notes[0]["Total Allocated"] - notes[0]["Bytes"]
    return max(0, max(note["Total Allocated"] for note in notes) - before)


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured with."""
    return {
        "where": processor_name(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": code_version(),
    }


def report(
    args: argparse.Namespace,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    device: torch.device,
    notes: Sequence[str] = (),
    **more: Any,
) -> None:
    """Print the table; with ``--json`` write the options, the machine, the rows and ``more``."""
    about = machine(device)
    print(title)
    print(f"{about['where']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}")
    print(f"medians of {args.rounds} rounds in turn")
    table = [[column.head for column in columns], *([_cell(row, column) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for cells in table:
        first, *others = (
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        print("  ".join((first, *others)).rstrip())
    for note in notes:
        print(note)
    if args.json:
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        del options["json"]
        content = {"options": options, "machine": about, "rows": list(rows), **more}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cell(row: Row, column: Column) -> str:
    value = row[column.key]
    if value is None:
        return "-"
    return format(value * column.factor if column.factor != 1 else value, column.format)
