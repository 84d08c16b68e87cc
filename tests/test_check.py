"""The dataset check: every fault is found, all at once, with file and fix; and what it counts is what is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import data.check
from data import DatasetFiles
from data.check import Report, check_dataset
from data.decode import read_image
from tests.conftest import tiny_values
from utils.config import CITYSCAPES_IDS, Config, check_config
from utils.errors import UserError

IDS = [f"picture_{index}" for index in range(8)]
LABELED, UNLABELED, VAL = IDS[:3], IDS[3:6], IDS[6:]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save_image(root: Path, name: str, *, seed: int, size: tuple[int, int] = (60, 50), mode: str = "RGB") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(root / f"JPEGImages/{name}.jpg")


def save_label(root: Path, name: str, *ids: int, size: tuple[int, int] = (60, 50)) -> None:
    """Stripes of equal height, one for each id."""
    label = np.repeat(np.array(ids, dtype=np.uint8), size[1] // len(ids))[:, None].repeat(size[0], axis=1)
    Image.fromarray(label).save(root / f"SegmentationClassAug/{name}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images of 60 x 50, labeled 0, 0, 1, 1, 2 in stripes of 600 pixels; two unlabeled ones have no label map."""
    for folder in ("JPEGImages", "SegmentationClassAug"):
        (tmp_path / folder).mkdir()
    for seed, name in enumerate(IDS):
        save_image(tmp_path, name, seed=seed)
        if name not in UNLABELED[1:]:
            save_label(tmp_path, name, 0, 0, 1, 1, 2)
    write(tmp_path / "labeled.txt", "\n".join(LABELED))
    write(tmp_path / "unlabeled.txt", "\n".join(UNLABELED))
    write(tmp_path / "ImageSets/Segmentation/val.txt", "\n".join(VAL))
    return tmp_path


@pytest.fixture
def config(root: Path) -> Callable[..., Config]:
    return lambda **changes: check_config(tiny_values(data_root=str(root), **changes), source="test")


@pytest.fixture
def check(config: Callable[..., Config]) -> Callable[..., Report]:
    return lambda **changes: check_dataset(config(**changes))


def only(messages: list[str]) -> str:
    (message,) = messages
    return message


# ------------------------------------------------------------------------------------------------ what is there


def test_a_clean_dataset_is_ready_and_described(check, root: Path):
    report = check()
    assert (report.errors, report.warnings) == ([], [])
    labeled, unlabeled, val = report.lists
    assert [(one.name, one.images, one.labels, one.hidden) for one in report.lists] == [
        *(("labeled", 3, 3, False), ("unlabeled", 3, 1, True), ("val", 2, 2, False))
    ]
    assert len({one.split_hash for one in report.lists}) == 3
    assert labeled.source == "labeled.txt"
    assert val.smallest == val.median == val.largest == (60, 50)
    assert unlabeled.modes == {"RGB": 3}
    text = report.as_text()
    assert text.endswith("\nready to train")
    assert str(root) in text
    assert "(1)" in text
    assert "hidden labels" in text
    assert max(map(len, text.splitlines())) <= max(100, len(str(root)) + 60)
    assert json.loads(json.dumps(report.as_dict()))["verdict"] == "ready to train"


def test_pixels_and_images_of_each_class_are_counted_by_list(check, root: Path):
    save_label(root, "picture_0", 0, 0, 0, 1, 255)  # 1800 x 0, 600 x 1, 600 ignored
    save_label(root, "picture_1", 0)  # 3000 x 0
    save_label(root, "picture_2", 2, 1)  # 1500 each
    report = check()
    labeled, _, val = report.lists
    assert labeled.class_pixels == [4800, 2100, 1500]
    assert labeled.class_images == [2, 2, 1]
    assert (labeled.ignored_pixels, labeled.foreign_pixels) == (600, 0)
    assert val.class_pixels == [2400, 2400, 1200]
    lines = [" ".join(line.split()) for line in report.as_text().splitlines()]
    assert "0 class 0 57.14 % 2 40.00 % 2" in lines
    assert "ignored, of all pixels 6.67 % -" in lines


def test_mapped_ids_are_counted_as_their_classes_and_the_others_named(check, root: Path):
    for name in LABELED + VAL:
        save_label(root, name, 7, 8, 11, 0, 1)
    report = check(dataset__label_ids=[8, 7, 11])
    assert report.errors == report.warnings == []
    assert report.lists[0].class_pixels == [1800, 1800, 1800]
    assert report.lists[0].ignored_pixels == 3600
    assert report.unmapped_ids == [0, 1]
    assert "ids not in dataset.label_ids, hence ignored: 0..1" in report.as_text()


