"""What is wrong with a dataset, all of it at once, and what the data look like: `prepare_data.py check`.

Every file of every list is read and decoded once, by all cores; what is kept of a file is a few numbers.
"""

import io
import multiprocessing
import os
import signal
import struct
import sys
import threading
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.datasets import DatasetFiles
from data.decode import IMAGE_FORMATS, bits_per_channel, read_image, read_label
from data.report import SHOWN, CropFacts, ListFacts, Report, count_text, size_text, some_text, spans_text
from utils.config import CITYSCAPES_IDS, Config, parse_size
from utils.errors import UserError

FEW = 100  # up to so many images, starting other processes takes longer than reading here

# What Pillow's decoders raise for damaged files beside what data.decode turns into a UserError (a ValueError).
_DECODING = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

_FETCH = "Fetch them again, or take their ids out of the lists"
_PROBLEMS = {
    "missing image": "image files that are missing: {}. "
    "Put them there, take their ids out of the lists, or correct dataset.images",
    "missing label": "label files that are missing: {}. "
    "Put them there, take their ids out of the lists, or correct dataset.labels",
    "empty image": "image files of zero bytes: {}. " + _FETCH,
    "empty label": "label files of zero bytes: {}. " + _FETCH,
    "damaged image": "images that cannot be decoded: {}. " + _FETCH,
    "damaged label": "label maps that cannot be decoded: {}. " + _FETCH,
    "label mode": "label maps that hold no class ids: {}. "
    "Expected 8-bit gray or palette PNGs; convert colors or 16-bit values to ids first",
    "deep image": "images of more than 8 bits a channel: {}. Convert them to 8 bits, all in the same way",
    "size": "label maps of another size than their image (width x height): {}. They must agree; export them again",
    "turned": "images whose EXIF orientation says that they are to be turned, which is not done here: {}. "
    "If the label maps were drawn on turned images, apply the orientation to the image files",
}
_ONLY_WARNED_OF = ("turned",)
_MODES = {"L": "gray", "P": "palette", "1": "black-and-white", "LA": "gray+alpha", "I;16": "16-bit gray"}


def check_dataset(config: Config) -> Report:
    """Read all files of the lists that a run and its evaluation use, and report every fault.

    Faults of the data are in the report; UserError only when the processes that read the files are killed.
    """
    about = (config.data.name, config.data.root, config.ignore_label, config.data.class_names)
    try:
        files = DatasetFiles(config)
    except UserError as error:
        return Report([str(error)], [], *about)
    lists, errors, notes = _read_lists(files)
    survey = _Survey(files, lists)
    ids = list(survey.lists_of)
    found = _read_all([(files.image_path(i), files.label_path(i)) for i in ids])
    for identifier, (image, label) in zip(ids, found, strict=True):
        survey.add(identifier, image, label)
    facts, crops = [survey.facts(one) for one in lists], survey.crops()
    errors += survey.problems(serious=True)
    notes += survey.problems(serious=False)
    _judge_ids(survey, config, errors, notes)
    for one in facts:
        _judge_coverage(one, config, errors, notes)
    if crops:
        _judge_crops(crops, notes)
    notes += _unlike_palettes(survey)
    notes += _shared_images(survey)
    seen, mapped = np.flatnonzero(survey.needed_ids.pixels).tolist(), config.data.label_ids
    unmapped = [index for index in seen if index not in mapped] if mapped else []
    return Report(errors, notes, *about, lists=facts, crops=crops, unmapped_ids=unmapped)


# ---------------------------------------------------------------------------------------------------- lists


class _List(NamedTuple):
    name: str
    source: str
    ids: list[str]
    split_hash: str

    @property
    def hidden(self) -> bool:
        """Whether its label maps, where there are any, are never trained on or measured with."""
        return self.name == "unlabeled"


