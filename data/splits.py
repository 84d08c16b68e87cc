"""Lists of ids: reading them, also those of other code, drawing labeled images, and writing them with their hash."""

import hashlib
import io
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.decode import IMAGE_ENDINGS
from utils.errors import UserError

_HASH_IN_HEADER = re.compile(r"^#.*\bhash ([0-9a-f]{12})\b")


def hash_of(ids: Iterable[str]) -> str:
    """Twelve hex digits that name which images a list holds, whatever their order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:12]


def read_ids(path: Path) -> list[str]:
    """One id a line; empty lines and lines that start with # do not count.

    Raises UserError: no text file, an id that is there twice or leaves the dataset's folder, or a list that was
    changed after its header was written.
    """
    lines = read_lines(path)
    ids = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    twice = [one for one, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {len(twice)} ids appear twice, for example {twice[0]}; list each once")
    for identifier in ids:
        parts = PurePosixPath(identifier)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(
                f"{path}: id {identifier!r} leaves the dataset's folder; ids are names below it, without extension"
            )
    header = _HASH_IN_HEADER.match(lines[0]) if lines else None
    if header and header[1] != hash_of(ids):
        raise UserError(
            f"{path}: its first line says hash {header[1]}, but these ids have {hash_of(ids)}: the list was changed. "
            "Restore it, or remove that line if the change is meant"
        )
    return ids


def write_ids(path: Path, ids: Sequence[str], *, about: Mapping[str, object], cure: str = "another --output") -> bool:
    """Write a list whose first line names ``about`` and the hash; False if the same ids are there already.

    Raises UserError when other ids are there: lists that results refer to are never overwritten.
    """
    if path.exists():
        if read_ids(path) == list(ids):
            return False
        raise UserError(f"{path}: is there already with other ids; remove it, or choose {cure}")
    header = ", ".join(f"{key} {value}" for key, value in {**about, "hash": hash_of(ids)}.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {header}\n" + "".join(f"{identifier}\n" for identifier in ids), encoding="utf-8")
    return True


# ---------------------------------------------------------------------------------------------------- drawing


def parse_amount(text: str) -> Fraction | int:
    """``"1/8"`` or ``"0.125"`` -> a share of the training images; ``"46"`` -> that many."""
    try:
        amount = Fraction(text)
    except (ValueError, ZeroDivisionError):
        amount = Fraction(0)
    if amount <= 0 or (not text.strip().isdigit() and amount >= 1):
        raise UserError(
            f"{text!r}: expected a fraction such as 1/8 or 0.125, a count such as 100, or for init a list that exists"
        )
    return amount if amount < 1 else int(amount)


def count_of(
    amount: Fraction | int, total: int, *, what: str = "labeled", round_up: bool = False, others: bool = False
) -> int:
    """How many images an amount is of ``total``. Raises UserError if none or all are left for the other list.

    round_up: a fraction of less than half an image is one. others: the other list has images of its own, so that a
    count may be all.
    """
    if others and amount == total > 0:
        return total
    count = amount if isinstance(amount, int) else round(amount * total)
    count = 1 if round_up and not isinstance(amount, int) and count == 0 else count
    if total < 2:
        raise UserError(f"--{what} {amount}: images with a label map to choose from: {total}; expected at least 2")
    if not 0 < count < total:
        raise UserError(
            f"--{what} {amount}: of {total} images that is {count}; expected 1 to {total - 1}, for example --{what} 1"
        )
    return count


def draw_order(
    ids: Iterable[str], *, seed: int, classes_of: Mapping[str, frozenset[int]] | None = None
) -> tuple[list[str], int]:
    """The order of which the first n are labeled: fewer are always among more, whatever other images there are.

    The order is that of the SHA-256 of "seed:id". classes_of: id -> the classes in its label map; then the images that
    are needed to hold every class come first, starting with the rarest class. Returns the order and how many of its
    first images are needed for that (0 without ``classes_of``).
    """
    order = sorted(ids, key=lambda identifier: hashlib.sha256(f"{seed}:{identifier}".encode()).hexdigest())
    if classes_of is None:
        return order, 0
    counts: dict[int, int] = {}
    for identifier in order:
        for one in classes_of[identifier]:
            counts[one] = counts.get(one, 0) + 1
    first: list[str] = []
    held: set[int] = set()
    for wanted in sorted(counts, key=lambda one: (counts[one], one)):
        if wanted not in held:
            chosen = next(identifier for identifier in order if wanted in classes_of[identifier])
            first.append(chosen)
            held |= classes_of[chosen]
    return first + [identifier for identifier in order if identifier not in set(first)], len(first)


# ---------------------------------------------------------------------------------------------------- other code's


def read_indices(path: Path) -> list[int]:
    """The indices of a pickled numpy array, as the release's split files are; nothing in the file is executed.

    Raises UserError: it holds anything but one array of different integers from 0.
    """
    try:
        array = _ArraysOnly(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: not a pickled array of indices ({type(error).__name__}: {error})") from error
    if isinstance(array, list) and all(type(one) is int for one in array):
        array = np.array(array, dtype=np.int64)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise UserError(f"{path}: expected one pickled array of indices, found {type(array).__name__}")
    if array.min() < 0 or len(np.unique(array)) != len(array):
        raise UserError(f"{path}: expected different indices from 0 on, found some twice or negative")
    return [int(index) for index in array]


class _ArraysOnly(pickle.Unpickler):
    """Knows what a pickled numpy array is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]  # numpy's own, wherever this version keeps it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a list of indices")


