"""A folder of images and label maps described as a configuration, whatever its layout."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import DatasetFiles
from data.describe import describe
from data.splits import read_ids
from utils.config import check_config
from utils.errors import UserError
from utils.visualize import write_label

IDS = [f"{index:04d}" for index in range(24)]


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 50), (90, 80, 70)).save(path)


def mask(path: Path, *values: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.zeros((50, 60), np.uint8)
    label[0, : len(values)] = values
    Image.fromarray(label).save(path)


def pairs(root: Path) -> None:
    """Images and label maps of two classes for all IDS."""
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        mask(root / f"masks/{name}.png", 0, 1)


def described(root: Path, **options: Any) -> tuple[dict[str, Any], DatasetFiles, str]:
    """The dataset's block, its files as a run will read them, and the notes."""
    found = describe(root, name="mine", lists=root.parent / "lists", **options)
    assert not (root.parent / "lists").exists()
    found.write_lists()
    config = check_config(found.values, source="test")
    files = DatasetFiles(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.check_for_training()
    return found.values["dataset"], files, "\n".join(found.notes)


@pytest.mark.parametrize(
    ("image", "label", "patterns"),
    [
        ("images/{id}.jpg", "masks/{id}.png", ("images/{id}.jpg", "masks/{id}.png")),
        ("{id}.jpg", "{id}.png", ("{id}.jpg", "{id}.png")),
        ("{id}.JPEG", "gt/{id}_mask.png", ("{id}.JPEG", "gt/{id}_mask.png")),
        ("rgb/{id}_rgb.png", "lab/{id}_label.png", ("rgb/{id}_rgb.png", "lab/{id}_label.png")),
        ("tiles/{id}.tif", "ids/{id}.png", ("tiles/{id}.tif", "ids/{id}.png")),
        ("all/photos/{id}.png", "all/ids/{id}.png", ("all/photos/{id}.png", "all/ids/{id}.png")),
    ],
)
def test_layouts(tmp_path: Path, image: str, label: str, patterns: tuple[str, str]):
    root = tmp_path / "root"
    for index, name in enumerate(IDS):
        Path(root / image.replace("{id}", name)).parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(root / image.replace("{id}", name))
        mask(root / label.replace("{id}", name), 0, 1, 2, 255)
    block, files, _ = described(root)
    assert (block["images"], block["labels"], block["num_classes"]) == (*patterns, 3)
    assert len(files.ids("val")) == 2
    assert len(files.ids("labeled")) == 3, "1/8 of 22, rounded"
    assert len(files.ids("unlabeled")) == 19


def test_folders_named_train_and_val_become_lists(tmp_path: Path):
    root = tmp_path / "root"
    for split, ids in (("train", IDS[:16]), ("val", IDS[16:])):
        for name in ids:
            photo(root / f"images/{split}/{name}.jpg")
            mask(root / f"masks/{split}/{name}.png", 0, 1)
    block, files, _ = described(root, labeled="1/4")
    assert block["val"] == "val/*"
    assert files.ids("val") == [f"val/{name}" for name in IDS[16:]]
    assert len(files.ids("labeled")) == 4
    assert all(name.startswith("train/") for name in files.ids("labeled") + files.ids("unlabeled"))


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("training", "validation"), ("train", "valid")])
def test_folders_of_other_spellings_become_lists(tmp_path: Path, train: str, val: str):
    for split, ids in ((train, IDS[:16]), (val, IDS[16:])):
        for name in ids:
            photo(tmp_path / f"root/images [v2]/{split}/{name}.jpg")
            mask(tmp_path / f"root/masks/{split}/{name}.png", 0, 1)
    block, files, _ = described(tmp_path / "root")
    assert block["val"] == f"{val}/*"
    assert files.ids("val") == [f"{val}/{name}" for name in IDS[16:]]


def test_folders_named_labeled_and_unlabeled_become_lists_and_validation_images_are_no_unlabeled_ones(tmp_path: Path):
    root = tmp_path / "root"
    for split, ids in (("labeled", IDS[:8]), ("unlabeled", IDS[8:])):
        for name in ids:
            photo(root / f"images/{split}/{name}.jpg")
            mask(root / f"masks/{split}/{name}.png", 0, 1)  # also of unlabeled ones, as some tools write blank maps
    block, files, notes = described(root, val="3")
    assert block["unlabeled"] == "unlabeled/*"
    assert files.ids("unlabeled") == [f"unlabeled/{name}" for name in IDS[8:]]
    assert len(files.ids("val")) == 3
    assert sorted([*files.ids("labeled"), *files.ids("val")]) == [f"labeled/{name}" for name in IDS[:8]]
    assert "labeled images      labeled/*: 5" in notes


