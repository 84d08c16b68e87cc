"""A generated dataset in VOC layout: nothing to download, and small enough for a CPU.

Balls, pyramids and rings are known by their form; stripes, checker and dots by their texture, in any outline.
Color, size, rotation, light, occlusion and clutter are random. So a few labeled pictures are too few to learn
from, yet every object is clear to the eye: the room that unlabeled pictures can fill.
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.errors import UserError
from utils.visualize import voc_palette, write_label

CLASSES = ("background", "ball", "pyramid", "ring", "stripes", "checker", "dots")
IGNORE_LABEL = 255
MANIFEST = "demo.json"
# A change to the pictures must change this number: folders made by an older version are then made again.
VERSION = 1

_TEXTURES = ("stripes", "checker", "dots")
_SPLITS = ("labeled", "unlabeled", "val")
_OWN_FILE = re.compile(
    r"(JPEGImages|SegmentationClassAug)(/(labeled|unlabeled|val)_\d+\.(jpg|png))?"
    r"|ImageSets(/Segmentation(/(train|val)\.txt)?)?|splits(/(labeled|unlabeled)\.txt)?|(classes|demo)\.json"
)
_SCALE = 3  # pictures are drawn this many times larger, then averaged down: smooth edges

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Generator = np.random.Generator


class _Object(NamedTuple):
    """An object on the canvas: mask (height, width), 255 inside; relief (height, width), its height in pixels."""

    class_id: int
    mask: Bytes
    relief: Floats


def make_demo_dataset(
    root: Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (96, 96),
    labeled: int = 48,
    unlabeled: int = 276,
    val: int = 100,
) -> Path:
    """Make the dataset under `root`, unless the same one is already there, and return `root`.

    Unlabeled images have label files too, for analysis only. The folder appears in one step when all is written.
    The same arguments give the same labels everywhere, and the same images but for rounding.

    Args:
        root: dataset folder. Another or a damaged demo dataset there is replaced; foreign files are an error.
        seed: seed of the pictures; one of a given split and index does not depend on the counts.
        size: height, width in pixels.
        labeled: number of labeled images, at least one for each class but background.
        unlabeled: number of unlabeled images.
        val: number of validation images.
    """
    if labeled < len(CLASSES) - 1:
        raise UserError(f"labeled is {labeled}; at least {len(CLASSES) - 1} are needed to show every class")
    counts = {"labeled": labeled, "unlabeled": unlabeled, "val": val}
    parameters = {"version": VERSION, "seed": seed, "size": list(size), **counts}
    if _is_complete(root, parameters):
        return root
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; name a folder")
    if root.resolve() == Path.cwd():  # which is put in place as a whole
        raise UserError(f"{root}: is the folder this command runs in; name one below it, or another")
    foreign = next((p for p in root.rglob("*") if not _is_own(p, root)), None)
    if foreign:
        raise UserError(f"{root} holds {foreign.name}, not a file of the demo dataset; name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        made = Path(folder) / root.name
        _write_dataset(made, seed=seed, size=size, counts=counts)
        manifest = {"parameters": parameters, "sha256": _content_hash(made)}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if not _is_complete(root, parameters):  # else another process was faster
            shutil.rmtree(root, ignore_errors=True)
            made.rename(root)
    return root


def draw_example(*, seed: int, split: str, index: int, size: tuple[int, int]) -> tuple[Bytes, Bytes]:
    """Draw one picture; it depends on nothing but the arguments.

    Returns:
        image: (H, W, 3) uint8, RGB.
        label: (H, W) uint8, class ids; `IGNORE_LABEL` on the line between two objects.
    """
    rng = np.random.Generator(np.random.PCG64([seed, _SPLITS.index(split), index]))
    height, width = size[0] * _SCALE, size[1] * _SCALE
    canvas = _background(height, width, rng)
    numbers = np.zeros(size, np.uint8)  # 0: background, k: the k-th object painted
    # The first and front-most object's class goes through all classes, so that a short list shows all.
    others = rng.integers(1, len(CLASSES), int(rng.integers(1, 5)))
    objects = _layout([1 + index % (len(CLASSES) - 1), *others.tolist()], height, width, rng)[::-1]
    light = rng.uniform(0, 2 * np.pi)
    for number, thing in enumerate(objects, start=1):
        _paint(canvas, thing, light, rng)
        numbers[cv2.resize(thing.mask, size[::-1], interpolation=cv2.INTER_AREA) >= 128] = number
    label = np.array([0, *(thing.class_id for thing in objects)], np.uint8)[numbers]
    window = np.ones((2, 2), np.uint8)  # as in VOC, a thin line around every object has no class
    label[cv2.dilate(numbers, window) != cv2.erode(numbers, window)] = IGNORE_LABEL
    image = cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
    return _photograph(image, rng), label


def _is_own(path: Path, root: Path) -> bool:
    return _OWN_FILE.fullmatch(path.relative_to(root).as_posix()) is not None


def _is_complete(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether `root` holds the dataset of these parameters, no file missing or changed."""
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(manifest == {"parameters": parameters, "sha256": _content_hash(root)})


