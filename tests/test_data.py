"""Datasets on disk: lists, splits, damaged files, joint geometry, and streams that do not depend on who loads them."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import DatasetFiles, evaluation_loader, preview_batch, training_loader
from data.decode import IMAGE_ENDINGS, image_size, read_image, read_label
from data.loaders import TrainingCrops
from data.transforms import PAD_COLOR, random_crop, resize
from tests.conftest import tiny_values
from utils.config import Config, DataConfig, check_config
from utils.errors import UserError
from utils.visualize import voc_palette

IDS = [f"picture_{index}" for index in range(8)]
SPLITS = ("labeled", "unlabeled")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images of 50 x 60; labels for all but two unlabeled ones."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(IDS):
        for folder in ("JPEGImages", "SegmentationClassAug"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(tmp_path / f"JPEGImages/{name}.jpg")
        if index not in (4, 5):
            Image.fromarray(rng.integers(0, 3, (50, 60), dtype=np.uint8)).save(
                tmp_path / f"SegmentationClassAug/{name}.png"
            )
    write(tmp_path / "labeled.txt", "# three images\n" + "\n".join(IDS[:3]))
    write(tmp_path / "unlabeled.txt", "\n".join(IDS[3:6]) + "\n\n")
    write(tmp_path / "train.txt", "\n".join(reversed(IDS[:6])))
    write(tmp_path / "ImageSets/Segmentation/val.txt", "\n".join(IDS[6:]))
    return tmp_path


@pytest.fixture
def config(root: Path) -> Callable[..., Config]:
    return lambda **changes: check_config(tiny_values(data_root=str(root), **changes), source="test")


def from_train(**changes: Any) -> dict[str, Any]:
    return {"dataset": {"root": "x", "num_classes": 3, "train": "train.txt"}, **changes}


# ------------------------------------------------------------------------------------------------ lists and splits


def test_lists_are_read_in_order_without_comments_and_empty_lines(config):
    files = DatasetFiles(config())
    assert files.ids("labeled") == IDS[:3]
    assert files.ids("unlabeled") == IDS[3:6]
    assert files.ids("val") == IDS[6:]
    files.check_for_training()


def test_unlabeled_images_without_label_files_train_and_a_missing_label_of_a_labeled_one_does_not(config, root: Path):
    DatasetFiles(config()).check_for_training()  # pictures 4 and 5 have no label file
    (root / "SegmentationClassAug/picture_1.png").unlink()
    with pytest.raises(UserError, match=r"1 of 6 files of the labeled list are missing: .*picture_1\.png"):
        DatasetFiles(config()).check_for_training()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "unlabeled.txt",
            "picture_2\npicture_3",
            "1 ids are in the labeled and the unlabeled list, for example picture_2",
        ),
        ("unlabeled.txt", "# nothing\n", "unlabeled.txt is empty"),
        ("labeled.txt", "", "labeled.txt is empty"),
        ("labeled.txt", "picture_0\npicture_0", "appear twice"),
        ("labeled.txt", "../../etc/passwd", "leaves the dataset's folder"),
        ("labeled.txt", "/etc/passwd", "leaves the dataset's folder"),
        ("labeled.txt", "nobody", "are missing: .*nobody.jpg"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(config, root: Path, name: str, text: str, message: str):
    write(root / name, text)
    with pytest.raises(UserError, match=message):
        DatasetFiles(config()).check_for_training()


def test_a_baseline_needs_no_unlabeled_list_and_a_method_with_unlabeled_terms_does(config, root: Path):
    block = {"root": "x", "num_classes": 3, "labeled": "labeled.txt"}
    files = DatasetFiles(config(dataset=block, training__unlabeled__train_unlabeled=False))
    files.check_for_training()
    with pytest.raises(UserError, match="names no list of unlabeled images"):
        files.ids("unlabeled")
    with pytest.raises(UserError, match=r"give dataset\.unlabeled or dataset\.train"):
        config(dataset=block)


def test_a_bad_label_of_a_validation_image_is_found_before_training(config, root: Path):
    Image.fromarray(np.full((50, 60), 77, dtype=np.uint8)).save(root / "SegmentationClassAug/picture_7.png")
    with pytest.raises(UserError, match=r"picture_7\.png: label ids out of range: 77"):
        DatasetFiles(config()).check_for_training()


def test_validation_on_training_images_is_said(config, root: Path):
    write(root / "ImageSets/Segmentation/val.txt", "picture_0\npicture_6")
    with pytest.warns(UserWarning, match="1 of 2 val images are training images too, for example picture_0"):
        DatasetFiles(config()).check_for_training()


def test_class_shares_count_the_labeled_pixels_of_the_labeled_images(config, root: Path):
    files, counts = DatasetFiles(config()), np.zeros(256)
    for name in IDS[:3]:
        counts += np.bincount(np.asarray(Image.open(root / f"SegmentationClassAug/{name}.png")).ravel(), minlength=256)
    assert files.class_shares() == pytest.approx(counts[:3] / counts[:3].sum())
    for name in IDS[:3]:  # one image of 0s, two of ignored pixels and 2s in equal numbers
        label = np.zeros((50, 60), np.uint8) if name == IDS[0] else np.full((50, 60), 2, np.uint8)
        label[:25] = 0 if name == IDS[0] else 255
        Image.fromarray(label).save(root / f"SegmentationClassAug/{name}.png")
    assert files.class_shares() == pytest.approx([0.5, 0, 0.5])


def test_label_maps_without_any_label_are_refused(config, root: Path):
    for name in IDS[6:]:
        Image.fromarray(np.full((50, 60), 255, dtype=np.uint8)).save(root / f"SegmentationClassAug/{name}.png")
    with pytest.raises(UserError, match="the label maps of the val list hold nothing but ignore_label"):
        DatasetFiles(config()).check_for_training()


def test_files_of_windows_editors_are_read(config, root: Path):
    (root / "labeled.txt").write_bytes(b"\xef\xbb\xbfpicture_0\r\npicture_1\r\n")
    assert DatasetFiles(config()).ids("labeled") == ["picture_0", "picture_1"]


def test_label_maps_with_lossy_compression_are_refused(tmp_path: Path):
    Image.new("L", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="not a readable PNG file"):
        read_label(tmp_path / "a.jpg")


def test_a_missing_root_or_list_names_its_path(config, root: Path):
    with pytest.raises(UserError, match=r"/nowhere/at/all: no such folder.*--data-root"):
        DatasetFiles(config().model_copy(update={"data_root": "/nowhere/at/all"}))
    (root / "labeled.txt").unlink()
    with pytest.raises(UserError, match=r"labeled\.txt: cannot read this id list"):
        DatasetFiles(config()).ids("labeled")
    with pytest.raises(UserError, match=r"names no test list; add dataset\.test"):
        DatasetFiles(config()).ids("test")


def test_a_list_that_changes_during_a_run_is_not_the_run_s(config, root: Path):
    files = DatasetFiles(config())
    ids, told = files.ids("val"), files.about("val")
    write(root / "ImageSets/Segmentation/val.txt", IDS[0])
    assert (files.ids("val"), files.about("val")) == (ids, told)
    assert DatasetFiles(config()).ids("val") == [IDS[0]] != ids


def test_a_seeded_split_is_drawn_from_the_sorted_list_and_said(config):
    with pytest.warns(UserWarning, match="seeded permutation of the sorted list"):
        first = [DatasetFiles(config(**from_train(training__data__labeled_samples=2))).ids(s) for s in SPLITS]
    with pytest.warns(UserWarning, match="seeded permutation"):
        again = [DatasetFiles(config(**from_train(training__data__labeled_samples=2))).ids(s) for s in SPLITS]
    assert first == again
    assert len(first[0]) == 2
    assert sorted(first[0] + first[1]) == sorted(IDS[:6])


@pytest.mark.filterwarnings("ignore:no training.data.split_id_list")
def test_an_unlabeled_list_counts_also_when_the_labeled_images_are_drawn(config, root: Path):
    write(root / "train.txt", "\n".join(IDS[:3]))
    block = {"root": "x", "num_classes": 3, "train": "train.txt", "unlabeled": "unlabeled.txt"}
    files = DatasetFiles(config(dataset=block, training__data__labeled_samples=2))
    assert files.ids("unlabeled") == IDS[3:6]
    assert set(files.ids("labeled")) < set(IDS[:3])


def test_a_split_file_decides_when_it_is_there(config, root: Path):
    write(root / "splits/custom/split_4.txt", "\n".join(IDS[5::-1]))
    split = {"training__data__split_id_list": 4, "training__data__labeled_samples": 2}
    assert DatasetFiles(config(**from_train(**split))).ids("labeled") == ["picture_5", "picture_4"]
    write(root / "splits/custom/split_4.txt", "\n".join(IDS[5:0:-1]))
    with pytest.raises(UserError, match="5 ids that are not the 6 of the training list"):
        DatasetFiles(config(**from_train(**split))).ids("labeled")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (from_train(training__data__labeled_samples=7), "labeled_samples is 7, but the training list has 6"),
        (from_train(), "all 6 training images are labeled"),
        ({"training__data__labeled_samples": 2}, "labeled_samples is 2, but .*labeled.txt has 3 ids"),
    ],
)
@pytest.mark.filterwarnings("ignore:no training.data.split_id_list")
def test_numbers_of_labeled_images_that_do_not_fit_are_refused(config, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        DatasetFiles(config(**changes)).ids("unlabeled")


def test_the_hash_names_the_images_not_their_order(config, root: Path):
    before = DatasetFiles(config()).split_hash()
    write(root / "labeled.txt", "\n".join(IDS[2::-1]))
    assert DatasetFiles(config()).split_hash() == before
    write(root / "labeled.txt", "\n".join(IDS[:2]))
    assert DatasetFiles(config()).split_hash() != before


def test_cityscapes_is_read_in_its_own_layout_with_ids_mapped_and_files_sorted(tmp_path: Path):
    rng = np.random.default_rng(0)
    for city, split in (("zurich", "train"), ("aachen", "train"), ("bonn", "val")):
        name = f"{city}_000000_000019"
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / split / city).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)).save(
            tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png"
        )
        label = np.array([[7, 33, 0, 5]], dtype=np.uint8).repeat(32, axis=0).repeat(16, axis=1)
        Image.fromarray(label).save(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png")
    values = tiny_values(dataset="cityscapes", data_root=str(tmp_path), ignore_label=250)
    values["training"]["data"]["labeled_samples"] = 1
    files = DatasetFiles(check_config(values, source="test"))
    assert files.ids("val") == ["val/bonn/bonn_000000_000019"]
    assert files._train_ids == ["train/aachen/aachen_000000_000019", "train/zurich/zurich_000000_000019"]
    _, label = files.read_pair("val/bonn/bonn_000000_000019")
    assert label[0, ::16].tolist() == [0, 18, 250, 250]
    released = next(iter(evaluation_loader(files, "val", protocol="release")))[0]
    original = next(iter(evaluation_loader(files, "val", protocol="original")))[0]
    assert released.image.shape == original.image.shape == (3, 512, 1024)
    assert released.label.shape == (512, 1024)
    assert original.label.shape == (32, 64)


# ------------------------------------------------------------------------------------------------ files


def test_palette_labels_are_read_as_ids(tmp_path: Path):
    image = Image.fromarray(np.array([[0, 1], [20, 255]], dtype=np.uint8)).convert("L")
    image.putpalette([value for color in voc_palette() for value in color])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    assert read_label(tmp_path / "a.png").tolist() == [[0, 1], [20, 255]]


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_ids_of_few_bits_are_read_as_stored(tmp_path: Path, bits: int):
    ids = np.arange(2**bits, dtype=np.uint8)
    values = np.unpackbits(ids[:, None], axis=1)[:, 8 - bits :]  # the highest bit first, as PNG packs them
    header = struct.pack(">IIBBBBB", len(ids), 1, bits, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + np.packbits(values).tobytes())), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert read_label(tmp_path / "a.png").tolist() == [ids.tolist()]


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_labels_that_hold_no_ids_are_refused_with_their_mode(tmp_path: Path, mode: str):
    Image.new(mode, (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"a\.png: a label map must be .* found mode {mode}"):
        read_label(tmp_path / "a.png")


@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_truncated_file_is_refused_not_half_read(tmp_path: Path, suffix: str, share: float):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=rf"a\.{suffix}: (damaged|not a readable)"):
        read_image(path)


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
def test_each_image_format_gives_the_pixels_that_were_saved(tmp_path: Path, ending: str):
    image = np.full((20, 30, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / f"a{ending}")
    assert image_size(tmp_path / f"a{ending}") == (20, 30)
    assert np.abs(read_image(tmp_path / f"a{ending}").astype(int) - image).max() <= 3, "JPEG and WebP lose some"


def test_bombs_empty_files_and_other_formats_are_refused_from_the_header(tmp_path: Path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "image.gif")
    for name in ("bomb.png", "empty.png", "image.gif"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        image_size(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            np.full((50, 60), 21, dtype=np.uint8),
            r"ids out of range: 21 \(3000 pixels\); expected 0\.\.2 or ignore_label 255",
        ),
        (np.full((50, 60), 254, dtype=np.uint8), r"254 \(3000 pixels\)"),
        (np.zeros((60, 50), dtype=np.uint8), "label map of 50 x 60 for an image of 60 x 50 pixels"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_does_not_fit_is_one_clear_message_from_any_process(
    config, root: Path, label: np.ndarray, message: str, workers: int
):
    Image.fromarray(label).save(root / "SegmentationClassAug/picture_0.png")
    files = DatasetFiles(config(training__num_workers=workers))
    with pytest.raises(UserError, match=message):
        files.check_for_training()
    with pytest.raises(UserError, match=message) as error:
        for _ in training_loader(files, "labeled", start_step=0):
            pass
    assert "Traceback" not in str(error.value)


# ------------------------------------------------------------------------------------------------ geometry


def coded(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red channel is also its label."""
    label = np.random.default_rng(1).integers(0, 200, (height, width), dtype=np.uint8)
    return np.stack((label, label, label), axis=2), label


