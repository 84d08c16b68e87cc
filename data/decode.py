"""Image and label files -> arrays, refusing what is damaged or not what it seems."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from utils.errors import UserError

IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
MAX_PIXELS = 100_000_000  # refused from the header: nobody labels such images, but a small file can claim to be one


def read_image(path: Path, *, upright: bool = False) -> np.ndarray:
    """(H,W,3) uint8 RGB. Raises UserError with the path when the file is missing or damaged.

    upright: turned as its EXIF orientation says, as viewers show it, not as it is stored, which label maps fit.
    """
    with _open(path) as image:  # of a file of several, the first
        if (bits := bits_per_channel(image)) > 8:  # Pillow would clip them, or keep the high byte of each alone
            raise UserError(f"{path}: an image of mode {image.mode}, {bits} bits a channel; convert it to 8 bits")
        decoded = _decode(image, path, "RGB")
        if upright:
            with suppress(Exception):  # damaged EXIF data can raise anything, and viewers show such an image as stored
                decoded = ImageOps.exif_transpose(decoded)
        return np.array(decoded)


def read_label(path: Path) -> np.ndarray:
    """(H,W) uint8 ids as stored in a gray or palette PNG (VOC's own files are palette PNGs), also of 2 or 4 bits."""
    with _open(path, formats=("PNG",)) as image:  # a JPEG's losses would change ids
        if image.mode not in ("P", "L"):
            raise UserError(
                f"{path}: a label map must be an 8-bit gray or palette PNG holding class ids, found mode {image.mode}; "
                "convert its colors to ids first"
            )
        bits = bits_per_channel(image)
        ids = np.array(_decode(image, path, image.mode))
        return ids // (255 // (2**bits - 1)) if image.mode == "L" and bits < 8 else ids  # which Pillow had spread


def bits_per_channel(image: ImageFile.ImageFile) -> int:
    """Of an image that was opened, but not decoded; 8 where the mode tells nothing else."""
    if image.format == "PNG" and image.fp is not None:
        place = image.fp.tell()
        image.fp.seek(24)  # behind signature, length and name of the first chunk, width and height
        bits = image.fp.read(1)[0]
        image.fp.seek(place)
        return int(bits)
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITSPERSAMPLE, ()), default=8)
    return {"I": 32, "F": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header alone."""
    with _open(path) as image:
        return image.height, image.width


def _open(path: Path, *, formats: tuple[str, ...] = IMAGE_FORMATS) -> ImageFile.ImageFile:
    try:
        image = Image.open(path, formats=formats)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but a list names it") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable {', '.join(formats)} file ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UserError(f"{path}: {image.width} x {image.height} pixels; refused above {MAX_PIXELS:,}")
    return image


def _decode(image: Image.Image, path: Path, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: damaged image data ({error}); fetch the file again") from None