def _content_hash(root: Path) -> str:
    """SHA-256 over the names and bytes of all the dataset's files but the manifest."""
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and _is_own(p, root) and p.name != MANIFEST):
        total.update(path.relative_to(root).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _write_dataset(root: Path, *, seed: int, size: tuple[int, int], counts: dict[str, int]) -> None:
    """Write pictures, labels, lists and class names: all but the manifest."""
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation", "splits"):
        (root / folder).mkdir(parents=True)
    ids = {split: [f"{split}_{index:04d}" for index in range(count)] for split, count in counts.items()}
    for split, names in ids.items():
        for index, name in enumerate(names):
            image, label = draw_example(seed=seed, split=split, index=index, size=size)
            Image.fromarray(image).save(root / f"JPEGImages/{name}.jpg", quality=95, subsampling=0)
            write_label(root / f"SegmentationClassAug/{name}.png", label, None)
    lists = {
        "ImageSets/Segmentation/train.txt": ids["labeled"] + ids["unlabeled"],
        "ImageSets/Segmentation/val.txt": ids["val"],
        "splits/labeled.txt": ids["labeled"],
        "splits/unlabeled.txt": ids["unlabeled"],
    }
    for path, names in lists.items():
        (root / path).write_text("".join(f"{name}\n" for name in names))
    classes = {"names": list(CLASSES), "palette": voc_palette(len(CLASSES))}
    (root / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")


def _layout(classes: list[int], height: int, width: int, rng: Generator) -> list[_Object]:
    """Place objects of the given classes, front first.

    One of which less than 70 % would show is placed elsewhere, at last dropped: its class could not be told.
    """
    placed: list[_Object] = []
    covered = np.zeros((height, width), bool)
    unit = min(height, width)
    margin = unit // 2  # objects may reach over the border; their relief must not
    frame = slice(margin, margin + height), slice(margin, margin + width)
    for class_id in classes:
        for _ in range(12):
            contours = _contours(class_id, rng)
            centre = rng.uniform(0.12, 0.88, 2) * (width, height) + margin
            radius = unit * rng.uniform(0.16, 0.32)
            points = [np.rint((contour * radius + centre) * 16).astype(np.int32) for contour in contours]
            mask = np.zeros((height + 2 * margin, width + 2 * margin), np.uint8)
            cv2.fillPoly(mask, points, 255, lineType=cv2.LINE_AA, shift=4)
            inside = mask > 127
            if np.count_nonzero(inside[frame] & ~covered) > 0.7 * np.count_nonzero(inside):
                placed.append(_Object(class_id, mask[frame], _relief(class_id, mask)[frame]))
                covered |= inside[frame]
                break
    return placed


def _contours(class_id: int, rng: Generator) -> list[NDArray[np.float64]]:
    """Outline of a randomly turned object of about unit radius, (N, 2) x, y; a second one is a hole."""
    name = CLASSES[class_id]
    corners = 3 if name == "pyramid" else 72
    angle = np.arange(corners) * (2 * np.pi / corners)
    radius = np.full(corners, 1.4 if name == "pyramid" else 1.0)  # about the same area for all
    if name in _TEXTURES:  # a smooth blob of any form
        for wave in (2, 3, 4):
            radius += rng.uniform(0.05, 0.2) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    turn, lean = rng.uniform(0, 2 * np.pi, 2)
    squeeze = _rotation(lean) @ np.diag([1, rng.uniform(0.8, 1)]) @ _rotation(-lean)
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) @ _rotation(turn) @ squeeze
    return [points, points * rng.uniform(0.4, 0.55)] if name == "ring" else [points]


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _relief(class_id: int, mask: Bytes) -> Floats:
    """Height above the ground: round for ball and ring, a pyramid, and for textures flat with a worn edge."""
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5).astype(np.float32)
    if CLASSES[class_id] != "pyramid":
        top = 2.0 * _SCALE if CLASSES[class_id] in _TEXTURES else max(float(depth.max()), 1.0)
        depth = (0.8 * top * np.sqrt(1 - (1 - np.clip(depth / top, 0, 1)) ** 2)).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(depth, (0, 0), 0.6 * _SCALE), np.float32)


def _noise(height: int, width: int, grain: float, rng: Generator) -> Floats:
    """Smooth noise in 0..1, (height, width, 1); `grain` is the size of a patch in pixels of the canvas."""
    coarse = rng.random((int(height / grain) + 2, int(width / grain) + 2), np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth, 0, 1).astype(np.float32)[..., None]


