"""What the runs of a study found: read from their folders, checked to be comparable, counted by rows."""

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.config import different_keys
from utils.errors import UserError
from utils.study import (
    PRESETS,
    SCRIPTS,
    SPLITS,
    failure_file,
    finished_run,
    has_score,
    measured,
    measurement_folder,
    read_json,
    refuse_untold,
    script_command,
    shown,
)

COMPARED = ("dataset", "split", "split hash", "labeled", "labeled hash", "protocol", "step", "commit")
FACTS = (*COMPARED[:3], "images", *COMPARED[3:], "torch", "machine")
TERMS = ("supervised", "cross_teacher", "high_level", "low_level")
COUNTS = "confusion_ensemble.csv"  # beside a result
LATE = 0.9  # of the steps; what is logged after them is late


@dataclass(frozen=True, eq=False)
class Record:
    """One run. state: "done", or in words how far it came. result: of the finished run alone, on val.

    measured: the same of other lists of images, by their name; failures: why there is none.
    """

    label: str
    seed: int
    name: str
    command: str
    state: str
    config: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()

    def score(self, *models: str) -> float:
        """mIoU in percent, the mean of ``models``."""
        assert self.result is not None
        return 100 * statistics.mean(self.result["models"][model]["mean_iou"] for model in models)

    @property
    def ensemble(self) -> float:
        return self.score("ensemble")

    @property
    def student(self) -> float:
        return self.score("student_0", "student_1")

    def class_iou(self, label: str) -> float | None:
        """The ensemble's IoU of a class in percent; None where the class is in no label and no prediction."""
        return self._of_ensemble(lambda found: found["iou"].get(label))

    def pixel_accuracy(self) -> float | None:
        """The share of labeled pixels of which the ensemble is right, in percent; None where it was not kept."""
        return self._of_ensemble(lambda found: found.get("pixel_accuracy"))

    def mean_recall(self) -> float | None:
        """In percent, over the classes in the labels; None where it was not kept."""
        return self._of_ensemble(lambda found: found.get("mean_accuracy"))

    def mean_precision(self) -> float | None:
        """In percent, over the classes predicted by the ensemble; None where its counts were not kept."""
        counts = (self.result or {}).get("counts") or []
        columns = [(column[index], sum(column)) for index, column in enumerate(zip(*counts, strict=True))]
        found = [right / count for right, count in columns if count]
        return 100 * statistics.mean(found) if found else None

    def late(self, keys: Sequence[str]) -> float | None:
        """The mean of what was logged under ``keys`` in the last tenth of the steps, None where nothing was."""
        steps = self.config["training"]["num_iterations"]
        found = [value for step, value in self.curve(*keys).items() if step > LATE * steps]
        return statistics.mean(found) if found else None

    def gradient(self, term: str) -> float | None:
        """Of a term at the outputs, late, as a multiple of the supervised term's; None where it was not logged."""
        terms = [self.late([f"gradient_norm/{one}/{index}" for index in range(2)]) for one in (term, TERMS[0])]
        return terms[0] / terms[1] if terms[0] is not None and terms[1] else None

    def seconds_per_step(self) -> float | None:
        """The median of what was logged, None where nothing was."""
        found = self._logged("seconds_per_step")
        return statistics.median(found) if found else None

    def hours(self) -> float | None:
        """Of the whole run at its median speed."""
        seconds = self.seconds_per_step()
        return None if seconds is None or self.result is None else seconds * self.result["step"] / 3600

    def memory(self) -> float | None:
        """The largest number of GiB that was logged, None where none was."""
        return max(self._logged("memory_gib"), default=None)

    def curve(self, *keys: str) -> dict[int, float]:
        """Step -> mean of what was logged under ``keys``."""
        lines = ((line["step"], [line[key] for key in keys if is_number(line.get(key))]) for line in self.log)
        return {step: statistics.mean(values) for step, values in lines if values}

    def _of_ensemble(self, part: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        value = part(self.result["models"]["ensemble"]) if self.result is not None else None
        return None if value is None else 100 * value

    def _logged(self, key: str) -> list[float]:
        return [line[key] for line in self.log if is_number(line.get(key))]


Measure = Callable[[Record], float | None]  # a number of a finished run, None where it has none


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the table: the runs of one setting, a seed each."""

    label: str
    records: Sequence[Record]

    @property
    def done(self) -> list[Record]:
        return [record for record in self.records if record.result is not None]

    @property
    def ensemble(self) -> list[float]:
        return [record.ensemble for record in self.done]

    @property
    def student(self) -> list[float]:
        return [record.student for record in self.done]

    def values(self, of: Measure) -> dict[int, float]:
        """Seed -> what ``of`` finds in that seed's finished run, where it finds a number."""
        return {record.seed: value for record in self.done if (value := of(record)) is not None}

    def differences(self, reference: "Row", of: Measure = lambda record: record.ensemble) -> dict[int, float]:
        """Seed -> ``of``, by default the ensemble's mIoU, less that of the other row's run of the same seed."""
        ours, theirs = self.values(of), reference.values(of)
        return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}

    def curve(self, *keys: str) -> dict[int, list[float]]:
        """Step -> a value of each finished run that logged one there."""
        merged: dict[int, list[float]] = {}
        for record in self.done:
            for step, value in record.curve(*keys).items():
                merged.setdefault(step, []).append(value)
        return dict(sorted(merged.items()))


