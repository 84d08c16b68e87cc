"""Real images, where they are at hand: beside the project in ../shared, never part of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DatasetFiles, evaluation_loader
from tests.conftest import tiny_values
from utils.config import check_config

PROJECT = Path(__file__).parent.parent
SHARED = PROJECT.parent / "shared"
CAMVID, VOC = SHARED / "camvid_voc", SHARED / "voc_samples"


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs the CamVid images in ../shared/camvid_voc")
def test_camvid_trains_by_its_json_alone(tmp_path: Path):
    overrides = {
        "training.num_iterations": 2,
        "training.unlabeled.start_iteration": 0,
        "training.contrastive.contrast_start": 1,
        "dataset.val": "two.txt",
        "utils.checkpoint_dir": str(tmp_path),
    }
    # A list lies below the data root, so a folder of links, with a list of two images to validate on, is the root.
    root = tmp_path / "root"
    root.mkdir()
    for path in CAMVID.iterdir():
        (root / path.name).symlink_to(path)
    (root / "two.txt").write_text("\n".join((CAMVID / "ImageSets/Segmentation/val.txt").read_text().split()[:2]))
    command = [
        sys.executable,
        "cross_teacher_deeplabv3+.py",
        "--config",
        "configs/configCamVid.json",
        "--name",
        "camvid",
    ]
    command += ["--data-root", str(root), *(f"--set={key}={json.dumps(value)}" for key, value in overrides.items())]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "bicyclist" in done.stdout
    (line, *_) = (next(tmp_path.glob("*-camvid")) / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2


@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images in ../shared/voc_samples")
def test_vocs_own_palette_files_are_read_as_ids_with_void_borders():
    dataset = {"root": str(VOC), "labels": "SegmentationClass/{id}.png", "train": "*", "num_classes": 21}
    config = check_config(tiny_values(dataset=dataset), source="test")
    files = DatasetFiles(config)
    items = [item for batch in evaluation_loader(files, "val", protocol="original") for item in batch]
    assert len(items) == 9
    for item in items:
        with Image.open(VOC / f"SegmentationClass/{item.id}.png") as image:
            assert image.mode == "P"
        assert item.image.shape[1:] == item.label.shape
        ids = set(np.unique(item.label))
        assert 255 in ids
        assert ids - {255} <= set(range(21))
    bird = next(item for item in items if item.id == "2007_006449")
    assert set(np.unique(bird.label)) == {0, 2, 255}


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs the CamVid images in ../shared/camvid_voc")
def test_a_folder_becomes_a_run_without_a_line_of_json(tmp_path: Path):
    """init, check, twenty steps; smaller than its defaults, and with two validation images, to be quick."""

    def command(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    config = tmp_path / "camvid.json"
    command("prepare_data.py", "init", CAMVID, "--name", "camvid", "--output", config, "--pretrained", "none",
            "--backbone", "resnet18", "--labeled", "splits/1_8/seed0/labeled.txt")  # fmt: skip
    checked = command("prepare_data.py", "check", config)
    assert checked.splitlines()[-1] == "ready to train"
    assert "7ca91b5b2844  splits/1_8/seed0/labeled.txt" in checked
    (tmp_path / "two.txt").write_text("\n".join((CAMVID / "ImageSets/Segmentation/val.txt").read_text().split()[:2]))
    small = {
        "training.num_iterations": 20, "training.num_workers": 0, "training.data.input_size": "64,64",
        "training.batch_size": 2, "backbone_width": 16, "feature_channels": 32,
        "dataset.val": str(tmp_path / "two.txt"), "utils.checkpoint_dir": str(tmp_path / "runs"),
    }  # fmt: skip
    overrides = [f"--set={key}={json.dumps(value)}" for key, value in small.items()]
    trained = command("cross_teacher_deeplabv3+.py", "--config", config, "--name", "camvid", *overrides)
    assert "bicyclist" in trained
    assert "step 20" in trained
