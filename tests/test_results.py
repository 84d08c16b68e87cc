"""The studies in results/: complete, comparable, and told by the pages as their files tell them."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import near_far
from utils.cli import overview_parser
from utils.config import dump_config, load_config
from utils.errors import UserError
from utils.study import measured
from utils.study_figures import _signals, draw_pictures
from utils.study_report import as_markdown, differences, only_rows, overview
from utils.study_results import results_of_study

PROJECT = Path(__file__).parent.parent
STUDIES = sorted(path.parent for path in (PROJECT / "results").glob("*/study.json"))
RUNS = [path.parent for study in STUDIES for path in sorted(study.glob("*/*/result.json"))]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_report_is_what_the_files_give(study: Path, monkeypatch: pytest.MonkeyPatch):
    for drawn in ("_png", "_svg"):  # the text needs the pictures' names alone
        monkeypatch.setattr(f"utils.study_figures.{drawn}", lambda *_: None)
    results = results_of_study(study)
    assert (study / "report.md").read_text() == as_markdown(results, draw_pictures(results))


def test_pages_show_the_tables_that_their_commands_print_and_every_study_is_in_one():
    told = set()
    for page in ("README.md", "results/README.md", "results/why.md", "results/history.md"):
        text = (PROJECT / page).read_text()
        for command in re.findall(r"^python3 ablate.py overview (.+)$", text, re.MULTILINE):
            args = overview_parser().parse_args(shlex.split(command))
            studies = only_rows([results_of_study(PROJECT / study) for study in args.studies], args.rows)
            assert (differences if args.differences else overview)(*studies, one_student=args.student) in text
            told |= {study.name for study in args.studies}
    assert told == {study.name for study in STUDIES}


def test_no_band_of_a_share_leaves_what_a_share_can_be():
    results = results_of_study(PROJECT / "results/labels_1_8_adjusted")
    figure = Figure()
    assert _signals(figure, results)
    heights = [path.vertices[:, 1] for axes in figure.axes for band in axes.collections for path in band.get_paths()]
    assert len(heights) >= 8
    assert min(map(min, heights)) >= 0
    assert max(map(max, heights)) <= 1


def _said_by(kept: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The values now of the keys that a kept configuration has."""
    return {key: _said_by(value, now[key]) if isinstance(value, dict) else now[key] for key, value in kept.items()}


@pytest.mark.parametrize("run", RUNS, ids=lambda path: f"{path.parent.parent.name}/{path.parent.name}")
def test_a_kept_run_can_be_trained_again_and_says_what_it_is(run: Path):
    config = load_config(run / "config.json")
    kept = json.loads((run / "config.json").read_text())
    assert _said_by(kept, dump_config(config)) == kept, "a key that came later has its default"
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == config.training.num_iterations
    assert result["seed"] == config.seed
    assert "+" not in result["commit"], "made by a committed version"
    assert measured(run, config.utils.val_protocol)["test"]["commit"] == result["commit"]
    for key in ("split hash", "labeled hash", "torch", "machine"):
        assert result[key]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == result["step"]


def test_the_named_recipe_is_what_its_study_trained():
    job = "results/labels_1_8_best_6000/full_CTT-high_weight=0.02-low_weight=0.02-seed=0"
    run = next((PROJECT / job).glob("*/config.json"))
    trained, recipe = load_config(run), load_config(PROJECT / "configs/configCamVid_best.json")
    for key in ("model", "backbone", "backbone_width", "feature_channels", "pretrained", "seed", "training"):
        assert getattr(trained, key) == getattr(recipe, key)
    assert trained.data.resize == recipe.data.resize


def test_the_page_shows_the_table_of_near_and_far_images():
    assert near_far.table(PROJECT / "results/near_far") in (PROJECT / "results/why.md").read_text()


def test_near_is_measured_within_a_drive():
    found = near_far.distances(["a_0030", "a_f0090p", "b_1000"], ["a_0060", "a_0200", "b_1030", "c_0030"])
    assert list(found.values()) == [30, 110, 30, float("inf")]
    with pytest.raises(UserError, match="expected DRIVE_NUMBER"):
        near_far.distances(["a_1"], ["noise"])
    with pytest.raises(UserError, match="no evaluation here"):
        near_far.table(PROJECT / "nowhere")


def test_the_table_compares_runs_of_one_seed(tmp_path: Path):
    for name, score in (("supervised-seed=0", 0.5), ("supervised-seed=1", 0.6), ("cross_teacher-seed=1", 0.625)):
        folder = tmp_path / "study" / f"{name}-far"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"labeled": 9, "models": {"ensemble": {"mean_iou": score}}}))
    assert near_far.table(tmp_path).splitlines()[2:] == [
        "| study | 9 | supervised | - | 55.0 |",
        "| study | 9 | cross teacher | - | 62.5 (+2.5) |",
    ]