def test_sizes_modes_and_the_share_of_padded_crops_are_told(check, root: Path):
    save_image(root, "picture_0", seed=0, size=(30, 100))
    save_label(root, "picture_0", 0, 1, size=(30, 100))
    save_image(root, "picture_1", seed=1, mode="L")
    save_image(root, "picture_2", seed=2, mode="CMYK")
    report = check()
    labeled = report.lists[0]
    assert (labeled.smallest, labeled.median, labeled.largest) == ((30, 100), (60, 50), (60, 50))
    assert labeled.distinct_sizes == 2
    assert labeled.modes == {"RGB": 1, "gray": 1, "CMYK": 1}
    # Crops are 48 wide and 40 high. 60 x 50 fills them from scale 0.8 on, 30 x 100 from 1.6 on, which is never drawn.
    assert report.crops is not None
    assert (report.crops.images, report.crops.smaller) == (6, 1)
    assert report.crops.padded_share == pytest.approx((5 * 0.3 + 1) / 6)
    words = " ".join(report.as_text().split())
    assert "1 of 6 training images (16.7 %) smaller in some side" in words
    assert "41.7 % of the crops are partly padding" in words


def test_without_random_scale_only_smaller_images_are_padded(check):
    crops = check(training__data__scale=False).crops
    assert (crops.smaller, crops.padded_share) == (0, 0)
    report = check(training__data__scale=False, training__data__input_size="64,64")
    assert (report.crops.smaller, report.crops.padded_share) == (6, 1)
    assert "smaller than the crop of 64 x 64 in some side: 6 of 6" in only(report.warnings)
    assert report.verdict == "ready to train, 1 warning"


def test_a_resize_decides_the_size_and_warns_where_it_distorts(check):
    report = check(dataset__resize="100,120")
    assert report.crops.padded_share == 0
    assert report.warnings == []
    report = check(dataset__resize="100,100")
    assert "dataset.resize to 100 x 100 makes wider or narrower by more than 10 %: 6 of 6" in only(report.warnings)


# ------------------------------------------------------------------------------------------------ lists


def test_a_root_that_is_not_there_is_one_error(config):
    report = check_dataset(config().model_copy(update={"data_root": "/nowhere/at/all"}))
    assert "/nowhere/at/all: no such folder" in only(report.errors)
    assert report.as_text().endswith("1 error, 0 warnings: training or evaluation would fail")


def test_a_bad_list_is_an_error_and_the_others_are_still_checked(check, root: Path):
    write(root / "labeled.txt", "picture_0\npicture_0")
    (root / "JPEGImages/picture_4.jpg").unlink()
    (root / "JPEGImages/picture_7.jpg").unlink()
    report = check()
    assert [one.name for one in report.lists] == ["unlabeled", "val"]
    twice, missing = report.errors
    assert "labeled.txt: 1 ids appear twice, for example picture_0; list each once" in twice
    assert "missing: 2" in missing


def test_one_fault_behind_two_lists_is_said_once(check):
    block = {"root": "x", "num_classes": 3, "train": "nothing.txt"}
    report = check(dataset=block, training__data__labeled_samples=2)
    assert "nothing.txt: cannot read this id list" in only(report.errors)


def test_a_drawn_split_is_noted_in_the_report(check, root: Path):
    write(root / "train.txt", "\n".join(LABELED + UNLABELED))
    for name in UNLABELED:
        save_label(root, name, 0, 1, 2, 2, 2)
    block = {"root": "x", "num_classes": 3, "train": "train.txt"}
    report = check(dataset=block, training__data__labeled_samples=2)
    assert "seeded permutation" in only(report.warnings)
    assert [(one.images, one.source) for one in report.lists[:2]] == [
        *((2, "drawn from train.txt"), (4, "the rest of train.txt"))
    ]


def test_ids_labeled_and_unlabeled_are_an_error_and_both_lists_are_still_checked(check, root: Path):
    write(root / "unlabeled.txt", "picture_2\npicture_3\npicture_4")
    (root / "JPEGImages/picture_4.jpg").write_bytes(b"")
    report = check()
    assert "ids in the labeled and the unlabeled list: 1 (picture_2); remove them from one" in report.errors[0]
    assert "picture_4" in report.errors[1]
    assert [one.name for one in report.lists] == ["labeled", "unlabeled", "val"]


