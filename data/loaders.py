"""Streams of training crops and of whole evaluation images.

Which image and which crop come at a step depends on (seed, stream, step, place in the batch) alone, not on the number
of loading processes or on where a run was resumed.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.cache import DiskCache
from data.datasets import DatasetFiles
from data.decode import read_image
from data.transforms import random_crop, resize
from utils.batch import Batch
from utils.config import Config, DataConfig, parse_size
from utils.distributed import ALONE, World, part_size
from utils.errors import StorageError, UserError, loader_errors
from utils.randomness import keyed_seed

Item = TypeVar("Item")
SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
SUBSTITUTES = 10  # images tried in place of a damaged one


class EvaluationImage(NamedTuple):
    """image: (3,H,W) uint8 RGB at the network's input size; label: (h,w) int64 at the size that counts."""

    image: Tensor
    label: Tensor
    id: str


class Loader(Generic[Item]):
    """A DataLoader whose samples' UserErrors reach the caller as they are, also from a worker process."""

    def __init__(
        self,
        dataset: "Dataset[Any]",
        indices: Sequence[int],
        collate: Callable[[list[Any]], Item],
        *,
        timeout: float,
        **options: Any,
    ) -> None:
        workers = options.get("num_workers", 0)
        options["timeout"] = timeout if workers else 0
        self.loader = DataLoader(
            dataset,
            sampler=indices,
            collate_fn=_Collate(collate),
            worker_init_fn=_start_worker if workers else None,
            **options,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Item]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # workers inherit it, see _start_worker
        try:
            iterator = iter(self.loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            with loader_errors():
                for item in iterator:
                    if isinstance(item, UserError):
                        raise item
                    yield item
        finally:  # at once, not when the iterator happens to be collected: its workers hear no signal
            getattr(iterator, "_shutdown_workers", lambda: None)()
            for worker in getattr(iterator, "_workers", ()):
                worker.kill()  # one that hangs in a read hears nothing else


class TrainingCrops(Dataset[Batch | UserError]):
    """Position p of a stream without end -> one crop: image p mod n of the p // n-th shuffled pass over the ids."""

    def __init__(self, files: DatasetFiles, stream: str) -> None:
        self.files, self.stream = files, stream
        self.ids = sorted(files.ids(stream))  # in whatever order a list has them, it is the same run
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self.resize = parse_size(files.block.resize) if files.block.resize else None
        data, config = files.config.training.data, files.config
        if data.cache == "disk":
            classes = (files.block.label_ids, config.num_classes, config.ignore_label)
            self.images: DiskCache | None = DiskCache(Path(data.cache_dir), repr(self.resize))
            self.labels: DiskCache | None = DiskCache(Path(data.cache_dir), repr((self.resize, classes)))
        else:
            self.images = self.labels = None

    def id_at(self, position: int) -> str:
        """The image at a position of the stream."""
        epoch, place = divmod(position, len(self.ids))
        if epoch != self._epoch:
            rng = np.random.default_rng(keyed_seed(self.files.config.seed, self.stream, "order", epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self.ids))
        return self.ids[self._order[place]]

    def __getitem__(self, position: int) -> Batch | UserError:
        identifier = self.id_at(position)
        try:
            return self._crop(position, identifier)
        except UserError as error:  # a value, so that no worker's traceback is wrapped around it
            skip = self.files.config.training.data.bad_sample == "skip" and not isinstance(error, StorageError)
            return self._substitute(position, error) if skip else error

    def _kept(self, cache: DiskCache | None, path: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        """What ``read`` makes of a file, at the dataset's ``resize``."""

        def make() -> np.ndarray:
            array = read(path)
            return resize(array, self.resize) if self.resize else array

        return cache.get(path, make) if cache is not None else make()

    def _substitute(self, position: int, error: UserError) -> Batch | UserError:
        """The same crop of another image, drawn by the position alone; the error if ten in a row are damaged too."""
        rng = np.random.default_rng(keyed_seed(self.files.config.seed, self.stream, "substitute", position))
        messages = [str(error)]
        for other in rng.integers(len(self.ids), size=SUBSTITUTES):
            try:
                return self._crop(position, self.ids[other])._replace(bad=tuple(messages))
            except StorageError as full:
                return full
            except UserError as again:
                messages.append(str(again))
        return error

    def _crop(self, position: int, identifier: str) -> Batch:
        config, files = self.files.config, self.files
        image = self._kept(self.images, files.image_path(identifier), read_image)
        rng = np.random.default_rng(keyed_seed(config.seed, self.stream, "crop", position))
        if self.stream == "labeled":
            label = self._label(identifier)
            return _crop_batch(image, label, config.training.data, rng=rng, identifier=identifier, files=files)
        nothing = np.full(image.shape[:2], config.ignore_label, dtype=np.uint8)
        if not config.training.data.hidden_labels:
            return _crop_batch(image, nothing, config.training.data, rng=rng, identifier=identifier, files=files)
        try:
            label = self._label(identifier) if files.label_path(identifier).is_file() else nothing
        except StorageError:
            raise
        except UserError:  # nobody promised that it is a label map
            label = nothing
        label = label if label.shape == nothing.shape else nothing
        crop = _crop_batch(image, label, config.training.data, rng=rng, identifier=identifier, files=files)
        return crop._replace(labels=torch.full_like(crop.labels, config.ignore_label), hidden=crop.labels)

    def _label(self, identifier: str) -> np.ndarray:
        path = self.files.label_path(identifier)
        return self._kept(self.labels, path, lambda _: self.files.read_classes(identifier))


class EvaluationImages(Dataset[EvaluationImage | UserError]):
    """Whole images of a split with their label maps."""

    def __init__(self, files: DatasetFiles, split: str, protocol: str) -> None:
        self.files, self.ids = files, files.ids(split)
        release = files.block.release_protocol if protocol == "release" else None
        self.label_size = parse_size(release.resize) if release and release.resize else None
        wanted = (release and release.resize) or files.block.resize
        self.image_size = parse_size(wanted) if wanted else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> EvaluationImage | UserError:
        try:
            image, label = self.files.read_pair(self.ids[index])
        except UserError as error:
            return error
        image = resize(image, self.image_size) if self.image_size else image
        label = resize(label, self.label_size) if self.label_size else label
        return EvaluationImage(_to_tensor(image), torch.from_numpy(label).long(), self.ids[index])

    def first(self, count: int) -> list[EvaluationImage]:
        """The first images of the list. Raises UserError for a damaged one."""
        items = [self[index] for index in range(min(count, len(self)))]
        for item in items:
            if isinstance(item, UserError):
                raise item
        return [item for item in items if isinstance(item, EvaluationImage)]


class Positions(Sequence[int]):
    """The positions of a stream that a process trains on: its part of every step's batch, step after step."""

    def __init__(self, steps: range, batch_size: int, here: World) -> None:
        self.steps, self.batch_size = steps, batch_size
        self.own = range(here.rank * batch_size // here.size, (here.rank + 1) * batch_size // here.size)

    def __len__(self) -> int:
        return len(self.steps) * len(self.own)

    def __getitem__(self, index: Any) -> Any:
        step, place = divmod(range(len(self))[index], len(self.own))
        return self.steps[step] * self.batch_size + self.own[place]


def training_loader(
    files: DatasetFiles, stream: str, *, start_step: int, here: World = ALONE, pin: bool = False
) -> Loader[Batch]:
    """Parts of batches of "labeled" or "unlabeled" crops for the steps from ``start_step`` to the last.

    A step's part of a process is ``training.accumulation`` batches; in a run of one process without accumulation, one.
    pin: into memory from which a GPU copies while the host goes on; takes a GPU's memory itself.
    """
    training = files.config.training
    return Loader(
        TrainingCrops(files, stream),
        Positions(range(start_step, training.num_iterations), training.batch_size, here),
        _join_crops,
        timeout=training.data.timeout,
        batch_size=part_size(files.config, here),
        num_workers=loading_processes(files.config, here),
        pin_memory=pin,
    )


def loading_processes(config: Config, here: World) -> int:
    """``training.num_workers``; "auto": for each of the two streams half of this process's cores but one, 1 to 8."""
    if config.training.num_workers != "auto":
        return config.training.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, (cores // here.local_size - 1) // 2))


def evaluation_loader(
    files: DatasetFiles,
    split: str,
    *,
    protocol: str,
    batch_size: int = 8,
    here: World = ALONE,
    first: int | None = None,
) -> Loader[list[EvaluationImage]]:
    """Lists of at most ``batch_size`` images of a process's share of a split, in the order of its list.

    first: only so many of the whole list; None: all.
    """
    images = EvaluationImages(files, split, protocol)
    training = files.config.training
    return Loader(
        images,
        range(len(images))[:first][here.rank :: here.size],
        list,
        timeout=training.data.timeout,
        batch_size=batch_size,
        num_workers=loading_processes(files.config, here),
    )


def preview_batch(files: DatasetFiles) -> Batch:
    """The middle of the first validation images, with labels: something to show."""
    still = files.config.training.data.model_copy(update={"scale": False, "crop": False, "flip": False})
    crops = []
    for item in EvaluationImages(files, "val", "original").first(3):
        image = item.image.permute(1, 2, 0).numpy()
        height, width = image.shape[:2]
        label = resize(item.label.byte().numpy(), (height, width))
        crops.append(_crop_batch(image, label, still, rng=np.random.default_rng(0), identifier=item.id, files=files))
    return _join_crops(crops)


class _Collate(Generic[Item]):
    """The first UserError among the samples, else what ``join`` makes of them. A class, so that it can be pickled."""

    def __init__(self, join: Callable[[list[Any]], Item]) -> None:
        self.join = join

    def __call__(self, samples: list[Any]) -> Item | UserError:
        error = next((sample for sample in samples if isinstance(sample, UserError)), None)
        return self.join(samples) if error is None else error


def _crop_batch(
    image: np.ndarray,
    label: np.ndarray,
    data: DataConfig,
    *,
    rng: np.random.Generator,
    identifier: str,
    files: DatasetFiles,
) -> Batch:
    """One crop as a Batch without its first dimension."""
    image, label, valid = random_crop(image, label, data=data, ignore_label=files.config.ignore_label, rng=rng)
    return Batch(_to_tensor(image), torch.from_numpy(np.array(label)), torch.from_numpy(valid), [identifier])


def _join_crops(crops: list[Batch]) -> Batch:
    images, labels, valid, ids, bad, hidden = zip(*crops, strict=True)
    names, messages = [name for one in ids for name in one], tuple(message for one in bad for message in one)
    known = torch.stack(hidden) if hidden[0] is not None else None
    return Batch(torch.stack(images), torch.stack(labels), torch.stack(valid), names, messages, known)


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _start_worker(_: int) -> None:
    """The main process alone decides when a run stops: a signal to the whole group must not take its workers away.

    A worker leaves when it is told to, or when the main process is gone, or a minute after SIGTERM, in which time the
    main process has finished its step. And a worker is one thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_in_a_minute)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # not before: one that came meanwhile would have ended it
    cv2.setNumThreads(0)


def _leave_in_a_minute(*_: Any) -> None:
    timer = threading.Timer(60, os._exit, (0,))
    timer.daemon = True  # it must not keep a worker that is told to leave at once
    timer.start()
