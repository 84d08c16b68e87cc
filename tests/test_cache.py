"""The cache of decoded images: the same crops, made once, and made again when a source has changed."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import DatasetFiles, training_loader
from data.cache import DiskCache
from data.loaders import TrainingCrops
from tests.conftest import tiny_values
from utils.batch import Batch
from utils.config import check_config
from utils.errors import StorageError, UserError


def files_of(demo: Path, **data: Any) -> DatasetFiles:
    block = {"root": str(demo), "labeled": "splits/labeled.txt", "unlabeled": "splits/unlabeled.txt", "num_classes": 7,
             "resize": "60,70"}  # fmt: skip
    changes = {"training__data": {"input_size": "40,48", **data}}
    return DatasetFiles(check_config(tiny_values(dataset=block, **changes), source="test"))


@pytest.mark.parametrize("stream", ["labeled", "unlabeled"])
@pytest.mark.parametrize("data", [{}, {"scale": False, "crop": False, "flip": False}])
def test_crops_from_the_cache_are_the_crops_from_the_files(demo: Path, tmp_path: Path, stream: str, data: dict):
    plain = TrainingCrops(files_of(demo, **data), stream)
    cached = TrainingCrops(files_of(demo, cache="disk", cache_dir=str(tmp_path / "cache"), **data), stream)
    for _ in range(2):  # the first time it is filled
        for position in range(6):
            one, other = plain[position], cached[position]
            assert isinstance(one, Batch)
            assert isinstance(other, Batch)
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 12  # of unlabeled images too: the hidden labels
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.slow
def test_many_processes_fill_one_cache(demo: Path, tmp_path: Path):
    files = files_of(demo, cache="disk", cache_dir=str(tmp_path / "cache"))
    config = files.config.model_copy(update={"training": files.config.training.model_copy(update={"num_workers": 2})})
    plain = iter(training_loader(files_of(demo), "labeled", start_step=0))
    for batch in training_loader(DatasetFiles(config), "labeled", start_step=0):
        assert torch.equal(batch.images, next(plain).images)


def test_a_changed_source_is_decoded_again(tmp_path: Path):
    source = tmp_path / "a.png"
    cache = DiskCache(tmp_path / "cache", "x")
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.asarray(Image.open(source))

    for value in (10, 10, 20):
        Image.new("L", (3, 2), value).save(source)
        os.utime(source, ns=(value, value))
        assert cache.get(source, make).tolist() == [[value] * 3] * 2
    assert len(made) == 2
    assert DiskCache(tmp_path / "cache", "y").get(source, make).tolist() == [[20] * 3] * 2
    assert len(made) == 3, "another kind is another file"


def test_a_damaged_file_of_the_cache_is_made_again(tmp_path: Path):
    source = tmp_path / "a"
    source.touch()
    cache = DiskCache(tmp_path / "cache", "x")
    cache.get(source, lambda: np.ones((20, 20), np.uint8))
    (path,) = (tmp_path / "cache").rglob("*.npy")
    for damage in (b"", path.read_bytes()[:150], b"rubbish"):
        path.write_bytes(damage)
        assert cache.get(source, lambda: np.ones((20, 20), np.uint8)).sum() == 400


def test_what_cannot_be_made_or_written_says_so(tmp_path: Path):
    def fail() -> np.ndarray:
        raise UserError("damaged")

    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="damaged"):
        DiskCache(tmp_path / "cache", "x").get(tmp_path / "a", fail)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write the cache"):
        DiskCache(tmp_path / "file", "x").get(tmp_path / "a", lambda: np.ones((2, 2), np.uint8))


def test_two_machines_whose_processes_have_one_number_do_not_disturb_each_other(tmp_path: Path):
    (tmp_path / "a").touch()
    one, other = (DiskCache(tmp_path / "cache", "x") for _ in range(2))
    real = os.replace

    def both_at_once(unfinished: Path, path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", real)
            assert other.get(tmp_path / "a", lambda: np.ones((2, 2), np.uint8)).sum() == 4
        real(unfinished, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", both_at_once)
        assert one.get(tmp_path / "a", lambda: np.ones((2, 2), np.uint8)).sum() == 4


def fill(arguments: tuple[str, str, int]) -> int:
    folder, source, value = arguments
    cache = DiskCache(Path(folder), "x")

    def make() -> np.ndarray:
        time.sleep(0.01)
        return np.full((50, 50), 7, np.uint8)

    return int(cache.get(Path(source), make).sum()) + 0 * value


@pytest.mark.slow
def test_processes_that_make_the_same_file_at_once_all_get_the_whole_of_it(tmp_path: Path):
    (tmp_path / "a").touch()
    with ProcessPoolExecutor(4) as pool:
        found = list(pool.map(fill, [(str(tmp_path / "cache"), str(tmp_path / "a"), value) for value in range(16)]))
    assert found == [7 * 2500] * 16