def test_validation_images_are_taken_from_no_list_where_there_are_others(tmp_path: Path):
    pairs(tmp_path / "root")
    (tmp_path / "root/labeled.txt").write_text("\n".join(IDS[:3]))
    block, files, _ = described(tmp_path / "root")
    assert (block["labeled"], files.ids("labeled")) == ("labeled.txt", IDS[:3])
    assert set(files.ids("val")) < set(IDS[3:])


def test_validation_images_are_not_taken_from_a_train_list_where_there_are_others(tmp_path: Path):
    pairs(tmp_path / "root")
    (tmp_path / "root/train.txt").write_text("\n".join(IDS[:10]))
    _, files, _ = described(tmp_path / "root", val="1/2")
    assert set(files.ids("val")) < set(IDS[10:])
    assert {*files.ids("labeled"), *files.ids("unlabeled")} == set(IDS[:10])


@pytest.mark.parametrize("given", [{"labeled": "1/4"}, {"val": "2"}])
def test_a_known_layout_has_its_lists_and_takes_no_others(tmp_path: Path, given: dict[str, str]):
    for part in ("leftImg8bit/train", "gtFine/train"):
        (tmp_path / part).mkdir(parents=True)
    found = describe(tmp_path, name="mine", lists=tmp_path / "lists")
    assert found.notes == ["layout              as configs/configCityscapes.json has it"]
    with pytest.raises(UserError, match=r"the layout is that of configs/configCityscapes.json, .* leave --labeled"):
        describe(tmp_path, name="mine", lists=tmp_path / "lists", **given)


def test_images_without_a_label_map_are_the_unlabeled_ones(tmp_path: Path):
    root = tmp_path / "root"
    for index, name in enumerate(IDS):
        photo(root / f"images/{name}.jpg")
        if index < 10:
            mask(root / f"masks/{name}.png", 0, 1, 2)
    _, files, notes = described(root, val="2")
    assert files.ids("unlabeled") == IDS[10:]
    assert set(files.ids("labeled")) | set(files.ids("val")) == set(IDS[:10])
    assert "labeled images      8: all that have a label map" in notes


@pytest.mark.parametrize("how", ["list", "no list", "folder"])
def test_beside_a_train_list_the_other_images_are_the_unlabeled_ones(tmp_path: Path, how: str):
    root, folder = tmp_path / "data", how == "folder"
    for index, name in enumerate(IDS):
        part = ("unlabeled/", "train/", "val/")[(index >= 10) + (index >= 20)] if folder else ""
        photo(root / f"images/{part}{name}.jpg")
        if index >= 10:
            mask(root / f"masks/{part}{name}.png", 0, 1)
    if not folder:
        (root / "train.txt").write_text("\n".join(IDS[10:20]))
        (root / "val.txt").write_text("\n".join(IDS[20:23]))
    if how == "list":
        (root / "unlabeled.txt").write_text("\n".join(IDS[:10]))
    block, files, notes = described(root)
    assert [name.rpartition("/")[2] for name in files.ids("labeled")] == IDS[10:20]
    assert [name.rpartition("/")[2] for name in files.ids("unlabeled")] == IDS[:10]
    assert (block["unlabeled"] == "unlabeled.txt") == (how == "list")
    assert ("1 images that are in no list, for example 0023" in notes) != folder


def test_lists_that_are_there_are_used(tmp_path: Path):
    root = tmp_path / "root"
    pairs(root)
    for name, ids in (("labeled", IDS[:4]), ("unlabeled", IDS[4:12]), ("val", IDS[12:18]), ("test", IDS[18:])):
        (root / f"lists/{name}.txt").parent.mkdir(exist_ok=True)
        (root / f"lists/{name}.txt").write_text("\n".join(ids))
    (root / "readme_train.txt").write_text("how to train with this\n")
    block, files, _ = described(root)
    assert {key: block[key] for key in ("labeled", "unlabeled", "val", "test")} == {
        key: f"lists/{key}.txt" for key in ("labeled", "unlabeled", "val", "test")
    }
    assert files.ids("labeled") == IDS[:4]
    assert not (tmp_path / "lists").exists(), "nothing had to be written"


