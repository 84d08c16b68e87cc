"""Lists of ids: their hash, their drawing, the release's pickles, and the lists of other code."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data.datasets
from data import DatasetFiles
from data.splits import count_of, draw_order, hash_of, import_ids, parse_amount, read_ids, read_indices, write_ids
from data.write_splits import draw_splits, take_names
from tests.conftest import Malicious, tiny_values
from utils.config import check_config
from utils.errors import UserError

IDS = [f"picture_{index}" for index in range(12)]
CAMVID = Path(__file__).parent.parent.parent / "shared" / "camvid_voc"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve images; class 2 is in one of them alone, class 1 in three."""
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for index, name in enumerate(IDS):
        Image.new("RGB", (40, 36)).save(tmp_path / f"JPEGImages/{name}.jpg", root=tmp_path)
        label = np.zeros((36, 40), np.uint8)
        label[0, 0], label[1, 1] = index < 3, 2 * (index == 7)
        Image.fromarray(label).save(tmp_path / f"SegmentationClassAug/{name}.png")
    (tmp_path / "train.txt").write_text("\n".join(reversed(IDS)))
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text(IDS[0])
    return tmp_path


@pytest.fixture
def files(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DatasetFiles]:
    """With an empty folder in place of this project, where lists are looked for too."""
    (root / "project").mkdir()
    monkeypatch.setattr(data.datasets, "PROJECT", root / "project")

    def make(name: str = "roads", **changes: Any) -> DatasetFiles:
        block = {"name": name, "root": str(root), "train": "train.txt", "num_classes": 3}
        return DatasetFiles(check_config(tiny_values(dataset=block, **changes), source="test"))

    return make


# ------------------------------------------------------------------------------------------------ lists


def test_a_written_list_says_what_it_is_and_is_read_again(tmp_path: Path):
    path = tmp_path / "lists/labeled.txt"
    assert write_ids(path, ["b", "a"], about={"seed": 3, "labeled": "1/8 of 16 images"})
    assert path.read_text() == f"# seed 3, labeled 1/8 of 16 images, hash {hash_of(['a', 'b'])}\nb\na\n"
    assert read_ids(path) == ["b", "a"]
    assert not write_ids(path, ["b", "a"], about={}), "the same list again"
    with pytest.raises(UserError, match="is there already with other ids"):
        write_ids(path, ["c"], about={})
    assert read_ids(path) == ["b", "a"]


def test_a_list_that_was_changed_after_it_was_written_is_refused(tmp_path: Path):
    path = tmp_path / "labeled.txt"
    write_ids(path, ["a", "b"], about={"seed": 0})
    path.write_text(path.read_text() + "c\n")
    with pytest.raises(UserError, match=r"hash [0-9a-f]{12}, but these ids have .*the list was changed"):
        read_ids(path)


@pytest.mark.parametrize(("text", "of_hundred"), [("1/8", 12), ("0.125", 12), ("7", 7), ("1/3", 33)])
def test_amounts(text: str, of_hundred: int):
    assert count_of(parse_amount(text), 100) == of_hundred


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "3/2", "2/1", "2.0", "x", "1/0", "nan", ""])
def test_amounts_that_mean_nothing_are_refused(text: str):
    with pytest.raises(UserError, match="expected a fraction such as 1/8"):
        parse_amount(text)


@pytest.mark.parametrize(("amount", "total"), [("1/8", 3), ("5", 5), ("9", 5)])
def test_amounts_that_leave_nothing_are_refused(amount: str, total: int):
    with pytest.raises(UserError, match=f"expected 1 to {total - 1}"):
        count_of(parse_amount(amount), total)


def test_an_order_depends_on_seed_and_ids_alone_and_is_nested():
    order, needed = draw_order(IDS, seed=1)
    assert sorted(order) == sorted(IDS)
    assert needed == 0
    assert draw_order(reversed(IDS), seed=1)[0] == order
    assert draw_order(IDS, seed=2)[0] != order
    without = [one for one in order if one != IDS[4]]
    assert draw_order([one for one in IDS if one != IDS[4]], seed=1)[0] == without, "other images change nothing"


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs the CamVid lists in ../shared/camvid_voc")
def test_camvids_lists_are_what_is_drawn():
    train = (CAMVID / "ImageSets/Segmentation/train.txt").read_text().split()
    for seed in (0, 1, 2):
        order, _ = draw_order(train, seed=seed)
        for fraction in ("1/16", "1/8", "1/4"):
            given = (CAMVID / f"splits/{fraction.replace('/', '_')}/seed{seed}/labeled.txt").read_text().split()
            assert set(order[: count_of(parse_amount(fraction), len(train))]) == set(given)


# ------------------------------------------------------------------------------------------------ drawn lists