def _read_lists(files: DatasetFiles) -> tuple[list[_List], list[str], list[str]]:
    """The lists that can be read, what is wrong with the others or between them, and what is worth knowing."""
    config, block = files.config, files.block
    names = ["labeled", *(["unlabeled"] if config.training.unlabeled.train_unlabeled else []), "val"]
    names += ["test"] if block.test else []
    lists: dict[str, _List] = {}
    errors: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in names:
            try:
                lists[name] = _read_list(files, name)
            except UserError as error:
                errors += [str(error)] if str(error) not in errors else []  # labeled's is unlabeled's too
    notes = list(dict.fromkeys(str(one.message) for one in caught))
    ids = {name: set(lists[name].ids) if name in lists else set() for name in ("labeled", "unlabeled", "val", "test")}
    if both := sorted(ids["labeled"] & ids["unlabeled"]):
        errors.append(
            f"ids in the labeled and the unlabeled list: {len(both)} ({some_text(both)}); remove them from one"
        )
    for name in ("val", "test"):
        if seen := sorted(ids[name] & (ids["labeled"] | ids["unlabeled"])):
            notes.append(
                f"ids of the {name} list that are trained on: {len(seen)} of {len(ids[name])} ({some_text(seen)}); "
                f"{name} scores will not tell how well new images are segmented. Take them out of one list"
            )
    return list(lists.values()), errors, notes


def _read_list(files: DatasetFiles, name: str) -> _List:
    config, block = files.config, files.block
    source, split = getattr(block, name), name
    if name == "unlabeled" and source is not None:
        # Read as if it were a list of its own: one that overlaps the labeled list is refused whole by its own name,
        # and nothing would be said about its files.
        config = config.model_copy(update={"dataset": block.model_copy(update={"test": source})})
        files, split = DatasetFiles(config), "test"
    if source is None:
        labeled = "the rest of " if name == "unlabeled" else "drawn from "
        source = f"{labeled}{block.train}"
    return _List(name, source, files.ids(split), files.split_hash(split))


# ---------------------------------------------------------------------------------------------------- reading files


@dataclass(frozen=True)
class _File:
    """What is kept of an image or label file. problem: a key of _PROBLEMS without its second word, or empty."""

    problem: str = ""
    detail: str = ""
    size: tuple[int, int] | None = None  # (width, height) from the header
    mode: str = ""
    digest: bytes = b""
    turned: bool = False
    pixels: np.ndarray | None = None  # (256,) int64: pixels of each id in a label map
    palette: bytes = b""  # of a label map, 3 bytes an id


def _read_all(jobs: list[tuple[Path, Path]]) -> Iterator[tuple[_File, _File]]:
    """The facts of each (image, label) in the order of the jobs, with a progress bar."""
    with tqdm(total=len(jobs), unit="image", file=sys.stderr, disable=None, leave=False, dynamic_ncols=True) as bar:
        for found in map(_inspect, jobs) if len(jobs) <= FEW else _read_in_processes(jobs):
            bar.update()
            yield found


