"""Label maps in color, and the picture of what the students learn from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.config import Config

SMALL_SIDE = 384  # overlays of photographs whose longer side is at most half of it are enlarged


def voc_palette(count: int = 256) -> list[list[int]]:
    """The colors of PASCAL VOC's label files: the bits of a class id, spread over red, green and blue."""
    palette = []
    for index in range(count):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append(color)
    return palette


def write_label(path: Path, label: np.ndarray, palette: Sequence[Sequence[int]] | None) -> None:
    """(H,W) uint8 class ids -> a palette PNG, as VOC's own label files."""
    colors = voc_palette()
    colors[: len(palette or [])] = [list(color) for color in palette or []]
    image = Image.fromarray(label).convert("L")
    image.putpalette([value for color in colors for value in color])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def colorize(label: np.ndarray, palette: Sequence[Sequence[int]] | None, *, ignore_label: int) -> np.ndarray:
    """(H,W) ids -> (H,W,3) uint8 RGB; ignored pixels are white."""
    colors = np.array(voc_palette(), dtype=np.uint8)
    colors[: len(palette or [])] = np.array(palette or np.empty((0, 3)), dtype=np.uint8)
    colors[ignore_label] = 255
    return colors[label]


def draw_overlay(
    image: np.ndarray, label: np.ndarray, *, class_names: Sequence[str], palette: Sequence[Sequence[int]] | None
) -> Image.Image:
    """(H,W,3) uint8 RGB under the colors of (H,W) class ids, and below it the colors of the classes that are there.

    A small photograph is enlarged a whole number of times: the legend would be larger than it.
    """
    colors = colorize(np.arange(len(class_names)), palette, ignore_label=255)
    counts = np.bincount(label.ravel(), minlength=len(class_names))
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    texts = [f"{class_names[index]} {100 * counts[index] / label.size:.1f} %" for index in present]
    times = max(1, SMALL_SIDE // max(label.shape))
    image, label = (np.kron(one, np.ones((times, times, *[1] * (one.ndim - 2)), np.uint8)) for one in (image, label))
    height, width = label.shape
    size = max(12, min(width, height) // 28)
    font = ImageFont.load_default(size)
    cell = int(max(font.getlength(text) for text in texts)) + 3 * size
    columns = max(1, width // cell)
    rows = -(-len(present) // columns)
    canvas = Image.new("RGB", (max(width, cell), height + int((1.6 * rows + 0.6) * size)), "white")
    canvas.paste(Image.fromarray(((image.astype(np.uint16) + colors[label]) // 2).astype(np.uint8)), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for place, (index, text) in enumerate(zip(present, texts, strict=True)):
        left = (place % columns) * cell + size // 2
        top = height + int((0.6 + 1.6 * (place // columns)) * size)
        draw.rectangle((left, top, left + size, top + size), fill=tuple(colors[index]), outline="gray")
        draw.text((left + 1.5 * size, top + size / 2), text, fill="black", font=font, anchor="lm")
    return canvas


def save_confusion(path: Path, matrix: np.ndarray, *, class_names: Sequence[str], title: str) -> None:
    """A picture of a (C,C) confusion matrix of counts: each row in percent of its true class's pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and without pyplot's global state
    from matplotlib.figure import Figure

    count = len(class_names)
    share = 100 * matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    figure = Figure(figsize=(3 + 0.42 * count, 2.4 + 0.36 * count), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(count), class_names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    empty = matrix.sum(axis=1) == 0
    names = [f"{name} (in no label)" if none else name for name, none in zip(class_names, empty, strict=True)]
    axes.set_yticks(range(count), names, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, column in np.argwhere(share >= 0.5):
        color = "white" if share[row, column] > 55 else "black"
        axes.text(column, row, f"{share[row, column]:.0f}", ha="center", va="center", color=color, fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def save_pictures(
    path: Path, previews: Sequence[Mapping[str, Any]], *, truth: Any, title: str, config: Config
) -> list[Path]:
    """A picture for each student, ``<path>_student_0.png`` and so on, of what it learns from.

    previews: see ``CrossTeacher.preview``; truth: (B,H,W) integer labels of their images.
    """
    paths = []
    for own, preview in enumerate(previews):
        first, *others = preview.items()
        paths.append(path.with_name(f"{path.stem}_student_{own}.png"))
        save_picture(
            paths[-1], dict([first, ("truth", truth), *others]), title=f"{title}; student {own}", config=config
        )
    return paths


def save_picture(path: Path, columns: Mapping[str, Any], *, title: str, config: Config) -> None:
    """One row an image, one titled column an entry, and the classes' colors below.

    columns: title -> tensors, (B,3,H,W) float RGB images in [0,1], (B,H,W) integer label maps, bool masks (white where
    True) or float in [0,1], whose scale is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and without pyplot's global state
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    class_names, palette, ignore_label = config.data.class_names, config.data.palette, config.ignore_label
    arrays = {name: tensor.cpu().numpy() for name, tensor in columns.items()}
    rows, (height, width) = len(next(iter(arrays.values()))), next(iter(arrays.values())).shape[-2:]
    legend_rows = -(-(len(class_names) + 1) // 8)  # with "ignored"
    legend_columns = -(-(len(class_names) + 1) // legend_rows)
    figure = Figure(
        figsize=(2.3 * len(columns), 2.3 * rows * height / width + 0.75 + 0.25 * legend_rows),
        dpi=100,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, len(columns), squeeze=False)
    for column, (name, images) in enumerate(arrays.items()):
        axes[0][column].set_title(name, fontsize=10)
        for row, image in enumerate(images):
            how: dict[str, Any] = {"interpolation": "nearest"}
            if image.ndim == 3:
                shown = image.transpose(1, 2, 0)
            elif image.dtype.kind in "fb":
                shown, how = (
                    image,
                    how | {"cmap": "gray" if image.dtype.kind == "b" else "viridis", "vmin": 0, "vmax": 1},
                )
            else:
                shown = colorize(image, palette, ignore_label=ignore_label)
            drawn = axes[row][column].imshow(shown, **how)
            axes[row][column].set(xticks=[], yticks=[])
            axes[row][column].spines[:].set_color("gray")  # a white panel has an edge
        if images.dtype.kind == "f" and images.ndim == 3:
            figure.colorbar(
                drawn, ax=[axes[row][column] for row in range(rows)], fraction=0.05, pad=0.02, aspect=20 * rows
            )
    figure.suptitle(title, fontsize=11)
    colors = colorize(np.arange(len(class_names)), palette, ignore_label=ignore_label)
    patches = [
        Patch(facecolor=color / 255, edgecolor="gray", label=name)
        for color, name in zip(colors, class_names, strict=True)
    ]
    patches.append(Patch(facecolor="white", edgecolor="gray", label="ignored"))
    figure.legend(handles=patches, loc="outside lower center", ncols=legend_columns, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
