"""What lies in a folder of images and label maps, said as a configuration: ``prepare_data.py init``."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from data.decode import IMAGE_ENDINGS, image_size, read_label
from data.layout import Layout, find_layout
from data.photos import find_files
from data.report import spans_text
from data.splits import count_of, draw_order, hash_of, import_ids, line_reader, parse_amount, read_lines, write_ids
from utils.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
LARGEST_CROP = 321  # the release's, for VOC
NAME_FILES = ("classes.json", "classes.txt", "labels.txt", "names.txt")
ROLES = ("unlabeled", "labeled", "train", "val", "test")  # "unlabeled" first: it contains "labeled"
SPELLINGS = {
    "unlabeled": ("unlabelled",), "labeled": ("labelled",), "train": ("training",), "val": ("valid", "validation"),
    "test": ("testing",),
}  # fmt: skip


@dataclass
class Description:
    """values: of a configuration file. notes: what was found and decided, a line each. lists: still to be written."""

    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    lists: dict[Path, list[str]] = field(default_factory=dict)
    seed: int = 0

    def write_lists(self) -> None:
        """Write the lists that the folder lacked. UserError where others are in their place."""
        for path, ids in self.lists.items():
            about = {"of": self.values["dataset"]["name"], "seed": self.seed, "images": len(ids)}
            write_ids(path, ids, about=about, cure="another --name")


def describe(
    root: Path, *, name: str, lists: Path, labeled: str | None = None, val: str | None = None, seed: int = 0
) -> Description:
    """A configuration for the folder ``root``; for lists that it lacks, ``lists`` is the folder. Writes nothing.

    labeled: a fraction, a count, or a list below root; by default the root's only list of labeled images, else all
    images that have a label map if others have none, else 1/8 of the training images. val: how many images become
    validation images where there is no list of them, by default 1/10.

    Raises UserError: no such folder, or nothing in it that images and label maps could be.
    """
    root = root.resolve()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    preset = _preset(root)
    if preset is not None:
        if labeled is not None or val is not None:
            raise UserError(
                f"{root}: the layout is that of configs/{preset}.json, whose lists say what is labeled and validated "
                "on; leave --labeled and --val out, and draw other labeled images with prepare_data.py split draw"
            )
        values = json.loads((PROJECT / "configs" / f"{preset}.json").read_text(encoding="utf-8"))
        return Description(values | {"data_root": str(root)}, [f"layout              as configs/{preset}.json has it"])
    layout = find_layout(root)
    if unlisted := [
        one for one in layout.pairs + layout.alone if one.startswith("#") or one.splitlines() != [one.strip()]
    ]:
        raise UserError(
            f"{root}: {len(unlisted)} names cannot stand in a list, for example {unlisted[0]!r}: they begin with #, or "
            "begin or end with a space, or hold a line break. Rename these files"
        )
    found = Description({}, [
        f"images              {layout.images}: {len(layout.pairs) + len(layout.alone)}",
        f"label maps          {layout.labels}: {len(layout.pairs)}",
    ], seed=seed)  # fmt: skip
    if layout.also:
        found.notes.append(f"not used            {', '.join(layout.also)} fit too; dataset.labels chooses")
    if layout.left_out:
        warnings.warn(
            f"{len(layout.left_out)} photographs are left out, for example {layout.left_out[0]}: all images, labeled "
            f"or not, must fit {layout.images}. Move them into one folder, or folders below it, with one ending",
            stacklevel=2,
        )
    block = {"name": name, "root": str(root), "images": layout.images, "labels": layout.labels}
    ignore_label = _describe_classes(root, layout, block, found.notes)
    _Lists(root, layout, lists, found).describe(block, labeled, "1/10" if val is None else val)
    shown = [root / layout.images.replace("{id}", one) for one in layout.pairs[:200]]
    sizes = [size for path in shown if (size := _size_if_readable(path))]
    side = min(LARGEST_CROP, int(median(map(min, sizes))) if sizes else LARGEST_CROP)
    found.values = {
        "model": "DeepLabv3+", "backbone": "resnet50", "pretrained": "imagenet", "dataset": block, "seed": seed,
        "ignore_label": ignore_label, "training": {"data": {"input_size": f"{max(33, side)},{max(33, side)}"}},
    }  # fmt: skip
    return found


def _size_if_readable(path: Path) -> tuple[int, int] | None:
    try:
        return image_size(path)
    except UserError:
        return None  # the check will say why


def _preset(root: Path) -> str | None:
    """The shipped configuration of a known dataset's layout."""
    if (root / "leftImg8bit/train").is_dir() and (root / "gtFine/train").is_dir():
        return "configCityscapes"
    lists = root / "ImageSets/Segmentation"
    if (root / "SegmentationClassAug").is_dir() and all(
        (lists / f"{one}.txt").is_file() for one in ("train_aug", "val")
    ):
        return "configVOC"
    return None


