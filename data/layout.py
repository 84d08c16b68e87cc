"""Which folders below a root hold the images and the label maps, and how their names pair up."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from data.decode import IMAGE_ENDINGS
from data.photos import find_files
from utils.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Where images and label maps lie below a root: patterns with {id}, ids with both, and ids with an image alone.

    left_out: photographs, as paths below the root, that the patterns do not name. also: patterns of other label maps
    that fit these images as well.
    """

    images: str
    labels: str
    pairs: list[str]
    alone: list[str]
    left_out: Sequence[str] = ()
    also: Sequence[str] = ()


def find_layout(root: Path) -> Layout:
    """The images and label maps below a folder that pair up best."""
    photos, masks = _families(root)
    candidates = [
        layout
        for photo_place, photo_ids in _large(photos).items()
        for mask_place, mask_ids in _large(masks).items()
        if (layout := _pair(photo_place, photo_ids, mask_place, mask_ids)) is not None
    ]
    if not candidates:
        raise UserError(_why_no_pairs(root, photos, masks))
    # VOC keeps maps of objects beside those of classes.
    best = max(candidates, key=lambda one: (len(one.pairs), "object" not in one.labels.lower(), one.images))
    alike = {one.labels for one in candidates if one.images == best.images and len(one.pairs) == len(best.pairs)}
    taken = {best.images.replace("{id}", one) for one in best.pairs + best.alone}
    all_photos = (one + ending for (folder, ending), ids in photos.items() if not folder for one in ids)
    left_out = sorted(set(all_photos) - taken)
    return replace(best, left_out=left_out, also=sorted(alike - {best.labels}))


Place = tuple[str, str]  # (folder below root, "" for root itself; file ending)


def _families(root: Path) -> tuple[dict[Place, list[str]], dict[Place, list[str]]]:
    """Photographs and label maps: place -> ids below it. Each file counts for every folder above it."""
    folders: dict[Place, list[str]] = {}
    for path in find_files(root):
        here = path.parent.relative_to(root).as_posix()
        folders.setdefault((here, path.suffix), []).append(path.name.removesuffix(path.suffix))
    photos: dict[Place, list[str]] = {}
    masks: dict[Place, list[str]] = {}
    for (folder, ending), stems in folders.items():
        kind = masks if _holds_masks(root, folder, ending, stems) else photos
        parts = [part for part in folder.split("/") if part != "."]
        for depth in range(len(parts) + 1):
            above, below_it = "/".join(parts[:depth]), "/".join(parts[depth:])
            ids = (f"{below_it}/{stem}" if below_it else stem for stem in stems)
            kind.setdefault((above, ending), []).extend(ids)
    return photos, masks


def _large(places: dict[Place, list[str]]) -> dict[Place, list[str]]:
    """Without places that hold less than a tenth of the files: one of many folders of a kind is no dataset."""
    most = max(map(len, places.values()), default=0)
    return {place: ids for place, ids in places.items() if 10 * len(ids) >= most}


