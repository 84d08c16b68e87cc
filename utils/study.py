"""A study: the rows of a grid or of a preset, each with every seed, planned as runs of the training scripts."""

import argparse
import itertools
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from utils.config import Config, different_keys, dump_config, load_config
from utils.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = {"DeepLab": "cross_teacher_contr.py", "DeepLabv3+": "cross_teacher_deeplabv3+.py"}
EVALUATION = "evaluateSSL.py"
SPLITS = ("test", "unlabeled", "labeled")  # that a study may measure besides val
LONGEST_NAME = 240  # characters of a folder; file systems take 255 bytes

_CROSS, _SELF, _PEER = (f"training.unlabeled.teacher={who}" for who in ("cross", "self", "peer"))
_NO_HIGH, _NO_LOW = (f"training.contrastive.{level}_weight=0" for level in ("high", "low"))

# Preset -> label of a row -> its settings; what a row does not set is as in the configuration.
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": {
        "supervised": ("training.unlabeled.train_unlabeled=false",),
        "two mean teachers": (_SELF, _NO_HIGH, _NO_LOW),
        "cross pseudo supervision": (_PEER, _NO_HIGH, _NO_LOW),
        "cross teacher": (_CROSS, _NO_HIGH, _NO_LOW),
        "+ high level": (_CROSS, _NO_LOW),
        "+ low level": (_CROSS, _NO_HIGH),
        "full CTT": (_CROSS,),
    }
}


@dataclass(frozen=True)
class Cell:
    """A row of the table: label for people, name for folders, and its ``KEY=VALUE`` settings."""

    label: str
    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """One run: a cell with a seed, in ``folder``. command: without the interpreter's path, as a person types it."""

    cell: Cell
    seed: int
    folder: Path
    config: Config
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def no_result(self) -> str:
        """Why a run that ended well may be of no use."""
        return "it ended without a score of the planned configuration; was its file changed meanwhile?"

    @property
    def failure(self) -> Path:
        """Where its failure is told, if it failed."""
        return failure_file(self.folder)

    @property
    def is_ready(self) -> bool:
        return True

    def finished(self) -> Path | None:
        """The run folder that holds the result of just this configuration, or None."""
        return finished_run(self.folder, dump_config(self.config))

    def on(self, device: str | None) -> tuple[str, ...]:
        """The command for a device, or for the one that the script chooses."""
        return (*self.command, *(["--device", device] if device else []))


@dataclass(frozen=True, eq=False)
class Measurement:
    """The last checkpoint of a finished run on another list of images than val, once."""

    job: Job
    split: str

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def name(self) -> str:
        return f"{self.job.name} on {self.split}"

    @property
    def no_result(self) -> str:
        """Why an evaluation that ended well may be of no use."""
        return f"it ended without a score; does any label map of dataset.{self.split} hold a class?"

    @property
    def failure(self) -> Path:
        """Where its failure is told, if it failed."""
        return failure_file(self.folder, self.split)

    @property
    def is_ready(self) -> bool:
        return self.job.finished() is not None

    def finished(self) -> Path | None:
        """The folder of the result, or None."""
        run = self.job.finished()
        found = measured(run, self.job.config.utils.val_protocol) if run is not None else {}
        return run if self.split in found else None

    def on(self, device: str | None) -> tuple[str, ...]:
        """The command for a device, of a run that is finished."""
        run = self.job.finished()
        assert run is not None, self.name
        protocol = self.job.config.utils.val_protocol
        command = [*script_command(EVALUATION), "--model-path", str(run / "checkpoint.pth")]
        command += ["--split", self.split, "--protocol", protocol]
        command += ["--output", str(measurement_folder(run, self.split, protocol))]
        command += ["--data-root", self.job.config.data.root]
        # Not one of the settings that runs are compared by: it may have been given after the training.
        command += ["--set", f"dataset.test={json.dumps(self.job.config.data.test)}"] if self.split == "test" else []
        gpu = {None: None, "auto": None, "cpu": "-1", "cuda": "0"}.get(device, (device or "").rpartition(":")[2])
        return (*command, *(["--gpu", gpu] if gpu is not None else []))


@dataclass(frozen=True)
class Study:
    """What ``ablate.py`` was asked for. command: the same whatever the order of its options was."""

    name: str
    folder: Path
    command: tuple[str, ...]
    jobs: tuple[Job, ...]
    measurements: tuple[Measurement, ...] = ()

    @property
    def cells(self) -> list[Cell]:
        return list(dict.fromkeys(job.cell for job in self.jobs))