# ---------------------------------------------------------------------------------------------------- classes


def _describe_classes(root: Path, layout: Layout, block: dict[str, Any], notes: list[str]) -> int:
    """Names or number of classes, palette and label_ids into ``block``; returns the ignore_label."""
    paths = [root / layout.labels.replace("{id}", one) for one in layout.pairs]
    with ThreadPoolExecutor() as pool:
        counts = list(tqdm(pool.map(_pixels, paths), total=len(paths), unit="label map", disable=None))
    pixels, files = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for one in counts:
        if one is not None:
            pixels, files = pixels + one, files + (one > 0)
    found: list[int] = np.flatnonzero(pixels).tolist()
    damaged = [path for path, one in zip(paths, counts, strict=True) if one is None]
    stray = {value for value in found if files[value] == 1} if len(paths) >= 10 else set()
    notes.append(
        f"ids in label maps    {spans_text(set(found))}"
        + (f"; in one of {len(paths)} alone, so perhaps stray: {spans_text(stray)}" if stray else "")
        + (f"; {len(damaged)} cannot be read, for example {damaged[0].relative_to(root)}" if damaged else "")
    )
    given = _names_in_files(root)
    if given:
        return _describe_named(given, found, stray, block, notes)
    if found == [0, 255]:
        block |= {"names": ["background", "foreground"], "label_ids": [0, 255]}
        notes.append("classes             two: 0 is background, 255 foreground")
        return 255
    ids = [one for one in found if one != 255]
    if len(ids) < 2:
        held = f"{ids[0]} alone: nothing to tell apart" if ids else "nothing but 255, which is ignored"
        raise UserError(f"{root}: the label maps of {layout.labels} hold {held}")
    are_levels = ids[-1] + 1 > 2 * len(ids) or ids[0] > 0  # such as 0, 38, 75: gray levels; or 1, 2, 3
    between = int(pixels[1:255].sum())
    if (are_levels or len(ids) > 64) and len(ids) > 4 and {0, 255} <= set(found) and between < pixels[255]:
        raise UserError(
            f"{root}: the label maps of {layout.labels} hold 0 and 255 and, on {between / pixels.sum():.1%} of the "
            f"pixels, {len(ids) - 1} gray levels between: masks with soft edges? Write them as 0 and 255 alone"
        )
    block["num_classes"] = len(ids) if are_levels else ids[-1] + 1
    hint = "; so many may be colors turned to gray, or maps resized smoothly" if len(ids) > 64 else ""
    if are_levels:
        block["label_ids"] = ids
        hint += "; 255 does not count: if it is a class too, add it to label_ids" if 255 in found else ""
    notes.append(f'classes             {block["num_classes"]}, without names: add "names" to the configuration{hint}')
    return 255