def test_of_several_lists_of_labeled_images_one_is_chosen_by_name_and_its_neighbour_with_it(tmp_path: Path):
    root = tmp_path / "root"
    pairs(root)
    for seed in (0, 1):
        folder = root / f"splits/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "labeled.txt").write_text("\n".join(IDS[seed : seed + 3]))
        (folder / "unlabeled.txt").write_text("\n".join(IDS[4:16]))
    (root / "val.txt").write_text("\n".join(IDS[16:]))
    _, files, notes = described(root)
    assert "several lists       labeled: splits/seed0/labeled.txt, splits/seed1/labeled.txt" in notes
    assert len(files.ids("labeled")) == 2, "1/8 of 16, drawn"
    shutil.rmtree(tmp_path / "lists")
    block, files, _ = described(root, labeled="splits/seed1/labeled.txt")
    assert block["unlabeled"] == "splits/seed1/unlabeled.txt"
    assert files.ids("labeled") == IDS[1:4]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 1, 2), {"num_classes": 3}),
        ((0, 1, 2, 255), {"num_classes": 3}),
        ((0, 255), {"names": ["background", "foreground"], "label_ids": [0, 255]}),
        ((0, 38, 75), {"num_classes": 3, "label_ids": [0, 38, 75]}),
        ((0, 1, 3), {"num_classes": 4}),
    ],
)
def test_classes_from_ids(tmp_path: Path, values: tuple[int, ...], expected: dict[str, Any]):
    root = tmp_path / "root"
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        mask(root / f"masks/{name}.png", *values)
    block, _, _ = described(root)
    assert {key: block[key] for key in ("names", "num_classes", "label_ids") if key in block} == expected


@pytest.mark.parametrize("line", ["a b/{}.jpg", "images/a b/{}.jpg", "images/a b/{}.jpg masks/a b/{}.png", "{}"])
def test_lists_that_name_images_in_another_way_are_written_anew(tmp_path: Path, line: str):
    root = tmp_path / "root"
    for index in range(10):
        photo(root / f"images/a b/{index}.jpg")
        mask(root / f"masks/a b/{index}.png", 0, 1)
    for name, indices in (("mine", (1, 2)), ("valid", (3, 4)), ("unlabelled", (5, 6))):
        (root / f"{name}.txt").write_text("".join(line.replace("{}", str(index)) + "\n" for index in indices))
    block, files, notes = described(root, labeled="mine.txt")
    folder = tmp_path / "lists"
    assert [block[role] for role in ("labeled", "unlabeled", "val")] == [
        str(folder / f"{role}.txt") for role in ("labeled", "unlabeled", "val")
    ]
    assert files.ids("labeled") == ["a b/1", "a b/2"]
    assert files.ids("val") == ["a b/3", "a b/4"]
    assert files.ids("unlabeled") == ["a b/5", "a b/6"]
    assert "val list            valid.txt: 2" in notes


def test_a_list_with_a_wrong_line_is_never_passed_over(tmp_path: Path):
    root = tmp_path / "root"
    pairs(root)
    (root / "test.txt").write_text("how to test\nthis\n")
    _, _, notes = described(root)
    assert "not used            test.txt: 2 of 2 lines name no image" in notes
    shutil.rmtree(tmp_path / "lists")
    (root / "val.txt").write_text("\n".join([*IDS[:2], "nobody"]))
    with pytest.raises(UserError, match=r"val\.txt: 1 of 3 lines name no image, for example nobody; mend this list"):
        described(root)
    (root / "val.txt").write_text(f"{IDS[0]}.jpg\n{IDS[0]}\n")
    with pytest.raises(UserError, match=r"val\.txt: doubled ids"):
        described(root)