def finished_before(study: Study) -> dict[Path, Path]:
    """Folder of a job -> run folder with its result, for the jobs that another command planned for this study."""
    names = (read_json(study.folder / "study.json") or {}).get("jobs", [])
    found: dict[Path, Path] = {}
    for folder in (study.folder / name for name in names if name not in {job.name for job in study.jobs}):
        about = read_json(folder / "job.json")
        run = finished_run(folder, about["config"]) if about is not None else None
        found |= {folder: run} if run is not None else {}
    return found


def plan_study(args: argparse.Namespace) -> Study:
    """Every run of the study, its configuration checked; UserError for whatever could be known before the first."""
    if any(setting.startswith("seed=") for setting in [*args.set, *args.grid]):
        raise UserError("the seeds are given with --seeds, not with --set or --grid")
    seeds = sorted(args.seeds)
    folder = Path(load_config(args.config, overrides=args.set).utils.checkpoint_dir) / args.name
    rows = cells(args.grid, args.preset, args.rows)
    jobs = [plan(args, cell, seed, folder) for seed in seeds for cell in rows]
    if len({job.folder for job in jobs}) < len(jobs):
        raise UserError("two runs of this grid would share a folder; name each value and each seed once")
    _refuse_equal_rows(jobs[: len(rows)])
    for job in jobs:
        _refuse_foreign_runs(job)
    command = [*script_command("ablate.py"), "--config", str(args.config), "--name", args.name]
    command += ["--preset", args.preset] if args.preset else []
    command += ["--rows", *(row for row in PRESETS[args.preset] if row in args.rows)] if args.rows else []
    command += [part for axis in args.grid for part in ("--grid", axis)]
    command += [part for setting in args.set for part in ("--set", setting)]
    command += ["--measure", *args.measure] if args.measure else []
    measurements = [Measurement(job, split) for job in jobs for split in args.measure]
    study = Study(args.name, folder, (*command, "--seeds", *map(str, seeds)), tuple(jobs), tuple(measurements))
    configs = {job.name: job.config for job in jobs}
    labels = {job.name: job.cell.label for job in jobs}
    for other, run in finished_before(study).items():
        configs[other.name] = load_config(run / "config.json")
        labels[other.name] = (read_json(other / "job.json") or {})["label"]
    _refuse_incomparable(configs)
    refuse_untold([(name, labels[name], dump_config(config)) for name, config in configs.items()])
    return study


def cells(grid: Sequence[str], preset: str | None = None, labels: Sequence[str] = ()) -> list[Cell]:
    """["a.b=1,2", "c=3"] -> the cells b=1-c=3 and b=2-c=3; of a preset, each of its rows, or those with these
    labels, with each of them."""
    rows = [Cell("", "", ())]
    if preset is not None:
        _refuse_unknown_rows(labels, preset)
        rows = [Cell(label, _slug(label), settings) for label, settings in PRESETS[preset].items()]
        rows = [row for row in rows if not labels or row.label in labels]
    elif labels:
        raise UserError("--rows chooses among the rows of a preset; give --preset too")
    axes = [_axis(axis) for axis in grid]
    keys = [axis[0].partition("=")[0] for axis in axes]
    taken = {setting.partition("=")[0] for row in rows for setting in row.settings}
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise UserError(f"--grid {key}: given twice; name all its values in one")
        if key in taken:
            raise UserError(f"--grid {key}: the preset {preset} sets this key itself")
    found = []
    for row, settings in itertools.product(rows, itertools.product(*axes)):
        label = ", ".join([*([row.label] if row.label else []), *settings]) or "default"
        short = [setting.partition("=")[0].rpartition(".")[2] + "=" + setting.partition("=")[2] for setting in settings]
        name = re.sub(r"[^\w.=+-]", "_", "-".join([*([row.name] if row.name else []), *short]))
        found.append(Cell(label, name, (*row.settings, *settings)))
    return found


