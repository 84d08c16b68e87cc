"""Studies: what is planned, run, survived and reported; with hand-made runs, a stand-in for training, and real ones."""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests import faults
from tests.conftest import tiny_values
from utils.cli import ablation_parser, device_of, evaluation_parser
from utils.config import dump_config, load_config
from utils.errors import UserError
from utils.study import PRESETS, SCRIPTS, Study, cells, check_lists, plan_study, shown
from utils.study_figures import draw_pictures
from utils.study_keep import keep_study, thinned
from utils.study_report import as_markdown, differences, only_rows, overview, results_text, tables, write_report
from utils.study_results import Record, Results, Row, refuse_mixing, results_of_folders, results_of_study
from utils.study_run import Runner, _Running, check_places, describe_plan, last_error

PROJECT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(PROJECT)}

# Stands in for training: reads the same command line, takes a moment, writes what a run writes.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from utils.config import dump_config, load_config

def values(option):
    return [sys.argv[i + 1] for i, a in enumerate(sys.argv) if a == option]

sets = [a.removeprefix("--set=") for a in sys.argv if a.startswith("--set=")]
config = load_config(values("--config")[0], overrides=sets)
teacher = config.training.unlabeled.teacher
if "--dry-run" in sys.argv:
    if teacher == "self":
        sys.exit("error: no room on the device")
    print("estimated time        1.50 hours")
    sys.exit(0)
if teacher == os.environ.get("FAILS"):
    sys.exit("a line\\nerror: loss is nan")
stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: stopped.append(n))
folder = Path(config.utils.checkpoint_dir) / "11-22_10-00-run"
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(dump_config(config)))
with (folder / "starts.txt").open("a") as file:
    print(os.getpid(), *values("--device"), file=file)
(folder / "begun").touch()
while Path(os.environ.get("HOLD", "/none")).exists() and not stopped:
    time.sleep(0.02)
if stopped:
    time.sleep(0.3)
    (folder / "signals.txt").write_text(repr(stopped))
    sys.exit(128 + stopped[0])
score = 0.5 + 0.01 * config.seed + {"cross": 0.1, "self": 0.05, "peer": 0.0}[teacher]
steps = config.training.num_iterations
(folder / "log.jsonl").write_text(json.dumps({"step": steps, "val/ensemble": score}) + "\\n")
iou = {"sky": score, "road": score}
models = {name: {"mean_iou": score, "iou": iou} for name in ("student_0", "student_1", "ensemble")}
about = {"dataset": "d", "split": "val", "split hash": "a", "labeled": 6, "labeled hash": "b", "protocol": "original"}
(folder / "result.json").write_text(json.dumps(about | {"step": steps, "commit": COMMIT, "models": models}))
"""


# Stands in for evaluation.
EVALUATION_STAND_IN = """
import json, os, sys
from pathlib import Path

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
checkpoint, split = Path(given["--model-path"]), given["--split"]
assert checkpoint.name == "checkpoint.pth"
if split == os.environ.get("SPLIT_FAILS"):
    sys.exit(f"error: no {split} here")
result = json.loads((checkpoint.parent / "result.json").read_text()) | {"split": split, "gpu": given.get("--gpu")}
for model in result["models"].values():
    model["mean_iou"] -= 0.2
folder = Path(given["--output"])
folder.mkdir()  # only once
(folder / "result.json").write_text(json.dumps(result))
"""


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(tiny_values(**{"utils__checkpoint_dir": str(folder / "runs")} | changes)))
    return path


def asked(config: Path, **changes: Any) -> argparse.Namespace:
    """What the command line gives, as it is where nothing is asked for."""
    plain = {"config": config, "name": "study", "seeds": [0, 1]}
    plain |= {"preset": None, "rows": [], "grid": [], "set": [], "measure": []}
    return argparse.Namespace(**plain | changes)


def about(**changes: Any) -> dict[str, Any]:
    same = {"dataset": "roads", "split": "val", "split hash": "aaaa", "labeled": 6, "labeled hash": "bbbb"}
    return same | {"images": 3, "protocol": "original", "step": 8, "commit": "c0ffee", **changes}


def make_run(
    folder: Path, score: float, *, seed: int = 0, settings: Sequence[str] = (), speed: bool = False, **changes: Any
) -> Path:
    """A run folder with an ensemble of this mIoU, students 0.1 and 0.2 below it, and two validations."""
    folder.mkdir(parents=True)
    values = tiny_values(seed=seed)
    path = folder / "wanted.json"
    path.write_text(json.dumps(values))
    config = load_config(path, overrides=settings)
    path.unlink()
    (folder / "config.json").write_text(json.dumps(dump_config(config)))
    models = {
        name: {
            "mean_iou": value,
            "pixel_accuracy": value + 0.1,
            "iou": {"sky": value, "road": value / 2, "ghost": None},
        }
        for name, value in (("student_0", score - 0.1), ("student_1", score - 0.2), ("ensemble", score))
    }
    lines: list[dict[str, Any]] = [{"step": step, "val/ensemble": score * step / 8} for step in (4, 8)]
    lines += [{"step": s, "supervised/0": 1 / s, "supervised/1": 3 / s} for s in range(1, 9)]
    if speed:
        lines += [{"step": s, "seconds_per_step": 450.0 * s, "memory_gib": 2.5 - s / 10} for s in (1, 2, 4)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "cut o')
    (folder / "result.json").write_text(json.dumps(about(**changes) | {"models": models}))
    return folder


def make_study(folder: Path) -> list[Path]:
    """Two rows with three seeds each; means 50 and 57, standard deviations 10 and 5, paired differences 12, 7, 2."""
    scores = {"self": (0.40, 0.50, 0.60), "cross": (0.52, 0.57, 0.62)}
    return [
        make_run(
            folder / f"{teacher}{seed}",
            score,
            seed=seed,
            settings=[f"training.unlabeled.teacher={teacher}"],
            speed=teacher == "cross",
        )
        for teacher, row in scores.items()
        for seed, score in enumerate(row)
    ]


class Page(HTMLParser):
    """The tables of a page as texts, and everything in it that could reach out of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.reaches: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "srcset", "action", "data") and not (value or "").startswith("#"):
                self.reaches.append(f"{tag} {key}={value}")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Every table's rows of cells, without the line below the head."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().splitlines()]
        found.append([[cell.strip() for cell in row] for row in rows if set("".join(row)) - set("- ")])
    return found


# ------------------------------------------------------------------------------------------------ planning


