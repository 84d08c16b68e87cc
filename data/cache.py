"""Decoded and resized images kept on disk, so that a training image is decoded once and not in every epoch.

A file of the cache is one array, written under another name and then renamed: any number of processes, on any number
of machines, may fill one folder. Its name is a hash of all that its content depends on, the source's size and time of
change among it, so that a changed source is another file.
"""

import hashlib
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.errors import StorageError


class DiskCache:
    """Arrays by the file they were made of. kind: what else their content depends on."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def get(self, source: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
        """``make()``, or what it gave before for this source: (H,W[,3]) uint8, read-only, mapped from the disk.

        Raises what ``make`` raises, and StorageError where the cache cannot be written.
        """
        try:
            state = source.stat()
        except FileNotFoundError:
            return make()  # says what is missing
        key = repr((self.kind, str(source.resolve()), state.st_size, state.st_mtime_ns))
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        path = self.folder / name[:2] / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            pass  # not there, or damaged
        array = make()
        unfinished = path.with_name(f"{name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(unfinished, path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            raise StorageError(
                f"{path}: cannot write the cache of decoded images ({error.strerror}); free some room, choose another "
                'training.data.cache_dir, or set training.data.cache to "none"'
            ) from None
        return array
