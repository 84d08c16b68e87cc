"""PASCAL VOC 2012 with the label maps of SBD, brought into the folder that the preset "pascal_voc" expects.

Whatever is unfinished lives in one scratch folder and reaches its final name by a rename, so that a run that was
killed leaves nothing that a later run would take for complete.
"""

import errno
import hashlib
import http.client
import io
import os
import re
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from data.decode import image_size, read_label
from data.workspace import complete, data_errors, workspace
from utils.config import VOC_NAMES
from utils.errors import DataError, StorageError
from utils.visualize import write_label

# How many ids each list has; train_aug is (VOC train + SBD train + SBD val) without VOC val.
EXPECTED = {"VOC train": 1464, "VOC val": 1449, "SBD train": 8498, "SBD val": 2857, "train_aug": 10582}
TIMEOUT = 60.0  # seconds without a byte from the server, after which a download has failed

_LABELS = "SegmentationClassAug"
_VOC_FOLDERS = ("JPEGImages", "SegmentationClass")
_TRAIN, _VAL, _TRAIN_AUG = (f"ImageSets/Segmentation/{name}.txt" for name in ("train", "val", "train_aug"))
_VOC_PARTS = (*_VOC_FOLDERS, _TRAIN, _VAL)
_SBD_PARTS = ("cls", "train.txt", "val.txt")
_VOC_INSIDE, _SBD_INSIDE = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"  # where the archives have these parts
_IGNORE_LABEL = 255


class Archive(NamedTuple):
    """A file to download: its name, its address, and the MD5 of its bytes in hexadecimal."""

    name: str
    url: str
    md5: str


class _Lists(NamedTuple):
    """Sorted ids: the two lists of the preset, and whose label maps come from VOC and from SBD."""

    train_aug: list[str]
    val: list[str]
    from_voc: list[str]
    from_sbd: list[str]


def archives() -> dict[str, Archive]:
    """The archives "voc" and "sbd", as torchvision knows them."""
    from torchvision.datasets.sbd import SBDataset  # takes seconds, and folders that are there already do without
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    voc = DATASET_YEAR_DICT["2012"]
    return {
        "voc": Archive(voc["filename"], voc["url"], voc["md5"]),
        "sbd": Archive(SBDataset.filename, SBDataset.url, SBDataset.md5),
    }


def prepare_voc(root: Path) -> str:
    """Make ``root`` the folder of the preset "pascal_voc" and return a summary of a few lines.

    VOC 2012 and SBD are taken from folders in root (VOC in root itself or in VOCdevkit/VOC2012; SBD in
    benchmark_RELEASE/dataset or sbd), else from their archives in root, else they are downloaded into root. Folders
    of VOC are moved to their place; those that are links to elsewhere are linked there. Running it again goes on with
    what is missing, and does nothing where nothing is.

    Raises DataError for what cannot be downloaded, is damaged, incomplete, or not what is expected.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; name a folder")
    root.mkdir(parents=True, exist_ok=True)
    counts = f"train_aug {EXPECTED['train_aug']} images, val {EXPECTED['VOC val']}"
    if _is_prepared(root):
        return f"{root}: already prepared, nothing to do ({counts})"
    with workspace(root) as scratch:
        _provide_voc(root, scratch)
        sbd = _provide_sbd(root, scratch)
        lists = _read_lists(root, sbd)
        _check_files(root, sbd, lists)
        if _lacking(root / _LABELS, [*lists.from_voc, *lists.from_sbd], ".png"):
            _write_labels(root, sbd, lists, scratch)
            labels = f"{len(lists.from_sbd)} converted from SBD, {len(lists.from_voc)} copied from VOC"
        else:  # a run was killed between its last two renames, or somebody else put them there
            labels = "were there already, not checked again"
        with complete(root / _TRAIN_AUG, scratch) as unfinished:
            unfinished.write_text("".join(f"{name}\n" for name in lists.train_aug), encoding="utf-8")
    return (
        f"{root}: PASCAL VOC 2012 with SBD is ready ({counts})\n"
        f"label maps in {_LABELS}: {labels}\n"
        f"training does not need {sbd.relative_to(root).parts[0]}, VOCdevkit and the archives any more"
    )


# ------------------------------------------------------------------------------------------------ getting the files


def _is_prepared(root: Path) -> bool:
    """Whether both lists are complete and every id of theirs has its image and its label map."""
    if not ((root / _TRAIN_AUG).is_file() and (root / _VAL).is_file()):
        return False
    train_aug, val = _read_ids(root / _TRAIN_AUG), _read_ids(root / _VAL)
    if (len(train_aug), len(val)) != (EXPECTED["train_aug"], EXPECTED["VOC val"]):
        return False
    ids = [*train_aug, *val]
    return not _lacking(root / "JPEGImages", ids, ".jpg") and not _lacking(root / _LABELS, ids, ".png")


def _provide_voc(root: Path, scratch: Path) -> None:
    """Bring VOC's folders and lists to their place in root, as far as they are not there yet."""
    missing = [part for part in _VOC_PARTS if not (root / part).exists()]
    source = root / _VOC_INSIDE
    if not all((source / part).exists() for part in missing):
        source = _unpack(_provide_archive("voc", root, scratch), scratch / "voc", _VOC_INSIDE, _VOC_PARTS)
    for part in missing:
        if part not in _VOC_FOLDERS:
            with complete(root / part, scratch) as unfinished:
                unfinished.write_bytes((source / part).read_bytes())
        elif (source / part).resolve().is_relative_to(root.resolve()):
            os.rename(source / part, root / part)
        else:  # perhaps shared with others: not ours to move
            (root / part).symlink_to((source / part).resolve())