def test_a_list_of_files_that_the_patterns_leave_out_names_no_image_of_the_same_name(tmp_path: Path):
    root = tmp_path / "root"
    for split, ids in (("train", IDS), ("val", IDS[:4])):
        for name in ids:
            photo(root / f"{split}/images/{name}.jpg")
            mask(root / f"{split}/masks/{name}.png", 0, 1)
    (root / "val.txt").write_text("".join(f"val/images/{name}.jpg\n" for name in IDS[:4]))
    with (
        pytest.warns(UserWarning, match="4 photographs are left out"),
        pytest.raises(
            UserError, match=r"val\.txt: 4 of 4 lines name files that are no image of train/images/{id}\.jpg"
        ),
    ):
        describe(root, name="mine", lists=tmp_path / "lists")


def test_lists_that_cannot_be_read_are_never_passed_over(tmp_path: Path):
    root = tmp_path / "root"
    pairs(root)
    (root / "val.txt").write_text("\n".join(IDS[:3]), encoding="utf-16")  # as PowerShell's > writes
    with pytest.raises(UserError, match=r"val\.txt: cannot read this id list .* expected UTF-8 text"):
        described(root)
    (root / "val.txt").write_text("\n")
    assert "not used            val.txt: no line of text" in described(root)[2]


def test_lists_behind_a_link_are_found(tmp_path: Path):
    pairs(tmp_path / "root")
    (tmp_path / "lists_of_mine").mkdir()
    (tmp_path / "lists_of_mine/val.txt").write_text("\n".join(IDS[:5]))
    (tmp_path / "root/lists").symlink_to(tmp_path / "lists_of_mine")
    assert described(tmp_path / "root")[1].ids("val") == IDS[:5]


@pytest.mark.parametrize(
    ("content", "names", "label_ids"),
    [
        ('{"names": ["void", "road", "car"], "ignore_index": 0}', ["road", "car"], [1, 2]),
        ('{"names": ["road", "car", "void"], "ignore_index": 2}', ["road", "car"], [0, 1]),
        ('["__ignore__", "road", "car", "sky"]', ["road", "car", "sky"], None),
        ('["road", "car", "dog", "sky"]', ["road", "car", "dog", "sky"], None),  # 77 is stray, not sky
    ],
)
def test_names_stand_for_their_ids(tmp_path: Path, content: str, names: list[str], label_ids: list[int] | None):
    for index, name in enumerate(IDS):
        photo(tmp_path / f"root/images/{name}.jpg")
        mask(tmp_path / f"root/masks/{name}.png", 0, 1, 2, *([77] if index == 5 else []))
    (tmp_path / "root/classes.json").write_text(content)
    values = describe(tmp_path / "root", name="mine", lists=tmp_path / "lists").values
    assert (values["dataset"]["names"], values["dataset"].get("label_ids"), values["ignore_label"]) == (
        names, label_ids, 255,
    )  # fmt: skip


def test_two_names_of_masks_of_0_and_255(tmp_path: Path):
    for name in IDS:
        photo(tmp_path / f"root/images/{name}.jpg")
        mask(tmp_path / f"root/masks/{name}.png", 255)
    (tmp_path / "root/labels.txt").write_text("masks/1.png\nmasks/2.png\n")  # a list of files, no names
    (tmp_path / "root/names.txt").write_text("ground\nwell\n")
    block = described(tmp_path / "root")[0]
    assert (block["names"], block["label_ids"]) == (["ground", "well"], [0, 255])


def test_an_id_in_one_of_many_label_maps_is_told(tmp_path: Path):
    for index in range(10):
        photo(tmp_path / f"root/images/{index}.jpg")
        mask(tmp_path / f"root/masks/{index}.png", 0, 1, *([2] if index < 2 else [77] if index == 5 else []))
    notes = describe(tmp_path / "root", name="mine", lists=tmp_path / "lists").notes
    assert "ids in label maps    0..2, 77; in one of 10 alone, so perhaps stray: 77" in notes


