"""Preparing a dataset without ever leaving half of a file under its final name."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import DataError, UserError


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """An empty folder below ``folder`` for what is unfinished; removed at the end, as is what a killed run left there.

    Raises DataError while another process has it.
    """
    scratch, lock_file = folder / ".prepare", folder / ".prepare.lock"
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is preparing this folder; wait until it has ended") from None
        except OSError:
            pass  # a file system without locks
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


@contextmanager
def complete(path: Path, scratch: Path) -> Iterator[Path]:
    """Where to write a file of the workspace's folder; it gets its name, and its folders, when all of it is there."""
    unfinished = scratch / "-".join(path.relative_to(scratch.parent).parts)
    yield unfinished
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.replace(path)


@contextmanager
def data_errors() -> Iterator[None]:
    """A damaged file of a dataset that is being prepared means: fetch it again, exit status 5."""
    try:
        yield
    except UserError as error:
        raise DataError(str(error)) from None