@pytest.mark.parametrize("size", [(30, 30), (60, 40), (100, 120)])
def test_image_label_and_validity_move_together(size: tuple[int, int]):
    options = DataConfig(input_size="48,56", scale=False)
    for seed in range(10):
        image, label, valid = random_crop(
            *coded(*size), data=options, ignore_label=255, rng=np.random.default_rng(seed)
        )
        assert image.shape == (48, 56, 3)
        assert (image[..., 0] == label)[valid].all()
        assert (label[~valid] == 255).all()
        assert (image[~valid] == PAD_COLOR).all()
        assert valid.sum() == min(size[0], 48) * min(size[1], 56)


def test_scale_covers_its_range_and_nothing_else():
    options = DataConfig(input_size="200,200", scale_range=(0.5, 1.5), crop=False, flip=False)
    sides = [
        np.sqrt(random_crop(*coded(100, 100), data=options, ignore_label=255, rng=np.random.default_rng(s))[2].sum())
        for s in range(200)
    ]
    assert 50 <= min(sides) < 55
    assert 145 < max(sides) <= 150


def test_switching_one_draw_off_leaves_the_others_alone():
    crops = []
    for flip in (True, False):
        options = DataConfig(input_size="40,40", scale=False, flip=flip)
        crops.append(random_crop(*coded(64, 64), data=options, ignore_label=255, rng=np.random.default_rng(3))[1])
    assert np.array_equal(crops[0], crops[1]) or np.array_equal(crops[0], crops[1][:, ::-1])