def _provide_sbd(root: Path, scratch: Path) -> Path:
    """The folder in root with SBD's cls, train.txt and val.txt."""
    own = root / "sbd"
    for folder in (root / _SBD_INSIDE, own):
        lacking = [part for part in _SBD_PARTS if not (folder / part).exists()]
        if folder.exists() and not lacking:
            return folder
        if folder.exists():
            raise DataError(
                f"{folder}: {', '.join(lacking)} not there, so it is not all of SBD; delete this folder and run again"
            )
    os.rename(_unpack(_provide_archive("sbd", root, scratch), scratch / "sbd", _SBD_INSIDE, _SBD_PARTS), own)
    return own


def _provide_archive(kind: str, root: Path, scratch: Path) -> Path:
    """The path of an archive in root, downloaded if it is not there. Raises DataError unless its MD5 is right."""
    archive = archives()[kind]
    path = root / archive.name
    by_hand = f"or put {archive.name} into {root} by hand, from {archive.url}"
    if path.is_file():
        found, what, fix = _md5(path), str(path), f"delete it and run again, {by_hand}"
    else:
        _download(archive, scratch, by_hand)
        found, what, fix = _md5(scratch / archive.name), archive.url, f"nothing was kept; run again, {by_hand}"
    if found != archive.md5:
        raise DataError(f"{what}: damaged or incomplete, its MD5 is {found}, expected {archive.md5}; {fix}")
    if not path.is_file():
        os.replace(scratch / archive.name, path)
    return path


