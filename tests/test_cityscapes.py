"""A Cityscapes download: complete or told what is wrong with it, and a faster copy that trains the same."""

import fcntl
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DatasetFiles, cityscapes, evaluation_loader
from data.cityscapes import prepare_cityscapes
from data.decode import image_size, read_label
from data.loaders import TrainingCrops
from tests.conftest import tiny_values
from utils import config as config_module
from utils.config import CITYSCAPES_IDS, ReleaseProtocol, check_config
from utils.errors import DataError

SIZE, RESIZED = (96, 192), (48, 96)
IDS = {
    "train": ["aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "zurich/zurich_000000_000019"],
    "val": ["bonn/bonn_000000_000019", "munster/munster_000000_000019"],
}
TRAIN_IMAGE = "leftImg8bit/train/aachen/aachen_000001_000019_leftImg8bit.png"
TRAIN_LABEL = "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png"
VAL_LABEL = "gtFine/val/bonn/bonn_000000_000019_gtFine_labelIds.png"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 96 x 192 that the preset halves."""
    monkeypatch.setattr(cityscapes, "EXPECTED", {split: len(ids) for split, ids in IDS.items()})
    monkeypatch.setattr(cityscapes, "SIZE", SIZE)
    preset = config_module.DATASETS["cityscapes"]
    resized = "{},{}".format(*RESIZED)
    small = preset.model_copy(update={"resize": resized, "release_protocol": ReleaseProtocol(resize=resized)})
    monkeypatch.setitem(config_module.DATASETS, "cityscapes", small)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Noise for images; label maps of blocks of five pixels with all ids, that no halving keeps as they are."""
    folder, rng = tmp_path / "full", np.random.default_rng(0)
    for split, ids in IDS.items():
        for name in ids:
            image = folder / f"leftImg8bit/{split}/{name}_leftImg8bit.png"
            label = folder / f"gtFine/{split}/{name}_gtFine_labelIds.png"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(image)
            blocks = rng.integers(0, 34, (20, 39), dtype=np.uint8).repeat(5, axis=0).repeat(5, axis=1)
            Image.fromarray(np.ascontiguousarray(blocks[: SIZE[0], : SIZE[1]])).save(label)
            label.with_name(label.name.replace("labelIds.png", "polygons.json")).write_text("{}")
            label.with_name(label.name.replace("labelIds.png", "color.png")).touch()
    return folder


def files(root: Path, **changes) -> DatasetFiles:
    values = tiny_values(dataset="cityscapes", data_root=str(root), **changes)
    values["training"]["data"] |= {"labeled_samples": 2}
    return DatasetFiles(check_config(values, source="test"))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


# ------------------------------------------------------------------------------------------------ checking


def test_a_complete_download_is_said_to_be_complete(root: Path):
    before = snapshot(root)
    assert prepare_cityscapes(root) == (
        f"{root}: Cityscapes is complete (train 3 images, val 2 images, all with label maps)"
    )
    assert snapshot(root) == before


def test_everything_that_is_wrong_is_told_at_once(root: Path):
    (root / TRAIN_IMAGE).unlink()
    (root / VAL_LABEL).unlink()
    (root / VAL_LABEL.replace("labelIds.png", "polygons.json")).unlink()
    Image.new("L", (50, 40)).save(root / TRAIN_LABEL.replace("_000001_", "_000000_"))
    (root / "leftImg8bit/val/munster/munster_000000_000019_leftImg8bit.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        prepare_cityscapes(root, half=root.parent / "half")
    assert caught.value.exit_status == 5
    for part in (
        f"train: 2 images in {root / 'leftImg8bit/train'}, expected 3\n",
        f"val: 1 of 2 images have no label map {root / VAL_LABEL}\n",
        "1 files that are not 192 x 96: ",
        "aachen_000000_000019_gtFine_labelIds.png (50 x 40)",
        "1 unreadable files: ",
        "munster_000000_000019_leftImg8bit.png: not a readable",
    ):
        assert part in str(caught.value)
    assert not (root.parent / "half").exists()


def test_polygons_without_label_maps_are_told_from_label_maps_that_are_missing(root: Path):
    for path in root.glob("gtFine/*/*/*_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(DataError) as caught:
        prepare_cityscapes(root)
    for part in ("train: 3 of 3 images have no", "val: 2 of 2 images", "polygons are there: unpack", "json2labelImg"):
        assert part in str(caught.value)


def test_a_folder_too_high_or_too_low_is_told_with_the_right_one(root: Path):
    with pytest.raises(DataError, match=rf"one folder too high; name {root}$"):
        prepare_cityscapes(root.parent)
    for below in ("leftImg8bit", "gtFine", "leftImg8bit/train", "leftImg8bit/train/aachen"):
        with pytest.raises(DataError, match=rf"too low; name the folder above it, {root}$"):
            prepare_cityscapes(root / below)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        prepare_cityscapes(root / "nowhere")


def test_archives_that_are_still_packed_are_told(root: Path):
    (root / "gtFine").rename(root.parent / "gtFine")
    (root / "gtFine_trainvaltest.zip").touch()
    with pytest.raises(DataError, match=rf"full: no folder gtFine; unpack gtFine_trainvaltest.zip .*-d {root}\)$"):
        prepare_cityscapes(root)
    (root / "gtFine_trainvaltest.zip").unlink()
    with pytest.raises(DataError, match=r"no folder gtFine; unpack gtFine_trainvaltest.zip of https://www.cityscapes"):
        prepare_cityscapes(root)
    (root / "leftImg8bit").rename(root.parent / "leftImg8bit")
    with pytest.raises(DataError, match=r"no folder leftImg8bit and no folder gtFine; unpack leftImg8bit.*and unpack"):
        prepare_cityscapes(root)


def test_archives_unpacked_each_into_a_folder_of_its_own_are_told(root: Path):
    for kind in ("gtFine", "leftImg8bit"):
        (root / f"{kind}_trainvaltest").mkdir()
        (root / kind).rename(root / f"{kind}_trainvaltest" / kind)
    with pytest.raises(
        DataError, match=rf"move {root}/leftImg8bit_trainvaltest/leftImg8bit to {root}/leftImg8bit, and"
    ):
        prepare_cityscapes(root)


# ------------------------------------------------------------------------------------------------ the copy


@pytest.mark.parametrize("stream", ["labeled", "unlabeled"])
@pytest.mark.filterwarnings("ignore:no training.data.split_id_list")
def test_training_crops_of_the_copy_are_those_of_the_original_bit_for_bit(root: Path, tmp_path: Path, stream: str):
    half = tmp_path / "half"
    summary = prepare_cityscapes(root, half=half)
    assert "6 training files of 96 x 48 pixels, 6 made now, 0 were there already" in summary
    assert f"--data-root {half}" in summary
    original, copy = TrainingCrops(files(root), stream), TrainingCrops(files(half), stream)
    seen = set()
    for position in range(12):
        mine, theirs = copy[position], original[position]
        assert mine.ids == theirs.ids
        for name in ("images", "labels", "valid"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), (position, name)
        seen |= set(mine.labels.unique().tolist())
    assert len(seen) > 10 or stream == "unlabeled"


@pytest.mark.filterwarnings("ignore:no training.data.split_id_list")
def test_evaluation_of_the_copy_counts_at_full_size(root: Path, tmp_path: Path):
    prepare_cityscapes(root, half=tmp_path / "half")
    files(tmp_path / "half").check_for_training()
    for protocol in ("original", "release"):
        batches = [next(iter(evaluation_loader(files(r), "val", protocol=protocol))) for r in (root, tmp_path / "half")]
        for mine, theirs in zip(*batches, strict=True):
            assert mine.id == theirs.id
            assert torch.equal(mine.image, theirs.image)
            assert torch.equal(mine.label, theirs.label)
            assert mine.label.shape == (SIZE if protocol == "original" else RESIZED)


def test_the_copy_keeps_raw_ids_and_the_original_is_not_touched(root: Path, tmp_path: Path):
    before = snapshot(root)
    prepare_cityscapes(root, half=tmp_path / "half")
    assert snapshot(root) == before
    label = read_label(tmp_path / "half" / TRAIN_LABEL)
    assert label.shape == RESIZED
    assert set(np.unique(label)) - set(CITYSCAPES_IDS)  # ids that no class has are still there
    for kind in ("leftImg8bit", "gtFine"):
        link = tmp_path / "half" / kind / "val"
        assert link.is_symlink()
        assert link.readlink() == root / kind / "val"


def test_a_relative_root_is_linked_absolutely(root: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_cityscapes(Path("full"), half=Path("deep/half"))
    assert (tmp_path / "deep/half/gtFine/val").readlink() == root / "gtFine/val"


def test_a_second_run_makes_only_what_is_missing(root: Path, tmp_path: Path):
    half = tmp_path / "half"
    prepare_cityscapes(root, half=half)
    (half / TRAIN_LABEL).unlink()
    (half / ".prepare").mkdir()  # of a run that was killed
    (half / ".prepare/leftImg8bit-train-aachen-x.png").write_bytes(b"half")
    before = snapshot(half)
    assert "1 made now, 5 were there already" in prepare_cityscapes(root, half=half)
    after = snapshot(half)
    assert image_size(half / TRAIN_LABEL) == RESIZED
    assert after.keys() - before.keys() == {TRAIN_LABEL}
    assert before.keys() - after.keys() == {".prepare/leftImg8bit-train-aachen-x.png"}
    assert all(after[name] == before[name] for name in after.keys() & before.keys())


def test_a_damaged_image_stops_with_its_path_and_leaves_no_half_file(root: Path, tmp_path: Path):
    data = (root / TRAIN_IMAGE).read_bytes()
    (root / TRAIN_IMAGE).write_bytes(data[: len(data) // 2])  # its header is whole
    with pytest.raises(DataError, match=r"aachen_000001_000019_leftImg8bit\.png: damaged image data"):
        prepare_cityscapes(root, half=tmp_path / "half")
    assert not (tmp_path / "half" / TRAIN_IMAGE).exists()
    assert not (tmp_path / "half/.prepare").exists()
    (root / TRAIN_IMAGE).write_bytes(data)
    prepare_cityscapes(root, half=tmp_path / "half")
    assert image_size(tmp_path / "half" / TRAIN_IMAGE) == RESIZED


@pytest.mark.parametrize("place", [".", "leftImg8bit", "leftImg8bit/half", "gtFine/train", "leftImg8bit/train/aachen"])
def test_a_copy_within_the_download_is_refused(root: Path, place: str):
    before = snapshot(root)
    for half in (root / place, root.parent / "link"):
        if half.name == "link":
            half.symlink_to(root / place)
        with pytest.raises(DataError, match="is the download itself or within it, which is never changed"):
            prepare_cityscapes(root, half=half)
    assert snapshot(root) == before


@pytest.mark.parametrize("linked", ["leftImg8bit", "gtFine/train", "leftImg8bit/train/aachen"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_copy_with_links_into_the_download_is_refused(root: Path, tmp_path: Path, linked: str, beside: bool):
    before = snapshot(root)
    half = tmp_path / "half" if beside else tmp_path  # the download lies within the second
    (half / linked).parent.mkdir(parents=True, exist_ok=True)
    (half / linked).symlink_to(root / linked)
    with pytest.raises(DataError, match=rf"is a link to {root}/.*, where nothing may be written"):
        prepare_cityscapes(root, half=half)
    assert snapshot(root) == before


def test_files_of_another_size_in_the_place_of_the_copy_are_not_replaced(root: Path, tmp_path: Path):
    other = tmp_path / "half" / TRAIN_IMAGE
    other.parent.mkdir(parents=True)
    other.write_bytes((root / TRAIN_IMAGE).read_bytes())
    with pytest.raises(DataError, match="found 192 x 96 pixels, expected 96 x 48; not made by this command"):
        prepare_cityscapes(root, half=tmp_path / "half")
    assert other.read_bytes() == (root / TRAIN_IMAGE).read_bytes()


def test_a_val_folder_that_is_no_link_is_not_replaced(root: Path, tmp_path: Path):
    (tmp_path / "half/gtFine/val/bonn").mkdir(parents=True)
    with pytest.raises(DataError, match=r"gtFine/val: expected a link to .*, found something else; delete it"):
        prepare_cityscapes(root, half=tmp_path / "half")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file; name a folder"):
        prepare_cityscapes(root, half=tmp_path / "file")


def test_two_processes_on_one_copy_are_refused(root: Path, tmp_path: Path):
    (tmp_path / "half").mkdir()
    with (tmp_path / "half/.prepare.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="half: another process is preparing this folder"):
            prepare_cityscapes(root, half=tmp_path / "half")