@pytest.mark.parametrize("words", [["reprot", "runs/x"], ["reprot", "-n", "x"], ["-n", "x", "reprot"]])
def test_a_word_that_is_no_command_is_named(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        ablation_parser(PRESETS, ()).parse_args(words)
    assert "reprot: a command is report, keep or overview, and the first word" in capsys.readouterr().err


def test_a_grid_is_the_product_of_its_values_and_commas_in_brackets_are_part_of_one():
    found = cells(["a.b=1,2", 'c=["x","y"],"3,4"'])
    assert [cell.settings for cell in found] == [
        ("a.b=1", 'c=["x","y"]'), ("a.b=1", 'c="3,4"'), ("a.b=2", 'c=["x","y"]'), ("a.b=2", 'c="3,4"'),
    ]  # fmt: skip
    assert found[0].label == 'a.b=1, c=["x","y"]'
    assert len({cell.name for cell in found}) == 4
    assert [cell.label for cell in cells([])] == ["default"]
    nested = cells(["a=[[1,2],[3,4]],[[5,6]]", 'b={"x":1,"y":"},"},null'])
    assert [cell.settings for cell in nested] == [
        ("a=[[1,2],[3,4]]", 'b={"x":1,"y":"},"}'), ("a=[[1,2],[3,4]]", "b=null"),
        ("a=[[5,6]]", 'b={"x":1,"y":"},"}'), ("a=[[5,6]]", "b=null"),
    ]  # fmt: skip


@pytest.mark.parametrize("axis", ["a", "a=", "=1", "a=1,,2", "a=1,", "a=[1,2", 'a="1,2', "a=1],2"])
def test_a_grid_without_key_or_values_is_refused(axis: str):
    with pytest.raises(UserError, match="expected KEY=V1,V2"):
        cells([axis])


def test_every_row_of_the_paper_s_preset_is_what_its_name_says(tmp_path: Path):
    study = plan_study(asked(write_config(tmp_path, training__contrastive__high_weight=0.3), preset="paper", seeds=[0]))
    found = {}
    for job in study.jobs:
        unlabeled, contrastive = job.config.training.unlabeled, job.config.training.contrastive
        weights = (contrastive.high_weight, contrastive.low_weight)
        found[job.cell.label] = (unlabeled.train_unlabeled, unlabeled.teacher, *weights)
    assert found == {
        "supervised": (False, "cross", 0.3, 0.1),
        "two mean teachers": (True, "self", 0, 0),
        "cross pseudo supervision": (True, "peer", 0, 0),
        "cross teacher": (True, "cross", 0, 0),
        "+ high level": (True, "cross", 0.3, 0),
        "+ low level": (True, "cross", 0, 0.1),
        "full CTT": (True, "cross", 0.3, 0.1),
    }
    assert list(found) == list(PRESETS["paper"])
    assert all(re.fullmatch(r"\w[\w=-]+", job.name) for job in study.jobs)


def test_a_grid_multiplies_a_preset_and_set_reaches_all_rows(tmp_path: Path):
    config = write_config(tmp_path)
    grid = ["training.unlabeled.mix_mask=cut,class"]
    study = plan_study(asked(config, preset="paper", grid=grid, set=["training.learning_rate=0.5"], seeds=[3]))
    assert len(study.jobs) == 14
    assert study.cells[0].label == "supervised, training.unlabeled.mix_mask=cut"
    assert {job.config.training.learning_rate for job in study.jobs} == {0.5}
    assert [job.config.training.unlabeled.mix_mask for job in study.jobs] == ["cut", "class"] * 7


def test_rows_of_a_preset_are_the_same_runs_whether_chosen_or_all(tmp_path: Path):
    config = write_config(tmp_path)
    chosen = plan_study(asked(config, preset="paper", rows=["full CTT", "supervised"], measure=["test"]))
    rows = ("supervised", "full_CTT")
    assert [job.name for job in chosen.jobs] == [f"{row}-seed={seed}" for seed in (0, 1) for row in rows]
    everything = {job.name: job.command for job in plan_study(asked(config, preset="paper")).jobs}
    assert {job.name: job.command for job in chosen.jobs}.items() <= everything.items()
    assert "--rows supervised 'full CTT' --measure" in shlex.join(chosen.command)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "paper", "rows": ["full"]}, '--rows "full": the preset paper has "supervised", "two'),
        ({"rows": ["full CTT"]}, "give --preset too"),
        ({"preset": "paper", "grid": ["training.unlabeled.teacher=cross,self"]}, "preset paper sets this key itself"),
        ({"preset": "paper", "set": ["training.contrastive.low_weight=0"]}, "would be the same configuration"),
        ({"grid": ["training.learning_rate=0.1,0.10"]}, "would be the same configuration"),
        ({"grid": ["training.batch_size=1", "training.batch_size=2"]}, "given twice"),
        ({"seeds": [1, 1]}, "would share a folder"),
        ({"set": ["seed=3"]}, "the seeds are given with --seeds"),
        ({"grid": ["training.num_iterations=5,6"]}, "training.num_iterations is 5 in num_iterations=5-seed=0"),
        ({"grid": ["utils.val_protocol=original,sliding"]}, "utils.val_protocol is original in"),
        ({"grid": ["dataset.labeled=a.txt,b.txt"]}, "the list of labeled images is a.txt"),
        ({"grid": [f"pretrained={'x' * 300}"]}, "would name a folder with"),
    ],
)
def test_what_could_not_share_a_table_is_refused_before_anything_runs(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        plan_study(asked(write_config(tmp_path), **changes))
    assert not (tmp_path / "runs").exists()


def test_seeds_that_would_draw_other_labeled_images_are_refused(tmp_path: Path):
    dataset = {"root": "nowhere", "train": "train.txt", "num_classes": 3}
    config = write_config(tmp_path, dataset=dataset, training__data__labeled_samples=4)
    with pytest.raises(UserError, match=re.escape("set training.data.split_id_list")):
        plan_study(asked(config))
    assert len(plan_study(asked(config, set=["training.data.split_id_list=0"])).jobs) == 2


def test_the_command_of_a_study_does_not_depend_on_the_order_of_its_seeds_or_on_how_many_run_at_once(tmp_path: Path):
    config = write_config(tmp_path)
    one = plan_study(asked(config, seeds=[1, 0], jobs=2))
    other = plan_study(asked(config, seeds=[0, 1], devices=["cuda:0"]))
    assert shown(one.command) == shown(other.command)
    assert [job.name for job in one.jobs] == [job.name for job in other.jobs]


def test_a_folder_with_runs_of_another_configuration_is_refused(tmp_path: Path):
    study = plan_study(asked(write_config(tmp_path)))
    folder = make_run(study.jobs[0].folder / "11-22_10-00-run", 0.5, settings=["training.learning_rate=0.7"])
    (folder / "checkpoint.pth").touch()
    with pytest.raises(
        UserError, match=r"another configuration; choose another --name:\n *training.learning_rate: 0.7"
    ):
        plan_study(asked(write_config(tmp_path)))


def test_devices_are_one_run_each_and_jobs_share_the_cpu():
    assert check_places(None, None) == [None]
    assert check_places(None, 3) == [None, None, None]
    assert check_places(["cuda:0", "cuda:1"], None) == ["cuda:0", "cuda:1"]
    for devices, jobs in ((None, 0), (["cuda:0"], 2), (["cuda:0", "cuda:0"], None)):
        with pytest.raises(UserError):
            check_places(devices, jobs)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("", "no message"),
        ("a\nb\n", "b"),
        ("x.py: error: no\nusage", "x.py: error: no"),
        ("50%\rerror: full\r", "error: full"),
    ],
)
def test_the_last_error_is_found_among_progress_bars(text: str, last: str):
    assert last_error(text) == last