def test_the_test_list_is_checked_where_there_is_one_and_unlabeled_only_where_it_is_used(check, root: Path):
    write(root / "test.txt", "picture_5")  # has no label map
    report = check(dataset__test="test.txt", training__unlabeled__train_unlabeled=False)
    assert [one.name for one in report.lists] == ["labeled", "val", "test"]
    assert "SegmentationClassAug/picture_5.png" in only(report.errors)


@pytest.mark.parametrize("name", ["val", "test"])
def test_evaluation_ids_that_are_trained_on_are_warned_of(check, root: Path, name: str):
    write(root / "test.txt", "picture_7")
    write(root / {"val": "ImageSets/Segmentation/val.txt", "test": "test.txt"}[name], "picture_1\npicture_7")
    report = check(dataset__test="test.txt")
    assert report.errors == []
    assert f"ids of the {name} list that are trained on: 1 of 2 (picture_1)" in only(report.warnings)


# ------------------------------------------------------------------------------------------------ files


def test_missing_files_are_named_with_what_is_there_instead(check, root: Path):
    (root / "JPEGImages/picture_0.jpg").rename(root / "JPEGImages/picture_0.PNG")
    (root / "SegmentationClassAug/picture_1.png").unlink()
    (root / "SegmentationClassAug/picture_6.png").unlink()
    (root / "SegmentationClassAug/picture_6.png").symlink_to(root / "gone.png")
    images, labels = check().errors
    assert images.startswith("image files that are missing: 1. Put them there")
    assert "JPEGImages/picture_0.jpg: but picture_0.PNG is there" in images
    assert "missing: 2" in labels
    assert "correct dataset.labels" in labels
    assert "SegmentationClassAug/picture_6.png: a link to a file that is not there" in labels


def test_a_missing_folder_is_named_once_for_all_its_files(check):
    message = check(dataset__labels="Masks/{id}.png").errors[0]
    assert "missing: 5" in message
    assert "Masks/picture_0.png: there is no folder Masks" in message


def test_all_damaged_files_are_found_in_one_run_and_at_most_five_named(check, root: Path):
    for name in IDS[:6]:
        path = root / f"JPEGImages/{name}.jpg"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (root / "JPEGImages/picture_6.jpg").write_bytes(b"")
    Image.new("RGB", (60, 50)).save(root / "JPEGImages/picture_7.jpg", format="GIF")
    (root / "SegmentationClassAug/picture_0.png").write_bytes(b"no image")
    report = check()
    empty, damaged, label = report.errors
    assert empty.startswith("image files of zero bytes: 1. Fetch them again")
    assert "JPEGImages/picture_6.jpg" in empty
    assert damaged.startswith("images that cannot be decoded: 7. Fetch them again")
    assert damaged.count("JPEGImages/") == 5
    assert "JPEGImages/picture_0.jpg: damaged image data" in damaged
    assert damaged.endswith("and 2 more")
    assert "SegmentationClassAug/picture_0.png: not a readable PNG file" in label
    assert report.lists[0].class_images == [2, 2, 2]  # the other label maps count
    assert "  - JPEGImages/picture_0.jpg: damaged" in report.as_text()
    assert report.verdict == "3 errors, 0 warnings: training or evaluation would fail"


def test_damage_that_our_decoder_does_not_name_does_not_end_the_check(check, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Path) -> np.ndarray:
        raise ValueError("Truncated IHDR chunk")

    monkeypatch.setattr(data.check, "read_image", fail)
    message = only(check().errors)
    assert "images that cannot be decoded: 8" in message
    assert "picture_0.jpg: Truncated IHDR chunk" in message


def test_label_maps_of_another_size_are_named_with_both_sizes(check, root: Path):
    save_label(root, "picture_0", 0, 1, 2, 2, 2, size=(64, 50))
    save_label(root, "picture_7", 0, 1, 2, 2, 2, size=(50, 60))
    message = only(check().errors)
    assert "another size than their image (width x height): 2. They must agree" in message
    assert "SegmentationClassAug/picture_0.png: 64 x 50 for an image of 60 x 50\n" in message
    assert "picture_7.png: 50 x 60 for an image of 60 x 50, width and height swapped: was one" in message


@pytest.mark.parametrize(("mode", "word"), [("RGB", "RGB"), ("I;16", "16-bit gray"), ("1", "black-and-white")])
def test_label_maps_that_hold_no_ids_are_an_error(check, root: Path, mode: str, word: str):
    Image.new(mode, (60, 50)).save(root / "SegmentationClassAug/picture_1.png")
    message = only(check().errors)
    assert "hold no class ids: 1. Expected 8-bit gray or palette PNGs; convert" in message
    assert f"SegmentationClassAug/picture_1.png: mode {word}" in message