def _read_in_processes(jobs: list[tuple[Path, Path]]) -> Iterator[tuple[_File, _File]]:
    cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    workers = min(cores, len(jobs), 61)  # Windows can wait for 61 at most
    # "spawn" everywhere: a fork of a process with threads, such as the progress bar's, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from pool.map(_inspect, jobs, chunksize=max(1, min(16, len(jobs) // (4 * workers))))
    except BrokenProcessPool:
        raise UserError(
            f"one of {workers} processes that read the images was killed, probably for want of memory; "
            "close other programs and run the check again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the main process's to handle; and when that is gone, however it ended, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _inspect(job: tuple[Path, Path]) -> tuple[_File, _File]:
    with warnings.catch_warnings():  # Pillow's, such as of large images, belong to no file on a terminal
        warnings.simplefilter("ignore")
        return _inspect_file(job[0], is_label=False), _inspect_file(job[1], is_label=True)


def _inspect_file(path: Path, *, is_label: bool) -> _File:
    """Hash, header, and the decoding that training does; its second look at the file is served from memory."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return _File("missing")
    except OSError as error:
        return _File("damaged", detail=error.strerror or str(error))
    if not content:
        return _File("empty")
    size, mode, kind, turned, bits, palette = _header(content)
    facts: dict[str, Any] = {"size": size, "mode": mode}
    if is_label and kind == "PNG" and mode not in ("L", "P"):
        return _File("label mode", detail=f"mode {_MODES.get(mode, mode)}", **facts)
    if is_label and kind not in ("PNG", ""):
        losses = ", whose losses change ids" if kind in ("JPEG", "WEBP") else ""
        return _File("damaged", detail=f"a {kind} file{losses}; expected PNG", **facts)
    try:
        if is_label:
            return _File(pixels=np.bincount(read_label(path).ravel(), minlength=256), palette=palette, **facts)
        if bits > 8:
            detail = f"mode {_MODES.get(mode, mode)}, {bits} bits"
            return _File("deep image", detail=detail, digest=sha256(content).digest(), turned=turned, **facts)
        read_image(path)
    except _DECODING as error:
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), path.name)
        return _File("damaged", detail=reason.removesuffix("; fetch the file again"), **facts)
    return _File(digest=sha256(content).digest(), turned=turned, **facts)


def _header(content: bytes) -> tuple[tuple[int, int] | None, str, str, bool, int, bytes]:
    """(width, height), Pillow's mode and format, whether EXIF asks for a turn, bits of a channel, and 3 bytes for each
    color of a palette; nothing where unreadable."""
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            # In a PNG this could stand behind the pixels, which would have to be decoded; a TIFF is decoded turned.
            orientation = 1 if image.format in ("PNG", "TIFF") else image.getexif().get(0x0112, 1)
            palette = image.palette.getdata()[1] if image.mode == "P" and image.palette else b""
            turned = orientation in range(2, 9)
            return image.size, image.mode, image.format or "", turned, bits_per_channel(image), bytes(palette)
    except _DECODING:
        return None, "", "", False, 8, b""


# ---------------------------------------------------------------------------------------------------- gathering


class _Ids:
    """Pixels and files of each id, over many label maps. pixels, files: (256,) int64."""

    def __init__(self) -> None:
        self.pixels, self.files = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
        self.labels = 0
        self.example: dict[int, Path] = {}

    def add(self, pixels: np.ndarray, path: Path) -> None:
        self.pixels += pixels
        self.files += pixels > 0
        self.labels += 1
        for index in np.flatnonzero(pixels):
            self.example.setdefault(int(index), path)


class _Problem:
    """Files with one kind of problem: their number and the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[tuple[Path, str]] = []

    def add(self, path: Path, detail: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.examples.append((path, detail))


class _Survey:
    """What the files seen so far have shown."""

    def __init__(self, files: DatasetFiles, lists: list[_List]) -> None:
        self.files, self.lists = files, lists
        self.lists_of: dict[str, list[str]] = defaultdict(list)
        for one in lists:
            for identifier in one.ids:
                self.lists_of[identifier].append(one.name)
        self.ids = {one.name: _Ids() for one in lists}
        self.needed_ids, self.hidden_ids = _Ids(), _Ids()
        self.sizes: dict[str, Counter[tuple[int, int]]] = {one.name: Counter() for one in lists}
        self.modes: dict[str, Counter[str]] = {one.name: Counter() for one in lists}
        self.training_sizes: Counter[tuple[int, int]] = Counter()
        self.same_bytes: dict[bytes, list[str]] = defaultdict(list)
        self.ids_of_color: dict[bytes, dict[int, Path]] = defaultdict(dict)  # color -> id -> a label map that has both
        self._problems: dict[tuple[str, bool], _Problem] = defaultdict(_Problem)  # key: kind, only of hidden labels

    def add(self, identifier: str, image: _File, label: _File) -> None:
        """One id's two files."""
        lists = self.lists_of[identifier]
        hidden = lists == ["unlabeled"]
        path, label_path = self.files.image_path(identifier), self.files.label_path(identifier)
        if image.problem:
            kind = image.problem if image.problem in _PROBLEMS else f"{image.problem} image"
            self._problems[kind, False].add(path, image.detail)
        if image.turned:
            self._problems["turned", False].add(path, "")
        if image.digest:
            self.same_bytes[image.digest].append(identifier)
        if label.problem and not (hidden and label.problem == "missing"):
            kind = label.problem if label.problem in _PROBLEMS else f"{label.problem} label"
            self._problems[kind, hidden].add(label_path, label.detail)
        if image.size and label.size and image.size != label.size:
            turned = ", width and height swapped: was one of them turned?" if image.size == label.size[::-1] else ""
            detail = f"{size_text(label.size)} for an image of {size_text(image.size)}{turned}"
            self._problems["size", hidden].add(label_path, detail)
        if image.size and {"labeled", "unlabeled"} & set(lists):
            self.training_sizes[image.size] += 1
        for name in lists:
            if image.size:
                self.sizes[name][image.size] += 1
                self.modes[name][_MODES.get(image.mode, image.mode)] += 1
            if label.pixels is not None:
                self.ids[name].add(label.pixels, label_path)
        if label.pixels is not None:
            (self.hidden_ids if hidden else self.needed_ids).add(label.pixels, label_path)
            color_of = {i: label.palette[3 * i : 3 * i + 3] for i in np.flatnonzero(label.pixels).tolist()}
            times = Counter(color_of.values())
            for index, color in color_of.items():
                if color and times[color] == 1:
                    self.ids_of_color[color].setdefault(index, label_path)

    def short(self, path: Path) -> str:
        return path.relative_to(self.files.root).as_posix()

    def problems(self, *, serious: bool) -> list[str]:
        """A message for each kind of problem of single files."""
        messages = []
        for kind, title in _PROBLEMS.items():
            for hidden in (False, True):
                problem = self._problems.get((kind, hidden))
                if problem is None or serious == (hidden or kind in _ONLY_WARNED_OF):
                    continue
                lines = [("hidden labels, not needed to train: " if hidden else "") + title.format(problem.count)]
                for path, detail in problem.examples:
                    detail = self._elsewhere(path) if kind.startswith("missing") else detail
                    lines.append(f"{self.short(path)}{': ' if detail else ''}{detail}")
                lines += [f"and {problem.count - SHOWN} more"] if problem.count > SHOWN else []
                messages.append("\n  ".join(lines))
        return messages

    def _elsewhere(self, path: Path) -> str:
        """Where a missing file may be: most often all are there under another suffix or in another folder."""
        if path.is_symlink():
            return "a link to a file that is not there"
        if not path.parent.is_dir():
            return f"there is no folder {self.short(path.parent)}"
        stem = path.name.split(".")[0].lower()
        near = sorted(other.name for other in path.parent.iterdir() if other.name.split(".")[0].lower() == stem)
        return f"but {near[0]} is there" if near else ""

    def facts(self, one: _List) -> ListFacts:
        ids, sizes = self.ids[one.name], sorted(self.sizes[one.name].elements(), key=lambda s: (s[0] * s[1], s))
        config = self.files.config
        classes = config.data.label_ids or list(range(config.num_classes))
        others = int(ids.pixels.sum() - ids.pixels[classes].sum())
        ignored = others if config.data.label_ids else int(ids.pixels[config.ignore_label])
        return ListFacts(
            name=one.name,
            source=one.source,
            images=len(one.ids),
            split_hash=one.split_hash,
            labels=ids.labels,
            hidden=one.hidden,
            smallest=sizes[0] if sizes else None,
            median=sizes[len(sizes) // 2] if sizes else None,
            largest=sizes[-1] if sizes else None,
            distinct_sizes=len(set(sizes)),
            modes=dict(self.modes[one.name].most_common()),
            class_pixels=ids.pixels[classes].tolist(),
            class_images=ids.files[classes].tolist(),
            ignored_pixels=ignored,
            foreign_pixels=others - ignored,
        )

    def crops(self) -> CropFacts | None:
        """None when no training image could be read."""
        data, resize = self.files.config.training.data, self.files.block.resize
        crop_height, crop_width = parse_size(data.input_size)
        low, high = data.scale_range if data.scale else (1.0, 1.0)
        images = self.training_sizes.total()
        distorted, smaller, padded = 0, 0, 0.0
        for (width, height), count in self.training_sizes.items():
            new_height, new_width = parse_size(resize) if resize else (height, width)
            ratio = new_width * height / (new_height * width)
            distorted += count if max(ratio, 1 / ratio) > 1.1 else 0
            enough = max(crop_width / new_width, crop_height / new_height)  # the least scale that fills the crop
            smaller += count if enough > 1 else 0
            padded += count * (min(max((enough - low) / (high - low), 0), 1) if high > low else enough > low)
        fixed = (parse_size(resize)[1], parse_size(resize)[0]) if resize else None
        size, scales = (crop_width, crop_height), (low, high)
        return CropFacts(size, fixed, images, distorted, smaller, scales, padded / images) if images else None


# ---------------------------------------------------------------------------------------------------- judging


def _judge_ids(survey: _Survey, config: Config, errors: list[str], notes: list[str]) -> None:
    """Ids that mean nothing, or something else than was meant, put into ``errors`` and ``notes``."""
    classes, ignore, label_ids = config.num_classes, config.ignore_label, config.data.label_ids
    seen = set(np.flatnonzero(survey.needed_ids.pixels).tolist())
    if label_ids is None:
        for ids, prefix, messages in ((survey.needed_ids, "", errors), (survey.hidden_ids, "hidden labels: ", notes)):
            foreign = [i for i in np.flatnonzero(ids.pixels).tolist() if i >= classes and i != ignore]
            if foreign:
                most = sorted(sorted(foreign, key=lambda i: -ids.pixels[i])[:SHOWN])
                lines = [
                    f"{prefix}{count_text(len(foreign), 'label id')} out of range; expected 0..{classes - 1} or "
                    f"ignore_label {ignore}. {_likely_cause(np.flatnonzero(ids.pixels).tolist(), foreign, config)}"
                ]
                lines += [
                    f"id {i}: {count_text(int(ids.pixels[i]), 'pixel')} in {count_text(int(ids.files[i]), 'file')}, "
                    f"for example {survey.short(ids.example[i])}"
                    for i in most
                ]
                lines += [f"and {len(foreign) - SHOWN} more"] if len(foreign) > SHOWN else []
                messages.append("\n  ".join(lines))
        if seen == {0, 255} and ignore == 255 and classes > 1:
            errors.append(
                "the label maps hold nothing but 0 and 255, and 255 is ignore_label: only class 0 would be learned. "
                "A binary mask whose foreground is 255? Use dataset.label_ids: [0, 255] with two classes"
            )
    elif (stray := seen - set(label_ids) - {ignore}) and seen <= {*range(classes), ignore}:
        notes.append(
            f"the label maps hold nothing but {spans_text(seen)}, as if their ids were classes already, and "
            f"dataset.label_ids leaves out {spans_text(stray)}; if they are classes, remove dataset.label_ids"
        )


def _likely_cause(seen: list[int], foreign: list[int], config: Config) -> str:
    """What ids out of range mostly come from, with the fix. seen: all ids of the label maps, foreign among them."""
    classes, meant = config.num_classes, [index for index in seen if index != config.ignore_label]
    if seen == [0, 255]:
        return "A binary mask whose foreground is 255? Use dataset.label_ids: [0, 255] with two classes"
    if foreign == [255]:
        return "Does 255 mark pixels of no class? Set ignore_label to 255"
    if foreign == [classes] and 0 not in seen:
        return f"Do the ids start at 1? Use dataset.label_ids: {_from_one(classes)}"
    if foreign == [classes]:
        return (
            f"Off by one: is {classes} a class (set num_classes to {classes + 1}), or does it mark pixels of no class "
            f"(set ignore_label to {classes}), or does 0 (use dataset.label_ids: {_from_one(classes)})?"
        )
    if classes == len(CITYSCAPES_IDS) and max(foreign) <= max(CITYSCAPES_IDS):
        return f"Are they Cityscapes labelIds? Use dataset.label_ids: {CITYSCAPES_IDS}"
    if len(meant) == classes:
        return f"As many ids as classes: one gray level for each? Use dataset.label_ids: {meant}"
    if len(seen) > max(64, 2 * classes):
        return (
            f"{len(seen)} ids for {count_text(classes, 'class', 'classes')}: are they colors turned to gray, or were "
            "the maps resized smoothly or stored as JPEG in between? Export them again as ids"
        )
    return f"Check the number of classes ({classes}) and ignore_label, or map the ids with dataset.label_ids"


def _judge_coverage(one: ListFacts, config: Config, errors: list[str], notes: list[str]) -> None:
    """Classes that a list of labels does not show, put into ``errors`` and ``notes``."""
    if one.hidden or not one.labels:
        return
    if not any(one.class_pixels):
        if not one.foreign_pixels:  # else said already
            fix = "dataset.label_ids names none of their ids" if config.data.label_ids else "check ignore_label"
            errors.append(
                f"the label maps of the {one.name} list hold nothing but ignore_label; "
                f"expected pixels of some class; {fix}"
            )
        return
    is_one = sum(map(bool, one.class_pixels)) == 1
    if one.name == "labeled" and is_one and not errors:  # else said already
        (only,) = (f"{index} {config.data.class_names[index]}" for index, n in enumerate(one.class_pixels) if n)
        errors.append(
            f"the label maps of the labeled list hold {only} alone: nothing to tell apart; expected two classes or more"
        )
        return
    absent = [f"{index} {config.data.class_names[index]}" for index, count in enumerate(one.class_images) if not count]
    if absent:
        means = "cannot be learned"
        if one.name != "labeled":
            means = "have no IoU there, or 0 where they are predicted, so mIoU says nothing about them"
        fix = "label images that show them" if one.name == "labeled" else "add images that show them"
        notes.append(f"classes in no {one.name} image: {len(absent)} ({some_text(absent)}); they {means}; {fix}")


def _judge_crops(crops: CropFacts, notes: list[str]) -> None:
    if 2 * crops.smaller > crops.images:
        notes.append(
            f"training images smaller than the crop of {size_text(crops.size)} in some side: {crops.smaller} of "
            f"{crops.images}; their crops are partly padding. A smaller training.data.input_size wastes less"
        )
    if crops.distorted and crops.resize:
        notes.append(
            f"training images that dataset.resize to {size_text(crops.resize)} makes wider or narrower by more than "
            f"10 %: {crops.distorted} of {crops.images}; choose a size of their proportions, or no dataset.resize"
        )


def _shared_images(survey: _Survey) -> list[str]:
    """Warnings of image files with the same bytes under different ids."""
    across, within = [], []
    for group in survey.same_bytes.values():
        trained = [i for i in group if {"labeled", "unlabeled"} & set(survey.lists_of[i])]
        judged = [i for i in group if {"val", "test"} & set(survey.lists_of[i])]
        mixed = next(((a, b) for a in trained for b in judged if a != b), None)
        across += [mixed] if mixed else []
        within += [(one[0], one[1]) for one in (trained, judged) if len(one) > 1]

    def named(identifier: str) -> str:
        return f"{identifier} ({', '.join(survey.lists_of[identifier])})"

    def pairs(found: Iterable[tuple[str, str]]) -> str:
        return "".join(f"\n  {named(one)} = {named(other)}" for one, other in found)

    messages = []
    for found, what in (
        (across, "trained on and also in val or test under another id, so that scores are too high"),
        (within, "more than once under different ids, so that they count more than once"),
    ):
        if found:
            more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            messages.append(
                f"byte-identical images {what}: {len(found)}. Keep one id of each{pairs(found[:SHOWN])}{more}"
            )
    return messages


def _unlike_palettes(survey: _Survey) -> list[str]:
    """A warning where palettes give one color to several ids, as programs do that make a palette for each file."""
    several = {color: ids for color, ids in survey.ids_of_color.items() if len(ids) > 1}
    if not several:
        return []
    shown = []
    for color, ids in list(several.items())[:SHOWN]:
        where = [f"id {index} in {survey.short(path)}" for index, path in list(ids.items())[:SHOWN]]
        shown.append(f"color {tuple(color)}: {', '.join(where)}")
    title = (
        f"colors of the label maps' palettes that are another id in another file: {len(several)}. Did a program make a "
        "palette for each file? Then ids mean nothing, and colors must be converted to ids, as docs/datasets.md shows"
    )
    return ["\n  ".join([title, *shown])]


def _from_one(classes: int) -> str:
    return f"[1, 2, ..., {classes}]" if classes > 8 else str(list(range(1, classes + 1)))
