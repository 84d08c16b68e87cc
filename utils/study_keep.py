"""What is kept of a study among a project's files: enough for its report and for doing a run again, no weights."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.study import SPLITS, finished_run, measured, read_json
from utils.study_report import write_report
from utils.study_results import Results, read_log, results_of_study
from utils.study_run import write_json, write_whole

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
    """Lines of a log at about ``count`` steps evenly spaced and at every validation, the last ones among them.

    What is told by class is in the last line alone, but for the ensemble's IoU.
    """
    validations = [line for line in lines if any(tag.startswith("val/") for tag in line)]
    others = [line for line in lines if not any(tag.startswith("val/") for tag in line)]
    stride = max(1, -(-len(others) // count))
    chosen = [*others[::-1][::stride][::-1], *validations]
    return [
        {tag: _rounded(value) for tag, value in line.items() if line in others[-1:] or not _is_dropped(tag)}
        for line in sorted(chosen, key=lambda line: line["step"])
    ]


def _keep_job(job: Path, output: Path) -> None:
    about = read_json(job / "job.json") or {}
    output.mkdir()
    write_json(output / "job.json", about)
    run = finished_run(job, about["config"])
    if run is None:
        return
    kept = output / RUN
    kept.mkdir()
    for name in ("config.json", "result.json"):
        shutil.copyfile(run / name, kept / name)
    protocol = about["config"]["utils"]["val_protocol"]
    for split in SPLITS:
        if split in measured(run, protocol):
            folder = f"evaluation-{split}-{protocol}"
            (kept / folder).mkdir()
            shutil.copyfile(run / folder / "result.json", kept / folder / "result.json")
    text = "".join(json.dumps(line) + "\n" for line in thinned(read_log(run / "log.jsonl")))
    write_whole(kept / "log.jsonl", text.encode())


def _is_dropped(tag: str) -> bool:
    """Told by class, and not of the ensemble."""
    return "_of_class/" in tag or (tag.startswith("val_iou/") and not tag.startswith("val_iou/ensemble/"))


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
