"""What can go wrong for a user, each with the exit status that the scripts end with.

A ``UserError`` says what is wrong, where, and what to do; the scripts print it as it is, without a traceback.
Everything else that is raised is a mistake of ours and keeps its traceback.
"""

import sys
import warnings
from collections.abc import Callable


class UserError(ValueError):
    """Bad input or configuration."""

    exit_status = 2


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not belong to this model."""


class StorageError(UserError):
    """A disk that is full, or a file that cannot be written."""

    exit_status = 3


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite; raised before any weight is changed."""

    exit_status = 4


class WeightsError(UserError):
    """Pretrained weights that cannot be found, read or trusted."""

    exit_status = 5


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and leave with its exit status; a ``UserError`` becomes one message on stderr."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        status = main() or 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        status = error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        status = 130
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        status = 141
    sys.stdout.flush() if status != 141 else None
    sys.exit(status)
