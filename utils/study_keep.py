"""What is kept of a study among a project's files: enough for its report and for doing a run again, no weights."""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import write_json, write_whole
from utils.study import SPLITS, finished_run, measured, measurement_folder, read_json
from utils.study_report import write_report
from utils.study_results import COUNTS, LATE, Results, is_number, read_log, results_of_study

LOG_LINES = 60  # of a run, besides those of validations
DIGITS = 4  # of logged numbers
RUN = "run"  # the folder of a kept run, below its job's


def keep_study(study: Path, output: Path) -> Results:
    """Copy the finished runs of a study: configuration, results, a thinned log; its report without the page.

    UserError where ``study`` is none, its runs cannot share a table, or ``output`` holds another study, or weights.
    """
    results_of_study(study)
    planned = read_json(study / "study.json") or {}
    there = read_json(output / "study.json")
    if there is not None and there.get("name") != planned["name"]:
        raise UserError(f"{output} holds the study {there.get('name')}; choose another --output")
    if output.resolve() == study.resolve():
        raise UserError("--output is the study itself; choose another folder")
    if weights := next((path for name in planned["jobs"] for path in (output / name).rglob("*.pth")), None):
        raise UserError(f"{output} holds weights ({weights.name} in {weights.parent}); choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    for name in planned["jobs"]:
        shutil.rmtree(output / name, ignore_errors=True)
        _keep_job(study / name, output / name)
    write_json(output / "study.json", planned)
    results = results_of_study(output)
    write_report(results, output, page=False)
    return results


def thinned(lines: Sequence[Mapping[str, Any]], count: int = LOG_LINES) -> list[dict[str, Any]]:
    """About ``count`` lines of a log, each the means of about equally many up to its step, and every validation.

    None is of steps both late and earlier. What is told by class is in the last line alone, but for the ensemble's IoU.
    """
    validations = [line for line in lines if any(tag.startswith("val/") for tag in line)]
    others = [line for line in lines if not any(tag.startswith("val/") for tag in line)]
    size = max(1, -(-len(others) // count))
    first_late = sum(line["step"] <= LATE * others[-1]["step"] for line in others)
    parts = [*_evenly(others[:first_late], size), *_evenly(others[first_late:], size)]
    chosen = [_mean(part) for part in parts]
    last = chosen[-1:]
    return [
        {tag: _rounded(value) for tag, value in line.items() if line in last or not _is_dropped(tag)}
        for line in sorted([*chosen, *validations], key=lambda line: line["step"])
    ]


def _evenly(lines: Sequence[Mapping[str, Any]], size: int) -> list[Sequence[Mapping[str, Any]]]:
    """Consecutive parts of at most ``size`` lines, whose lengths differ by one at most."""
    count = -(-len(lines) // size)
    return [lines[len(lines) * part // count : len(lines) * (part + 1) // count] for part in range(count)]


def _mean(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last line's step; of every other tag the mean of the lines that have it, NaN left out."""
    tags = dict.fromkeys(tag for line in lines for tag in line if tag != "step")
    found = {tag: [line[tag] for line in lines if is_number(line.get(tag))] for tag in tags}
    means = {tag: statistics.mean(values) if len(values) > 1 else values[0] for tag, values in found.items() if values}
    return {"step": lines[-1]["step"]} | means


def _keep_job(job: Path, output: Path) -> None:
    about = read_json(job / "job.json") or {}
    output.mkdir()
    write_json(output / "job.json", about)
    run = finished_run(job, about["config"])
    if run is None:
        return
    kept = output / RUN
    kept.mkdir()
    shutil.copyfile(run / "config.json", kept / "config.json")
    _keep_result(run, kept)
    protocol = about["config"]["utils"]["val_protocol"]
    for split in SPLITS:
        if split in measured(run, protocol):
            _keep_result(measurement_folder(run, split, protocol), measurement_folder(kept, split, protocol))
    text = "".join(json.dumps(line) + "\n" for line in thinned(read_log(run / "log.jsonl")))
    write_whole(kept / "log.jsonl", text.encode())


def _keep_result(folder: Path, kept: Path) -> None:
    """The result and the ensemble's counts."""
    kept.mkdir(exist_ok=True)
    for name in ("result.json", COUNTS):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, kept / name)


def _is_dropped(tag: str) -> bool:
    """Told by class, and not of the ensemble."""
    return "_of_class/" in tag or (tag.startswith("val_iou/") and not tag.startswith("val_iou/ensemble/"))


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