def _download(archive: Archive, folder: Path, by_hand: str) -> None:
    """Fetch an archive into a folder where it does not lie yet; its checksum is not looked at."""
    from torchvision.datasets.utils import download_url

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # download_url sets none, and would wait for a silent server for ever
    try:
        # Without its md5: a mismatch would not be told from other faults, nor what was found.
        download_url(archive.url, str(folder), archive.name)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(f"{folder}: no room for {archive.name} ({error.strerror}); free some") from None
        raise DataError(
            f"{archive.url}: cannot download {archive.name} ({error}); check the network and run again, {by_hand}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Path, target: Path, inside: str, parts: Sequence[str]) -> Path:
    """Extract the files below the given parts of the archive's folder ``inside``; return that folder in ``target``."""
    wanted = [PurePosixPath(inside, part) for part in parts]
    again = "nothing of it was kept; delete it and run again"
    try:
        with (
            archive.open("rb") as raw,
            tqdm.wrapattr(raw, "read", total=archive.stat().st_size, desc=f"unpack {archive.name}") as file,
            tarfile.open(fileobj=file, mode="r|*") as members,
        ):
            for member in members:  # not extractall, whose safe filter Python before 3.11.4 does not have
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise DataError(f"{archive}: cannot unpack it ({name} would be written outside); {again}")
                content = members.extractfile(member) if member.isreg() else None
                if content is not None and any(name.is_relative_to(part) for part in wanted):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    with content, (target / name).open("wb") as written:
                        shutil.copyfileobj(content, written)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: cannot unpack it ({error}); {again}") from None
    except OSError as error:
        raise StorageError(
            f"{target}: cannot unpack {archive.name} there ({error.strerror or error}); free some room"
        ) from None
    absent = [part for part in parts if not (target / inside / part).exists()]
    if absent:
        raise DataError(f"{archive}: no {', '.join(absent)} in its folder {inside}; {again}")
    return target / inside


# ------------------------------------------------------------------------------------------------ lists


def _read_lists(root: Path, sbd: Path) -> _Lists:
    """The four lists of VOC and SBD, and what follows from them. Raises DataError unless their lengths are known."""
    paths = {
        "VOC train": root / _TRAIN,
        "VOC val": root / _VAL,
        "SBD train": sbd / "train.txt",
        "SBD val": sbd / "val.txt",
    }
    ids = {name: set(_read_ids(path)) for name, path in paths.items()}
    train, val, of_sbd = ids["VOC train"], ids["VOC val"], ids["SBD train"] | ids["SBD val"]
    ids["train_aug"] = (train | of_sbd) - val
    wrong = [
        f"{name} {len(ids[name])}, expected {count}" for name, count in EXPECTED.items() if len(ids[name]) != count
    ]
    if wrong:
        raise DataError(
            f"{root}: number of ids: {'; '.join(wrong)}. No label map and no list was written. "
            f"Lists of VOC 2012 and SBD are wanted: delete {', '.join(map(str, paths.values()))} and run again"
        )
    return _Lists(sorted(ids["train_aug"]), sorted(val), sorted(train | val), sorted(of_sbd - train - val))


def _read_ids(path: Path) -> list[str]:
    try:
        ids = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read this id list ({error}); delete it and run again") from None
    ids = [line.strip() for line in ids if line.strip()]
    for identifier in ids:
        if not re.fullmatch(r"\w+", identifier, re.ASCII):  # also: no id leads out of the folder
            raise DataError(
                f"{path}: {identifier[:80]!r} is no id of VOC; expected one a line, such as 2007_000032. "
                "Move this file away and run again"
            )
    return ids


# ------------------------------------------------------------------------------------------------ label maps


def _lacking(folder: Path, ids: Iterable[str], ending: str) -> list[str]:
    """The ids without a file in the folder, which need not exist."""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    return [identifier for identifier in ids if identifier + ending not in there]


def _check_files(root: Path, sbd: Path, lists: _Lists) -> None:
    """Everything that is to be converted is there, and nothing of somebody else's would be overwritten."""
    everything = [*lists.from_voc, *lists.from_sbd]
    for folder, ids, ending in (
        (root / "JPEGImages", everything, ".jpg"),
        (root / "SegmentationClass", lists.from_voc, ".png"),
        (sbd / "cls", lists.from_sbd, ".mat"),
    ):
        if lacking := _lacking(folder, ids, ending):
            shown = ", ".join(name + ending for name in lacking[:3]) + (" ..." if len(lacking) > 3 else "")
            raise DataError(
                f"{folder}: {len(lacking)} of {len(ids)} files are missing: {shown}. Add them; "
                f"or delete {sbd if folder.parent == sbd else folder} and run again"
            )
    labels, train_aug = root / _LABELS, root / _TRAIN_AUG
    lacking = _lacking(labels, everything, ".png")
    if lacking and labels.is_dir() and any(labels.iterdir()):
        raise DataError(
            f"{labels}: made by something else, {len(lacking)} of {len(everything)} label maps are missing, "
            f"for example {lacking[0]}.png; move this folder away and run again"
        )
    if train_aug.is_file() and sorted(_read_ids(train_aug)) != lists.train_aug:
        raise DataError(
            f"{train_aug}: holds other ids than the {len(lists.train_aug)} of VOC train and SBD without VOC val; "
            "move this file away and run again"
        )


def _write_labels(root: Path, sbd: Path, lists: _Lists, scratch: Path) -> None:
    """SegmentationClassAug: VOC's own files where it has them, else SBD's as palette PNGs; all of them or nothing."""
    made, of_voc = scratch / _LABELS, set(lists.from_voc)
    made.mkdir()

    def make(identifier: str) -> None:
        target = made / f"{identifier}.png"
        if identifier in of_voc:
            source = root / f"SegmentationClass/{identifier}.png"
            _check_label(read_label(source), source, root)
            shutil.copyfile(source, target)
        else:
            source = sbd / f"cls/{identifier}.mat"
            label = _read_mat(source)
            _check_label(label, source, root)
            write_label(target, label, None)

    with data_errors():
        thread_map(make, [*lists.from_voc, *lists.from_sbd], desc="label maps", unit="map")
    os.rename(made, root / _LABELS)


def _read_mat(path: Path) -> np.ndarray:
    """(H,W) uint8 ids, the matrix GTcls.Segmentation of SBD's file. Raises DataError for a damaged or other file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        data = path.read_bytes()
        _check_mat(data)
        # MATLAB's scalars are 1 x 1: the struct GTcls, and the cell that each of its fields is read as.
        label = loadmat(io.BytesIO(data), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    # scipy has no one exception for a damaged file; these are what such files were seen to raise
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError, zlib.error, MatReadError) as error:
        raise DataError(
            f"{path}: cannot read GTcls.Segmentation ({error}); the file is damaged or not SBD's, fetch it again"
        ) from None
    if not isinstance(label, np.ndarray) or label.dtype != np.uint8 or label.ndim != 2:
        found = f"{label.dtype} {label.shape}" if isinstance(label, np.ndarray) else type(label).__name__
        raise DataError(f"{path}: GTcls.Segmentation is {found}, expected a uint8 matrix; fetch SBD again")
    return label


def _check_mat(data: bytes) -> None:
    """ValueError or zlib.error where a MATLAB 5 file is cut or its compressed parts fail their checksum.

    On some damaged files, such as those whose end is zeros, scipy's reader would crash and take the process with it.
    """
    order, start = ("<" if data[126:128] == b"IM" else ">"), 128
    if len(data) <= start:
        raise ValueError("it ends within its header")
    while start < len(data):
        if start + 8 > len(data):
            raise ValueError("it is cut off")
        kind, size = struct.unpack_from(f"{order}II", data, start)
        if kind not in (14, 15) or start + 8 + size > len(data):  # a matrix, a compressed matrix
            raise ValueError("it is cut off or overwritten")
        if kind == 15:
            zlib.decompress(data[start + 8 : start + 8 + size])
        start += 8 + size


def _check_label(label: np.ndarray, source: Path, root: Path) -> None:
    """DataError unless the ids are classes or 255 and the size is the image's."""
    size = image_size(root / f"JPEGImages/{source.stem}.jpg")
    if label.shape != size:
        raise DataError(
            f"{source}: label map of {label.shape[1]} x {label.shape[0]} for an image of {size[1]} x {size[0]} pixels; "
            "they must agree, fetch both again"
        )
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
    outside = [int(index) for index in present if index >= len(VOC_NAMES) and index != _IGNORE_LABEL]
    if outside:
        raise DataError(
            f"{source}: label ids out of range: {', '.join(map(str, outside[:5]))}; "
            f"expected 0..{len(VOC_NAMES) - 1} or {_IGNORE_LABEL}, fetch the file again"
        )