# ------------------------------------------------------------------------------------------------ reporting


def test_means_spreads_and_paired_differences_are_those_computed_by_hand(tmp_path: Path):
    results = results_of_folders(make_study(tmp_path), ["python3", "ablate.py"])
    first, second = results.rows
    assert [row.label for row in results.rows] == [
        "training.unlabeled.teacher=self",
        "training.unlabeled.teacher=cross",
    ]
    assert first.ensemble == pytest.approx([40, 50, 60])
    assert first.student == pytest.approx([25, 35, 45])
    assert second.differences(first) == pytest.approx({0: 12, 1: 7, 2: 2})
    assert second.curve("val/ensemble")[4] == pytest.approx([0.26, 0.285, 0.31])
    assert first.curve("supervised/0", "supervised/1")[4] == pytest.approx([0.5, 0.5, 0.5])
    assert first.records[1].class_iou("road") == pytest.approx(25)
    assert first.records[1].class_iou("ghost") is None
    write_report(results, tmp_path / "out")
    main, classes, runs, cost = page_of(tmp_path / "out").tables
    assert main[1][1:] == [
        "50.0 ± 10.0", "35.0 ± 10.0", "-",
        "40.0, 50.0, 60.0", "25.0, 35.0, 45.0",
    ]  # fmt: skip
    assert main[0][4:] == ["ensemble, each seed (0, 1, 2)", "one student, each seed (0, 1, 2)"]
    assert main[2][1:4] == ["57.0 ± 5.0", "42.0 ± 5.0", "+7.0"]
    assert classes == [
        ["class", *(row.label for row in results.rows)],
        ["sky", "50.0", "57.0 (+7.0)"], ["road", "25.0", "28.5 (+3.5)"], ["ghost", "-", "-"],
        ["pixel accuracy", "60.0", "67.0 (+7.0)"],
    ]  # fmt: skip
    assert {row[2] for row in runs[1:]} == {"done"}
    assert cost[1][2:] == ["-", "-", "-"]
    assert cost[4][2:] == ["900.000", "2.00", "2.40"], (
        "median of 450, 900, 1800 seconds; 8 steps; the largest of the GiB"
    )


def test_only_seeds_that_both_rows_have_are_compared(tmp_path: Path):
    runs = make_study(tmp_path)
    results = results_of_folders([runs[1], *runs[3:]], ["python3", "ablate.py"])
    write_report(results, tmp_path / "out")
    main = page_of(tmp_path / "out").tables[0]
    assert main[1][1:5] == ["50.0", "35.0", "-", "-, 50.0, -"]
    assert main[2][3] == "+7.0 (1 of 3 seeds)"


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "release"}, {"split": "test"}, {"split hash": "x"}, {"labeled hash": "x"}, {"labeled": 7},
        {"dataset": "x"}, {"commit": "x"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_runs_that_were_not_measured_alike_are_refused_with_their_names(tmp_path: Path, changes: dict[str, Any]):
    runs = make_study(tmp_path)
    odd = make_run(tmp_path / "odd", 0.5, seed=9, **changes)
    ((key, value),) = changes.items()
    same = about()[key]
    with pytest.raises(UserError, match=rf"{key} is {same} \(.*self0, .*, \.\.\.\) and {value} \({odd}\)"):
        results_of_folders([*runs, odd], ["python3", "ablate.py"])


def test_runs_of_another_number_of_steps_are_refused():
    def record(name: str, step: int) -> Record:
        return Record("", 0, name, "", "done", {}, about(step=step))

    with pytest.raises(UserError, match=r"step is 8 \(short\) and 9 \(long\)"):
        refuse_mixing([record("short", 8), record("long", 9)])


def test_names_and_values_are_escaped_and_the_page_needs_nothing_but_itself(tmp_path: Path):
    label = '<script>alert("1")</script> & $x^2$ | *bold*'
    results = results_of_folders(make_study(tmp_path), ["python3", "ablate.py", "report", "a b; rm"])
    rows = [Row(f"{label} {row.label}", row.records) for row in results.rows]
    text = write_report(Results(label, results.commands, rows, results.facts), tmp_path / "out")
    page = page_of(tmp_path / "out")
    assert page.reaches == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    html = (tmp_path / "out/report.html").read_text()
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert page.tables[0][1][0].startswith(label)
    assert "<script" not in text
    assert all(len({len(row) for row in table}) == 1 for table in markdown_tables(text))
    assert "'a b; rm'" in page.text, "commands are quoted for a shell"
    assert page.tags.count("svg") == 3
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', html)) <= set(ids)


def test_recall_and_precision_and_signals_near_the_end(tmp_path: Path):
    pixels = "pixels of (row) predicted as (column),sky,road,ghost\n"
    for index, (name, rows) in enumerate({"self": "sky,8,2,0\nroad,4,6,0\nghost,0,0,0\n", "cross": "sky,8"}.items()):
        run = make_run(tmp_path / "runs" / name, 0.5, settings=[f"training.unlabeled.teacher={name}"])
        result = json.loads((run / "result.json").read_text())
        result["models"]["ensemble"]["mean_accuracy"] = 0.7 + index / 10
        (run / "result.json").write_text(json.dumps(result))
        (run / "confusion_ensemble.csv").write_text(pixels + rows if index == 0 else "sky,half of a li")
        with (run / "log.jsonl").open("w") as log:
            for step in range(1, 9):
                line = {
                    "step": step,
                    "pseudo_label/accuracy/0": 0.1 * step,
                    "pseudo_label/accuracy/1": 0.1 * step + 0.1,
                }
                line |= {
                    f"gradient_norm/{term}/{own}": own + 1.0 for term in ("supervised", "high_level") for own in (0, 1)
                }
                line["gradient_norm/high_level/1"] = 1.0
                print(json.dumps(line), file=log)
    results = results_of_folders([tmp_path / "runs"], [])
    assert [row.label for row in results.rows] == [f"training.unlabeled.teacher={name}" for name in ("cross", "self")]
    found = {table.title: {line[0]: line[1:] for line in table.rows} for table in tables(results)}
    assert found["IoU of each class"]["mean recall"] == ["80.0", "70.0 (-10.0)"]
    assert found["IoU of each class"]["mean precision"] == ["-", f"{(8 / 12 + 6 / 8) * 50:.1f}"]
    assert found["Signals"] == {
        "pseudo-labels: share of pixels that are right": ["85.0", "85.0"],  # step 8 alone is in the last tenth
        "gradient of high_level, in % of supervised": ["66.7", "66.7"],
    }


def test_the_markdown_has_the_page_s_tables_and_its_pictures_are_beside_it(tmp_path: Path):
    results = results_of_folders(make_study(tmp_path), ["python3", "ablate.py"])
    text = write_report(results, tmp_path / "out")
    assert markdown_tables(text) == page_of(tmp_path / "out").tables
    for name in re.findall(r"!\[[^]]*\]\((\w+\.png)\)", text):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md", "report.html", "bars.png", "curves.png", "terms.png",
    }  # fmt: skip
    for fact in ("dataset roads", "split hash aaaa", "labeled 6", "labeled hash bbbb", "protocol original", "c0ffee"):
        assert fact in text


