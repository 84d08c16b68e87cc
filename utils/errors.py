"""What can go wrong for a user, each with the exit status that the scripts end with.

A ``UserError`` says what is wrong, where, and what to do; the scripts print it as it is, without a traceback.
Everything else that is raised is a mistake of ours and keeps its traceback.
"""

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input or configuration. is_said: on stderr already, by this process or another one on this machine."""

    exit_status = 2
    is_said = False


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not belong to this model."""


class StorageError(UserError):
    """A disk that is full, or a file that cannot be written."""

    exit_status = 3


class LoaderError(UserError):
    """A process that loads images died, or gives no sign of life."""

    exit_status = 3


class OutOfMemory(UserError):
    """Neither a GPU's memory nor the main one has room for what is to be computed."""

    exit_status = 3


class PeerError(UserError):
    """Another process of the same run is gone."""

    exit_status = 3


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite; raised before any weight is changed."""

    exit_status = 4


class WeightsError(UserError):
    """Pretrained weights that cannot be found, read or trusted."""

    exit_status = 5


class DataError(UserError):
    """A dataset that cannot be downloaded, is incomplete, or is not what its checksum says."""

    exit_status = 5


@contextmanager
def loader_errors() -> Iterator[None]:
    """What torch's DataLoader raises as RuntimeError, anywhere in the main process, as a LoaderError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise LoaderError(
            f"{reason}. A dead one was mostly killed for want of memory: fewer training.num_workers. One that hangs "
            "waits for the disk or the network: look there, or raise training.data.timeout"
        ) from None


@contextmanager
def memory_errors() -> Iterator[None]:
    """What torch raises where memory does not suffice, on a GPU or not, as OutOfMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no memory"
        raise OutOfMemory(
            f"out of memory: {reason[:300]}. Training takes less with, in this order, training.precision bf16, "
            "training.checkpoint_activations, training.accumulation, a smaller training.data.input_size; evaluation "
            "and prediction may run on the CPU, or in windows"
        ) from error


# As a GPU says it, as a CPU, and as cuBLAS and cuDNN do.
_NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")

# What a full or broken disk answers, often without a file name.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def say(error: UserError) -> None:
    """Once, on stderr."""
    if not error.is_said:
        print(f"error: {error}", file=sys.stderr, flush=True)
    error.is_said = True


_leaving: list[bool] = []  # not empty: `leave_at_once` was called


def leave_at_once() -> None:
    """Let `run_script` end the process without anything that Python does at its end."""
    _leaving.append(True)


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave with its exit status; a ``UserError`` becomes one message on stderr."""
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr) if first else None
    logging.basicConfig(format="%(message)s")
    for name in ("model", "utils.run"):
        logging.getLogger(name).setLevel(logging.INFO if first else logging.ERROR)
    interrupted = _note_interrupt()
    try:
        with memory_errors():
            status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        say(error)
        status = error.exit_status
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        if error.errno not in _STORAGE and error.filename is None:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; check this path and the disk", file=sys.stderr)
        status = StorageError.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception:
        if not interrupted and not _leaving:  # within an import it can end as any other error
            raise
        print("interrupted" if interrupted else traceback.format_exc().rstrip(), file=sys.stderr)
        status = 130 if interrupted else 1
    if _leaving:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _note_interrupt() -> list[int]:
    """Not empty once Ctrl-C was pressed; the KeyboardInterrupt comes all the same."""
    noted: list[int] = []
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        return noted

    def note(number: int, _: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    return noted
