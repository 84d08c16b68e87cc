"""Checkpoints: one file with everything, written so that a crash never leaves half of one, read with suspicion."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.errors import CheckpointError, StorageError

FORMAT, VERSION = "cross-teacher-training", 1
RECORDS = ("step", "best", "config", "facts", "method", "optimizer")  # what a run needs to go on


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain Python values to ``path``; the file there is the old one or the new one, never a mixture.

    Raises StorageError when the disk is full or not writable; the old file is then intact and nothing is left over.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # else the new name may be lost with the power
        os.close(folder)
    except (OSError, RuntimeError) as error:  # a full disk inside torch.save is a RuntimeError
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: cannot write this checkpoint ({error}); is the disk full? Any older one is intact"
        ) from error


def read_file(path: Path) -> Any:
    """What a PyTorch file holds, on the CPU. CheckpointError: it is missing, damaged or unsafe."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with path.open("rb") as file:
            is_old = file.read(2) != b"PK"  # before PyTorch 1.6 a file was no zip archive
        if not is_old:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})") from error


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise CheckpointError(f"{path}: compressed records, which PyTorch never writes; not loaded")
        damaged = archive.testzip()  # torch.load itself checks no CRC
    if damaged is not None:
        raise CheckpointError(f"{path}: record {damaged} is damaged; use another checkpoint")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run onto the CPU. CheckpointError: see ``read_file``, or it is of another format."""
    return check_format(read_file(path), path)


def check_format(state: Any, path: Path) -> dict[str, Any]:
    """``state`` as read from ``path``, if it is a checkpoint of a run in the format that this code writes."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        release = "; it is one of the authors' release: start from it with pretrained" if is_release(state) else ""
        raise CheckpointError(f"{path}: not a checkpoint of this project (expected format {FORMAT!r}){release}")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format version {state.get('version')}; this code reads version {VERSION}"
        )
    missing = [key for key in RECORDS if key not in state]
    if missing:
        raise CheckpointError(
            f"{path}: a checkpoint without {', '.join(missing)}; it was not written by a training run"
        )
    return state


def is_release(state: Any) -> bool:
    """Whether what a file holds is a checkpoint of the authors' release."""
    return isinstance(state, dict) and {"iteration", "config", "model"} <= state.keys()


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint file, or the best (else the last) one of a run folder."""
    if not path.is_dir():
        return path
    found = [file for name in ("best_model.pth", "checkpoint.pth") if (file := path / name).is_file()]
    if not found:
        raise CheckpointError(f"{path}: neither best_model.pth nor checkpoint.pth in this folder; name a file")
    return found[0]