def _color(hue: float, rng: Generator, *, value: tuple[float, float], vivid: tuple[float, float]) -> Floats:
    """A color, (3,) in 0..255; hue in 0..6, random brightness and saturation (`vivid`) within the bounds."""
    wheel = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    saturation = rng.uniform(*vivid)
    return np.asarray(255 * rng.uniform(*value) * (1 - saturation + saturation * wheel), np.float32)


def _surface(class_id: int, height: int, width: int, rng: Generator) -> Floats:
    """Colors of an object: (3,) if plain, else its texture over the whole canvas, (height, width, 3)."""
    name, hue = CLASSES[class_id], rng.uniform(0, 6)
    if name not in _TEXTURES:
        return _color(hue, rng, value=(0.7, 1.0), vivid=(0.5, 0.95))
    grid = np.mgrid[:height, :width] * (2 * np.pi / (_SCALE * rng.uniform(9, 15)))
    u, v = np.tensordot(_rotation(rng.uniform(0, 2 * np.pi)), grid, 1)
    checker, dots = 1.6 * np.sin(u) * np.sin(v), np.cos(u) + np.cos(v) - 0.7
    waves = {"stripes": np.sin(u), "checker": checker, "dots": dots}
    share = np.clip(0.5 + 2.5 * waves[name], 0, 1)[..., None]  # of the light color
    dark = _color(hue, rng, value=(0.35, 0.6), vivid=(0.7, 0.95))
    light = _color(hue + rng.uniform(-0.5, 0.5), rng, value=(0.85, 1.0), vivid=(0.1, 0.45))
    return np.asarray(dark * (1 - share) + light * share, np.float32)


def _background(height: int, width: int, rng: Generator) -> Floats:
    """Two dull colors, grain, and clutter of no class (lines, arcs, specks): (height, width, 3)."""
    first, second = (_color(rng.uniform(0, 6), rng, value=(0.4, 0.75), vivid=(0.05, 0.2)) for _ in range(2))
    blend = _noise(height, width, rng.uniform(0.2, 0.7) * width, rng)
    grain = 0.85 + 0.3 * _noise(height, width, _SCALE * rng.uniform(1.5, 8), rng)
    canvas = np.ascontiguousarray((first * blend + second * (1 - blend)) * grain, np.float32)
    for _ in range(int(rng.integers(2, 8))):
        color = _color(rng.uniform(0, 6), rng, value=(0.2, 0.9), vivid=(0.1, 0.5)).tolist()
        x, y, x2, y2 = (rng.random(4) * (width, height, width, height)).astype(int).tolist()
        kind, thickness, start = rng.integers([0, 1, 0], [3, 2 * _SCALE, 360]).tolist()
        if kind == 0:
            cv2.line(canvas, (x, y), (x2, y2), color, thickness)
        elif kind == 1:
            axes = 1 + abs(x2 - x) // 2, 1 + abs(y2 - y) // 2
            cv2.ellipse(canvas, (x, y), axes, 0, start, start + int(rng.integers(40, 150)), color, thickness)
        else:
            cv2.circle(canvas, (x, y), thickness, color, -1)
    return canvas


def _paint(canvas: Floats, thing: _Object, light: float, rng: Generator) -> None:
    """Lay an object, lit from the side `light` (an angle), and its soft shadow on the canvas, in place."""
    height, width = thing.mask.shape
    x, y = float(np.cos(light)), float(np.sin(light))
    shift = np.array([[1, 0, -2 * _SCALE * x], [0, 1, -2 * _SCALE * y]], np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(thing.mask, shift, (width, height)), (0, 0), 1.5 * _SCALE)
    canvas *= 1 - shadow[..., None] * np.float32(rng.uniform(0.2, 0.5) / 255)
    slope_y, slope_x = np.gradient(thing.relief)
    facing = (1 - slope_x * x - slope_y * y) / np.sqrt(2 * (1 + slope_x**2 + slope_y**2))
    shade = (0.45 + 0.8 * np.clip(facing, 0, 1))[..., None]
    alpha = thing.mask[..., None] / np.float32(255)
    surface = _surface(thing.class_id, height, width, rng)
    canvas += alpha * (np.clip(surface * shade, 0, 255) - canvas)


def _photograph(image: Floats, rng: Generator) -> Bytes:
    """Add uneven light, a color cast, contrast and sensor noise: (H, W, 3) float32 to uint8."""
    y, x = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0, 0.3) * (np.cos(angle) * x + np.sin(angle) * y)
    lit = image * light[..., None] * rng.uniform(0.85, 1.15, 3)
    lit = (lit - 128) * rng.uniform(0.85, 1.1) + 128 + rng.uniform(-15, 15)
    lit = lit + rng.normal(0, rng.uniform(1, 6), image.shape)
    return np.asarray(np.clip(np.rint(lit), 0, 255), np.uint8)
