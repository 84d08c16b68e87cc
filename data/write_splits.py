"""Lists of labeled and unlabeled images, drawn or taken over from other code: ``prepare_data.py split``."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.datasets import DatasetFiles
from data.splits import count_of, draw_order, hash_of, import_ids, parse_amount, read_indices, write_ids
from utils.errors import UserError


def draw_splits(
    files: DatasetFiles, *, amounts: Sequence[str], seeds: Sequence[int], cover: bool, output: Path
) -> list[str]:
    """Write <output>/<amount>/seed<k>/labeled.txt and unlabeled.txt for every amount and seed; lines that say so.

    Of one seed, fewer labeled images are always among more. cover: every class of the training images is in every
    labeled list. Raises UserError, before anything is written, for an amount that is none or too small to cover.
    """
    ids = files.train_ids()
    files.check_paths(ids, what="training list", labels=False)
    able = [one for one in ids if files.label_path(one).is_file()]  # the others can only be unlabeled
    counts = {amount: count_of(parse_amount(amount), len(able), others=len(able) < len(ids)) for amount in amounts}
    classes = _classes_of(files, able) if cover else None
    lines = []
    orders = {seed: draw_order(able, seed=seed, classes_of=classes) for seed in seeds}
    for seed, (_, needed) in orders.items():
        if short := [amount for amount, count in counts.items() if count < needed]:
            raise UserError(
                f"seed {seed}: {needed} images are needed for every class to be among the labeled ones; "
                f"{', '.join(short)} is {counts[short[0]]}. Take more, another seed, or leave out --cover"
            )
    for amount, count in counts.items():
        for seed, (order, _) in orders.items():
            folder = output / amount.replace("/", "_") / f"seed{seed}"
            about = {"dataset": files.block.name, "labeled": f"{amount} of {len(able)} images", "seed": seed}
            about |= {"classes": "all covered"} if cover else {}
            labeled = set(order[:count])
            lines += _write_both(folder, order[:count], [one for one in ids if one not in labeled], about)
    return lines


def take_names(files: DatasetFiles, path: Path, *, count: int | None, output: Path) -> list[str]:
    """Write <output>/labeled.txt and unlabeled.txt from another code's list of labeled images.

    A pickled array holds indices into the training list, as the release's split files: with ``count`` its first ones
    are labeled. A text file holds ids or paths. Raises UserError for what is not in the training list.
    """
    ids = files.train_ids()
    about: dict[str, object] = {"dataset": files.block.name, "from": path.name}
    with_pickle = path.is_file() and path.read_bytes()[:1] == b"\x80"
    if with_pickle:
        indices = read_indices(path)
        if max(indices) >= len(ids):
            raise UserError(f"{path}: index {max(indices)}, but the training list has {len(ids)} images")
        if count is None and len(indices) == len(ids):
            raise UserError(
                f"{path}: an order of all {len(ids)} training images; say with --count how many are labeled"
            )
        labeled = [ids[index] for index in indices]
    else:
        labeled = import_ids(path, ids, pattern=files.block.images, root=files.root)
    if count is not None and not 0 < count <= len(labeled):
        raise UserError(f"--count {count}: {path} names {len(labeled)} images")
    labeled = labeled[:count]
    files.check_paths(labeled, what=f"images that {path.name} calls labeled", labels=True)
    chosen = set(labeled)
    if len(chosen) == len(ids):
        raise UserError(f"{path}: names all {len(ids)} training images; none would be left for the unlabeled list")
    lines = _write_both(output, labeled, [one for one in ids if one not in chosen], about)
    if with_pickle:
        source = files.block.train or f"{files.block.labeled} and then {files.block.unlabeled}"
        lines.append(f"These were indices into {source} as it is here; with another order they mean other images.")
        if files.block.name == "cityscapes":
            lines.append("The release's follow the order in which its author's disk listed the files: nobody has it.")
    return lines


def _write_both(folder: Path, labeled: Sequence[str], unlabeled: Sequence[str], about: dict[str, object]) -> list[str]:
    state = [
        write_ids(folder / f"{name}.txt", ids, about=about)
        for name, ids in (("labeled", labeled), ("unlabeled", unlabeled))
    ]
    done = "written" if any(state) else "was there already"
    return [f"{folder}: {len(labeled)} labeled (hash {hash_of(labeled)}), {len(unlabeled)} unlabeled, {done}"]


def _classes_of(files: DatasetFiles, ids: Sequence[str]) -> dict[str, frozenset[int]]:
    """id -> the classes in its label map, without ``ignore_label``."""

    def classes(identifier: str) -> frozenset[int]:
        present = np.unique(files.read_classes(identifier)).tolist()
        return frozenset(present) - {files.config.ignore_label}

    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(classes, ids), total=len(ids), unit="label map", disable=None)
        return dict(zip(ids, found, strict=True))