def test_a_label_map_in_another_format_is_refused(check, root: Path):
    Image.new("L", (60, 50)).save(root / "SegmentationClassAug/picture_1.png", format="JPEG")
    assert "picture_1.png: a JPEG file, whose losses change ids; expected PNG" in only(check().errors)
    Image.new("L", (60, 50)).save(root / "SegmentationClassAug/picture_1.png", format="TIFF")
    assert "picture_1.png: a TIFF file; expected PNG" in only(check().errors)


@pytest.mark.parametrize("ending", ["tif", "webp", "bmp"])
def test_images_of_other_formats_are_checked_as_any(check, root: Path, ending: str):
    for name in IDS:
        Image.open(root / f"JPEGImages/{name}.jpg").save(root / f"JPEGImages/{name}.{ending}")
    report = check(dataset__images=f"JPEGImages/{{id}}.{ending}")
    assert (report.errors, report.warnings) == ([], [])


@pytest.mark.parametrize("shape", [(50, 60), (50, 60, 3)], ids=["gray", "RGB"])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_images_are_an_error(check, root: Path, shape: tuple[int, ...], ending: str):
    for index, name in enumerate(IDS):
        cv2.imwrite(str(root / f"JPEGImages/{name}.{ending}"), np.full(shape, 1000 + index, dtype=np.uint16))
    message = only(check(dataset__images=f"JPEGImages/{{id}}.{ending}").errors)
    assert "images of more than 8 bits a channel: 8. Convert them to 8 bits" in message
    with pytest.raises(UserError, match="16 bits a channel"):
        read_image(root / f"JPEGImages/picture_0.{ending}")


def test_palettes_that_give_a_color_to_another_id_in_each_file_are_warned_of(check, root: Path):
    red, blue, gray = [200, 0, 0], [0, 0, 200], [9, 9, 9]
    for index, name in enumerate(("picture_0", "picture_1")):
        label = Image.fromarray(np.tile(np.uint8([0, 1, 1]), (50, 20)))
        label.putpalette([*(red, blue)[index], *(blue, red)[index], *gray, *gray])
        label.save(root / f"SegmentationClassAug/{name}.png")
    warning = next(one for one in check().warnings if "palettes" in one)
    assert "another id in another file: 2. Did a program make a palette for each file?" in warning
    labels = [f"SegmentationClassAug/picture_{index}.png" for index in (0, 1)]
    assert f"color (200, 0, 0): id 0 in {labels[0]}, id 1 in {labels[1]}" in warning


def test_an_exif_rotation_is_warned_of(check, root: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 50)).save(root / "JPEGImages/picture_2.jpg", exif=exif)
    report = check()
    assert report.errors == []
    assert "images whose EXIF orientation says that they are to be turned" in only(report.warnings)
    assert "JPEGImages/picture_2.jpg" in report.warnings[0]


def test_hidden_labels_only_warn(check, root: Path):
    save_label(root, "picture_3", 9)
    (root / "SegmentationClassAug/picture_4.png").write_bytes(b"")
    save_label(root, "picture_5", 0, size=(30, 30))
    report = check()
    assert report.errors == []
    assert len(report.warnings) == 3
    assert all(message.startswith("hidden labels") for message in report.warnings)
    assert report.verdict == "ready to train, 3 warnings"


# ------------------------------------------------------------------------------------------------ ids and classes


def test_ids_out_of_range_are_counted_over_the_whole_dataset(check, root: Path):
    save_label(root, "picture_1", 0, 1, 2, 9, 9)
    save_label(root, "picture_6", 0, 1, 2, 2, 9)
    save_label(root, "picture_7", 0, 1, 2, 2, 200)
    report = check()
    message = only(report.errors)
    assert "2 label ids out of range; expected 0..2 or ignore_label 255. Check the number of classes (3)" in message
    assert "id 9: 1800 pixels in 2 files, for example SegmentationClassAug/picture_1.png" in message
    assert "id 200: 600 pixels in 1 file, for example SegmentationClassAug/picture_7.png" in message
    assert [one.foreign_pixels for one in report.lists] == [1200, 0, 1200]
    assert "out of range, of all" in report.as_text()