def plan(args: argparse.Namespace, cell: Cell, seed: int, study: Path) -> Job:
    """The run of a cell with a seed in the study's folder."""
    folder = study / "-".join([*([cell.name] if cell.name else []), f"seed={seed}"])
    if len(folder.name) > LONGEST_NAME:
        raise UserError(f"--grid: {folder.name[:60]}... would name a folder with {len(folder.name)} characters")
    settings = [*args.set, *cell.settings, f"seed={seed}", f"utils.checkpoint_dir={json.dumps(str(folder))}"]
    config = load_config(args.config, overrides=settings)
    command = [*script_command(SCRIPTS[config.model]), "--config", str(args.config)]
    command += ["--name", "run", "--resume", "auto", *(f"--set={setting}" for setting in settings)]
    return Job(cell, seed, folder, config, tuple(command))


def finished_run(folder: Path, config: dict[str, Any]) -> Path | None:
    """The run folder below ``folder`` that holds the result of just this dumped configuration, or None."""
    for path in sorted(folder.glob("*/result.json"), reverse=True):
        result, trained = read_json(path), read_json(path.parent / "config.json")
        if result is None or trained is None or not has_score(result) or different_keys(trained, config):
            continue
        if result.get("step") == config["training"]["num_iterations"]:
            return path.parent
    return None


def measured(run: Path, protocol: str) -> dict[str, dict[str, Any]]:
    """Split -> what ``evaluateSSL.py`` found there for the run's last checkpoint, under its own protocol."""
    last, found = read_json(run / "result.json") or {}, {}
    for split in SPLITS:
        result = read_json(measurement_folder(run, split, protocol) / "result.json")
        if result is not None and has_score(result) and result.get("step") == last.get("step"):
            found[split] = result
    return found


def measurement_folder(run: Path, split: str, protocol: str) -> Path:
    """Where a study measures a run on a split."""
    return run / f"evaluation-{split}-{protocol}"


def failure_file(job: Path, split: str | None = None) -> Path:
    """Where the failure of a job's run, or of its measurement on a split, is told."""
    return job / (f"failed-{split}.json" if split else "failed.json")


class Lists(Protocol):
    """The dataset's lists of images."""

    def check_files(self, split: str, *, labels: bool) -> None: ...
    def split_hash(self, split: str) -> str: ...


def check_lists(study: Study, files: Lists) -> None:
    """UserError where a list to measure on lacks files, or is another one than a run was measured on before."""
    hashes = dict[str, str]()
    for split in {one.split for one in study.measurements}:
        files.check_files(split, labels=True)
        hashes[split] = files.split_hash(split)
    for one in study.measurements:
        if (run := one.finished()) is None:
            continue
        protocol = one.job.config.utils.val_protocol
        then = measured(run, protocol)[one.split].get("split hash")
        if then != hashes[one.split]:
            raise UserError(
                f"{measurement_folder(run, one.split, protocol)}: measured on other images, hash {then}, while "
                f"dataset.{one.split} has {hashes[one.split]} now; set the list back, or remove this folder"
            )


def has_score(result: Mapping[str, Any]) -> bool:
    """Whether the ensemble was evaluated, and on at least one labeled pixel."""
    return result.get("models", {}).get("ensemble", {}).get("mean_iou") is not None


def steps_text(study: Study) -> str:
    """The length of the runs."""
    return " or ".join(map(str, sorted({job.config.training.num_iterations for job in study.jobs})))


def process_command(command: Sequence[str]) -> list[str]:
    """The same with this Python in the place of ``python3``."""
    return [sys.executable, *command[1:]]


def shown(command: Sequence[str]) -> str:
    """A command as it is typed, quoted for a shell; a script of ours by its name, if this is its folder."""
    parts = [Path(part).name if Path(part).parent == PROJECT == Path.cwd() else part for part in command[1:2]]
    return shlex.join([*command[:1], *parts, *command[2:]])


