"""A generated toy dataset in VOC layout: nothing to download, and small enough for a CPU.

Four classes are known by their outline (disc, square, triangle, ring), two by their texture (stripes, checker); colour,
size, rotation, lighting and clutter are random, so colour says nothing about the class. A network needs many pictures to
learn that, which is what makes a few labeled ones too few and the unlabeled ones useful.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("background", "disc", "triangle", "ring", "stripes", "checker", "dots")
IGNORE_LABEL = 255
# A change to the pictures must change this number: folders made by an older version are then made again.
VERSION = 1
MANIFEST = "demo.json"

_SPLITS = ("labeled", "unlabeled", "val")
_OWN_FILE = re.compile(
    r"(JPEGImages|SegmentationClassAug)(/(labeled|unlabeled|val)_\d+\.(jpg|png))?|ImageSets(/Segmentation(/\w+\.txt)?)?"
    r"|splits(/\w+\.txt)?|classes\.json|demo\.json"
)
_SCALE = 3  # pictures are drawn this many times larger, then averaged down: smooth edges
_TEXTURES = ("stripes", "checker", "dots")  # these classes have any outline
_FILLS = ("plain", "plain")  # of the outline classes; never the texture of another class

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def make_demo_dataset(
    root: Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (96, 96),
    labeled: int = 16,
    unlabeled: int = 288,
    val: int = 100,
) -> Path:
    """Make the dataset under `root`, unless the same one is already there, and return `root`.

    The label files of unlabeled images exist too, for analysis only. The folder appears in one step when everything
    is written, so a run that is cut short leaves no half-made dataset.

    Args:
        root: dataset folder. One that holds a different or damaged demo dataset is replaced; foreign files are an error.
        seed: the same seed gives the same pictures, whatever the counts of the splits.
        size: height, width in pixels.
        labeled, unlabeled, val: number of images of each split.
    """
    if labeled < len(CLASSES) - 1:
        raise ValueError(
            f"labeled is {labeled}; it must be at least {len(CLASSES) - 1}, so that every class occurs in the labeled images"
        )
    root = Path(root)
    counts = {"labeled": labeled, "unlabeled": unlabeled, "val": val}
    parameters = {"version": VERSION, "seed": seed, "size": list(size), **counts}
    if _is_complete(root, parameters):
        return root
    foreign = [p for p in root.rglob("*") if not _OWN_FILE.fullmatch(p.relative_to(root).as_posix())]
    if foreign:
        raise ValueError(
            f"{root} holds files that are not of the demo dataset, such as {foreign[0]}; name another folder"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        made = Path(folder) / root.name
        _write_dataset(made, seed=seed, size=size, counts=counts)
        manifest = {"parameters": parameters, "sha256": _content_hash(made)}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if root.exists():
            shutil.rmtree(root)
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
    objects = np.zeros(size, np.uint8)  # 0: background, k: the k-th object painted
    # The first and front-most object's class goes through all classes, so that each is seen in a short list.
    count = int(rng.integers(2, 6))
    classes = [1 + index % (len(CLASSES) - 1), *rng.integers(1, len(CLASSES), count - 1).tolist()]
    light = rng.uniform(0, 2 * np.pi)
    painted = _layout(classes, height, width, rng)[::-1]
    for number, (class_id, mask) in enumerate(painted, start=1):
        _paint(canvas, mask, _shade(class_id, mask, light), light, _surface(class_id, height, width, rng), rng)
        objects[cv2.resize(mask, size[::-1], interpolation=cv2.INTER_AREA) >= 128] = number
    image = cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA)
    label = np.array([0, *(class_id for class_id, _ in painted)], np.uint8)[objects]
    window = np.ones((2, 2), np.uint8)  # as in VOC, a thin line between any two objects has no class
    label[cv2.dilate(objects, window) != cv2.erode(objects, window)] = IGNORE_LABEL
    return _photograph(image, rng), label


def voc_palette(count: int = 256) -> NDArray[np.uint8]:
    """Return the colours of VOC's label files, (count, 3) uint8: the bits of the id dealt to red, green, blue in turn."""
    ids = np.arange(count)[:, None]
    colours = np.zeros((count, 3), np.int64)
    for bit in range(8):
        colours |= ((ids >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def _is_complete(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether `root` holds exactly the dataset of these parameters, no file missing or changed."""
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(manifest == {"parameters": parameters, "sha256": _content_hash(root)})


def _content_hash(root: Path) -> str:
    """SHA-256 over the names and bytes of all files but the manifest."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _write_dataset(root: Path, *, seed: int, size: tuple[int, int], counts: dict[str, int]) -> None:
    """Write pictures, labels, lists and class names, all but the manifest."""
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation", "splits"):
        (root / folder).mkdir(parents=True)
    palette = voc_palette()
    ids = {split: [f"{split}_{i:04d}" for i in range(count)] for split, count in counts.items()}
    for split, names in ids.items():
        for index, name in enumerate(names):
            image, label = draw_example(seed=seed, split=split, index=index, size=size)
            Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
            label_file = Image.fromarray(label)
            label_file.putpalette(palette.tobytes())
            label_file.save(root / "SegmentationClassAug" / f"{name}.png")
    _write_list(root / "ImageSets/Segmentation/train.txt", ids["labeled"] + ids["unlabeled"])
    _write_list(root / "ImageSets/Segmentation/val.txt", ids["val"])
    _write_list(root / "splits/labeled.txt", ids["labeled"])
    _write_list(root / "splits/unlabeled.txt", ids["unlabeled"])
    classes = {"names": list(CLASSES), "palette": palette[: len(CLASSES)].tolist()}
    (root / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")


def _write_list(path: Path, names: Iterable[str]) -> None:
    path.write_text("".join(f"{name}\n" for name in names))


def _layout(classes: list[int], height: int, width: int, rng: np.random.Generator) -> list[tuple[int, Bytes]]:
    """Place the objects, front first: (class id, mask (height, width) uint8, 255 inside).

    An object that would show less than half of itself is placed again, then dropped: it could not be recognised.
    """
    placed: list[tuple[int, Bytes]] = []
    covered = np.zeros((height, width), bool)
    for class_id in classes:
        for _ in range(12):
            contours = _contours(class_id, rng)
            radius = min(height, width) * rng.uniform(0.16, 0.32)
            centre = rng.uniform(0.12, 0.88, 2) * (width, height)
            mask = np.zeros((height, width), np.uint8)
            points = [np.rint((c * radius + centre) * 16).astype(np.int32) for c in contours]
            cv2.fillPoly(mask, points, 255, lineType=cv2.LINE_AA, shift=4)
            area = sum(abs(cv2.contourArea(p.astype(np.float32) / 16)) * (-1) ** i for i, p in enumerate(points))
            if np.count_nonzero((mask > 127) & ~covered) > 0.7 * area:
                placed.append((class_id, mask))
                covered |= mask > 127
                break
    return placed


def _contours(class_id: int, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Outlines of a randomly turned and squeezed object of about unit radius, (N, 2) x, y; a second one is a hole."""
    name = CLASSES[class_id]
    corners = 3 if name == "triangle" else 72
    angle = np.arange(corners) * (2 * np.pi / corners)
    radius = np.full(corners, 1.25 if name == "triangle" else 1.0)
    if name in _TEXTURES:  # a smooth blob of any form
        for wave in (2, 3, 4):
            radius = radius + rng.uniform(0.05, 0.2) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    turn, lean = rng.uniform(0, 2 * np.pi, 2)
    squeeze = _rotation(lean) @ np.diag([1, rng.uniform(0.75, 1)]) @ _rotation(-lean)
    points = points @ (_rotation(turn).T @ squeeze)
    return [points, points * rng.uniform(0.45, 0.65)] if name == "ring" else [points]


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _noise(height: int, width: int, grain: float, rng: np.random.Generator) -> Floats:
    """Smooth noise in 0..1, (height, width); `grain` is the size of a patch in pixels of the canvas."""
    rows, columns = int(height / grain) + 2, int(width / grain) + 2
    coarse = rng.random((rows, columns), np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1).astype(np.float32)


def _colour(
    rng: np.random.Generator, *, hue: float | None = None, value: tuple[float, float], vivid: tuple[float, float]
) -> Floats:
    """A colour of any hue, (3,) float32 in 0..255; brightness and saturation (`vivid`) between the bounds."""
    hue, saturation, brightness = rng.uniform(0, 6) if hue is None else hue, rng.uniform(*vivid), rng.uniform(*value)
    wheel = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return np.asarray(255 * brightness * (1 - saturation + saturation * wheel), np.float32)


def _surface(class_id: int, height: int, width: int, rng: np.random.Generator) -> Floats:
    """The coloured texture of an object over the whole canvas, (height, width, 3)."""
    name = CLASSES[class_id]
    kind = name if name in _TEXTURES else _FILLS[rng.integers(len(_FILLS))]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = np.tensordot(_rotation(rng.uniform(0, 2 * np.pi)), [x, y], 1) * (2 * np.pi / (_SCALE * rng.uniform(9, 18)))
    wave: Any = {
        "stripes": lambda: np.sin(u),
        "checker": lambda: np.sin(u) * np.sin(v) * 1.6,
        "dots": lambda: np.cos(u) + np.cos(v) - 0.7,
        "speckle": lambda: _noise(height, width, _SCALE * 1.6, rng) * 2 - 1,
        "blotches": lambda: _noise(height, width, _SCALE * 9, rng) * 2 - 1,
        "plain": lambda: x,
    }[kind]()
    share = np.clip(0.5 + 2.5 * wave, 0, 1)[..., None]
    hue = rng.uniform(0, 6)
    dark = _colour(rng, hue=hue, value=(0.3, 0.65), vivid=(0.6, 0.95))
    light = _colour(rng, hue=hue + rng.uniform(-0.5, 0.5), value=(0.85, 1.0), vivid=(0.1, 0.45))
    if kind == "plain":
        return np.ones((height, width, 3), np.float32) * _colour(rng, hue=hue, value=(0.6, 1.0), vivid=(0.35, 0.9))
    return np.asarray(dark * (1 - share) + light * share, np.float32)


def _background(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Two blended colours, fine grain and clutter (lines, arcs, specks) that belongs to no class; (height, width, 3)."""
    blend = _noise(height, width, rng.uniform(0.2, 0.7) * width, rng)[..., None]
    one, other = (_colour(rng, value=(0.35, 0.8), vivid=(0.05, 0.3)) for _ in range(2))
    canvas = one * blend + other * (1 - blend)
    canvas = canvas * (0.85 + 0.3 * _noise(height, width, _SCALE * rng.uniform(1.5, 8), rng)[..., None])
    canvas = np.ascontiguousarray(canvas, np.float32)
    for _ in range(int(rng.integers(3, 11))):
        colour = tuple(float(c) for c in _colour(rng, value=(0.2, 1.0), vivid=(0.1, 0.7)))
        x, y, x2, y2 = (rng.random(4) * (width, height, width, height)).astype(int).tolist()
        kind, thickness = int(rng.integers(3)), int(rng.integers(1, 2 * _SCALE))
        if kind == 0:
            cv2.line(canvas, (x, y), (x2, y2), colour, thickness)
        elif kind == 1:
            start = int(rng.integers(360))
            axes = (1 + abs(x2 - x) // 2, 1 + abs(y2 - y) // 2)
            cv2.ellipse(canvas, (x, y), axes, 0, start, start + int(rng.integers(40, 150)), colour, thickness)
        else:
            cv2.circle(canvas, (x, y), thickness, colour, -1)
    return canvas


def _shade(class_id: int, mask: Bytes, angle: float) -> Floats:
    """Light from one side on an object's relief, (height, width) around 1.

    A disc is a ball, a ring a tube, a triangle a pyramid; the others are flat with a worn edge.
    """
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5).astype(np.float32)
    name = CLASSES[class_id]
    top = depth.max() if name not in _TEXTURES else 2.0 * _SCALE
    if name == "triangle":
        height = depth * 1.0
    else:
        height = top * np.sqrt(1 - (1 - np.clip(depth / top, 0, 1)) ** 2) * 0.8
    height = cv2.GaussianBlur(height, (0, 0), 0.6 * _SCALE)
    slope_y, slope_x = np.gradient(height)
    facing = (1 - slope_x * np.cos(angle) - slope_y * np.sin(angle)) / np.sqrt(2 * (1 + slope_x**2 + slope_y**2))
    return np.asarray(0.45 + 0.8 * np.clip(facing, 0, 1), np.float32)


def _paint(canvas: Floats, mask: Bytes, shade: Floats, angle: float, surface: Floats, rng: np.random.Generator) -> None:
    """Lay an object with a soft shadow and shading from one side on the canvas, in place."""
    height, width = mask.shape
    shift = np.array([[1, 0, -np.cos(angle) * 2 * _SCALE], [0, 1, -np.sin(angle) * 2 * _SCALE]], np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(mask, shift, (width, height)), (0, 0), 1.5 * _SCALE)
    canvas *= 1 - (shadow[..., None] / 255.0) * rng.uniform(0.2, 0.5)
    alpha = mask[..., None] / 255.0
    canvas[:] = canvas * (1 - alpha) + np.clip(surface * shade[..., None], 0, 255) * alpha


def _photograph(image: Floats, rng: np.random.Generator) -> Bytes:
    """Uneven light, a colour cast, contrast and sensor noise; (H, W, 3) float32 to uint8."""
    height, width = image.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0, 0.3) * (np.cos(angle) * x + np.sin(angle) * y)
    image = image * light[..., None] * rng.uniform(0.85, 1.15, 3)
    image = (image - 128) * rng.uniform(0.75, 1.1) + 128 + rng.uniform(-15, 15)
    image = image + rng.normal(0, rng.uniform(1, 6), image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
