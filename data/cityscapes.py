"""Cityscapes as it is unpacked: whether it is complete, and a copy with training images of half size.

Training resizes every image to the preset's size before anything else. Decoding the full size costs most of the
loading time; the copy holds the resized images, bit for bit what training would compute.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from data.decode import image_size, read_image, read_label
from data.transforms import resize
from data.workspace import complete, data_errors, workspace
from utils.config import DATASETS, parse_size
from utils.errors import DataError, UserError

EXPECTED = {"train": 2975, "val": 500}
SIZE = (1024, 2048)  # height and width of every image and label map

_KINDS = ("leftImg8bit", "gtFine")
_IMAGE_ENDING, _POLYGONS_ENDING = "_leftImg8bit.png", "_gtFine_polygons.json"
_WHERE = "https://www.cityscapes-dataset.com (an account is needed)"


def prepare_cityscapes(root: Path, *, half: Path | None = None) -> str:
    """Check an unpacked download; with ``half``, make a faster copy there. Returns a summary of a few lines.

    The copy has the layout of root. Its training images and label maps (raw ids) have the preset's ``resize``, its
    val folders are links to those of root, because evaluation counts at full size. Nothing in root is written, and
    files that the copy already has are kept, so that a run that was stopped can be run again.

    Raises DataError with all that is wrong with root, or for a place of ``half`` that cannot be meant.
    """
    _check_layout(root)
    ids = {split: _ids(root, split) for split in EXPECTED}
    problems = [
        f"{split}: {len(ids[split])} images in {root / _KINDS[0] / split}, expected {count}"
        for split, count in EXPECTED.items()
        if len(ids[split]) != count
    ]
    problems += [line for split in EXPECTED for line in _missing_labels(root, split, ids[split])]
    problems += _wrong_files([path for split in EXPECTED for path in _existing_files(root, ids[split])])
    if problems:
        raise DataError(
            f"{root}: not the whole of Cityscapes; unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
            f"of {_WHERE} there again\n" + "\n".join(f"       {line}" for line in problems)
        )
    counts = ", ".join(f"{split} {len(ids[split])} images" for split in EXPECTED)
    summary = f"{root}: Cityscapes is complete ({counts}, all with label maps)"
    return summary if half is None else f"{summary}\n{_write_half(root, half, ids['train'])}"


# ------------------------------------------------------------------------------------------------ checking


def _ids(root: Path, split: str) -> list[str]:
    """As DatasetFiles names them: train/aachen/aachen_000000_000019."""
    folder = root / _KINDS[0]
    found = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{split}/*/*{_IMAGE_ENDING}"))
    return [name.removesuffix(_IMAGE_ENDING) for name in found]


def _image_path(root: Path, identifier: str) -> Path:
    return root / DATASETS["cityscapes"].images.replace("{id}", identifier)


def _label_path(root: Path, identifier: str) -> Path:
    return root / DATASETS["cityscapes"].labels.replace("{id}", identifier)


def _check_layout(root: Path) -> None:
    """DataError that says what to do where root does not hold both folders."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the one where Cityscapes is unpacked")
    missing = [kind for kind in _KINDS if not (root / kind).is_dir()]
    if not missing:
        return
    real = root.resolve()
    for kind in _KINDS:
        if len(missing) == len(_KINDS) and kind in real.parts:  # the folder above the last part of this name
            above = Path(*real.parts[: len(real.parts) - 1 - real.parts[::-1].index(kind)])
            raise DataError(f"{root}: this is a folder within {kind}, too low; name the folder above it, {above}")
    nested = {kind: sorted(path for path in root.glob(f"*/{kind}") if path.is_dir()) for kind in missing}
    parents = [{path.parent for path in paths} for paths in nested.values()]
    both = sorted(set.intersection(*parents))
    if len(missing) == len(_KINDS) and both:
        raise DataError(f"{root}: no {' and no '.join(missing)} here, one folder too high; name {both[0]}")
    fixes = []
    for kind in missing:
        archives = sorted(root.glob(f"{kind}*.zip"))
        if nested[kind]:
            fixes.append(f"move {nested[kind][0]} to {root / kind}")
        elif archives:
            fixes.append(f"unpack {archives[0].name} there (unzip {archives[0]} -d {root})")
        else:
            fixes.append(f"unpack {kind}_trainvaltest.zip of {_WHERE} there")
    raise DataError(f"{root}: no folder {' and no folder '.join(missing)}; " + ", and ".join(fixes))