def _describe_named(
    given: dict[str, Any], found: list[int], stray: set[int], block: dict[str, Any], notes: list[str]
) -> int:
    """Names, palette and label_ids of ``_names_in_files`` into ``block``; returns the ignore_label."""
    block |= {key: given[key] for key in ("names", "palette") if given.get(key)}
    count, ignore_label = len(given["names"]), given["ignore"]
    notes.append(f"class names         {given['file']}: {count}")
    if 0 <= ignore_label < count:  # a name for what does not count, such as void
        for key in {"names", "palette"} & set(block):
            block[key] = [one for index, one in enumerate(block[key]) if index != ignore_label]
        block["label_ids"] = [index for index in range(count) if index != ignore_label]
        notes.append(f"label_ids           all but {ignore_label} {given['names'][ignore_label]}, which does not count")
        return 255
    meant = [one for one in found if one not in (ignore_label, 255)]
    beyond = {one for one in meant if one >= count}
    if found == [0, 255] and count == 2:
        meant, beyond = found, {255}
    if len(meant) == count and beyond - stray:  # such as ids from 1
        block["label_ids"] = meant
        notes.append(f"label_ids           {spans_text(set(meant))} are the classes in this order")
    return ignore_label if ignore_label >= count else 255


def _pixels(path: Path) -> np.ndarray | None:
    """(256,) int64, how many pixels of a label map have each id; None where it cannot be read: the check says why."""
    try:
        return np.bincount(read_label(path).ravel(), minlength=256)
    except UserError:
        return None


def _names_in_files(root: Path) -> dict[str, Any] | None:
    """names, and where given palette and ignore, from a file of class names at the root."""
    for path in (root / name for name in NAME_FILES if (root / name).is_file()):
        try:
            text = path.read_text(encoding="utf-8-sig")
            content = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as class names ({error}); mend or remove it") from None
        known = content if isinstance(content, dict) else {"names": [one for one in content if one]}
        names = known.get("names", known.get("classes"))
        if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
            raise UserError(f'{path}: expected {{"names": ["first", ...]}} or a list of names; mend or remove it')
        if any(one.lower().endswith(IMAGE_ENDINGS) for one in names):
            continue  # a list of images
        names = names[1:] if names[0] == "__ignore__" else names  # labelme's line for what has no id
        ignore = known.get("ignore_index", known.get("ignore_label"))
        ignore = 255 if ignore is None else ignore
        if not isinstance(ignore, int):
            raise UserError(f"{path}: the label that does not count is {ignore!r}; expected a number, or none given")
        return {"file": path.name, "names": names, "palette": known.get("palette"), "ignore": ignore}
    return None


# ---------------------------------------------------------------------------------------------------- lists