@pytest.mark.parametrize(
    ("ids", "changes", "cause"),
    [
        ([0, 255], {"dataset__num_classes": 2}, "binary mask whose foreground is 255? Use dataset.label_ids: [0, 255]"),
        ([0, 255], {"dataset__num_classes": 2, "ignore_label": 250}, "Use dataset.label_ids: [0, 255]"),
        ([0, 1, 2, 255], {"ignore_label": 250}, "Does 255 mark pixels of no class? Set ignore_label to 255"),
        ([1, 2, 3], {}, "Do the ids start at 1? Use dataset.label_ids: [1, 2, 3]"),
        ([0, 1, 2, 3], {}, "Off by one: is 3 a class (set num_classes to 4)"),
        ([7, 8, 11, 26, 33], {"dataset__num_classes": 19}, f"Use dataset.label_ids: {CITYSCAPES_IDS}"),
        ([0, 128, 254], {}, "one gray level for each? Use dataset.label_ids: [0, 128, 254]"),
        (list(range(100)), {}, "100 ids for 3 classes: are they colors turned to gray"),
        ([0, 1, 2, 17, 40], {}, "Check the number of classes (3) and ignore_label"),
    ],
)
def test_the_likely_cause_of_ids_out_of_range_is_told(check, root: Path, ids: list[int], changes: dict, cause: str):
    for name in LABELED + VAL:
        save_image(root, name, seed=IDS.index(name), size=(60, 100))
        save_label(root, name, *ids, size=(60, 100 // len(ids) * len(ids)))
        save_image(root, name, seed=IDS.index(name), size=(60, 100 // len(ids) * len(ids)))
    (root / "SegmentationClassAug/picture_3.png").unlink()
    assert cause in only(check(**changes).errors)


def test_class_ids_under_a_mapping_of_other_ids_are_warned_of(check):
    report = check(dataset__label_ids=[0, 7, 8])
    assert "hold nothing but 0..2, as if their ids were classes already" in report.warnings[0]
    assert "leaves out 1..2; if they are classes, remove dataset.label_ids" in report.warnings[0]


def test_classes_that_are_nowhere_labeled_or_validated_are_warned_of(check, root: Path):
    for name in LABELED:
        save_label(root, name, 0, 1)
    for name in VAL:
        save_label(root, name, 2, 0)
    report = check(dataset__names=["sky", "road", "car"])
    assert report.errors == []
    labeled, val = report.warnings
    assert "classes in no labeled image: 1 (2 car); they cannot be learned" in labeled
    assert "classes in no val image: 1 (1 road); they have no IoU" in val


def test_labeled_images_of_one_class_alone_are_an_error_as_they_are_in_training(check, config, root: Path):
    for name in LABELED:
        save_label(root, name, 1)
    assert "labeled list hold 1 class 1 alone: nothing to tell apart" in only(check().errors)
    with pytest.raises(UserError, match="nothing to tell apart"):
        DatasetFiles(config()).check_for_training()


@pytest.mark.parametrize("changes", [{}, {"dataset__label_ids": [0, 1, 2]}])
def test_a_list_of_nothing_but_ignored_pixels_is_an_error(check, root: Path, changes: dict[str, Any]):
    for name in VAL:
        save_label(root, name, 255)
    report = check(**changes)
    assert "label maps of the val list hold nothing but ignore_label" in only(report.errors)
    assert report.warnings == []


# ------------------------------------------------------------------------------------------------ duplicates


def test_images_with_the_same_bytes_are_paired_within_and_across_lists(check, root: Path):
    save_image(root, "picture_3", seed=0)  # unlabeled, as labeled picture_0
    save_image(root, "picture_7", seed=1)  # val, as labeled picture_1
    report = check()
    assert report.errors == []
    across, within = report.warnings
    assert "under another id, so that scores are too high: 1. Keep one id of each" in across
    assert "picture_1 (labeled) = picture_7 (val)" in across
    assert "more than once under different ids, so that they count more than once: 1" in within
    assert "picture_0 (labeled) = picture_3 (unlabeled)" in within


# ------------------------------------------------------------------------------------------------ reading


def test_a_file_in_two_lists_is_read_once(check, root: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    def count(path: Path) -> np.ndarray:
        seen.append(path.name)
        return np.zeros(0)

    monkeypatch.setattr(data.check, "read_image", count)
    write(root / "ImageSets/Segmentation/val.txt", "picture_0\npicture_3\npicture_7")
    check()
    assert sorted(seen) == [f"{name}.jpg" for name in (*IDS[:6], "picture_7")]


def test_other_processes_find_the_same(check, root: Path, monkeypatch: pytest.MonkeyPatch):
    (root / "JPEGImages/picture_2.jpg").write_bytes(b"")
    save_label(root, "picture_6", 0, 1, 2, 9, 9)
    here = check()
    monkeypatch.setattr(data.check, "FEW", 0)
    monkeypatch.setattr(data.check.os, "cpu_count", lambda: 2)
    assert check() == here
    assert len(here.errors) == 2
