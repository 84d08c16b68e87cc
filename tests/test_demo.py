"""The demo dataset: the same everywhere, complete or not there, and in VOC layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import demo
from data.demo import CLASSES, IGNORE_LABEL, MANIFEST, draw_example, make_demo_dataset
from utils.errors import UserError
from utils.visualize import voc_palette

SIZE = (40, 56)


def make(root: Path, *, seed: int = 3, labeled: int = 6, unlabeled: int = 3, val: int = 2) -> Path:
    return make_demo_dataset(root, seed=seed, size=SIZE, labeled=labeled, unlabeled=unlabeled, val=val)


def read_list(root: Path, name: str) -> list[str]:
    return (root / name).read_text().split()


def label_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "SegmentationClassAug").iterdir())}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("demo") / "set")


def test_two_roots_hold_the_same_labels_and_images(root: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other" / "deep")
    assert label_bytes(root) == label_bytes(other)
    for path in (root / "JPEGImages").iterdir():
        same = np.asarray(Image.open(path)) == np.asarray(Image.open(other / "JPEGImages" / path.name))
        assert same.all(), path.name


def test_seed_and_split_change_the_pictures() -> None:
    image, label = draw_example(seed=0, split="val", index=1, size=SIZE)
    for seed, split in ((1, "val"), (0, "labeled")):
        other_image, other_label = draw_example(seed=seed, split=split, index=1, size=SIZE)
        assert (other_image != image).any()
        assert (other_label != label).any()


def test_lists_are_disjoint_counted_and_have_files(root: Path) -> None:
    labeled, unlabeled = read_list(root, "splits/labeled.txt"), read_list(root, "splits/unlabeled.txt")
    val = read_list(root, "ImageSets/Segmentation/val.txt")
    assert (len(labeled), len(unlabeled), len(val)) == (6, 3, 2)
    assert len({*labeled, *unlabeled, *val}) == 11
    assert read_list(root, "ImageSets/Segmentation/train.txt") == labeled + unlabeled
    for name in labeled + unlabeled + val:
        assert Image.open(root / f"JPEGImages/{name}.jpg").size == SIZE[::-1]
        assert Image.open(root / f"SegmentationClassAug/{name}.png").size == SIZE[::-1]


def test_labels_are_palette_images_with_known_ids_and_thin_borders(root: Path) -> None:
    for path in (root / "SegmentationClassAug").iterdir():
        image = Image.open(path)
        assert image.mode == "P"
        assert image.getpalette() == [value for color in voc_palette() for value in color]
        label = np.asarray(image)
        assert set(np.unique(label)) <= {*range(len(CLASSES)), IGNORE_LABEL}
        assert 0 < (label == IGNORE_LABEL).mean() < 0.25


def test_every_class_occurs_in_the_labeled_images(root: Path) -> None:
    names = read_list(root, "splits/labeled.txt")
    labels = [np.asarray(Image.open(root / f"SegmentationClassAug/{name}.png")) for name in names]
    assert set(np.unique(labels)) == {*range(len(CLASSES)), IGNORE_LABEL}
    with pytest.raises(ValueError, match="labeled is 5"):
        make(root, labeled=5)


def test_class_file_names_every_class_with_its_color(root: Path) -> None:
    classes = json.loads((root / "classes.json").read_text())
    assert classes["names"] == list(CLASSES)
    # As published for VOC.
    assert classes["palette"][:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert len(classes["palette"]) == len(CLASSES)


def test_complete_dataset_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "set")
    monkeypatch.setattr(demo, "_write_dataset", lambda *_, **__: pytest.fail("made again"))
    assert make(root) == root


@pytest.mark.parametrize("damage", [MANIFEST, "JPEGImages/val_0001.jpg", "splits/labeled.txt"])
def test_half_made_dataset_is_made_again(tmp_path: Path, damage: str) -> None:
    root = make(tmp_path / "set")
    before = label_bytes(root)
    (root / damage).unlink()
    make(root)
    assert (root / damage).exists()
    assert label_bytes(root) == before


def test_other_parameters_replace_the_dataset(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    make(root, unlabeled=1)
    assert read_list(root, "splits/unlabeled.txt") == ["unlabeled_0000"]
    assert not (root / "JPEGImages/unlabeled_0001.jpg").exists()


def test_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "draw_example", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    assert (make(tmp_path / "set") / MANIFEST).exists()


def test_the_folder_one_stands_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the folder this command runs in"):
        make_demo_dataset(Path())


def test_foreign_files_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "2007_000032.jpg").touch()
    with pytest.raises(ValueError, match="2007_000032"):
        make(tmp_path)
    assert (tmp_path / "JPEGImages" / "2007_000032.jpg").exists()