def test_lists_are_drawn_for_every_amount_and_seed_and_can_be_trained_on(files: Any, root: Path):
    lines = draw_splits(files(), amounts=["1/6", "6"], seeds=[0, 1], cover=False, output=root / "out")
    assert len(lines) == 4
    for seed in (0, 1):
        few, many = (read_ids(root / f"out/{amount}/seed{seed}/labeled.txt") for amount in ("1_6", "6"))
        assert (len(few), len(many)) == (2, 6)
        assert many[:2] == few
        assert set(read_ids(root / f"out/6/seed{seed}/unlabeled.txt")) == set(IDS) - set(many)
    again = draw_splits(files(), amounts=["1/6"], seeds=[0], cover=False, output=root / "out")
    assert "was there already" in again[0]
    block = {"root": str(root), "labeled": "out/6/seed1/labeled.txt", "unlabeled": "out/6/seed1/unlabeled.txt"}
    config = check_config(tiny_values(dataset=block | {"num_classes": 3}), source="test")
    assert DatasetFiles(config).split_hash() in lines[3]


@pytest.mark.parametrize("seed", range(5))
def test_with_cover_every_class_is_labeled_however_rare(files: Any, root: Path, seed: int):
    draw_splits(files(), amounts=["2", "5"], seeds=[seed], cover=True, output=root / "out")
    few = read_ids(root / f"out/2/seed{seed}/labeled.txt")
    assert few[0] == IDS[7], "the only image with class 2"
    assert few[1] in IDS[:3], "class 1"
    assert read_ids(root / f"out/5/seed{seed}/labeled.txt")[:2] == few
    assert "classes all covered" in (root / f"out/5/seed{seed}/labeled.txt").read_text()


def test_only_images_with_a_label_map_are_labeled(files: Any, root: Path):
    for name in IDS[:7]:
        (root / f"SegmentationClassAug/{name}.png").unlink()
    draw_splits(files(), amounts=["2/5", "5"], seeds=[0], cover=True, output=root / "out")
    labeled = read_ids(root / "out/2_5/seed0/labeled.txt")
    assert len(labeled) == 2
    assert set(labeled) <= set(IDS[7:])
    assert set(read_ids(root / "out/5/seed0/labeled.txt")) == set(IDS[7:])
    assert set(read_ids(root / "out/5/seed0/unlabeled.txt")) == set(IDS[:7])
    (root / "theirs.txt").write_text(f"{IDS[8]}\n{IDS[2]}\n")
    with pytest.raises(UserError, match=r"1 of 4 files of the images that theirs.txt calls labeled are missing"):
        take_names(files(), root / "theirs.txt", count=None, output=root / "taken")
    assert not (root / "taken").exists()


def test_too_few_to_cover_every_class_is_refused_before_anything_is_written(files: Any, root: Path):
    with pytest.raises(UserError, match=r"2 images are needed for every class .* 1 is 1\. Take more"):
        draw_splits(files(), amounts=["6", "1"], seeds=[0], cover=True, output=root / "out")
    assert not (root / "out").exists()


