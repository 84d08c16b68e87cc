"""Files like a camera's, made on the fly: smooth at every scale, grainy, and about as large when compressed."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image


def write_dataset(
    root: Path, *, images: int, size: tuple[int, int], classes: int, kind: str, grain: float
) -> dict[str, Any]:
    """Write images and label maps; return the values of a configuration's ``dataset``, every list holding all images.

    Args:
        kind: "jpg" or "png".
        grain: standard deviation of the noise, in gray levels; the compressed size grows with it.
    """
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    names = [f"{index:04d}" for index in range(images)]
    for index, name in enumerate(names):
        rng = np.random.default_rng([0, index])
        options = {"quality": 92} if kind == "jpg" else {}
        Image.fromarray(photograph(*size, grain=grain, rng=rng)).save(root / "images" / f"{name}.{kind}", **options)
        Image.fromarray(label_map(*size, classes=classes, rng=rng)).save(root / "labels" / f"{name}.png")
    (root / "all.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return {
        "name": "generated", "root": str(root), "images": f"images/{{id}}.{kind}", "labels": "labels/{id}.png",
        "train": "all.txt", "labeled": "all.txt", "val": "all.txt", "num_classes": classes,
    }  # fmt: skip


def mean_bytes(root: Path) -> float:
    """Mean size of the files below a folder."""
    sizes = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
    return sum(sizes) / len(sizes)


def photograph(height: int, width: int, *, grain: float, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8: noise of ever finer patches, each fainter than the one before, and grain."""
    image = np.full((height, width, 3), 120, np.float32)
    patch = float(max(height, width))
    while patch >= 4:
        coarse = (int(height / patch) + 2, int(width / patch) + 2)
        gray, color = rng.normal(0, 1, (*coarse, 1)), rng.normal(0, 0.3, (*coarse, 3))
        contrast = 40 * (patch / max(height, width)) ** 0.5
        image += contrast * _enlarge((gray + color).astype(np.float32), height, width)
        patch /= 2
    image += rng.normal(0, grain, (height, width, 1)).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def label_map(height: int, width: int, *, classes: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width) uint8: regions of about an eighth of the image, each the class whose smooth noise is highest."""
    noise = rng.normal(0, 1, (8, 8, classes)).astype(np.float32)
    small = np.stack([_enlarge(noise[..., index], height // 4, width // 4) for index in range(classes)])
    label = small.argmax(axis=0).astype(np.uint8)
    return np.asarray(cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def _enlarge(noise: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