def line_reader(known: Sequence[str], *, pattern: str, root: Path) -> Callable[[str], str | None]:
    """(line of a list as other code writes it) -> the id that it means, or None.

    Lines are ids, or paths of images, with their label map's beside or not. known: all ids of the dataset. pattern: its
    image paths with {id}, below root. A path that leads elsewhere means the image of its name, if there is just one,
    but not where the path is another file below root.
    """
    before, after = pattern.split("{id}")
    is_known = set(known)
    by_name: dict[str, list[str]] = {}
    for identifier in known:
        by_name.setdefault(PurePosixPath(identifier).name, []).append(identifier)

    def said(path: str) -> str | None:
        place = path.rfind(before) if before else 0
        inner = path[place + len(before) :] if place >= 0 else path
        return next((one for one in (path, inner.removesuffix(after), inner) if one in is_known), None)

    def named(path: str) -> str | None:
        name = PurePosixPath(path).name.removesuffix(PurePosixPath(after).name)
        stem = name.rsplit(".", 1)[0] if name.lower().endswith(IMAGE_ENDINGS) else name
        found = by_name.get(stem, []) or by_name.get(name, [])
        is_another = path.endswith(after) and (root / path).is_file()
        return found[0] if len(found) == 1 and not is_another else None

    def read(line: str) -> str | None:
        whole = line.strip().lstrip("/")
        first = re.split(r"[\s,;]+", whole)[0]
        return said(whole) or said(first) or named(first) or named(whole)  # the whole first: names may hold spaces

    return read


def import_ids(path: Path, known: Sequence[str], *, pattern: str, root: Path) -> list[str]:
    """The ids of a list as other code writes it, see ``line_reader``. Raises UserError naming lines that mean none."""
    read = line_reader(known, pattern=pattern, root=root)
    lines = [line for line in read_lines(path) if line.strip() and not line.startswith("#")]
    ids = [read(line) for line in lines]
    lost = [line.strip() for line, identifier in zip(lines, ids, strict=True) if identifier is None]
    if lost or not lines:
        if not lines:
            raise UserError(f"{path}: the list is empty; expected one image a line")
        shown = "; ".join(lost[:3])
        raise UserError(f"{path}: {len(lost)} of {len(lines)} lines name no training image of the dataset: {shown}")
    found = [identifier for identifier in ids if identifier is not None]
    if len(set(found)) != len(found):
        again = next(one for index, one in enumerate(found) if one in found[:index])
        count = len(found) - len(set(found))
        raise UserError(f"{path}: {count} images are named twice, for example {again}; list each once")
    return found


def read_lines(path: Path) -> list[str]:
    """Of a text file in UTF-8. Raises UserError for any other."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:  # ValueError: no text, or no path
        raise UserError(f"{path}: cannot read this id list ({error}); expected UTF-8 text, one id a line") from None