class _Lists:
    """Finds the lists of a folder, and makes those that it lacks."""

    def __init__(self, root: Path, layout: Layout, folder: Path, description: Description) -> None:
        self.root, self.layout, self.folder = root, layout, folder
        self.notes, self.made, self.seed = description.notes, description.lists, description.seed
        self.known = set(layout.pairs) | set(layout.alone)
        self.means = line_reader(sorted(self.known), pattern=layout.images, root=root)
        self.read_as: dict[str, list[str]] = {}  # lists that name images, but not as ids
        self.not_used: list[str] = []
        self.drawn: set[str] = set()  # for validation
        self.found = self._find()
        self.notes += [f"not used            {one}" for one in self.not_used[:3]]
        if len(self.not_used) > 3:
            self.notes.append(f"not used            and {len(self.not_used) - 3} more such files")

    def describe(self, block: dict[str, Any], labeled: str | None, val: str) -> None:
        """The keys train or labeled and unlabeled, val, and test of a dataset's block."""
        given = labeled if labeled and (self.root / labeled).is_file() else None
        if given and not set(self._ids(given)) <= self.known:
            pattern = self.layout.images
            self.read_as[given] = import_ids(self.root / given, sorted(self.known), pattern=pattern, root=self.root)
        amount = parse_amount(labeled) if labeled and not given else None
        given = self._only("labeled") if given is None and amount is None else given
        beside = str(PurePosixPath(given).with_name("unlabeled.txt")) if given else None
        unlabeled = beside if beside in self.found["unlabeled"] else self._only("unlabeled")
        held_out: set[str] = set()
        for role in ("test", "val"):
            source = self._only(role)
            if source:
                block[role] = self._named(role, source)
                self.notes.append(f"{role + ' list':<20}{source}: {len(self._ids(source))}")
                held_out |= set(self._ids(source))
        train = self._only("train")
        if "val" not in block:
            listed = [set(self._ids(one)) if one else set() for one in (given, unlabeled, train)]
            drawn = self._draw_val(val, held_out, listed)
            block["val"] = self._make("val", drawn)
            held_out |= set(drawn)
            self.drawn = set(drawn)
        ids = self._ids(train) if train else sorted(self.known)
        more = self._ids(unlabeled) if unlabeled else self.layout.alone  # besides those of a list for training
        ids = [one for one in sorted({*ids, *more}) if one not in held_out]
        if left := sorted(self.known.difference(ids, held_out, self._ids(given) if given else ())):
            self.notes.append(f"not used            {len(left)} images that are in no list, for example {left[0]}")
        block |= self._labeled(ids, given, unlabeled, amount)

    def _draw_val(self, amount: str, held_out: set[str], listed: list[set[str]]) -> list[str]:
        """Validation images, of those in no list if there are any; of the labeled and then the unlabeled list last.

        listed: the ids of the lists labeled, unlabeled and train.
        """
        labeled, unlabeled, train = listed
        for taken in (labeled | unlabeled | train, labeled | unlabeled, unlabeled, set()):
            rest = [one for one in self.layout.pairs if one not in held_out | taken]
            if len(rest) > 1:
                order, _ = draw_order(rest, seed=self.seed)
                return sorted(order[: count_of(parse_amount(amount), len(rest), what="val", round_up=True)])
        raise UserError(
            f"{self.root}: images with a label map from which validation images can be drawn: {len(rest)}; expected at "
            "least 2. Label more images, or write a val.txt"
        )

    def _labeled(self, ids: list[str], given: str | None, source: str | None, amount: Any) -> dict[str, str]:
        """The keys labeled and unlabeled for the training ids. given, source: the lists that are there."""
        if given is not None:
            taken = set(self._ids(given)) - self.drawn
            others = [one for one in ids if one not in taken]
            unlabeled = self._named("unlabeled", source) if source else self._make("unlabeled", others)
            self.notes.append(f"labeled images      {given}: {len(taken)}")
            return {"labeled": self._named("labeled", given), "unlabeled": unlabeled}
        without = set(self.layout.alone)
        if source and amount is None and (chosen := [one for one in ids if one not in {*self._ids(source), *without}]):
            self.notes.append(f"labeled images      {len(chosen)}: all that {source} does not name")
            return {"labeled": self._make("labeled", chosen), "unlabeled": self._named("unlabeled", source)}
        with_mask, alone = [one for one in ids if one not in without], [one for one in ids if one in without]
        if alone and amount is None:
            chosen, how = with_mask, "all that have a label map"
        else:
            order, _ = draw_order(with_mask, seed=self.seed)
            amount = amount or parse_amount("1/8")
            chosen = order[: count_of(amount, len(with_mask), round_up=True, others=bool(alone))]
            how = f"{amount} of {len(with_mask)}, seed {self.seed}"
        if not chosen or len(chosen) == len(ids):
            raise UserError(
                f"{self.root}: besides val and test {len(ids)} images, {len(chosen)} of them labeled; expected both "
                "labeled and unlabeled ones to train on"
            )
        others = [one for one in ids if one not in set(chosen)]
        self.notes.append(f"labeled images      {len(chosen)}: {how}")
        return {"labeled": self._make("labeled", chosen), "unlabeled": self._make("unlabeled", others)}

    def _find(self) -> dict[str, list[str]]:
        """role -> lists of this layout's ids below the root, shortest path first."""
        found: dict[str, list[str]] = {role: [] for role in ROLES}
        for path in sorted(find_files(self.root, (".txt",)), key=lambda path: (len(path.parts), path)):
            role = next((role for role in ROLES if role in path.stem.lower().replace("labelled", "labeled")), None)
            source = path.relative_to(self.root).as_posix()
            if role and self._names_images(source, is_meant=path.stem.lower() in (role, *SPELLINGS[role])):
                found[role].append(source)
        folders = sorted({one.split("/")[0] for one in self.known if "/" in one})
        for role in ROLES:  # else folders of these names
            named = [one for one in folders if not found[role] and one.lower() in (role, *SPELLINGS[role])]
            for folder in named:
                depths = {one.count("/") for one in self.known if one.startswith(f"{folder}/")}
                found[role] += [folder + "/*" * depth for depth in depths if len(depths) == 1]
        return found

    def _names_images(self, source: str, *, is_meant: bool) -> bool:
        """Whether all lines of a file name images; UserError for a list that is meant to be one, but for some lines."""
        try:
            lines = self._ids(source)
        except UserError:
            if is_meant:
                raise
            lines = []
        if lines and set(lines) <= self.known:
            return True
        if not lines:
            self.not_used.append(f"{source}: no line of text")
            return False
        ids = [one for line in lines if (one := self.means(line)) is not None]
        if is_meant and len(set(ids)) == len(lines):
            self.read_as[source] = ids
            return True
        lost = [line for line in lines if self.means(line) is None]
        if elsewhere := [line for line in lost if is_meant and (self.root / line).is_file()]:
            raise UserError(
                f"{self.root / source}: {len(elsewhere)} of {len(lines)} lines name files that are no image of "
                f"{self.layout.images}, for example {elsewhere[0]}. Move all images into one folder or folders below it"
            )
        if is_meant and 2 * len(ids) >= len(lines):
            wrong = f"{len(lost)} of {len(lines)} lines name no image, for example {lost[0]}" if lost else "doubled ids"
            raise UserError(f"{self.root / source}: {wrong}; mend this list, or give it a name that says of no list")
        self.not_used.append(f"{source}: {len(lost)} of {len(lines)} lines name no image")
        return False

    def _named(self, role: str, source: str) -> str:
        """A list as the configuration names it: written anew if it names images not as ids, or drawn for validation."""
        ids = self._ids(source)
        if source in self.read_as or not self.drawn.isdisjoint(ids):
            return self._make(role, [one for one in ids if one not in self.drawn])
        return source

    def _only(self, role: str) -> str | None:
        """The one list of a role, or the one whose name is just that; None where there is none or a choice."""
        lists = self.found[role]
        exact = [one for one in lists if PurePosixPath(one).stem == role]
        chosen = exact if len(exact) == 1 else lists
        if len(chosen) > 1:
            more = f" and {len(chosen) - 3} more" if len(chosen) > 3 else ""
            self.notes.append(f"several lists       {role}: {', '.join(chosen[:3])}{more}; --labeled LIST takes one")
            if role in ("labeled", "unlabeled"):
                return None
        return chosen[0] if chosen else None

    def _ids(self, source: str) -> list[str]:
        if source in self.read_as:
            return self.read_as[source]
        if "*" in source:
            return sorted(one for one in self.known if one.startswith(source.split("*")[0]))
        return [line.strip() for line in read_lines(self.root / source) if line.strip() and not line.startswith("#")]

    def _make(self, role: str, ids: list[str]) -> str:
        """A list to be written; its path as the configuration names it."""
        path = self.folder / f"{role}.txt"
        self.made[path] = ids
        self.notes.append(f"{role + ' list':<20}{path}: {len(ids)}, hash {hash_of(ids)}")
        return path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else str(path)
