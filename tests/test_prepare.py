"""prepare_data.py as it is typed: what it prints, what it writes, and its exit status."""

import importlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data.datasets
import data.describe
from data.splits import read_ids
from tests.conftest import tiny_values
from tests.test_scripts import run
from utils.config import load_config
from utils.errors import DataError, UserError

IDS = [f"{index:04d}" for index in range(20)]
Run = Callable[..., int]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty images of 60 x 50 with label maps of two classes; no lists."""
    rng = np.random.default_rng(0)
    for folder in ("photos", "masks"):
        (tmp_path / "roads" / folder).mkdir(parents=True)
    for name in IDS:
        pixels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"roads/photos/{name}.jpg")
        Image.fromarray(rng.integers(0, 2, (50, 60), dtype=np.uint8)).save(tmp_path / f"roads/masks/{name}.png")
    return tmp_path / "roads"


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Its exit status, with an empty folder in place of this project."""
    project = tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    script: ModuleType = importlib.import_module("prepare_data")
    for module in (script, data.datasets, data.describe):
        monkeypatch.setattr(module, "PROJECT", project)

    def call(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        status: int = script.main()
        return status

    return call


def test_a_folder_is_described_checked_and_described_again(prepare: Run, root: Path, tmp_path: Path, capsys: Any):
    assert prepare("init", root, "--pretrained", "none", "--backbone", "resnet18") == 0
    said = capsys.readouterr().out
    path = tmp_path / "project/configs/roads.json"
    assert f"python3 prepare_data.py check {path}" in said
    assert f"python3 'cross_teacher_deeplabv3+.py' --config {path} --name roads" in said
    config = load_config(path)
    assert (config.pretrained, config.backbone, config.data.labels) == ("none", "resnet18", "masks/{id}.png")
    assert prepare("check", path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready to train"
    assert prepare("init", root, "--pretrained", "none", "--backbone", "resnet18") == 0, "the same again"
    with pytest.raises(UserError, match=r"roads\.json: is there already, and differs"):
        prepare("init", root, "--pretrained", "none")


def test_a_folder_is_checked_without_a_configuration(prepare: Run, root: Path, tmp_path: Path, capsys: Any):
    drawn = data.describe.describe(root, name="roads", lists=Path("lists")).lists
    (labeled,) = (ids for path, ids in drawn.items() if path.name == "labeled.txt")
    Image.new("RGB", (60, 50)).save(root / f"masks/{labeled[0]}.png")
    assert prepare("check", root, "--json", tmp_path / "report.json") == 2
    said = capsys.readouterr().out
    assert f"masks/{labeled[0]}.png" in said
    assert "1 cannot be read" in said
    assert said.splitlines()[-1].endswith("training or evaluation would fail")
    assert len(json.loads((tmp_path / "report.json").read_text())["errors"]) == 1
    assert not (tmp_path / "project/splits").exists(), "a check writes no lists"


def test_lists_are_drawn_and_named_for_training(prepare: Run, root: Path, tmp_path: Path, capsys: Any):
    prepare("init", root)
    config = tmp_path / "project/configs/roads.json"
    capsys.readouterr()
    assert prepare("split", "draw", config, "--labeled", "1/4", "3", "--seeds", 0, 1, "--cover") == 0
    said = capsys.readouterr().out
    first = "splits/roads/1_4/seed0"
    assert f"--set dataset.labeled={first}/labeled.txt --set dataset.unlabeled={first}/unlabeled.txt" in said
    assert len(read_ids(tmp_path / "project" / first / "labeled.txt")) == 4, "of the 18 that are not for validation"
    assert prepare("check", config, "--set", f"dataset.labeled={first}/labeled.txt",
                   "--set", f"dataset.unlabeled={first}/unlabeled.txt") == 0  # fmt: skip


def test_a_list_of_other_code_is_taken_over(prepare: Run, root: Path, tmp_path: Path, capsys: Any):
    prepare("init", root)
    config = tmp_path / "project/configs/roads.json"
    train = [name for name in IDS if name not in read_ids(tmp_path / "project/splits/roads/val.txt")]
    (tmp_path / "theirs.txt").write_text("\n".join(f"photos/{name}.jpg masks/{name}.png" for name in train[:5]))
    assert prepare("split", "import", config, tmp_path / "theirs.txt") == 0
    assert read_ids(tmp_path / "project/splits/roads/theirs/labeled.txt") == train[:5]
    (tmp_path / "split_0.pkl").write_bytes(pickle.dumps(np.arange(18)))
    with pytest.raises(UserError, match="--count"):
        prepare("split", "import", config, tmp_path / "split_0.pkl")
    assert prepare("split", "import", config, tmp_path / "split_0.pkl", "--count", 4, "--output", tmp_path / "out") == 0
    assert len(read_ids(tmp_path / "out/unlabeled.txt")) == 14


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["init", "ROOT/gone"], UserError, "no such folder"),
        (["init", "ROOT/photos"], UserError, "no label maps"),
        (["init", "ROOT", "--labeled", "0"], UserError, "expected a fraction"),
        (["init", "ROOT", "--val", "500"], UserError, "--val 500: of 20 images"),
        (["init", "ROOT", "--backbone", "resnet7"], UserError, "backbone"),
        (["init", "ROOT", "--pretrained", "imgnet"], UserError, "--pretrained imgnet: no such file"),
        (["init", "ROOT", "--name", "a/b c"], UserError, "--name 'a/b c'"),
        (["init", "ROOT", "--labeled", "gone.txt"], UserError, "a list that exists"),
        (["check", "ROOT/gone.json"], UserError, "cannot be read"),
        (["split", "draw", "ROOT/gone.json", "--labeled", "1/8"], UserError, "cannot be read"),
        (["cityscapes", "ROOT"], DataError, "no folder leftImg8bit"),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(
    prepare: Run, root: Path, tmp_path: Path, arguments: list[str], error: type[Exception], message: str
):
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        prepare(*(one.replace("ROOT", str(root)) for one in arguments))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_exit_statuses_and_help(tmp_path: Path):
    for command in ("demo", "voc", "cityscapes", "init", "check", "split draw", "split import"):
        done = run("prepare_data.py", *command.split(), "--help")
        assert done.returncode == 0
        assert f"usage: prepare_data.py {command}" in done.stdout
    (tmp_path / "leftImg8bit").mkdir()
    for arguments, status in ((["cityscapes", tmp_path], 5), (["init", tmp_path], 2), (["check", tmp_path / "x"], 2)):
        done = run("prepare_data.py", *arguments)
        assert done.returncode == status
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_init_writes_trains(prepare: Run, root: Path, tmp_path: Path, capsys: Any):
    prepare("init", root, "--labeled", "6", "--pretrained", "none")
    path = tmp_path / "project/configs/roads.json"
    values = json.loads(path.read_text())
    small = {
        key: value for key, value in tiny_values().items() if key.startswith("backbone") or key == "feature_channels"
    }
    for role in ("labeled", "unlabeled", "val"):  # lists are looked for in the project, which here is another one
        values["dataset"][role] = str(tmp_path / "project" / values["dataset"][role])
    path.write_text(json.dumps(values | small))
    done = run("cross_teacher_deeplabv3+.py", "--config", path, "--name", "roads", "--set", "training.num_iterations=2",
               "--set", f"utils.checkpoint_dir={tmp_path / 'runs'}", "--set", "training.num_workers=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "class 1" in done.stdout
