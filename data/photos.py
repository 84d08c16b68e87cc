"""Which photographs a prediction is made of, and where it may be written."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data.decode import IMAGE_ENDINGS
from data.transforms import resize
from utils.config import parse_size
from utils.errors import UserError


class Photo(NamedTuple):
    """path: of the image file. name: of what is made of it, a relative path without ending."""

    path: Path
    name: str


def find_files(root: Path, endings: tuple[str, ...] = IMAGE_ENDINGS) -> Iterator[Path]:
    """The files of a folder and all below it, through links too, but none twice for a link to a folder above.

    endings: in lower case. What begins with a dot is left out.
    """
    for folder, below, names in os.walk(root, followlinks=True):
        here = Path(folder)
        above = {path.resolve() for path in (here, *here.parents)}
        below[:] = sorted(one for one in below if not one.startswith(".") and (here / one).resolve() not in above)
        for name in names:
            path = here / name
            if path.suffix.lower() in endings and not name.startswith(".") and path.is_file():
                yield path


def find_photos(source: Path, *, output: Path) -> list[Photo]:
    """An image, the images of a folder and all below it, or those that a text file names, one path a line.

    Paths in a text file are relative to its folder; of those that lead out of it, only the file's name is kept.
    Images below ``output`` are an earlier run's and do not count, unless all are below it. Raises UserError: nothing
    there, or two images that would be written to the same place.
    """
    if source.is_dir():
        if output.resolve() == source.resolve():
            raise UserError(f"{output}: is the folder of the photographs; choose another one for what is made of them")
        paths = sorted(find_files(source))
        if not source.resolve().is_relative_to(output.resolve()):
            paths = [path for path in paths if not path.resolve().is_relative_to(output.resolve())]
        shown = [(path, PurePosixPath(path.relative_to(source).as_posix())) for path in paths]
    elif source.suffix.lower() in IMAGE_ENDINGS:
        shown = [(source, PurePosixPath(source.name))]
    elif source.suffix.lower() in ("", ".txt", ".lst"):
        shown = _listed(source)
    else:
        raise UserError(
            f"{source}: not a kind of file that is read; expected {', '.join(IMAGE_ENDINGS)}, a folder, or a .txt list"
        )
    if not shown:
        raise UserError(f"{source}: no image here; expected {', '.join(IMAGE_ENDINGS)}")
    if missing := [str(path) for path, _ in shown if not path.is_file()]:
        ending = "" if Path(missing[0]).suffix else "; expected paths with their ending, not ids"
        raise UserError(
            f"{source}: {len(missing)} of {len(shown)} images do not exist, for example {missing[0]}{ending}"
        )
    counts = Counter(name.with_suffix("") for _, name in shown)
    # a.jpg and a.png keep their endings: a.jpg.png, a.png.png
    photos = [
        Photo(path, str(name if counts[name.with_suffix("")] > 1 else name.with_suffix(""))) for path, name in shown
    ]
    twice = [name for name, count in Counter(photo.name for photo in photos).items() if count > 1]
    if twice:
        raise UserError(f"{source}: {len(twice)} names stand for several images, for example {twice[0]}; rename them")
    return photos


def as_trained(image: np.ndarray, resize_to: str | None) -> np.ndarray:
    """(H,W,3) uint8 as large as training saw it: ``dataset.resize``, but in the photograph's own proportions."""
    if resize_to is None:
        return image
    rows, columns = parse_size(resize_to)
    height, width = image.shape[:2]
    if abs(width * rows / (height * columns) - 1) < 0.02:
        return resize(image, (rows, columns))
    factor = (rows * columns / (height * width)) ** 0.5
    return resize(image, (max(1, round(height * factor)), max(1, round(width * factor))))


def place_inside(output: Path, relative: str) -> Path:
    """``output / relative``, its folder made. Raises UserError where links would lead out of ``output``."""
    path = output / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.resolve().is_relative_to(output.resolve()):
        raise UserError(f"{path}: a link leads out of {output}; nothing is written there. Choose an empty folder")
    return path


def _listed(source: Path) -> list[tuple[Path, PurePosixPath]]:
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source}: expected an image, a folder, or a text file with one path a line ({error})"
        ) from None
    names = [PurePosixPath(line) for line in lines if line and not line.startswith("#")]
    return [
        (source.parent / name, PurePosixPath(name.name) if name.is_absolute() or ".." in name.parts else name)
        for name in names
    ]