def _missing_labels(root: Path, split: str, ids: list[str]) -> list[str]:
    missing = [identifier for identifier in ids if not _label_path(root, identifier).is_file()]
    if not missing:
        return []
    shown = _shown(_label_path(root, identifier) for identifier in missing)
    line = f"{split}: {len(missing)} of {len(ids)} images have no label map {shown}"
    if any(root.joinpath(_KINDS[1], identifier + _POLYGONS_ENDING).is_file() for identifier in missing):
        line += (
            "; their polygons are there: unpack all of gtFine_trainvaltest.zip, which has the *_labelIds.png too, "
            "or draw them with json2labelImg of the package cityscapesscripts (csCreateTrainIdLabelImgs draws "
            "*_labelTrainIds.png, which are other ids)"
        )
    return [line]


def _existing_files(root: Path, ids: list[str]) -> list[Path]:
    labels = (_label_path(root, identifier) for identifier in ids)
    return [*(_image_path(root, identifier) for identifier in ids), *(path for path in labels if path.is_file())]


def _wrong_files(paths: list[Path]) -> list[str]:
    """Lines about files that cannot be read or have another size, by the headers alone."""

    def look(path: Path) -> tuple[str, str] | None:
        try:
            height, width = image_size(path)
        except UserError as error:
            return "unreadable files", str(error)
        if (height, width) == SIZE:
            return None
        return f"files that are not {SIZE[1]} x {SIZE[0]}", f"{path} ({width} x {height})"

    found = [one for one in thread_map(look, paths, desc="sizes", unit="file") if one is not None]
    counts = Counter(what for what, _ in found)
    return [f"{count} {what}: {_shown(name for kind, name in found if kind == what)}" for what, count in counts.items()]


# ------------------------------------------------------------------------------------------------ the copy


def _write_half(root: Path, half: Path, ids: list[str]) -> str:
    """Fill ``half`` and say what was done."""
    size = parse_size(DATASETS["cityscapes"].resize or f"{SIZE[0] // 2},{SIZE[1] // 2}")
    _check_place(root, half, ids)
    half.mkdir(parents=True, exist_ok=True)
    with workspace(half) as scratch:
        for kind in _KINDS:
            _link(half / kind / "val", (root / kind / "val").resolve())

        def make(identifier: str) -> int:
            image, label = _image_path(half, identifier), _label_path(half, identifier)
            made = _resize_file(_image_path(root, identifier), image, size, read=read_image, scratch=scratch)
            return made + _resize_file(_label_path(root, identifier), label, size, read=read_label, scratch=scratch)

        with data_errors():
            made = sum(thread_map(make, ids, desc="resize", unit="image"))
    return (
        f"{half}: {2 * len(ids)} training files of {size[1]} x {size[0]} pixels, {made} made now, "
        f"{2 * len(ids) - made} were there already; val is linked to {root}\n"
        f"train with --data-root {half}"
    )


def _check_place(root: Path, half: Path, ids: list[str]) -> None:
    """DataError where writing the copy would write into the download, or anywhere else outside ``half``."""
    if half.exists() and not half.is_dir():
        raise DataError(f"{half} is a file; name a folder")
    real, own = half.resolve(), root.resolve()
    taken = [own, *((root / kind).resolve() for kind in _KINDS)]
    if real == own or any(real.is_relative_to(folder) for folder in taken[1:]):
        raise DataError(f"{half}: is the download itself or within it, which is never changed; name another folder")
    for folder in sorted({path(half, i).parent for i in ids for path in (_image_path, _label_path)}):
        where = folder.resolve()
        if not where.is_relative_to(real) or any(where.is_relative_to(other) for other in taken[1:]):
            raise DataError(f"{folder}: is a link to {where}, where nothing may be written; name another folder")


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() and link.resolve() == target:
        return
    if os.path.lexists(link):
        raise DataError(f"{link}: expected a link to {target}, found something else; delete it or name another folder")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def _resize_file(
    source: Path, target: Path, size: tuple[int, int], *, read: Callable[[Path], np.ndarray], scratch: Path
) -> bool:
    """Write the PNG ``source`` as a PNG of ``size`` (height, width); False where that file is there already."""
    if target.exists():
        height, width = image_size(target)
        if (height, width) != size:
            raise DataError(
                f"{target}: found {width} x {height} pixels, expected {size[1]} x {size[0]}; not made by this command, "
                "so it is not replaced: name another folder"
            )
        return False
    with complete(target, scratch) as unfinished:
        Image.fromarray(resize(read(source), size)).save(unfinished)
    return True


def _shown(things: Iterable[object]) -> str:
    first = [str(thing) for thing in itertools.islice(things, 4)]
    return ", ".join(first[:3]) + (" ..." if len(first) > 3 else "")