def script_command(script: str) -> list[str]:
    """Start of a command with a script of ours."""
    return ["python3", str(PROJECT / script)]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file, or one that was cut off by a kill."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _axis(axis: str) -> list[str]:
    """ "a=1,2" -> ["a=1", "a=2"]; commas within brackets, braces and quotes belong to a value."""
    key, equals, text = axis.partition("=")
    values, depth, is_quoted = [""], 0, False
    for sign in text:
        is_quoted ^= sign == '"'
        depth += 0 if is_quoted else (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0 and not is_quoted:
            values.append("")
        else:
            values[-1] += sign
    if not equals or not key or not all(values) or depth or is_quoted:
        raise UserError(f"--grid {axis}: expected KEY=V1,V2")
    return [f"{key}={value}" for value in values]


def _refuse_unknown_rows(labels: Sequence[str], preset: str) -> None:
    for label in labels:
        if label not in PRESETS[preset]:
            rows = ", ".join(f'"{known}"' for known in PRESETS[preset])
            raise UserError(f'--rows "{label}": the preset {preset} has {rows}')


def _slug(label: str) -> str:
    return re.sub(r"\W+", "_", label).strip("_")


def _refuse_equal_rows(jobs: Sequence[Job]) -> None:
    """UserError if two cells are one configuration: their labels would promise a difference that is not there."""
    seen: dict[str, str] = {}
    for job in jobs:
        values = dump_config(job.config)
        values["utils"].pop("checkpoint_dir")
        same = seen.setdefault(json.dumps(values, sort_keys=True), job.cell.label)
        if same != job.cell.label:
            raise UserError(
                f'"{same}" and "{job.cell.label}" would be the same configuration; a preset needs one in which its '
                "terms are on, a grid values that differ"
            )


def _refuse_incomparable(configs: Mapping[str, Config]) -> None:
    """UserError for runs, by their names, whose results could not share a table, before hours are spent on them."""
    (first, config), *others = configs.items()
    known = _what_is_compared(config)
    for name, other in others:
        for key, value in _what_is_compared(other).items():
            if value != known[key]:
                raise UserError(
                    f"results could not share a table: {key} is {known[key]} in {first}, {value} in {name}; make it "
                    "one, or choose another --name"
                )


def refuse_untold(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    """UserError where two runs differ in more than their seeds and what the labels of their rows tell.

    runs: name, label and dumped configuration of each.
    """
    first: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    for run in runs:
        first.setdefault(run[1], run)
    pairs = [(first[run[1]], run) for run in runs if first[run[1]] is not run]
    for one, other in [*pairs, *itertools.combinations(first.values(), 2)]:
        told = {"seed"} if one[1] == other[1] else {"seed", *_keys_told(one[1]), *_keys_told(other[1])}
        differing = different_keys(dict(one[2]), dict(other[2]))
        untold = {key: values for key, values in differing.items() if not _is_within(key, told)}
        if untold:
            rows = "".join(f"\n       {key}: {old} and {new}" for key, (old, new) in untold.items())
            raise UserError(
                f"{one[0]} and {other[0]} cannot share a table, they differ in what no row tells; make it one, or "
                f"choose another --name:{rows}"
            )


def _keys_told(label: str) -> set[str]:
    """The keys that a row's label stands for."""
    presets = (
        settings for rows in PRESETS.values() for row, settings in rows.items() if f"{label}, ".startswith(f"{row}, ")
    )
    named = [setting.partition("=")[0] for settings in presets for setting in settings]
    return {*named, *re.findall(r"(?:^|, )([\w.]+)=", label)}


def _is_within(key: str, blocks: set[str]) -> bool:
    return any(key == block or key.startswith(f"{block}.") for block in blocks)


def _what_is_compared(config: Config) -> dict[str, Any]:
    """What must be the same in all runs, as far as a configuration tells."""
    block, data = config.data, config.training.data
    draws = block.labeled is None and data.labeled_samples is not None
    drawn = (
        "" if data.split_id_list is not None else f" that seed {config.seed} draws (set training.data.split_id_list)"
    )
    return {
        "training.num_iterations": config.training.num_iterations,
        "utils.val_protocol": config.utils.val_protocol,
        "dataset": block.name,
        "dataset.val": block.val,
        "the list of labeled images": f"split {data.split_id_list}{drawn}" if draws else block.labeled or block.train,
        "training.data.labeled_samples": data.labeled_samples,
    }


def _refuse_foreign_runs(job: Job) -> None:
    """UserError if the folder's checkpoints are of another configuration: the run could not continue from them."""
    if job.finished() is not None:
        return
    for path in sorted(job.folder.glob("*/config.json")):
        trained = read_json(path)
        if trained is None or not any(path.parent.glob("checkpoint*.pth")):
            continue
        different = different_keys(trained, dump_config(job.config))
        if different:
            rows = "".join(f"\n       {key}: {old} there, {new} here" for key, (old, new) in different.items())
            raise UserError(f"{path.parent} is a run of another configuration; choose another --name:{rows}")