@dataclass(frozen=True)
class Results:
    """Everything that a report tells. facts: what all finished runs have in common."""

    title: str
    commands: Sequence[str]
    rows: Sequence[Row]
    facts: Mapping[str, Any]

    @property
    def records(self) -> list[Record]:
        return [record for row in self.rows for record in row.records]

    @property
    def missing(self) -> list[Record]:
        return [record for record in self.records if record.result is None]

    @property
    def splits(self) -> list[str]:
        """The lists of images besides val on which a run was measured."""
        return [split for split in SPLITS if any(split in record.measured for record in self.records)]

    def on(self, split: str) -> "Results":
        """The same with the numbers of another list of images in the place of val's."""

        def measured(record: Record) -> Record:
            result = record.measured.get(split)
            state = record.failures.get(split, "not measured") if record.state == "done" else record.state
            state = "done" if result is not None else state
            return replace(record, result=result, state=state)

        rows = [Row(row.label, [measured(record) for record in row.records]) for row in self.rows]
        return replace(self, rows=rows, facts=_facts([record for row in rows for record in row.records]))

    @property
    def class_names(self) -> list[str]:
        results = [record.result for record in self.records if record.result is not None]
        return list(dict.fromkeys(label for result in results for label in result["models"]["ensemble"]["iou"]))


def results_of_study(folder: Path) -> Results:
    """Of every run that the study's last ``ablate.py`` planned, started or not, and of the others that are done."""
    planned = read_json(folder / "study.json")
    if planned is None or not {"jobs", "commands"} <= planned.keys():
        below = sorted(path.parent.name for path in folder.glob("*/study.json"))
        what = f"the folder of {len(below)} studies: {', '.join(below)}" if below else "no study"
        raise UserError(f"{folder}: {what}; expected a folder with an undamaged study.json")
    records = [_planned(folder / name, name) for name in planned["jobs"]]
    labels = sorted(dict.fromkeys(record.label for record in records), key=_place)
    refuse_untold([(one.name, one.label, one.config) for one in records if one.result is not None])
    return _results(folder.resolve().name, planned["commands"], labels, records)


def _place(label: str) -> int:
    """Of a row among those of the presets, whichever was trained first; after them all, any other."""
    rows = [row for preset in PRESETS.values() for row in preset]
    return next((index for index, row in enumerate(rows) if f"{label}, ".startswith(f"{row}, ")), len(rows))


def results_of_folders(folders: Sequence[Path], command: Sequence[str]) -> Results:
    """Of any run folders; one that is none stands for all runs below it. Rows are what differs but for the seed.

    UserError where there is no run, or a setting has two runs of one seed.
    """
    if len(folders) == 1 and (folders[0] / "study.json").is_file():
        return results_of_study(folders[0])
    records = {record.name: record for folder in folders for record in _records_below(folder)}
    groups: list[list[Record]] = []
    for record in records.values():
        group = next((one for one in groups if not _settings_differ(one[0], record)), None)
        if group is None:
            groups.append([record])
            continue
        same = next((one for one in group if one.seed == record.seed), None)
        if same is not None:
            raise UserError(f"{same.name} and {record.name} are the same setting and seed; leave one out")
        group.append(record)
    labels = _labels(groups)
    named = [
        replace(record, label=label)
        for label, group in zip(labels, groups, strict=True)
        for record in sorted(group, key=lambda one: one.seed)
    ]
    return _results("comparison", [shown(command)], labels, named)


def refuse_mixing(records: Iterable[Record]) -> None:
    """UserError if finished runs were not made and measured alike, naming what differs and in which runs."""
    problems = []
    for key in COMPARED:
        runs: dict[str, list[str]] = {}
        for record in records:
            if record.result is not None:
                runs.setdefault(str(record.result.get(key, "not recorded")), []).append(record.name)
        if len(runs) > 1:
            told = (f"{value} ({', '.join(names[:4])}{', ...' * (len(names) > 4)})" for value, names in runs.items())
            problems.append(f"\n       {key} is {' and '.join(told)}")
    if problems:
        raise UserError("these runs cannot share a table:" + "".join(problems))


def _results(title: str, commands: Sequence[str], labels: Sequence[str], records: Sequence[Record]) -> Results:
    refuse_mixing(records)
    rows = [Row(label, [record for record in records if record.label == label]) for label in labels]
    results = Results(title, commands, rows, _facts(records))
    for split in results.splits:
        refuse_mixing(results.on(split).records)
    return results


def _facts(records: Iterable[Record]) -> dict[str, str]:
    """What the results have in common; all values where there are several."""
    done = [record.result for record in records if record.result is not None]
    facts: dict[str, str] = {}
    for key in FACTS:
        values = list(dict.fromkeys(str(result[key]) for result in done if key in result))
        facts |= {key: " and ".join(sorted(values))} if values else {}
    return facts


