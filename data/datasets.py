"""Which files a dataset is made of: ids, their image and label paths, and the labeled/unlabeled split."""

import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from glob import escape
from pathlib import Path

import numpy as np

from data.decode import image_size, read_image, read_label
from data.splits import hash_of, read_ids, read_indices
from utils.config import Config, DatasetConfig
from utils.errors import UserError
from utils.randomness import keyed_seed

PROJECT = Path(__file__).resolve().parent.parent
RELEASE_SPLITS = {"pascal_voc": "voc", "cityscapes": "city"}  # the folders of the release's split files


class DatasetFiles:
    """The ids and paths behind a configuration. Raises UserError when a list or file is missing."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.block: DatasetConfig = config.data
        self.root = Path(self.block.root)
        self._lists: dict[str, list[str]] = {}  # read once: a list that changes during a run is not this run's
        if not self.root.is_dir():
            raise UserError(
                f"{self.root}: no such folder for dataset {self.block.name}; "
                "give its place with --data-root DIR or data_root in the config"
            )

    def image_path(self, identifier: str) -> Path:
        return self.root / self.block.images.replace("{id}", identifier)

    def label_path(self, identifier: str) -> Path:
        return self.root / self.block.labels.replace("{id}", identifier)

    def ids(self, split: str) -> list[str]:
        """The ids of "labeled", "unlabeled", "val" or "test", in the order of their list."""
        if split == "labeled":
            return self._labeled
        if split == "unlabeled":
            return self._unlabeled
        source: str | None = getattr(self.block, split)
        if source is None:
            raise UserError(f"dataset {self.block.name} names no {split} list; add dataset.{split} to the config")
        return self._read_ids(source)

    def check_files(self, split: str, *, labels: bool) -> None:
        """Every image of the split, and where asked every label map, exists; UserError names the first that do not."""
        self.check_paths(self.ids(split), what=f"{split} list", labels=labels)

    def check_paths(self, ids: list[str], *, what: str, labels: bool) -> None:
        """As ``check_files``, for any ids; ``what`` names them in the message."""
        paths = [self.image_path(i) for i in ids] + ([self.label_path(i) for i in ids] if labels else [])
        missing = [path for path in paths if not path.is_file()]
        if missing:
            shown = ", ".join(str(path) for path in missing[:3])
            more = " ..." if len(missing) > 3 else ""
            raise UserError(f"{len(missing)} of {len(paths)} files of the {what} are missing: {shown}{more}")

    def read_pair(self, identifier: str) -> tuple[np.ndarray, np.ndarray]:
        """(H,W,3) uint8 RGB image and (H,W) uint8 label map of classes and ``ignore_label``, of one size."""
        return read_image(self.image_path(identifier)), self.read_classes(identifier)

    def read_classes(self, identifier: str) -> np.ndarray:
        """(H,W) uint8 classes and ``ignore_label``. UserError: not the image's size, or other ids."""
        path, size = self.label_path(identifier), image_size(self.image_path(identifier))
        label = read_label(path)
        if label.shape != size:
            raise UserError(
                f"{path}: label map of {label.shape[1]} x {label.shape[0]} "
                f"for an image of {size[1]} x {size[0]} pixels; they must agree"
            )
        if self.label_table is not None:
            return self.label_table[label]
        counts = np.bincount(label.ravel(), minlength=256)
        ignore, classes = self.config.ignore_label, self.config.num_classes
        outside = [index for index in np.flatnonzero(counts) if index >= classes and index != ignore]
        if outside:
            found = ", ".join(f"{index} ({counts[index]} pixels)" for index in outside[:5])
            raise UserError(
                f"{path}: label ids out of range: {found}; expected 0..{classes - 1} or ignore_label {ignore}. "
                "Check the number of classes, ignore_label, or map the ids with dataset.label_ids"
            )
        return label

    def class_shares(self) -> np.ndarray:
        """(C,) float64: the share of each class among the labeled pixels of the labeled images; sums to 1."""
        classes = self.config.num_classes

        def count(identifier: str) -> np.ndarray:
            return np.bincount(self.read_classes(identifier).ravel(), minlength=256)[:classes]

        with ThreadPoolExecutor() as pool:
            counts = sum(pool.map(count, self.ids("labeled")), np.zeros(classes))
        return counts / counts.sum()

    def check_for_training(self) -> None:
        """All files that a run will read are there, and the label maps hold classes."""
        if self.config.training.unlabeled.train_unlabeled:
            self.check_files("unlabeled", labels=False)  # unlabeled images need no label file
        for split in ("labeled", "val"):
            self.check_files(split, labels=True)
            with ThreadPoolExecutor() as pool:
                found = pool.map(lambda i: frozenset(np.unique(self.read_classes(i)).tolist()), self.ids(split))
                classes = frozenset().union(*found) - {self.config.ignore_label}
            if not classes:
                raise UserError(
                    f"the label maps of the {split} list hold nothing but ignore_label; nothing could be learned"
                )
            if split == "labeled" and len(classes) == 1:
                raise UserError(
                    f"the label maps of the labeled list hold class {min(classes)} alone, besides ignore_label "
                    f"{self.config.ignore_label}: nothing to tell apart. Masks of 0 and 255? Use "
                    "dataset.label_ids: [0, 255]"
                )
        self.warn_of_trained_images("val")

    def warn_of_trained_images(self, split: str) -> None:
        """A warning where images of a split that is to judge a model are in its training lists."""
        judged = set(self.ids(split))
        lists = [source for source in (self.block.train, self.block.labeled, self.block.unlabeled) if source]
        alone = not self.config.training.unlabeled.train_unlabeled
        trained = set(self.ids("labeled")) if alone else set().union(*map(self._read_ids, lists))
        if shared := sorted(judged & trained):
            warnings.warn(
                f"{len(shared)} of {len(judged)} {split} images are training images too, for example {shared[0]}: "
                f"{split} scores do not tell how well new images are segmented",
                stacklevel=3,
            )

    def about(self, split: str) -> dict[str, str | int]:
        """Which images a result is about."""
        return {"dataset": self.block.name, "split": split, "split hash": self.split_hash(split)}

    def about_labeled(self) -> dict[str, str | int]:
        """Which images were labeled: part of every checkpoint, because it belongs to the model."""
        return {"labeled": len(self.ids("labeled")), "labeled hash": self.split_hash("labeled")}

    def about_unlabeled(self) -> dict[str, str | int]:
        """Which images a run takes as unlabeled ones: part of its checkpoints, nothing where it takes none."""
        takes = self.config.training.unlabeled.train_unlabeled
        return {"unlabeled hash": self.split_hash("unlabeled")} if takes else {}

    def split_hash(self, split: str = "labeled") -> str:
        """Twelve hex digits that name which images a split holds, whatever their order."""
        return hash_of(self.ids(split))

    @cached_property
    def label_table(self) -> np.ndarray | None:
        """(256,) uint8: id in a label file -> class or ``ignore_label``; None where ids are classes already."""
        if self.block.label_ids is None:
            return None
        table = np.full(256, self.config.ignore_label, dtype=np.uint8)
        table[self.block.label_ids] = np.arange(len(self.block.label_ids), dtype=np.uint8)
        return table

    @cached_property
    def _labeled(self) -> list[str]:
        wanted = self.config.training.data.labeled_samples
        if self.block.labeled is None:
            order = self._train_order
            if wanted is not None and wanted > len(order):
                raise UserError(
                    f"training.data.labeled_samples is {wanted}, but the training list has {len(order)} images"
                )
            return order[:wanted]
        labeled = self._read_ids(self.block.labeled)
        if wanted not in (None, len(labeled)):
            raise UserError(
                f"training.data.labeled_samples is {wanted}, but dataset.labeled {self.block.labeled} has "
                f"{len(labeled)} ids; make them agree, or set training.data.labeled_samples to null"
            )
        return labeled

    @cached_property
    def _unlabeled(self) -> list[str]:
        labeled = set(self._labeled)
        if self.block.unlabeled is not None:
            unlabeled = self._read_ids(self.block.unlabeled)
        else:
            unlabeled = [i for i in (self._train_ids if self.block.labeled else self._train_order) if i not in labeled]
        both = sorted(labeled.intersection(unlabeled))
        if both:
            raise UserError(
                f"{len(both)} ids are in the labeled and the unlabeled list, for example {both[0]}; "
                "remove them from one"
            )
        if not unlabeled:
            raise UserError(
                f"all {len(labeled)} training images are labeled, none is left for the unlabeled terms; set "
                "training.data.labeled_samples to fewer, or set training.unlabeled.train_unlabeled to false"
            )
        return unlabeled

    def train_ids(self) -> list[str]:
        """All training ids, labeled or not, in the order of their list."""
        if self.block.train is not None:
            return self._train_ids
        return self._labeled + (self._unlabeled if self.block.unlabeled is not None else [])

    @cached_property
    def _train_ids(self) -> list[str]:
        if self.block.train is None:
            raise UserError(f"dataset {self.block.name} names no list of unlabeled images; add dataset.unlabeled")
        return self._read_ids(self.block.train)

    @cached_property
    def _train_order(self) -> list[str]:
        """The training ids in the order from which the first ``labeled_samples`` are labeled."""
        index, ids = self.config.training.data.split_id_list, sorted(self._train_ids)
        order = self._split_file_order(index) if index is not None else None
        if order is not None:
            return order
        random.Random(keyed_seed("split", index if index is not None else self.config.seed)).shuffle(ids)
        if self.config.training.data.labeled_samples is not None:
            where = f"splits/{self.block.name}/split_{index}.txt"
            wanted = where if index is not None else "training.data.split_id_list"
            warnings.warn(
                f"no {wanted}: the labeled images are drawn by a seeded permutation of the sorted list "
                f"({self._about_order(ids)})",
                stacklevel=2,
            )
        return ids

    def _split_file_order(self, index: int) -> list[str] | None:
        """The order of splits/<dataset>/split_<index>.txt or .pkl below the data root or this project, if any."""
        ids = self._train_ids
        names = (self.block.name, RELEASE_SPLITS.get(self.block.name, self.block.name))
        folders = [base / "splits" / name for base in (self.root, PROJECT) for name in names]
        for path in (folder / f"split_{index}{kind}" for folder in folders for kind in (".txt", ".pkl")):
            if not path.is_file():
                continue
            if path.suffix == ".txt":
                order = read_ids(path)
                if sorted(order) != sorted(ids):
                    raise UserError(f"{path}: {len(order)} ids that are not the {len(ids)} of the training list")
                return order
            indices = read_indices(path)
            if sorted(indices) != list(range(len(ids))):
                raise UserError(
                    f"{path}: {len(indices)} indices that are no permutation of the {len(ids)} training images"
                )
            order = [ids[place] for place in indices]
            warnings.warn(
                f"{path}: indices into {self.block.train} as it is here ({self._about_order(order)}); they mean other "
                "images where that list has another order",
                stacklevel=2,
            )
            return order
        return None

    def _about_order(self, order: list[str]) -> str:
        count = self.config.training.data.labeled_samples or len(order)
        return f"labeled images: hash {hash_of(order[:count])}"

    def _read_ids(self, source: str) -> list[str]:
        """Ids from a text file below root or this project, or, when ``source`` has a *, from the images that exist."""
        if source in self._lists:
            return self._lists[source]
        if "*" in source:
            if ".." in source.split("/"):
                raise UserError(f"{source}: a pattern is matched below {self.root} and must not leave it")
            before, after = self.block.images.split("{id}")[:2]
            try:
                paths = list(self.root.glob(f"{escape(before)}{source}{escape(after)}"))
            except (NotImplementedError, ValueError) as error:
                raise UserError(f"{before}{source}{after}: no pattern of files below {self.root} ({error})") from None
            found = sorted(path.relative_to(self.root).as_posix() for path in paths)
            ids = [name[len(before) : len(name) - len(after)] for name in found]
            what = f"{self.root / (before + source + after)} matches no image"
        else:
            path = next((p for p in (self.root / source, PROJECT / source) if p.is_file()), self.root / source)
            ids, what = read_ids(path), f"{path} is empty"
        if not ids:
            raise UserError(f"{what}; expected at least one")
        self._lists[source] = ids
        return ids