def test_names_and_palette_from_a_file(tmp_path: Path):
    root = tmp_path / "root"
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        write_label(root / f"masks/{name}.png", np.eye(50, 60, dtype=np.uint8), None)
    about = {"names": ["road", "car", "sky"], "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "ignore_index": 254}
    (root / "classes.json").write_text(json.dumps(about))
    found = describe(root, name="mine", lists=tmp_path / "lists")
    assert found.values["ignore_label"] == 254
    assert found.values["dataset"]["names"] == about["names"]
    assert found.values["dataset"]["palette"] == about["palette"]
    (root / "classes.json").unlink()
    (root / "classes.txt").write_text("road\ncar\n\n")
    assert describe(root, name="mine", lists=tmp_path / "lists").values["dataset"]["names"] == ["road", "car"]


def test_ids_from_one_are_mapped_to_the_names_that_are_given(tmp_path: Path):
    root = tmp_path / "root"
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        path = root / f"masks/{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60).astype(np.uint8) % 3 + 1).save(path)
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    block, _, notes = described(root)
    assert block["label_ids"] == [1, 2, 3]
    assert "label_ids           1..3 are the classes in this order" in notes


def test_images_that_are_left_out_are_told_and_damaged_ones_do_not_matter(tmp_path: Path):
    root = tmp_path / "root"
    for name in IDS:
        photo(root / f"train/images/{name}.jpg")
        mask(root / f"train/masks/{name}.png", 0, 1)
    for name in IDS[:3]:
        photo(root / f"val/images/{name}x.jpg")
    (root / f"train/images/{IDS[0]}.jpg").write_bytes(b"not an image")
    told = f"3 photographs are left out, for example val/images/{IDS[0]}x.jpg: all images, labeled or not, must fit"
    with pytest.warns(UserWarning, match=told):
        found = describe(root, name="mine", lists=tmp_path / "lists")
    assert found.values["dataset"]["images"] == "train/images/{id}.jpg"


def test_few_label_maps_are_enough_for_a_validation_list_and_a_labeled_one(tmp_path: Path):
    for index in range(20):
        photo(tmp_path / f"root/images/{index}.jpg")
    for index in range(4):
        mask(tmp_path / f"root/masks/{index}.png", 0, 1)
    found = describe(tmp_path / "root", name="mine", lists=tmp_path / "lists")
    assert {path.stem: len(ids) for path, ids in found.lists.items()} == {"val": 1, "labeled": 3, "unlabeled": 16}


def test_known_layouts_become_their_shipped_configuration(tmp_path: Path):
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    (tmp_path / "gtFine/train").mkdir(parents=True)
    values = describe(tmp_path, name="mine", lists=tmp_path / "lists").values
    assert (values["dataset"], values["data_root"], values["ignore_label"]) == ("cityscapes", str(tmp_path), 250)
    voc = tmp_path / "voc"
    for part in (
        "SegmentationClassAug/x.png",
        "ImageSets/Segmentation/train_aug.txt",
        "ImageSets/Segmentation/val.txt",
    ):
        (voc / part).parent.mkdir(parents=True, exist_ok=True)
        (voc / part).touch()
    assert describe(voc, name="mine", lists=tmp_path / "lists").values["dataset"] == "pascal_voc"


def test_vocs_object_maps_are_not_taken_for_classes(tmp_path: Path):
    root = tmp_path / "root"
    for name in IDS:
        photo(root / f"JPEGImages/{name}.jpg")
        for folder in ("SegmentationObject", "SegmentationClass"):
            write_label(root / f"{folder}/{name}.png", np.eye(50, 60, dtype=np.uint8), None)
    block, _, _ = described(root)
    assert block["labels"] == "SegmentationClass/{id}.png"


def colored(root: Path) -> None:
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        photo(root / f"masks/{name}.png")


def unrelated(root: Path) -> None:
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        mask(root / f"masks/other{name}.png", 0, 1)


def empty(root: Path) -> None:
    root.mkdir()


def ignored(root: Path) -> None:
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        path = root / f"masks/{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((50, 60), 255, np.uint8)).save(path)


def soft(root: Path) -> None:
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        mask(root / f"masks/{name}.png", *[255] * 30, 191, 143, 64, 48, 16)


def of_one_class(root: Path) -> None:
    for name in IDS:
        photo(root / f"images/{name}.jpg")
        mask(root / f"masks/{name}.png", 0)


def numbered(root: Path) -> None:
    pairs(root)
    photo(root / "images/#1.jpg")


def gray_photographs(root: Path) -> None:
    pairs(root)
    shutil.rmtree(root / "images")


def in_two_forms(root: Path) -> None:
    for index in range(24):
        photo(root / f"images/{index}\u00fc.jpg")
        mask(root / f"masks/{index}u\u0308.png", 0, 1)


def labeled_once(root: Path) -> None:
    for index, name in enumerate(IDS):
        photo(root / f"images/{name}.jpg")
        if index == 0:
            mask(root / f"masks/{name}.png", 0, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (soft, r"0 and 255 and, on 0\.2% of the pixels, 5 gray levels between: masks with soft edges\?"),
        (of_one_class, "hold 0 alone: nothing to tell apart"),
        (numbered, "1 names cannot stand in a list, for example '#1': they begin with #"),
        (gray_photographs, "no photographs: the 24 PNGs here are gray or palette images of few values"),
        (in_two_forms, r"agree for the eye alone: their accents have two Unicode forms"),
        (labeled_once, "from which validation images can be drawn: 1; expected at least 2"),
        (colored, r"48 images, but no label maps: .*Are these some\? RGB: 24 in masks, for example masks/"),
        (colored, r"Colored \(RGB\), 16-bit, JPEG or TIFF ones must be converted"),
        (unrelated, "24 photographs and 24 label maps, but no names that agree"),
        (empty, "no photographs"),
        (ignored, "hold nothing but 255"),
        (lambda root: None, "no such folder"),
    ],
)
def test_folders_that_cannot_be_described_say_why(tmp_path: Path, build: Any, message: str):
    build(tmp_path / "root")
    with pytest.raises(UserError, match=message):
        describe(tmp_path / "root", name="mine", lists=tmp_path / "lists")
    assert not (tmp_path / "lists").exists()