def test_the_same_results_give_the_same_bytes(tmp_path: Path):
    runs = make_study(tmp_path)
    for name in ("one", "other"):
        write_report(results_of_folders(runs, ["python3", "ablate.py"]), tmp_path / name)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "other")


def test_unfinished_and_failed_runs_and_those_not_begun_are_told(tmp_path: Path):
    study = plan_study(asked(write_config(tmp_path), grid=["training.unlabeled.teacher=self,cross"]))
    results = planned(study)
    for job in study.jobs[:3]:
        folder = job.folder / "11-22_10-00-run"
        make_run(folder, 0.5)
        (folder / "config.json").write_text(json.dumps(dump_config(job.config)))
    for job in study.jobs[1:3]:
        (job.folder / "11-22_10-00-run/result.json").write_text('{"step": 8, "mod')
    (study.jobs[2].folder / "failed.json").write_text(json.dumps({"status": 4, "message": "error: <loss> is nan"}))
    text = write_report(results(), tmp_path / "out")
    page = page_of(tmp_path / "out")
    states = {(row[0], row[1]): row[2] for row in page.tables[-2][1:]}
    assert states == {
        ("training.unlabeled.teacher=self", "0"): "done",
        ("training.unlabeled.teacher=self", "1"): "failed, exit status 4: error: <loss> is nan",
        ("training.unlabeled.teacher=cross", "0"): "unfinished, step 8 of 8",
        ("training.unlabeled.teacher=cross", "1"): "not started",
    }
    assert "3 of 4 runs are not in the numbers" in page.text
    assert "3 of 4 runs are not in the numbers" in text
    assert page.tables[0][1][4] == "50.0, failed"
    assert page.tables[0][2][1:5] == ["no result", "no result", "-", "unfinished, not started"]


def test_a_study_without_any_result_has_a_report_too(tmp_path: Path):
    results = planned(plan_study(asked(write_config(tmp_path))))
    write_report(results(), tmp_path / "out")
    assert page_of(tmp_path / "out").tables[0][1][1] == "no result"


def planned(study: Study) -> Callable[[], Results]:
    """The study's plan written as by a run of it; what its report then tells."""
    from utils.study_run import _write_plan

    _write_plan(study)
    return lambda: results_of_folders([study.folder], [])


def test_any_run_folders_are_compared_and_two_of_one_seed_refused(tmp_path: Path):
    runs = make_study(tmp_path / "runs")
    whole = results_of_folders([tmp_path / "runs"], ["python3", "ablate.py"])
    assert sorted(record.name for record in whole.records) == sorted(map(str, runs))
    one = results_of_folders(runs[:1], ["python3", "ablate.py"])
    assert [row.label for row in one.rows] == ["default"]
    twin = make_run(tmp_path / "twin", 0.4, settings=["training.unlabeled.teacher=self"])
    with pytest.raises(UserError, match="the same setting and seed"):
        results_of_folders([runs[0], twin], ["python3", "ablate.py"])
    with pytest.raises(UserError, match="no run folder, and none below it"):
        results_of_folders([tmp_path / "nowhere"], ["python3", "ablate.py"])
    assert "--config" in one.records[0].command
    assert str(runs[0] / "config.json") in one.records[0].command


# ------------------------------------------------------------------------------------------------ running


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in for both training scripts, in this process and, by ``ablate``, in others."""
    from utils.run import code_version

    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN.replace("COMMIT", repr(code_version())))
    for network in SCRIPTS:
        monkeypatch.setitem(SCRIPTS, network, str(path))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return path


def ablate(stand_in: Path | None, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """ablate.py in a process of its own; with the stand-in in the place of training, if there is one."""
    patched = f"from utils.study import SCRIPTS; SCRIPTS.update(dict.fromkeys(SCRIPTS, {str(stand_in)!r})); "
    start = "import ablate, utils.errors; utils.errors.run_script(ablate.main)"
    command = [sys.executable, "-c", (patched if stand_in else "") + start, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ends(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=180)
    return process.returncode, output, errors


def wait_for(folder: Path, pattern: str, count: int = 1) -> list[Path]:
    end = time.monotonic() + 120
    while len(found := list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, pattern
        time.sleep(0.02)
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "study.json"}


def starts(folder: Path) -> int:
    """How many processes trained."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/*/starts.txt"))


GRID = ("--grid", "training.unlabeled.teacher=self,cross", "--name", "study", "--seeds", "0", "1")


@pytest.mark.slow
def test_a_study_runs_once_and_its_report_can_be_made_again(tmp_path: Path, stand_in: Path):
    config = write_config(tmp_path)
    status, output, errors = ends(ablate(stand_in, "-c", config, *GRID, "--jobs", "2"))
    assert status == 0, errors
    study = tmp_path / "runs/study"
    assert "4 runs of 8 steps, 0 already done" in output
    first = files_in(study)
    assert [row[1:4] for row in page_of(study).tables[0][1:]] == [
        ["55.5 ± 0.7", "55.5 ± 0.7", "-"],
        ["60.5 ± 0.7", "60.5 ± 0.7", "+5.0"],
    ]
    status, output, _ = ends(ablate(stand_in, *GRID, "-c", config))
    assert (status, starts(study)) == (0, 4)
    assert "4 already done" in output
    assert files_in(study) == first, "whatever the order of the options"
    status, output, errors = ends(ablate(None, "report", study, "--output", tmp_path / "again"))
    assert status == 0, errors
    assert files_in(tmp_path / "again") == first
    assert "60.5 ± 0.7" in output


@pytest.mark.slow
def test_a_first_signal_reaches_each_run_once_and_the_same_command_goes_on(tmp_path: Path, stand_in: Path):
    config = write_config(tmp_path)
    reference = tmp_path / "reference"
    ends(ablate(stand_in, "-c", config, *GRID))
    study = tmp_path / "runs/study"
    study.rename(reference)
    for number in (signal.SIGINT, signal.SIGTERM):
        process = ablate(stand_in, "-c", config, *GRID, "--jobs", "2", HOLD=str(config))
        wait_for(study, "*/*/begun", 2)
        os.killpg(process.pid, number)  # as a terminal does
        status, output, errors = ends(process)
        assert status == 128 + number, errors
        assert output.count("saved ") == 2
        assert len(errors.splitlines()) == 1
        assert "stopped, 0 of 4 runs are done; the same command goes on: python3 ablate.py --config" in errors
        seen = [path.read_text() for path in study.glob("*/*/signals.txt")]
        assert seen == [f"[<Signals.{number.name}: {number:d}>]"] * 2 or seen == [f"[{number:d}]"] * 2
        for path in study.glob("*/*/begun"):
            path.unlink()
    status, _, errors = ends(ablate(stand_in, "-c", config, *GRID))
    assert status == 0, errors
    assert starts(study) == 4 + 4
    assert files_in(study) == files_in(reference)


