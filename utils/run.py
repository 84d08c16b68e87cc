"""A run: its folder, its device, where it continues, how it is told to stop."""

import datetime
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import load_checkpoint
from utils.config import Config, different_keys, dump_config
from utils.errors import CheckpointError, UserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Run:
    """folder: where everything of the run goes. checkpoint: what it continues from, or None."""

    folder: Path
    device: torch.device
    checkpoint: dict[str, Any] | None = None
    stop_signal: int | None = field(default=None)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """The first SIGINT, SIGTERM or SIGHUP only sets ``stop_signal``; a second one ends the process at once."""

        def note(number: int, _: Any) -> None:
            self.stop_signal = number
            for any_of_them in STOP_SIGNALS:
                signal.signal(any_of_them, signal.SIG_DFL)

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def start_run(config: Config, *, name: str, resume: str | None, device: str) -> Run:
    """Make the run's folder, or find the one to continue, and write config.json there.

    Raises UserError for a name that is no file name, CheckpointError for a checkpoint that does not fit the config.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise UserError(
            f"--name {name!r}: expected letters, digits and . _ + - only, because it becomes a folder's name"
        )
    where = choose_device(device)
    path = newest_checkpoint(config, name) if resume == "auto" else Path(resume) if resume else None
    path = path / "checkpoint.pth" if path is not None and path.is_dir() else path
    if path is not None:
        checkpoint = load_checkpoint(path)
        refuse_other_config(path, json.loads(checkpoint["config"]), dump_config(config))
        return Run(path.parent, where, checkpoint)
    folder = _new_folder(Path(config.utils.checkpoint_dir), name)
    (folder / "config.json").write_text(json.dumps(dump_config(config), indent=1) + "\n", encoding="utf-8")
    return Run(folder, where)


def choose_device(wanted: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1" -> a device that exists; UserError otherwise."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind == "cuda" and int(index or 0) not in range(torch.cuda.device_count()):
        raise UserError(f"device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(wanted)


def newest_checkpoint(config: Config, name: str) -> Path | None:
    """The last written checkpoint.pth among this name's run folders."""
    pattern = re.compile(rf"\d\d-\d\d_\d\d-\d\d-{re.escape(name)}(~\d+)?")  # ~: no name has it
    folders = [f for f in Path(config.utils.checkpoint_dir).glob("*") if pattern.fullmatch(f.name)]
    found = [path for folder in folders if (path := folder / "checkpoint.pth").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def refuse_other_config(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """CheckpointError with every key that changes what is computed and differs."""
    different = different_keys(saved, wanted)
    if different:
        rows = "".join(f"\n       {key}: {old} there, {new} here" for key, (old, new) in different.items())
        raise CheckpointError(f"{path}: cannot continue, it was trained with another configuration:{rows}")


def code_version() -> str:
    """The project's commit, with + if files were changed since; "unknown" outside a git checkout."""
    project = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(project), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _new_folder(parent: Path, name: str) -> Path:
    stem = f"{datetime.datetime.now():%m-%d_%H-%M}-{name}"
    for suffix in ("", *(f"~{number}" for number in range(2, 1000))):
        folder = parent / (stem + suffix)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot make the run folder ({error}); set utils.checkpoint_dir") from None
    raise UserError(f"{parent}: a thousand runs named {stem}; choose another --name")
