"""CamVid from the folder that SegNet's authors publish."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DatasetFiles
from data.camvid import prepare_camvid
from tests.test_scripts import PROJECT, run
from utils.config import Config, load_config
from utils.errors import DataError

COUNTS = {"train": 32, "val": 3, "test": 4}
SIZE = (12, 16)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As SegNet's, with fewer and smaller images."""
    monkeypatch.setattr("data.camvid.EXPECTED", COUNTS)
    monkeypatch.setattr("data.camvid.SIZE", SIZE)
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for folder in (split, f"{split}annot"):
            (tmp_path / "CamVid" / folder).mkdir(parents=True)
        for index in range(count):
            name = f"{split}_{index:06d}.png"
            shade = np.full((*SIZE, 3), rng.integers(256, size=3), dtype=np.uint8)
            Image.fromarray(shade).save(tmp_path / "CamVid" / split / name)
            ids = rng.integers(12, size=SIZE).astype(np.uint8)
            Image.fromarray(ids).save(tmp_path / "CamVid" / f"{split}annot" / name)
    return tmp_path / "CamVid"


def config_for(root: Path) -> Config:
    lists = ["dataset.train=ImageSets/Segmentation/train.txt", "dataset.labeled=null", "dataset.unlabeled=null"]
    return load_config(PROJECT / "configs/configCamVid.json", overrides=[*lists, f"data_root={json.dumps(str(root))}"])


def test_the_folder_becomes_the_dataset_of_the_configurations(source: Path, tmp_path: Path):
    root = tmp_path / "voc"
    lines = prepare_camvid(source, config_for(root))
    assert lines[0] == f"{root}: CamVid is ready (train 32 images, val 3 images, test 4 images)"
    assert [int(line.split(": ")[1].split()[0]) for line in lines[1:]] == [2, 4, 8]
    files = DatasetFiles(load_config(PROJECT / "configs/configCamVid.json", overrides=[f"data_root={root}"]))
    assert {split: len(files.ids(split)) for split in ("labeled", "unlabeled", "val", "test")} == {
        "labeled": 4, "unlabeled": 28, "val": 3, "test": 4,
    }  # fmt: skip
    for identifier in files.ids("val"):
        given = np.asarray(Image.open(source / f"valannot/{identifier}.png"))
        assert np.array_equal(files.read_classes(identifier), np.where(given == 11, 255, given))
        frame = np.asarray(Image.open(source / f"val/{identifier}.png")).astype(int)
        assert np.abs(np.asarray(Image.open(root / f"JPEGImages/{identifier}.jpg")) - frame).max() < 6
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    assert prepare_camvid(source, config_for(root))[1].endswith("was there already")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")} == before


def test_what_is_not_all_of_camvid_is_refused_before_anything_is_written(source: Path, tmp_path: Path):
    root = tmp_path / "voc"
    frame, label = source / "train/train_000003.png", source / "trainannot/train_000003.png"
    label.rename(source / "gone.png")
    with pytest.raises(DataError, match=r"1 label maps are missing, for example .*trainannot/train_000003\.png"):
        prepare_camvid(source, config_for(root))
    frame.unlink()
    with pytest.raises(DataError, match=r"31 frames in train, expected 32; expected the folder CamVid of https"):
        prepare_camvid(source, config_for(root))
    assert not root.exists()


def test_a_file_in_the_place_of_the_folder_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "voc").touch()
    with pytest.raises(DataError, match="voc is a file; name a folder"):
        prepare_camvid(source, config_for(tmp_path / "voc"))


@pytest.mark.parametrize(
    ("ids", "message"), [(np.full(SIZE, 12), "label id 12; expected 0..10, 11"), (np.zeros((3, 4)), "4 x 3 pixels")]
)
def test_a_file_that_is_not_camvid_s_is_named(source: Path, tmp_path: Path, ids: np.ndarray, message: str):
    Image.fromarray(ids.astype(np.uint8)).save(source / "trainannot/train_000003.png")
    with pytest.raises(DataError, match=rf"train_000003\.png: {message}"):
        prepare_camvid(source, config_for(tmp_path / "voc"))


def test_the_command_names_what_it_expects(tmp_path: Path):
    done = run("prepare_data.py", "camvid", tmp_path, tmp_path / "voc")
    assert done.returncode == 5
    assert "0 frames in train, expected 367" in done.stderr
    assert "Traceback" not in done.stderr