@pytest.mark.slow
def test_a_second_signal_ends_the_runs(tmp_path: Path, stand_in: Path):
    stand_in.write_text(
        stand_in.read_text().replace("lambda n, _: stopped.append(n)", "lambda n, _: signal.signal(n, signal.SIG_DFL)")
    )
    config = write_config(tmp_path)
    process = ablate(stand_in, "-c", config, *GRID, HOLD=str(config))
    wait_for(tmp_path / "runs/study", "*/*/begun")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ends(process)[0] == 130


@pytest.mark.slow
def test_a_killed_study_goes_on_and_waits_for_what_it_left_behind(tmp_path: Path, stand_in: Path):
    config = write_config(tmp_path)
    ends(ablate(stand_in, "-c", config, *GRID))
    study = tmp_path / "runs/study"
    study.rename(tmp_path / "reference")
    (tmp_path / "hold").touch()
    process = ablate(stand_in, "-c", config, *GRID, HOLD=str(tmp_path / "hold"))
    wait_for(study, "*/*/begun")
    process.kill()
    process.wait()
    process = ablate(stand_in, "-c", config, *GRID)
    assert process.stdout is not None
    while "wait  teacher=self-seed=0: another process is at it" not in (line := process.stdout.readline()):
        assert line, "it ended without waiting"
    (tmp_path / "hold").unlink()
    status, _, errors = ends(process)
    assert status == 0, errors
    assert starts(study) == 4, "the run that was left behind was not started a second time"
    assert files_in(study) == files_in(tmp_path / "reference")


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_is_reported(tmp_path: Path, stand_in: Path):
    config = write_config(tmp_path)
    status, output, errors = ends(ablate(stand_in, "-c", config, *GRID, FAILS="self"))
    assert status == 1
    assert "FAILED teacher=self-seed=0: exit status 1: error: loss is nan" in output
    assert errors.count("failed: ") == 2
    study = tmp_path / "runs/study"
    page = page_of(study)
    assert [row[2] for row in page.tables[-2][1:]] == ["failed, exit status 1: error: loss is nan"] * 2 + ["done"] * 2
    status, _, errors = ends(ablate(stand_in, "-c", config, *GRID))
    assert status == 0, errors
    assert "not in the numbers" not in page_of(study).text, "mended and done again"


@pytest.mark.slow
def test_a_dry_run_estimates_and_writes_nothing(tmp_path: Path, stand_in: Path):
    config = write_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, output, errors = ends(ablate(stand_in, "-c", config, *GRID, "--dry-run"))
    assert (status, errors) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert "2 rows, 4 runs of 8 steps, 4 to do" in output
    assert "no estimate: error: no room on the device" in output
    assert "1.50 hours a run, 3.00 hours for 2" in output
    assert "no estimate for 2 of 4 runs" in output
    assert output.count("--resume auto") == 4