# ------------------------------------------------------------------------------------------------ the release's pickles


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_pickled_array_of_indices_is_read(tmp_path: Path, protocol: int):
    path = dump(tmp_path / "split_0.pkl", pickle.dumps(np.array([3, 1, 2, 0]), protocol))
    assert read_indices(path) == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a pickled array"),
        (b"\x80\x03garbage", "not a pickled array"),
        (pickle.dumps({"a": 1}), "found dict"),
        (pickle.dumps(np.zeros((2, 2), int)), "found ndarray"),
        (pickle.dumps(np.array([0.5])), "found ndarray"),
        (pickle.dumps(np.array([0, 0])), "some twice or negative"),
        (pickle.dumps(np.array([-1, 0])), "some twice or negative"),
        (pickle.dumps(np.array([{}], dtype=object)), "found ndarray"),
        (pickle.dumps(re.compile("x")), "is not allowed in a list of indices"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(UserError, match=message):
        read_indices(dump(tmp_path / "split_0.pkl", content))


def test_nothing_in_a_pickle_is_executed(tmp_path: Path):
    path = dump(tmp_path / "split_0.pkl", Malicious(tmp_path / "was-run"))
    with pytest.raises(UserError, match=r"is not allowed in a list of indices"):
        read_indices(path)
    assert not (tmp_path / "was-run").exists()


def test_split_id_list_takes_the_releases_pickle_with_indices_into_the_list_as_it_is(files: Any, root: Path):
    order = np.random.default_rng(0).permutation(12)
    for name, folder in (("roads", "splits/roads"), ("pascal_voc", "project/splits/voc")):
        dump(root / folder / "split_1.pkl", order)
        one = files(name, training__data={"input_size": "40,48", "split_id_list": 1, "labeled_samples": 4})
        with pytest.warns(UserWarning, match="indices into train.txt as it is here .*hash [0-9a-f]{12}"):
            labeled = one.ids("labeled")
        assert labeled == [list(reversed(IDS))[index] for index in order[:4]]
        assert one.ids("unlabeled") == [list(reversed(IDS))[index] for index in order[4:]]


def test_a_text_list_comes_before_a_pickle_and_the_data_root_before_the_project(files: Any, root: Path):
    dump(root / "splits/roads/split_0.pkl", np.arange(12))
    write_ids(root / "splits/roads/split_0.txt", IDS[6:] + IDS[:6], about={"seed": 0})
    write_ids(root / "project/splits/roads/split_0.txt", IDS, about={"seed": 0})
    one = files(training__data={"input_size": "40,48", "split_id_list": 0, "labeled_samples": 4})
    assert one.ids("labeled") == IDS[6:10]


@pytest.mark.parametrize("content", [np.arange(11), np.arange(13)])
def test_a_pickle_of_another_dataset_is_refused(files: Any, root: Path, content: np.ndarray):
    dump(root / "splits/roads/split_0.pkl", content)
    one = files(training__data={"input_size": "40,48", "split_id_list": 0, "labeled_samples": 4})
    with pytest.raises(UserError, match="no permutation of the 12 training images"):
        one.ids("labeled")


def test_a_list_is_found_below_the_project_too(files: Any, root: Path):
    write_ids(root / "project/splits/roads/labeled.txt", IDS[:3], about={})
    block = {"root": str(root), "labeled": "splits/roads/labeled.txt", "train": "train.txt", "num_classes": 3}
    one = files()
    assert (
        DatasetFiles(one.config.model_copy(update={"dataset": one.block.model_copy(update=block)})).ids("labeled")
        == (IDS[:3])
    )


# ------------------------------------------------------------------------------------------------ other code's lists


@pytest.mark.parametrize(
    "line",
    [
        "picture_3",
        "JPEGImages/picture_3.jpg SegmentationClass/picture_3.png",
        "/JPEGImages/picture_3.jpg /SegmentationClassAug/picture_3.png",
        "picture_3.jpg",
        "somewhere/else/picture_3.jpg,picture_3.png",
        "JPEGImages/picture_3.jpg\tx",
    ],
)
def test_lines_of_other_lists_are_understood(tmp_path: Path, line: str):
    (tmp_path / "list.txt").write_text(f"# theirs\n{line}\npicture_1\n\n")
    assert import_ids(tmp_path / "list.txt", IDS, pattern="JPEGImages/{id}.jpg", root=tmp_path) == [
        "picture_3",
        "picture_1",
    ]


@pytest.mark.parametrize("line", ["North Road/001", "photos/North Road/001.jpg"])
def test_names_may_hold_spaces(tmp_path: Path, line: str):
    (tmp_path / "list.txt").write_text(line)
    known = ["North Road/001", "North Road/002"]
    assert import_ids(tmp_path / "list.txt", known, pattern="photos/{id}.jpg", root=tmp_path) == known[:1]


def test_cityscapes_lists_of_other_code_are_understood(tmp_path: Path):
    known = ["train/aachen/aachen_000000_000019", "train/ulm/ulm_000001_000019"]
    lines = [
        f"leftImg8bit/{known[0]}_leftImg8bit.png gtFine/{known[0]}_gtFine_labelTrainIds.png",
        "ulm_000001_000019_leftImg8bit.png",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert import_ids(tmp_path / "list.txt", known, pattern="leftImg8bit/{id}_leftImg8bit.png", root=tmp_path) == known


def test_lines_that_name_no_training_image_are_named(tmp_path: Path):
    (tmp_path / "list.txt").write_text("picture_3\nnobody\n")
    with pytest.raises(UserError, match=r"1 of 2 lines name no training image of the dataset: nobody"):
        import_ids(tmp_path / "list.txt", IDS, pattern="JPEGImages/{id}.jpg", root=tmp_path)
    (tmp_path / "list.txt").write_text("picture_3\nJPEGImages/picture_3.jpg\n")
    with pytest.raises(UserError, match="1 images are named twice, for example picture_3"):
        import_ids(tmp_path / "list.txt", IDS, pattern="JPEGImages/{id}.jpg", root=tmp_path)


def test_taken_names_become_two_lists(files: Any, root: Path):
    (root / "theirs.txt").write_text(
        "\n".join(f"JPEGImages/{name}.jpg SegmentationClass/{name}.png" for name in IDS[2:5])
    )
    take_names(files(), root / "theirs.txt", count=None, output=root / "out")
    assert read_ids(root / "out/labeled.txt") == IDS[2:5]
    assert set(read_ids(root / "out/unlabeled.txt")) == set(IDS) - set(IDS[2:5])
    order = np.arange(12)[::-1].copy()  # the list is reversed, so these are the ids in order
    lines = take_names(files(), dump(root / "split_0.pkl", order), count=4, output=root / "pickled")
    assert read_ids(root / "pickled/labeled.txt") == IDS[:4]
    assert lines[1:] == ["These were indices into train.txt as it is here; with another order they mean other images."]


@pytest.mark.parametrize(
    ("content", "count", "message"),
    [
        (np.arange(12), None, "say with --count how many are labeled"),
        (np.arange(20), 3, "index 19, but the training list has 12 images"),
        (np.arange(5), 6, "--count 6: .* names 5 images"),
        (np.arange(12), 12, "none would be left"),
    ],
)
def test_names_that_cannot_be_two_lists_are_refused(files: Any, root: Path, content: Any, count: Any, message: str):
    with pytest.raises(UserError, match=message):
        take_names(files(), dump(root / "split_0.pkl", content), count=count, output=root / "out")
    assert not (root / "out").exists()
