"""A run: its folder, its device, where it continues, how it is told to stop."""

import datetime
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import checkpoints_of, latest_first, load_checkpoint, remove_leftovers, step_of
from utils.config import Config, different_keys, dump_config
from utils.distributed import ALONE, World, from_first, ignores_hangup, part_size, world
from utils.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
THEN = ", then "  # between the commits, versions or machines of a run that was continued


@dataclass
class Run:
    """folder: where everything of the run goes. checkpoint: what it continues from, or None.

    step_on_disk: of the folder's checkpoint.pth, None where there is none or a damaged one. origin: see ``origin_of``.
    resume: what the option --resume wants to go on with this run, if all else stays as it is.
    """

    folder: Path
    device: torch.device
    checkpoint: dict[str, Any] | None = None
    step_on_disk: int | None = None
    resume: str = "auto"
    stop_signal: int | None = field(default=None)
    origin: dict[str, str] = field(init=False)
    lock: Any = field(default=None, repr=False)  # an open file, locked as long as the process lives; False: another's
    scratch: Any = field(default=None, repr=False)  # of a dry run: its folder goes when this goes

    def __post_init__(self) -> None:
        if self.lock is None:
            self.lock = _lock(self.folder)
            remove_leftovers(self.folder)
        self.origin = origin_of(self.device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def continue_from(self, checkpoint: dict[str, Any]) -> None:
        """Not from the start; a warning where other code began it."""
        self.checkpoint, before = checkpoint, checkpoint["origin"]
        self.origin = origin_of(self.device, before)
        if before["commit"] != self.origin["commit"]:
            warnings.warn(f"resumed with other code: results will name {self.origin['commit']}", stacklevel=4)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """The first SIGINT, SIGTERM or SIGHUP only sets ``stop_signal``; a second one ends the process at once."""

        def note(number: int, _: Any) -> None:
            self.stop_signal = number
            for heard in STOP_SIGNALS:
                if signal.getsignal(heard) == note:
                    signal.signal(heard, signal.SIG_DFL)

        with noting_signals(note):
            yield


@contextmanager
def noting_signals(note: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and, where it would end the process, SIGHUP call ``note`` meanwhile."""
    heard = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not ignores_hangup()]
    previous = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_request(
    *, name: str, resume: str | None, device: str, processes: int = 1, folders: Sequence[str | Path | None] = ()
) -> None:
    """What can be said of a training command before its data are looked at; raises as ``start_run``.

    folders: where it will write.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{,99}", name):
        raise UserError(
            f"--name {name!r}: expected at most 100 letters, digits and . _ + -, because it becomes a folder's name"
        )
    if ":" in device and (processes > 1 or world().size > 1):
        raise UserError(f"--device {device}: several processes need a GPU each; write --device cuda")
    choose_device(device)
    if processes > 1 and device != "cpu" and processes > torch.cuda.device_count():
        raise UserError(
            f"--gpus {processes}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "with --device cpu so many processes share the CPU"
        )
    if resume not in (None, "auto") and not Path(resume).exists():
        raise CheckpointError(f"{resume}: no such checkpoint")
    for folder in folders:
        if folder is not None:
            check_output(Path(folder))


def check_output(folder: Path) -> None:
    """UserError if a folder cannot be made or written to."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{folder}: nothing can be written there; {there} is no folder, or not yours to write to")


def start_run(
    config: Config, *, name: str, resume: str | None, device: str, here: World = ALONE, dry: bool = False
) -> Run:
    """Make the run's folder, or find the one to continue, and write config.json there; the first process does.

    The others read the same checkpoint: with several machines the folder must be one that all of them see.

    Raises UserError for a name that is no file name or a folder that another process trains in, CheckpointError for a
    checkpoint that is damaged, does not fit the config, or has a later one beside it, which would be overwritten. Only
    "auto" goes back to an older checkpoint, and says so.

    dry: the folder is a temporary one, and nothing is continued.
    """
    check_request(name=name, resume=resume, device=device)
    unlabeled = config.training.unlabeled
    if part_size(config, here) == 1 and unlabeled.train_unlabeled and unlabeled.mix_mask not in (None, "None"):
        warnings.warn(
            "each process computes one image at a time, and images are mixed among those that are computed together: "
            "nothing is mixed; choose a larger training.batch_size or a smaller training.accumulation",
            stacklevel=2,
        )
    if config.training.deterministic:
        make_deterministic()
    where = choose_device(device, here)
    if dry:
        if (path := path_to_continue(config, name, resume)) is not None:
            _load(path, resume, config)
        scratch = tempfile.TemporaryDirectory(prefix="dry-run-")
        return Run(Path(scratch.name), where, scratch=scratch)
    if not here.is_first:
        folder, found = from_first((Path(), None))
        run = Run(folder, where, lock=False)
        if found:
            run.continue_from(load_checkpoint(found))
        return run
    run, found = _open_run(config, where, name=name, resume=resume)
    from_first((run.folder, found))
    return run


def _open_run(config: Config, where: torch.device, *, name: str, resume: str | None) -> tuple[Run, Path | None]:
    """The run, and the checkpoint that it continues from."""
    path = path_to_continue(config, name, resume)
    if path is None:
        if resume == "auto":
            logger.info("no checkpoint of the name %s in %s: a new run", name, config.utils.checkpoint_dir)
        folder = _new_folder(Path(config.utils.checkpoint_dir), name)
        _write_config(folder, config)
        return Run(folder, where), None
    named = _load(path, resume, config) if resume != "auto" else None  # before anything is written or removed beside it
    run = Run(path.parent, where)
    if not (run.folder / "config.json").exists():  # the checkpoint was put here by hand
        _write_config(run.folder, config)
    if not _is_named(run.folder, config, name):
        run.resume = shlex.quote(str(run.folder))
    found, checkpoint = named or _load(path, resume, config)
    run.continue_from(checkpoint)
    run.step_on_disk = checkpoint["step"] if found.name == "checkpoint.pth" else None
    logger.info("continues %s, step %d", found, checkpoint["step"])
    return run, found


def path_to_continue(config: Config, name: str, resume: str | None) -> Path | None:
    """The checkpoint that ``resume`` names or means, the latest of a folder; None: the run starts anew."""
    path = newest_folder(config, name) if resume == "auto" else Path(resume) if resume else None
    return next(iter(latest_first(path)), path / "checkpoint.pth") if path is not None and path.is_dir() else path


def _load(path: Path, resume: str | None, config: Config) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, or for "auto" an older one if it is damaged; CheckpointError if it cannot be continued."""
    if resume == "auto":
        path, checkpoint = _load_latest_good(path.parent)
    else:
        checkpoint = load_checkpoint(path)
        _refuse_to_go_back(path, checkpoint["step"])
    refuse_other_config(path, json.loads(checkpoint["config"]), dump_config(config))
    return path, checkpoint


def make_deterministic() -> None:
    """Ask torch for the same bits every time on a GPU; torch warns of operations that cannot promise it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def _load_latest_good(folder: Path) -> tuple[Path, dict[str, Any]]:
    """That of a run's checkpoints which has done most and is not damaged, with a warning where one is."""
    damaged: list[str] = []
    for candidate in latest_first(folder):
        try:
            checkpoint = load_checkpoint(candidate)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"{damaged[0]}. Continuing from {candidate} of step {checkpoint['step']}", stacklevel=3)
        return candidate, checkpoint
    raise CheckpointError("\n       ".join([*damaged, f"{folder}: no checkpoint to continue from; start anew"]))


def _refuse_to_go_back(path: Path, step: int) -> None:
    """CheckpointError where a later checkpoint of the same run, and what it learned, would be overwritten."""
    later = [other for other in latest_first(path.parent) if step < step_of(other) < math.inf]
    if later:
        raise CheckpointError(
            f"{path}: step {step}, but {later[0].name} beside it has step {step_of(later[0])}, which would be lost; "
            "continue that one, or copy this file to a folder of its own and continue it there"
        )


def _lock(folder: Path) -> Any:
    """UserError if another process trains in this folder. Workers do not inherit this kind of lock."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is training in this folder; wait for it or stop it") from None
    except OSError:  # a file system without locks
        pass
    return file


def choose_device(wanted: str, here: World = ALONE) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1" -> a device that exists, of several processes each its own; else UserError."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and here.size > 1:
        wanted = f"cuda:{here.local_rank}"
    kind, _, index = wanted.partition(":")
    if kind == "cuda" and int(index or 0) not in range(torch.cuda.device_count()):
        raise UserError(f"device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(wanted)


def newest_folder(config: Config, name: str) -> Path | None:
    """That of this name's run folders in which a checkpoint was written last."""
    folders = [f for f in Path(config.utils.checkpoint_dir).glob("*") if _is_named(f, config, name)]
    found = [path for folder in folders for path in checkpoints_of(folder)]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest is not None else None


def _is_named(folder: Path, config: Config, name: str) -> bool:
    """Whether it is a run folder of this name."""
    pattern = rf"\d\d-\d\d_\d\d-\d\d-{re.escape(name)}(~\d+)?"  # ~: no name has it
    parent = Path(config.utils.checkpoint_dir)
    return re.fullmatch(pattern, folder.name) is not None and folder.resolve().parent == parent.resolve()


def refuse_other_config(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """CheckpointError with every key that changes what is computed and differs.

    The parts in which a step is computed may change, as the number of processes may: the trainer warns of both. No
    weights from outside are needed any more. Lists may lie elsewhere: the trainer compares which images they name.
    """
    free = ["training.accumulation", "pretrained", "dataset.labeled", "dataset.unlabeled"]
    different = different_keys(saved, wanted, free=free)
    if different:
        rows = "".join(f"\n       {key}: {old} there, {new} here" for key, (old, new) in different.items())
        raise CheckpointError(f"{path}: cannot continue, it was trained with another configuration:{rows}")


def code_version() -> str:
    """The project's commit; where Python files were changed since, + and digits that name the change.

    "unknown" outside a git checkout.
    """
    project = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(project), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        change = git("diff", "HEAD", "--", "*.py")
        mark = f"+{hashlib.sha256(change.encode()).hexdigest()[:6]}" if change else ""
        return git("rev-parse", "--short=12", "HEAD") + mark
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin_of(device: torch.device, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a result names of what computed it: the project's commit, torch's version, and the machine.

    before: the same of the checkpoint that is continued or evaluated. What is another one now is named after it.
    """
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    now = {"commit": code_version(), "torch": str(torch.__version__), "machine": processor_name(device) + threads}
    return {key: _then((before or {}).get(key, value), value) for key, value in now.items()}


def _then(before: str, now: str) -> str:
    return before if before.split(THEN)[-1] == now else before + THEN + now


def processor_name(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A GPU's name, or the CPU's as Linux calls it, elsewhere its architecture.

    With the numbers of the CPU's family and model where Linux tells them: a virtual machine may hide the true name, and
    another model may compute other bits.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # of the first processor
    numbers = [f"{key} {told[of]}" for key, of in (("family", "cpu family"), ("model", "model")) if of in told]
    return f"{told.get('model name', platform.machine())} CPU" + (f" ({' '.join(numbers)})" if numbers else "")


def _write_config(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text(json.dumps(dump_config(config), indent=1) + "\n", encoding="utf-8")


def _new_folder(parent: Path, name: str) -> Path:
    stem = f"{datetime.datetime.now():%m-%d_%H-%M}-{name}"
    for suffix in ("", *(f"~{number}" for number in range(2, 1000))):
        folder = parent / (stem + suffix)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:  # ValueError: a null byte
            raise UserError(f"{folder}: cannot make the run folder ({error}); set utils.checkpoint_dir") from None
    raise UserError(f"{parent}: a thousand runs named {stem}; choose another --name")