def test_a_dry_run_counts_only_what_is_not_done(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    study = plan_study(asked(write_config(tmp_path)))
    folder = make_run(study.jobs[0].folder / "11-22_10-00-run", 0.5)
    (folder / "config.json").write_text(json.dumps(dump_config(study.jobs[0].config)))
    with pytest.raises(UserError, match="was computed by commit c0ffee, the code is"):
        list(describe_plan(study, [None]))
    monkeypatch.setattr("utils.study_run.code_version", lambda: "c0ffee")
    text = "\n".join(describe_plan(study, [None, None]))
    assert "seed 0: done" in text
    assert "seed 1: to do" in text
    assert "estimated time        1.50 hours, 1.50 hours with 2 at a time" in text


def test_each_device_has_one_run_at_a_time(tmp_path: Path, stand_in: Path):
    study = plan_study(asked(write_config(tmp_path), seeds=[0, 1, 2]))
    said: list[str] = []
    runner = Runner(study, ["cuda:0", "cuda:1"], say=said.append)
    runner.run()
    assert runner.failed == []
    used = [path.read_text().split()[1] for path in sorted(study.folder.glob("*/*/starts.txt"))]
    assert used[:2] == ["cuda:0", "cuda:1"]
    assert sum(line.startswith("start") for line in said) == 3
    assert not any("cuda" in job.command for job in study.jobs), "the report does not depend on where a run took place"


@pytest.fixture
def stand_in_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stand_in_evaluation.py"
    path.write_text(EVALUATION_STAND_IN)
    monkeypatch.setattr("utils.study.EVALUATION", str(path))


TWO_ROWS = ["training.unlabeled.teacher=self,cross"]


def test_runs_are_measured_once_each_on_other_images(tmp_path: Path, stand_in: Path, stand_in_evaluation: None):
    study = plan_study(asked(write_config(tmp_path), grid=TWO_ROWS, measure=["unlabeled", "test"]))
    said: list[str] = []
    for _ in range(2):  # the second time nothing is left to do
        runner = Runner(study, ["cuda:1", "cpu"], say=said.append)
        runner.run()
        assert runner.failed == []
    assert sum(line.startswith("start") for line in said) == 4 * (1 + 2)
    results = results_of_folders([study.folder], [])
    assert results.splits == ["test", "unlabeled"]
    gpus = {record.measured["test"]["gpu"] for record in results.records}
    assert gpus <= {"1", "-1"}
    assert [row.ensemble for row in results.on("test").rows] == [
        pytest.approx([value - 20 for value in row.ensemble]) for row in results.rows
    ]
    write_report(results, tmp_path / "report")
    titles = re.findall(r"^## (Results.*)", (tmp_path / "report/report.md").read_text(), re.MULTILINE)
    assert titles == ["Results", "Results on test", "Results on unlabeled"]
    found = markdown_tables((tmp_path / "report/report.md").read_text())
    assert [table[2][1] for table in found if table[0][0] == "setting" and "ensemble" in table[0][1]] == [
        "60.5 ± 0.7",
        "40.5 ± 0.7",
        "40.5 ± 0.7",
    ]


def test_other_rows_and_seeds_are_added_to_a_study_and_all_that_is_done_is_reported(tmp_path: Path, stand_in: Path):
    config = write_config(tmp_path)
    for rows, seeds in ((["full CTT"], [0]), (["full CTT"], [1]), (["two mean teachers"], [1])):
        study = plan_study(asked(config, preset="paper", rows=rows, seeds=seeds))
        Runner(study, [None], say=print).run()
    results = results_of_folders([study.folder], [])
    assert [(row.label, [record.seed for record in row.done]) for row in results.rows] == [
        ("two mean teachers", [1]),
        ("full CTT", [0, 1]),
    ], "in the preset's order, not in that of training"
    assert [command.partition("--rows ")[2] for command in results.commands] == [
        "'full CTT' --seeds 0",
        "'full CTT' --seeds 1",
        "'two mean teachers' --seeds 1",
    ]
    keep_study(study.folder, tmp_path / "kept/study")
    assert overview(results_of_study(tmp_path / "kept/study")) == overview(results)

    shutil.rmtree(study.folder / "full_CTT-seed=0/11-22_10-00-run")  # planned by another command, and not done
    Runner(study, [None], say=print).run()
    left = [record.name for record in results_of_study(study.folder).records]
    assert left == ["two_mean_teachers-seed=1", "full_CTT-seed=1"]
    whole = plan_study(asked(config, preset="paper", rows=["full CTT", "two mean teachers"]))
    Runner(whole, [None], say=print).run()
    assert results_of_study(study.folder).commands == [shown(whole.command)], "it made all that is there"


def test_rows_that_could_not_share_a_table_with_those_that_are_done_are_refused(tmp_path: Path, stand_in: Path):
    config = write_config(tmp_path)
    study = plan_study(asked(config, preset="paper", rows=["full CTT"], seeds=[0]))
    Runner(study, [None], say=print).run()
    with pytest.raises(UserError, match=r"num_iterations is 9 in supervised-seed=0, 8 in full_CTT-seed=0; make it one"):
        plan_study(asked(config, preset="paper", rows=["supervised"], seeds=[0], set=["training.num_iterations=9"]))


@pytest.mark.parametrize(("rows", "seeds"), [(["full CTT"], [1]), (["supervised"], [0])])
def test_runs_that_differ_in_what_no_row_tells_never_share_a_table(
    tmp_path: Path, stand_in: Path, rows: list[str], seeds: list[int]
):
    config = write_config(tmp_path)
    first = plan_study(asked(config, preset="paper", rows=["full CTT"], seeds=[0]))
    Runner(first, [None], say=print).run()
    later = asked(config, preset="paper", rows=rows, seeds=seeds)
    other = plan_study(later)
    write_config(tmp_path, training__learning_rate=0.5)
    with pytest.raises(UserError, match=r"in what no row tells; .*\n *training\.learning_rate: 0\.\d+ and 0\.\d+$"):
        plan_study(later)

    # It cannot be told beforehand where the file is changed while the study runs.
    said: list[str] = []
    runner = Runner(other, [None], say=said.append)
    runner.run()
    assert "exit status 0: it ended without a score of the planned configuration" in said[-1]
    (job,) = other.jobs
    assert [record.name for record in results_of_study(first.folder).missing] == [job.name]
    job.failure.unlink()
    state = results_of_study(first.folder).missing[0].state
    assert state == "not done; the run that is there has another configuration"
    about = json.loads((job.folder / "job.json").read_text())
    about["config"]["training"]["learning_rate"] = 0.5
    (job.folder / "job.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="in what no row tells"):
        results_of_study(first.folder)


def test_a_run_is_measured_where_the_dataset_lies_now(tmp_path: Path):
    study = plan_study(asked(write_config(tmp_path), measure=["test"], seeds=[0], set=["data_root=there"]))
    make_run(study.jobs[0].folder / "11-22_10-00-run", 0.5)
    command = study.measurements[0].on(None)
    assert command[command.index("--data-root") + 1] == "there"
    for device in ("auto", "cpu", "cuda:0", "cuda:3"):
        asked_for = evaluation_parser().parse_args(study.measurements[0].on(device)[2:])
        assert device_of(asked_for.gpu) == device


@pytest.mark.parametrize(("status", "word"), [(130, "saved"), (-2, "saved"), (2, "FAILED"), (1, "FAILED")])
def test_a_run_that_fails_after_a_signal_is_not_taken_for_one_that_it_stopped(tmp_path: Path, status: int, word: str):
    said: list[str] = []
    study = plan_study(asked(write_config(tmp_path), seeds=[0]))
    runner, process = Runner(study, [None], say=said.append), Mock(returncode=status)
    study.jobs[0].folder.mkdir(parents=True)
    (study.jobs[0].folder / "output.txt").touch()
    runner._passed_on = {signal.SIGINT, signal.SIGHUP}
    runner._running = [_Running(study.jobs[0], None, process, ())]
    runner._collect()
    assert said[0].startswith(f"{word} ")


def test_counts_that_were_cut_off_are_none(tmp_path: Path):
    run = make_run(tmp_path / "run", 0.5)
    for text, precision in (("c,a,b\na,3,1\nb,1,3\n", 75), ("c,a,b\na,3,1\nb,1\n", None), ("c,a,b\na,3,1\n", None)):
        (run / "confusion_ensemble.csv").write_text(text)
        (record,) = results_of_folders([run], []).records
        assert record.mean_precision() == precision


def test_what_cannot_be_measured_is_told_and_the_rest_is_done(
    tmp_path: Path, stand_in: Path, stand_in_evaluation: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAILS", "self")
    monkeypatch.setenv("SPLIT_FAILS", "test")
    study = plan_study(asked(write_config(tmp_path), grid=TWO_ROWS, seeds=[0], measure=["test", "unlabeled"]))
    runner = Runner(study, [None], say=print)
    runner.run()
    assert [job.name for job in runner.failed] == ["teacher=self-seed=0", "teacher=cross-seed=0 on test"]
    results = results_of_folders([study.folder], [])
    assert results.splits == ["unlabeled"]
    assert [record.state for record in results.records] == ["failed, exit status 1: error: loss is nan", "done"]
    name = "training.unlabeled.teacher"
    assert [line[2] for line in next(table for table in tables(results) if table.title == "Runs").rows] == [
        "failed, exit status 1: error: loss is nan",
        "done; on test: failed, exit status 1: error: no test here",
    ]
    assert (
        f"1 of 2 runs are not in the numbers: {name}=self with seed 0 (failed, exit status 1). "
        f"Not measured: {name}=cross with seed 0 (on test failed, exit status 1)."
    ) in results_text(results)
    assert overview(results).splitlines()[2:] == [
        "| setting | seeds | val, mIoU % | unlabeled, mIoU % |",
        "| --- | --- | --- | --- |",
        "| teacher=self | 0 | no result | no result |",
        "| teacher=cross | 1 | 60.0 | 40.0 |",
    ]


def test_differences_of_several_studies_are_one_table_with_each_seed_s(tmp_path: Path):
    for name, scores in (("self", (0.5, 0.6)), ("cross", (0.52, 0.5999))):
        for seed, score in enumerate(scores):
            setting = [f"training.unlabeled.teacher={name}"]
            make_run(tmp_path / f"first/{name}/{seed}", score, seed=seed, settings=setting)
    for name, score in (("cut", 0.7), ("class", 0.6)):
        run = make_run(tmp_path / f"second/{name}", score, settings=[f"training.unlabeled.mix_mask={name}"])
        test = run / "evaluation-test-original/result.json"
        test.parent.mkdir()
        result = json.loads((run / "result.json").read_text())
        models = {"ensemble": {"mean_iou": 0.2 + score / 2, "pixel_accuracy": 0.9, "iou": {}}}
        test.write_text(json.dumps(result | {"split": "test", "models": models}))
    studies = [results_of_folders([tmp_path / name], []) for name in ("first", "second")]
    facts = " | ".join(str(studies[0].facts[key]) for key in ("labeled", "step"))
    title = studies[0].title
    assert differences(*studies).splitlines()[2:] == [
        f"| {title} | {facts} | teacher=cross | 56.0 ± 5.6 | - |",
        f"| {title} | {facts} | teacher=self | -1.0 (-2.0, +0.0) | - |",
        f"| {studies[1].title} | {facts} | mix_mask=class | 60.0 | 50.0 |",
        f"| {studies[1].title} | {facts} | mix_mask=cut | +10.0 | +5.0 |",
    ]
    assert differences(studies[0], one_student=True).splitlines() == [
        "| study | labeled | step | setting; one student, mIoU % | val |",
        "| --- | --- | --- | --- | --- |",
        f"| {title} | {facts} | teacher=cross | 41.0 ± 5.6 |",
        f"| {title} | {facts} | teacher=self | -1.0 (-2.0, +0.0) |",
    ]
    assert overview(studies[0], one_student=True).splitlines()[2:] == [
        "| setting | seeds | val, one student, mIoU % |",
        "| --- | --- | --- |",
        "| teacher=cross | 2 | 41.0 ± 5.6 |",
        "| teacher=self | 2 | 40.0 ± 7.1 (-1.0) |",
    ]


def test_rows_are_compared_with_the_first_that_is_asked_for(tmp_path: Path):
    for name, score in (("cross", 0.5), ("peer", 0.7), ("self", 0.6)):
        make_run(tmp_path / f"study/{name}", score, settings=[f"training.unlabeled.teacher={name}"])
    for name, score in (("self", 0.4), ("cross", 0.5)):
        make_run(tmp_path / f"other/{name}", score, settings=[f"training.unlabeled.teacher={name}"])
    studies = [results_of_folders([tmp_path / name], []) for name in ("study", "other")]
    chosen = only_rows(studies, ["teacher=self", "teacher=peer", "teacher=cross"])
    assert [line.split(" | ")[3:] for line in differences(*chosen).splitlines()[2:]] == [
        ["teacher=self", "60.0 |"],
        ["teacher=peer", "+10.0 |"],
        ["teacher=cross", "-10.0 |"],
        ["teacher=self", "40.0 |"],
        ["teacher=cross", "+10.0 |"],
    ]
    assert [study.rows for study in only_rows(studies, [])] == [study.rows for study in studies]
    with pytest.raises(
        UserError, match='--rows "teacher=slef": no such row; there are "teacher=cross", "teacher=peer", '
    ):
        only_rows(studies, ["teacher=self", "teacher=slef"])
    with pytest.raises(UserError, match=r'--rows "teacher=peer": not in .*; the first row must be in every study'):
        only_rows(studies, ["teacher=peer", "teacher=self"])


def test_keys_of_one_last_name_are_written_out(tmp_path: Path):
    for index, value in enumerate(("false", "true")):
        settings = [f"training.{part}.flip={value}" for part in ("data", "unlabeled")]
        make_run(tmp_path / f"study/{index}", 0.5, settings=[*settings, f"training.data.crop={value}"])
    first, second = (
        line.split(" | ")[0] for line in overview(results_of_folders([tmp_path / "study"], [])).splitlines()[4:]
    )
    assert first == "| crop=false, training.data.flip=false, training.unlabeled.flip=false"
    assert second == first.replace("false", "true")


@pytest.mark.parametrize("models", [{}, {"student_0": {"mean_iou": 0.5}}, {"ensemble": {"mean_iou": None}}])
def test_an_evaluation_without_a_score_of_the_ensemble_is_none(tmp_path: Path, models: dict[str, Any]):
    run = make_run(tmp_path / "run", 0.5)
    other = run / "evaluation-test-original/result.json"
    other.parent.mkdir()
    other.write_text(json.dumps(about() | {"models": models}))
    assert results_of_folders([run], []).splits == []
    (run / "result.json").write_text(json.dumps(about() | {"models": models}))
    assert [record.result for record in results_of_folders([run], []).records] == [None]


def test_measurements_of_other_images_are_not_mixed(tmp_path: Path, stand_in: Path, stand_in_evaluation: None):
    study = plan_study(asked(write_config(tmp_path), measure=["test"]))
    Runner(study, [None], say=print).run()
    _, path = sorted(study.folder.glob("*/*/evaluation-test-original/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split hash": "another"}))
    with pytest.raises(UserError, match=r"split hash is a .* and another"):
        results_of_folders([study.folder], [])


def test_a_list_that_was_changed_after_it_was_measured_on_is_refused(
    tmp_path: Path, stand_in: Path, stand_in_evaluation: None
):
    study = plan_study(asked(write_config(tmp_path), grid=TWO_ROWS, seeds=[0], measure=["test"]))
    same, other = (Mock(split_hash=Mock(return_value=name)) for name in ("a", "b"))
    check_lists(study, other)  # nothing was measured
    Runner(study, [None], say=print).run()
    check_lists(study, same)
    with pytest.raises(UserError, match=r"evaluation-test-original: measured on other images, hash a, while .* has b"):
        check_lists(study, other)


def test_a_kept_study_tells_the_same_and_can_be_gone_on_with(tmp_path: Path, stand_in: Path, stand_in_evaluation: None):
    study = plan_study(asked(write_config(tmp_path), grid=TWO_ROWS, measure=["test"]))
    Runner(study, [None], say=print).run()
    shutil.rmtree(study.folder / "teacher=cross-seed=1/11-22_10-00-run")  # as if there had been no time for it
    kept = keep_study(study.folder, tmp_path / "kept/study")
    assert as_markdown(kept, {}) == as_markdown(results_of_folders([study.folder], []), {})
    assert overview(kept) == overview(results_of_folders([study.folder], []))
    assert {path.name for path in (tmp_path / "kept/study").rglob("*") if path.is_file()} == {
        "study.json",
        "job.json",
        "config.json",
        "result.json",
        "log.jsonl",
        "report.md",
        *(f"{name}.png" for name in draw_pictures(kept)),
    }
    keep_study(study.folder, tmp_path / "kept/study")  # once more
    shutil.rmtree(study.folder)
    shutil.copytree(tmp_path / "kept/study", study.folder)
    said: list[str] = []
    Runner(study, [None], say=said.append).run()
    assert [line for line in said if line.startswith("start")] == [
        "start teacher=cross-seed=1",
        "start teacher=cross-seed=1 on test",
    ]


def test_a_kept_study_never_replaces_another(tmp_path: Path, stand_in: Path):
    for name in ("study", "other"):
        Runner(plan_study(asked(write_config(tmp_path), name=name, seeds=[0])), [None], say=print).run()
    keep_study(tmp_path / "runs/study", tmp_path / "kept")
    with pytest.raises(UserError, match="holds the study study; choose another --output"):
        keep_study(tmp_path / "runs/other", tmp_path / "kept")
    with pytest.raises(UserError, match="the study itself"):
        keep_study(tmp_path / "runs/study", tmp_path / "runs/study")
    with pytest.raises(UserError, match="the folder of 2 studies: other, study"):
        keep_study(tmp_path / "runs", tmp_path / "new")
    weights = tmp_path / "kept/seed=0/11-22_10-00-run/checkpoint.pth"
    weights.parent.mkdir()
    weights.touch()
    with pytest.raises(UserError, match=r"kept holds weights \(checkpoint\.pth in .*; choose another --output"):
        keep_study(tmp_path / "runs/study", tmp_path / "kept")
    assert weights.exists()


def test_a_thinned_log_holds_means_and_validations_and_what_is_told_by_class_once():
    lines: list[dict[str, Any]] = [{"step": step, "supervised/0": 1.0 * step} for step in range(1, 101)]
    for line in lines[-20:]:
        line["bank_fill_of_class/0/sky"] = line["step"] / 100
    lines[94]["supervised/0"] = float("nan")
    lines[96]["pseudo_label/kept/0"] = 0.5
    lines += [{"step": 50, "val/ensemble": 0.123456, "val_iou/ensemble/sky": 0.5, "val_iou/teacher_0/sky": 0.4}]
    kept = thinned(lines, 10)
    assert kept[:4] == [{"step": 10 * tens, "supervised/0": 10 * tens - 4.5} for tens in range(1, 5)]
    assert kept[5] == {"step": 50, "val/ensemble": 0.1235, "val_iou/ensemble/sky": 0.5}
    assert [line["step"] for line in kept[6:]] == [60, 70, 80, 90, 100]
    last = {"step": 100, "supervised/0": 95.56, "pseudo_label/kept/0": 0.5, "bank_fill_of_class/0/sky": 0.955}
    assert kept[9:] == [{"step": 90, "supervised/0": 85.5}, last]
    assert thinned(kept, 100) == kept
    assert [line["step"] for line in thinned(lines[:25], 10)] == [2, 5, 8, 11, 13, 16, 19, 22, 25], "23 to 25 are late"
    assert thinned([], 10) == []


def test_a_study_does_not_go_on_with_other_code(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    study = plan_study(asked(write_config(tmp_path)))
    versions = iter(["one", "one", "two", "two"])
    monkeypatch.setattr("utils.study_run.code_version", lambda: next(versions))
    with pytest.raises(UserError, match="was one when the study began and is two now"):
        Runner(study, [None], say=print).run()
    assert starts(study.folder) == 1
    monkeypatch.setattr("utils.study_run.code_version", lambda: "three")
    with pytest.raises(UserError, match="the code is three now, and both cannot share a table"):
        Runner(study, [None], say=print).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "../x"], "--name '../x': expected"),
        (["--devices", "cuda:9"], "CUDA devices"),
        (["--devices", "gpu"], "is none of auto, cpu, cuda, cuda:0"),
        (["--preset", "pape"], "invalid choice"),
        (["--measure", "test"], "nowhere: no such folder"),
        (["--set", "training.batch_sise=1"], "did you mean training.batch_size"),
    ],
)
def test_wrong_requests_end_in_one_message_and_write_nothing(tmp_path: Path, arguments: list[str], message: str):
    status, _, errors = ends(ablate(None, "-c", write_config(tmp_path), "--name", "study", *arguments))
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists()


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """Reports without what was measured by a clock."""
    cut = re.compile(rb"(## |<h2>)Time and memory.*?(?=## |<h2>)", re.DOTALL)
    return {name: cut.sub(b"", data) if name.startswith("report") else data for name, data in files.items()}