def test_running_it_twice_finds_its_own_lists(tmp_path: Path):
    root = tmp_path / "root"
    pairs(root)
    first = describe(root, name="mine", lists=tmp_path / "lists")
    first.write_lists()
    second = describe(root, name="mine", lists=tmp_path / "lists")
    assert first == second
    second.write_lists()
    assert len(read_ids(tmp_path / "lists/val.txt")) == 2


def test_folders_that_are_links_are_looked_into_and_circles_of_links_end(tmp_path: Path):
    pairs(tmp_path / "elsewhere")
    (root := tmp_path / "root").mkdir()
    for name in ("images", "masks"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere/images/back").symlink_to(root)
    block, files, _ = described(root)
    assert (block["images"], block["labels"]) == ("images/{id}.jpg", "masks/{id}.png")
    assert sorted([*files.ids("labeled"), *files.ids("unlabeled"), *files.ids("val")]) == IDS


def test_other_label_maps_that_fit_are_told(tmp_path: Path):
    pairs(tmp_path / "root")
    for name in IDS:
        mask(tmp_path / f"root/instances/{name}.png", 0, 1, 2, 3)
    block, _, notes = described(tmp_path / "root")
    other = ({"masks/{id}.png", "instances/{id}.png"} - {block["labels"]}).pop()
    assert f"not used            {other} fit too; dataset.labels chooses" in notes


def test_all_label_maps_may_be_labeled_where_other_images_have_none(tmp_path: Path):
    pairs(tmp_path / "root")
    for name in IDS[:10]:
        (tmp_path / f"root/masks/{name}.png").unlink()
    with pytest.raises(UserError, match="of 13 images that is 14"):
        described(tmp_path / "root", labeled="14")
    _, files, _ = described(tmp_path / "root", labeled="13")  # 14 label maps, one of them for val
    assert len(files.ids("labeled")) == 13


@pytest.mark.parametrize(("ignore", "label"), [("null", 255), ("2", 2), ('"none"', None)])
def test_the_label_that_does_not_count_may_be_given_with_the_names(tmp_path: Path, ignore: str, label: int | None):
    pairs(tmp_path / "root")
    (tmp_path / "root/classes.json").write_text(f'{{"names": ["a", "b"], "ignore_index": {ignore}}}')
    if label is None:
        with pytest.raises(
            UserError, match=r"classes\.json: the label that does not count is 'none'; expected a number"
        ):
            described(tmp_path / "root")
    else:
        assert described(tmp_path / "root")[1].config.ignore_label == label


def test_many_text_files_that_are_no_lists_are_one_line(tmp_path: Path):
    pairs(tmp_path / "root")
    (tmp_path / "root/labels").mkdir()
    for index in range(30):
        (tmp_path / f"root/labels/train_{index:03d}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    _, _, notes = described(tmp_path / "root")
    assert notes.count("labels/train_") == 3
    assert "not used            and 27 more such files" in notes