def _planned(job: Path, name: str) -> Record:
    """The run that ``ablate.py`` planned in a folder: the finished one, else the newest begun, else none yet."""
    about = read_json(job / "job.json")
    if about is None:
        raise UserError(f"{job / 'job.json'} is missing or damaged; start the study again, finished runs are kept")
    config = about["config"]
    begun = [path.parent for path in job.glob("*/config.json")]
    newest = max(begun, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)
    finished = finished_run(job, config)
    folder = finished or newest
    read = _read(folder, config) if folder is not None else {"state": "not started"}
    trained = read_json(folder / "config.json") if folder is not None else None
    if finished is None and trained is not None and different_keys(trained, config):
        read = {"state": "not done; the run that is there has another configuration"}
    if failure := _failure(failure_file(job)) if read["state"] != "done" else None:
        read["state"] = failure
    lists = [split for split in SPLITS if read["state"] == "done" and split not in read["measured"]]
    failures = {split: failure for split in lists if (failure := _failure(failure_file(job, split)))}
    return Record(about["label"], about["seed"], name, about["command"], config=config, failures=failures, **read)


def _alone(folder: Path) -> Record:
    """A run by its folder alone."""
    config = read_json(folder / "config.json")
    if config is None or "training" not in config or "seed" not in config:
        raise UserError(f"{folder / 'config.json'} is not the configuration of a run")
    script = SCRIPTS.get(config.get("model", ""), SCRIPTS["DeepLab"])
    again = [*script_command(script), "--config", str(folder / "config.json"), "--name", "again"]
    return Record("", config["seed"], str(folder), shown(again), config=config, **_read(folder, config))


def _read(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """State, result and log of a run folder."""
    steps, log, result = config["training"]["num_iterations"], read_log(folder / "log.jsonl"), None
    if finished := read_json(folder / "result.json"):
        result = finished | _counts(folder) if finished.get("step") == steps and has_score(finished) else None
    protocol = config["utils"]["val_protocol"]
    others = measured(folder, protocol) if result else {}
    others = {split: found | _counts(measurement_folder(folder, split, protocol)) for split, found in others.items()}
    at = f"unfinished, step {log[-1]['step']} of {steps}" if log else "unfinished, nothing logged yet"
    return {"state": "done" if result else at, "result": result, "measured": others, "log": log}


def _counts(folder: Path) -> dict[str, list[list[int]]]:
    """The ensemble's pixels of each class (row) that are called each class (column), if they are in the folder."""
    try:
        lines = (folder / COUNTS).read_text(encoding="utf-8").splitlines()
        counts = [[int(cell) for cell in row[1:]] for row in csv.reader(lines[1:])]
    except (OSError, ValueError):
        return {}
    return {"counts": counts} if all(len(row) == len(counts) for row in counts) else {}


def _failure(file: Path) -> str | None:
    failed = read_json(file)
    return f"failed, exit status {failed['status']}: {failed['message']}" if failed else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, without one that was cut off by a kill."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def is_number(value: Any) -> bool:
    """Whether a logged value can be averaged; NaN cannot."""
    return isinstance(value, int | float) and value == value


def _records_below(folder: Path) -> list[Record]:
    """The folder's run; if it is no run's, all planned or begun below it."""
    if (folder / "job.json").is_file():
        return [_planned(folder, str(folder))]
    if (folder / "config.json").is_file():
        in_study = (folder.parent / "job.json").is_file()
        return [_planned(folder.parent, str(folder.parent)) if in_study else _alone(folder)]
    if study := read_json(folder / "study.json"):
        return [_planned(folder / name, str(folder / name)) for name in study["jobs"]]
    below = sorted(path.parent for path in folder.glob("**/config.json")) if folder.is_dir() else []
    if not below:
        raise UserError(f"{folder}: no run folder, and none below it; a run folder has a config.json")
    return [record for path in below for record in _records_below(path)]


def _settings_differ(one: Record, other: Record) -> dict[str, Any]:
    """The keys in which two runs differ, but for the seed."""
    found = different_keys(dict(one.config), dict(other.config))
    found.pop("seed", None)
    return found


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """What ``ablate.py`` called the groups, if that tells all of them apart; else the keys in which they differ."""
    given = [{record.label for record in group} for group in groups]
    names = [next(iter(labels)) for labels in given]
    if all(len(labels) == 1 for labels in given) and all(names) and len(set(names)) == len(names):
        return names
    varied: dict[str, list[str]] = {}
    for group in groups[1:]:
        for key in _settings_differ(groups[0][0], group[0]):
            varied[key] = [_value(one[0].config, key) for one in groups]
    if not varied:
        return ["default" for _ in groups]
    return [", ".join(f"{key}={values[index]}" for key, values in varied.items()) for index in range(len(groups))]


def _value(config: Mapping[str, Any], key: str) -> str:
    block: Any = config
    for part in key.split("."):
        block = block.get(part) if isinstance(block, Mapping) else None
    return block if isinstance(block, str) else json.dumps(block)
