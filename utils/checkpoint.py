"""Checkpoints: one file with everything, written so that a crash never leaves half of one, read with suspicion."""

import math
import os
import pickle
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import CheckpointError, StorageError

UNFINISHED = ".tmp"  # ending of a file that is being written
FORMAT, VERSION = "cross-teacher-training", 3
BEST = "best_model.pth"
SEAL = 8  # hexadecimal digits at the end of a file, its zip comment: the CRC of all bytes before
RECORDS = (  # what a run needs to go on
    *("step", "best", "config", "facts", "origin", "bad_files", "method", "optimizer", "scaler", "must_validate"),
    *("threads", "parts"),
)


def save_checkpoint(path: Path, state: dict[str, Any], *, keep_old_as: Path | None = None) -> None:
    """Write tensors and plain Python values to ``path``; the file there is the old one or the new one, never a mixture.

    keep_old_as: another name for the file that is there now.
    Raises StorageError when the disk is full or not writable; the old file is then intact and nothing is left over.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    try:
        with temporary.open("w+b") as file:
            torch.save({"format": FORMAT, "version": VERSION} | state, file)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_old_as is not None and path.exists():
            _give_second_name(path, keep_old_as)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # else the new name may be lost with the power
        os.close(folder)
    except (OSError, RuntimeError) as error:  # a full disk inside torch.save is a RuntimeError
        temporary.unlink(missing_ok=True)
        if "DataLoader" in str(error):  # a loading process died just now; torch tells it wherever we are
            raise
        need, free = _size_of(state) / 2**20, shutil.disk_usage(path.parent).free / 2**20
        raise StorageError(
            f"{path}: cannot write this checkpoint ({error}); it needs {need:,.1f} MiB, {free:,.1f} MiB are free. "
            "Any older one is intact; free some room, or lower utils.keep_checkpoints"
        ) from error


def _seal(file: BinaryIO) -> None:
    """Make the CRC of a whole zip file its comment: the records' own CRCs cover the data, but not all of the file."""
    file.seek(-2, os.SEEK_END)  # the length of the comment is the last field
    assert file.read(2) == b"\0\0", "torch.save writes no comment"
    file.seek(-2, os.SEEK_END)
    file.write(SEAL.to_bytes(2, "little"))
    file.seek(0)
    crc = _crc(file, file.seek(0, os.SEEK_END))
    file.seek(0, os.SEEK_END)
    file.write(f"{crc:0{SEAL}x}".encode())


def _is_sealed(path: Path) -> bool:
    """Whether not one byte of a file has changed since it was sealed."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END) - SEAL
        if length < 0:
            return False
        crc = _crc(file, length)
        return file.read() == f"{crc:0{SEAL}x}".encode()


def _crc(file: BinaryIO, length: int) -> int:
    """Of the first bytes of a file, which is left behind them."""
    file.seek(0)
    crc = 0
    while length > 0:
        block = file.read(min(length, 2**20))
        crc, length = zlib.crc32(block, crc), length - len(block)
    return crc


def _give_second_name(path: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)  # so that at no moment the file has no name
    except OSError:  # a file system without links
        os.replace(path, name)


def _size_of(state: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(_size_of(one) for one in inner)


def older_name(path: Path, step: int) -> Path:
    """What the checkpoint of a step is called once a newer one has taken its name."""
    return path.with_name(f"{path.stem}_{step:07d}{path.suffix}")


def older_checkpoints(path: Path) -> list[Path]:
    """The older ones that were kept beside ``path``, newest first."""
    found = path.parent.glob(f"{path.stem}_*{path.suffix}")
    return sorted((one for one in found if re.fullmatch(r"\d{7,}", one.stem.rpartition("_")[2])), reverse=True)


def checkpoints_of(folder: Path) -> list[Path]:
    """Those that a run has written in its folder."""
    last = folder / "checkpoint.pth"
    return [*folder.glob(last.name), *older_checkpoints(last), *folder.glob(BEST)]


def latest_first(folder: Path) -> list[Path]:
    """A run's checkpoints by their steps; one whose step cannot be read comes before all others."""
    return sorted(checkpoints_of(folder), key=step_of, reverse=True)


def step_of(path: Path) -> float:
    """The number of steps done, infinity where it cannot be read; the rest of the file is not looked at."""
    try:
        return int(_load(path, mmap=True)["step"])
    except Exception:  # noqa: BLE001  # a damaged pickle can raise anything
        return math.inf


def remove_leftovers(folder: Path) -> None:
    """Files that a killed process did not finish writing: checkpoints and the log. Others may lie there too."""
    for path in (*folder.glob(f"*.pth{UNFINISHED}"), *folder.glob(f"log.jsonl{UNFINISHED}")):
        path.unlink(missing_ok=True)


def read_file(path: Path) -> Any:
    """What a PyTorch file holds, on the CPU. CheckpointError: it is missing, damaged or unsafe."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with path.open("rb") as file:
            is_old = file.read(2) != b"PK"  # before PyTorch 1.6 a file was no zip archive
        if not is_old:
            _check_archive(path)
        return _load(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [""])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text advises to run what is in the file
            reason = "damaged, or it holds more than tensors and plain values, which is never executed"
        if isinstance(error, EOFError | zipfile.BadZipFile):
            reason = "damaged, incomplete, or something else; copy it again"
        raise CheckpointError(f"{path}: not a readable PyTorch file ({type(error).__name__}: {reason})") from error


def _load(path: Path, *, mmap: bool = False) -> Any:
    """mmap: tensors are read where they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise CheckpointError(f"{path}: compressed records, which PyTorch never writes; not loaded")
        damaged = archive.testzip()  # torch.load itself checks no CRC
    if damaged is not None:
        raise CheckpointError(f"{path}: record {damaged} is damaged; use another checkpoint")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run onto the CPU. CheckpointError: see ``read_file`` and ``check_format``."""
    return check_format(read_file(path), path)


def check_format(state: Any, path: Path) -> dict[str, Any]:
    """``state`` as read from ``path``, if it is a checkpoint of a run in the format that this code writes."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        release = "; it is one of the authors' release: start from it with pretrained" if is_release(state) else ""
        raise CheckpointError(
            f"{path}: not a checkpoint of this project (expected format {FORMAT!r}){release or ', nor of the release'}"
        )
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format version {state.get('version')}, this code reads version {VERSION}; the project "
            f"at commit {state.get('origin', {}).get('commit', '(of the run)')} reads it"
        )
    if not _is_sealed(path):
        raise CheckpointError(f"{path}: damaged, it is not byte for byte what was written; use another checkpoint")
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
    found = [file for name in (BEST, "checkpoint.pth") if (file := path / name).is_file()]
    if not found:
        raise CheckpointError(f"{path}: neither best_model.pth nor checkpoint.pth in this folder; name a file")
    return found[0]