def test_labels_are_resized_without_inventing_ids():
    label = np.where(np.arange(60)[None, :].repeat(50, axis=0) < 30, 0, 200).astype(np.uint8)
    assert set(np.unique(resize(label, (33, 41)))) == {0, 200}


# ------------------------------------------------------------------------------------------------ streams


def test_a_stream_depends_on_seed_and_place_not_on_workers_or_resume(config):
    def read(workers: int, start: int, **changes: Any) -> list:
        files = DatasetFiles(config(training__num_workers=workers, **changes))
        return list(training_loader(files, "labeled", start_step=start))

    whole = read(0, 0)
    assert len(whole) == 8
    for other in (read(2, 0), [None] * 5 + read(0, 5)):
        for mine, theirs in zip(whole, other, strict=True):
            assert theirs is None or (torch.equal(mine.images, theirs.images) and mine.ids == theirs.ids)
    assert not torch.equal(whole[0].images, read(0, 0, seed=2)[0].images)


def test_every_image_comes_once_a_pass_and_passes_differ(config):
    crops = TrainingCrops(DatasetFiles(config()), "unlabeled")
    passes = [tuple(crops.id_at(3 * epoch + place) for place in range(3)) for epoch in range(20)]
    assert all(sorted(one) == IDS[3:6] for one in passes)
    assert len(set(passes)) > 1


def test_unlabeled_batches_carry_no_labels(config):
    batch = next(iter(training_loader(DatasetFiles(config()), "unlabeled", start_step=0)))
    assert (batch.labels == 255).all()
    assert batch.images.dtype == torch.uint8
    on_device = batch.to(torch.device("cpu"))
    assert on_device.images.dtype == torch.float32
    assert 0 <= on_device.images.min() <= on_device.images.max() <= 1


def test_evaluation_sees_whole_images_and_the_preview_their_middle(config, root: Path):
    files = DatasetFiles(config())
    (batch,) = evaluation_loader(files, "val", protocol="original")
    assert [item.id for item in batch] == IDS[6:]
    assert np.array_equal(batch[0].image.permute(1, 2, 0), read_image(root / "JPEGImages/picture_6.jpg"))
    preview = preview_batch(files)
    assert preview.images.shape == (2, 3, 40, 48)
    assert torch.equal(preview.images[0], batch[0].image[:, 5:45, 6:54])
    assert torch.equal(preview.labels[0], batch[0].label[5:45, 6:54])
