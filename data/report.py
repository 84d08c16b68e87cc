"""What a check of a dataset found, and how it is told on a terminal."""

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 5  # examples of one kind of problem
COLUMNS = 100
_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}  # a path must stay one


@dataclass(frozen=True)
class ListFacts:
    """What one list of ids holds. Sizes are (width, height), None where no image could be read."""

    name: str
    source: str
    images: int
    split_hash: str
    labels: int  # label maps that could be read
    hidden: bool  # the label maps are never trained on
    smallest: tuple[int, int] | None
    median: tuple[int, int] | None  # by area
    largest: tuple[int, int] | None
    distinct_sizes: int
    modes: dict[str, int]
    class_pixels: list[int]
    class_images: list[int]
    ignored_pixels: int
    foreign_pixels: int  # of ids that are neither class nor ignore_label


@dataclass(frozen=True)
class CropFacts:
    """How training crops relate to the images; sizes are (width, height)."""

    size: tuple[int, int]
    resize: tuple[int, int] | None  # of every image before anything else
    images: int  # training images whose size is known
    distorted: int  # of them whose ratio of width to height the resize changes by more than 10 %
    smaller: int  # of them smaller than the crop in some side, once resized
    scale_range: tuple[float, float]  # (1, 1) where the scale is not random
    padded_share: float  # of all crops of an epoch, expected; 0..1


@dataclass(frozen=True)
class Report:
    """What ``check_dataset`` found. errors: training would fail or a number would be wrong."""

    errors: list[str]
    warnings: list[str]
    dataset: str
    root: str
    ignore_label: int
    class_names: list[str]
    lists: list[ListFacts] = field(default_factory=list)
    crops: CropFacts | None = None
    unmapped_ids: list[int] = field(default_factory=list)  # in the files, but not in dataset.label_ids: ignored

    @property
    def verdict(self) -> str:
        warned = count_text(len(self.warnings), "warning")
        if self.errors:
            return f"{count_text(len(self.errors), 'error')}, {warned}: training or evaluation would fail"
        return f"ready to train, {warned}" if self.warnings else "ready to train"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"verdict": self.verdict, **asdict(self)}

    def as_text(self) -> str:
        """For the terminal; the last line is the verdict."""
        head = f"{self.dataset} in {self.root}: {count_text(len(self.class_names), 'class', 'classes')}"
        parts = [f"{head}, ignore_label {self.ignore_label}"]
        if self.lists:
            parts += [_lists_text(self.lists), _images_text(self.lists)]
        parts += [_crops_text(self.crops)] if self.crops else []
        parts += [_classes_text(self)]
        parts += [_wrapped("error", message) for message in self.errors]
        parts += [_wrapped("warning", message) for message in self.warnings]
        return "\n\n".join([part for part in parts if part] + [self.verdict])


def _lists_text(lists: list[ListFacts]) -> str:
    rows = [["list", "images", "labels", "split hash", "from"]]
    for one in lists:
        labels = f"({one.labels})" if one.hidden else str(one.labels)
        rows.append([one.name, str(one.images), labels, one.split_hash, one.source])
    hidden = "\n(n): hidden labels, not used in training" if any(one.hidden and one.labels for one in lists) else ""
    return _table(rows, left=(0, 3, 4)) + hidden


def _images_text(lists: list[ListFacts]) -> str:
    rows = [["width x height", "smallest", "median", "largest", "sizes", "modes"]]
    for one in lists:
        if one.smallest and one.median and one.largest:
            modes = ", ".join(f"{count} {mode}" for mode, count in one.modes.items())
            sizes = [size_text(size) for size in (one.smallest, one.median, one.largest)]
            rows.append([one.name, *sizes, str(one.distinct_sizes), modes])
    return _table(rows, left=(0, 5)) if len(rows) > 1 else ""


def _crops_text(crops: CropFacts) -> str:
    text = f"crops of {size_text(crops.size)}"
    text += f" from images resized to {size_text(crops.resize)}" if crops.resize else ""
    text += f": {crops.smaller} of {count_text(crops.images, 'training image')} "
    text += f"({100 * crops.smaller / crops.images:.1f} %) smaller in some side; "
    if crops.scale_range != (1, 1):
        text += "with the random scale of {:g} to {:g}, ".format(*crops.scale_range)
    text += f"{100 * crops.padded_share:.1f} % of the crops are partly padding"
    return textwrap.fill(text, COLUMNS)


def _classes_text(report: Report) -> str:
    """A row for each class, two columns for each list: share of the pixels that have a class, and images."""
    shown = [one for one in report.lists if one.labels and not one.hidden]
    if not shown:
        return ""
    rows = [["class", *(text for one in shown for text in (f"{one.name} pixels", "images"))]]
    for index, name in enumerate(report.class_names):
        row = [f"{index:>3} {textwrap.shorten(name, 24, placeholder='...')}"]
        for one in shown:
            row += [_percent(one.class_pixels[index], sum(one.class_pixels)), str(one.class_images[index] or "-")]
        rows.append(row)
    for name, key in (("ignored, of all pixels", "ignored_pixels"), ("out of range, of all", "foreign_pixels")):
        if any(getattr(one, key) for one in shown):
            row = [f"    {name}"]
            for one in shown:
                total = sum(one.class_pixels) + one.ignored_pixels + one.foreign_pixels
                row += [_percent(getattr(one, key), total), ""]
            rows.append(row)
    mapped = f"\nids not in dataset.label_ids, hence ignored: {spans_text(set(report.unmapped_ids))}"
    return _table(rows, left=(0,)) + (mapped if report.unmapped_ids else "")


def _table(rows: list[list[str]], *, left: tuple[int, ...]) -> str:
    """Columns two spaces apart; those in ``left`` begin at the left, the others end at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _wrapped(kind: str, message: str) -> str:
    """A message of several lines, of which all but the first are indented examples."""
    first, *examples = message.split("\n  ")
    lines = [textwrap.fill(f"{kind}: {first}", COLUMNS, subsequent_indent="  ", **_WHOLE_WORDS)]
    lines += [
        textwrap.fill(one, COLUMNS, initial_indent="  - ", subsequent_indent="    ", **_WHOLE_WORDS) for one in examples
    ]
    return "\n".join(lines)


def size_text(size: tuple[int, int]) -> str:
    """(width, height) -> "640 x 480"."""
    return f"{size[0]} x {size[1]}"


def _percent(part: int, whole: int) -> str:
    """ "-" for none at all, which a rounded 0 would hide."""
    if not part:
        return "-"
    share = 100 * part / whole
    return "<0.01 %" if share < 0.01 else f"{share:.2f} %"


def count_text(number: int, one: str, many: str = "") -> str:
    """1, "class", "classes" -> "1 class"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def some_text(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def spans_text(ids: set[int]) -> str:
    """{0, 1, 2, 5} -> "0..2, 5"."""
    spans: list[list[int]] = []
    for index in sorted(ids):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in spans)