def _holds_masks(root: Path, folder: str, ending: str, stems: list[str]) -> bool:
    """Whether files look like label maps: 8-bit gray or palette PNGs of few values."""
    if ending.lower() != ".png":
        return False
    chosen = sorted(stems)[:: max(1, len(stems) // 5)][:5]
    few = 0
    for stem in chosen:
        try:
            with Image.open(root / folder / f"{stem}{ending}", formats=("PNG",)) as image:
                if image.mode not in ("P", "L") or image.width * image.height > 10**8:
                    continue
                few += image.mode == "P" or len(np.unique(np.asarray(image))) <= 40
        except (OSError, SyntaxError, ValueError):
            continue
    return 2 * few > len(chosen)


def _pair(photo_place: Place, photo_ids: list[str], mask_place: Place, mask_ids: list[str]) -> Layout | None:
    """Ids that both places share, where at most the ends of the names differ, as in 1_rgb.png and 1_mask.png."""
    ends = _name_ends(photo_ids, mask_ids)
    with_mask = {one.removesuffix(ends[1]) for one in mask_ids if one.endswith(ends[1])}
    with_photo = sorted(one.removesuffix(ends[0]) for one in photo_ids if one.endswith(ends[0]))
    pairs = [one for one in with_photo if one in with_mask]
    if not pairs:
        return None
    images, labels = (
        f"{folder}/{{id}}{end}{ending}" if folder else f"{{id}}{end}{ending}"
        for (folder, ending), end in zip((photo_place, mask_place), ends, strict=True)
    )
    return Layout(images, labels, pairs, [one for one in with_photo if one not in with_mask])


def _name_ends(photo_ids: list[str], mask_ids: list[str]) -> tuple[str, str]:
    """What most often follows the common beginning of a photograph's id and a label map's: ("", "") if they agree."""
    masks = sorted(mask_ids)
    if set(photo_ids) & set(masks):
        return "", ""
    votes: Counter[tuple[str, str]] = Counter()
    for photo in sorted(photo_ids)[:: max(1, len(photo_ids) // 50)]:
        for mask in masks[:2000]:
            common = next((i for i, (a, b) in enumerate(zip(photo, mask, strict=False)) if a != b), len(photo))
            start = re.split(r"[_\-. ]*$", photo[:common])[0]
            ends = photo[len(start) :], mask[len(start) :]
            if start and not start.endswith("/") and not any(end[:1].isalnum() for end in ends):
                votes[ends] += 1
    return votes.most_common(1)[0][0] if votes else ("", "")


def _why_no_pairs(root: Path, photos: dict[Place, list[str]], masks: dict[Place, list[str]]) -> str:
    def count(places: dict[Place, list[str]]) -> int:
        return sum(len(ids) for (folder, _), ids in places.items() if not folder)

    if not count(photos) and count(masks):
        return (
            f"{root}: no photographs: the {count(masks)} PNGs here are gray or palette images of few values, which are "
            "taken for label maps. Store photographs as JPEG, or as RGB PNGs"
        )
    if not count(photos):
        return f"{root}: no photographs ({', '.join(IMAGE_ENDINGS)}) below this folder"
    if not count(masks):
        colored = _colored(root, photos)
        return (
            f"{root}: {count(photos)} images, but no label maps: 8-bit gray or palette PNGs of class ids. "
            f"{f'Are these some? {colored}. ' if colored else ''}Colored (RGB), 16-bit, JPEG or TIFF ones must be "
            "converted to class ids first, as docs/datasets.md shows; beside PNG images they need a folder of their own"
        )
    composed = [
        {unicodedata.normalize("NFC", PurePosixPath(one).name) for ids in places.values() for one in ids}
        for places in (photos, masks)
    ]
    if composed[0] & composed[1]:
        return (
            f"{root}: the names of photographs and label maps agree for the eye alone: their accents have two Unicode "
            "forms (NFC and NFD, which macOS writes). Rename one kind, for example with convmv --nfc"
        )
    return (
        f"{root}: {count(photos)} photographs and {count(masks)} label maps, but no names that agree. Expected for "
        "example images/train/1.jpg with masks/train/1.png or 1_mask.png: one folder for images, one for label maps"
    )


def _colored(root: Path, photos: dict[Place, list[str]]) -> str:
    """What the PNGs of the folder that holds most of them are like, where other images are not PNGs."""
    found = [(len(ids), folder) for (folder, ending), ids in photos.items() if ending.lower() == ".png" and folder]
    if not found or all(ending.lower() == ".png" for _, ending in photos):
        return ""
    _, folder = max(found)
    modes: dict[str, list[str]] = {}
    for path in sorted((root / folder).rglob("*.png")):
        try:
            with Image.open(path, formats=("PNG",)) as image:
                modes.setdefault(image.mode, []).append(path.relative_to(root).as_posix())
        except (OSError, SyntaxError, ValueError):
            modes.setdefault("damaged", []).append(path.relative_to(root).as_posix())
    return "; ".join(f"{mode}: {len(names)} in {folder}, for example {names[0]}" for mode, names in modes.items())
