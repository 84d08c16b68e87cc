"""Joint geometry of an image and its label map: resize, random scale, crop with padding, flip."""

import cv2
import numpy as np

from utils.config import DataConfig, parse_size

PAD_COLOR = (124, 116, 104)  # mean RGB of ImageNet: close to 0 after any network's normalization


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H,W,3) or (H,W) uint8 -> (height, width) = size; images smoothly (by area when shrinking), labels by nearest."""
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0] and width < image.shape[1]
    smooth = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=smooth if image.ndim == 3 else cv2.INTER_NEAREST_EXACT)


def random_crop(
    image: np.ndarray, label: np.ndarray, *, data: DataConfig, ignore_label: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training crop of size ``data.input_size``.

    image: (H,W,3) uint8; label: (H,W) uint8. What does not reach the crop's size is padded at the right and the
    bottom, before it is mirrored: image with the mean color, label with ``ignore_label``. Returns image, label and
    valid, a bool map that is False on padding. Every draw is made whether it is used or not, so that switching one off
    leaves the others alone.
    """
    factor, top_share, left_share, mirror = rng.uniform(*data.scale_range), rng.random(), rng.random(), rng.random()
    if data.scale:
        size = (max(1, round(image.shape[0] * factor)), max(1, round(image.shape[1] * factor)))
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        label = resize(label, size)
    height, width = parse_size(data.input_size)
    spare_rows, spare_columns = max(0, image.shape[0] - height), max(0, image.shape[1] - width)
    top = int(top_share * (spare_rows + 1)) if data.crop else spare_rows // 2
    left = int(left_share * (spare_columns + 1)) if data.crop else spare_columns // 2
    flip = data.flip and mirror < 0.5

    def cut(array: np.ndarray, padding: int | tuple[int, ...]) -> np.ndarray:
        array = array[top : top + height, left : left + width]
        below, right = height - array.shape[0], width - array.shape[1]
        if below or right:
            array = cv2.copyMakeBorder(array, 0, below, 0, right, cv2.BORDER_CONSTANT, value=padding)
        return np.ascontiguousarray(array[:, ::-1]) if flip else array

    valid = cut(np.ones(image.shape[:2], dtype=np.uint8), 0).astype(bool)
    return cut(image, PAD_COLOR), cut(label, ignore_label), valid