@pytest.mark.slow
def test_a_study_killed_twice_reports_the_same_as_one_that_was_not(tmp_path: Path):
    demo = faults.tiny_demo(tmp_path / "demo")
    config = faults.write_config(tmp_path, demo)
    study = tmp_path / "runs/study"
    command = (
        "-c",
        config,
        *GRID[:-1],
        "--set",
        "dataset.test=ImageSets/Segmentation/val.txt",
        "--measure",
        "labeled",
        "test",
    )
    status, _, errors = ends(ablate(None, *command))
    assert status == 0, errors
    reference = without_times(files_in(study))
    study.rename(tmp_path / "reference")

    for cell in ("self", "cross"):
        process = ablate(None, *command)
        wait_for(study, f"*{cell}*/*/checkpoint.pth")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        for child in children if cell == "self" else ():  # the other time what it left behind goes on
            os.kill(int(child), signal.SIGKILL)
    status, _, errors = ends(ablate(None, *command))
    assert status == 0, errors
    assert without_times(files_in(study)) == reference
    again = ends(ablate(None, *command))
    assert again[0] == 0
    assert without_times(files_in(study)) == reference


# ------------------------------------------------------------------------------------------------ a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_the_tables_and_the_curves(tmp_path: Path):
    write_report(results_of_folders(make_study(tmp_path), ["python3", "ablate.py"]), tmp_path / "out")
    page = tmp_path / "out/report.html"
    # What a browser made of it, measured in it and written where --dump-dom shows it.
    probe = """<script>addEventListener("load", () => {
      const size = (e) => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
      document.title = JSON.stringify({
        tables: [...document.querySelectorAll("table")].map(t => t.rows.length),
        curves: [...document.querySelectorAll("svg.picture")].map(e => [...size(e), e.querySelectorAll("path").length]),
        overflow: document.documentElement.scrollWidth - innerWidth,
        requests: performance.getEntriesByType("resource").length,
        ink: getComputedStyle(document.querySelector("svg.picture")).color,
        shown: size(document.querySelector("table td")),
      });
    });</script></body>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    for size in ("1200,2400", "500,2400"):  # a headless window is not narrower
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        assert CHROMIUM is not None
        done = subprocess.run(
            [CHROMIUM, *options, f"--window-size={size}", "--virtual-time-budget=5000", "--dump-dom", probed.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", done.stdout)
        assert title is not None
        found = json.loads(title[1])
        assert found["tables"] == [3, 5, 7, 7]
        assert found["overflow"] <= 0, "only tables and pictures scroll sideways, the page does not"
        assert found["requests"] == 0
        assert len(found["curves"]) == 3
        assert all(width > 400 and height > 80 and paths > 10 for width, height, paths in found["curves"])
        assert min(found["shown"]) > 10
