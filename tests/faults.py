"""Faults on purpose: training processes that are killed, starved or fed rubbish; for test_faults.py and drill.py.

A training is the real script in a process of its own. What goes wrong is a ``Fault``: an action at the n-th time that
the process comes to a place in the code. So no clock decides, and every fault can be repeated.
"""

import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.demo import make_demo_dataset
from data.loaders import EvaluationImages, TrainingCrops
from tests.conftest import tiny_records, tiny_values
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import CheckpointError
from utils.logger import COSTS
from utils.trainer import Trainer

PROJECT = Path(__file__).resolve().parent.parent
SCRIPT = PROJECT / "cross_teacher_contr.py"
SAVE_EVERY = 2  # steps between checkpoints in the runs here
PATIENCE = 120  # seconds until a process that should have ended is given up

# Processes forked from one that has imported torch already: they start in a moment, and share nothing with pytest.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults", "model", "utils.run", "utils.visualize"])

# ------------------------------------------------------------------------------------------------ faults

# Where a process can be met: what is replaced there, and whether the action comes before, after or in the midst of it.
PLACES: dict[str, tuple[Any, str, str]] = {
    "opened": (torch, "save", "before"),
    "half written": (torch, "save", "half"),
    "written": (os, "fsync", "before"),
    "synced": (os, "fsync", "after"),
    "linked": (os, "link", "after"),
    "replaced": (os, "replace", "after"),
    "step": (Trainer, "_train_one", "before"),
    "update": (torch.optim.SGD, "step", "after"),
    "validation": (Trainer, "_validate", "before"),
    "training sample": (TrainingCrops, "__getitem__", "before"),
    "validation sample": (EvaluationImages, "__getitem__", "before"),
    "validated": (Trainer, "_keep_best", "before"),
    # In a loading process that has begun, but does not ignore signals yet.
    "worker start": (
        importlib.import_module("torch.utils.data._utils.signal_handling"),
        "_set_worker_signal_handlers",
        "after",
    ),
}
WRITING = ("opened", "half written", "written", "synced", "linked", "replaced")


@dataclass(frozen=True)
class Fault:
    """Do ``action`` at the n-th time (from 1) that a process comes to ``place``."""

    place: str
    nth: int
    action: Callable[..., None]
    arguments: tuple[Any, ...] = ()

    def install(self) -> None:
        owner, name, moment = PLACES[self.place]
        original, count = getattr(owner, name), 0

        def replaced(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count != self.nth:
                return original(*args, **kwargs)
            if moment == "before":
                self.action(*self.arguments)
            elif moment == "half":
                _write_half(*args)
                self.action(*self.arguments)
            result = original(*args, **kwargs)
            if moment == "after":
                self.action(*self.arguments)
            return result

        setattr(owner, name, replaced)


def _write_half(state: Any, file: Any) -> None:
    whole = io.BytesIO()
    torch.serialization.save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()


def kill() -> None:
    """As the kernel does when memory is short: nothing can be done about it."""
    os.kill(os.getpid(), signal.SIGKILL)


def send(*numbers: int) -> None:
    """Signals to this process alone."""
    for number in numbers:
        os.kill(os.getpid(), number)


def send_to_group(number: int) -> None:
    """A signal to this process and all its loading processes, as a terminal or a cluster sends it."""
    os.killpg(os.getpgrp(), number)


def kill_a_loader() -> None:
    """End a loading process, and wait until that is noticed here."""
    worker = multiprocessing.active_children()[0].pid
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)


def limit_files(size: int) -> None:
    """From now on no file grows beyond ``size`` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def hang(folder: str, prefix: str) -> None:
    """Images that never answer: named pipes that nobody writes to."""
    for path in list(Path(folder).glob(f"{prefix}*")):
        pipe = path.with_suffix(".pipe")
        os.mkfifo(pipe)
        os.replace(pipe, path)  # at no moment is there no file


# ------------------------------------------------------------------------------------------------ trainings


class Training:
    """The training script in a process of its own, which leads a process group of its own."""

    def __init__(self, folder: Path, *arguments: object, faults: tuple[Fault, ...] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._output, self._errors, self._steps = (_fresh(folder, kind) for kind in ("output", "errors", "steps"))
        files = tuple(map(str, (self._output, self._errors, self._steps)))
        self._process = FORKS.Process(target=_train, args=(list(map(str, arguments)), files, faults))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self) -> int:
        """The exit status; -n for a process that signal n killed."""
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            self.end()
            raise AssertionError(f"the training did not end within {PATIENCE} s; it said:\n{self.errors}")
        return self._process.exitcode

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something is so; AssertionError if the process ends, or if it does not come to be."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self._process.exitcode is None, f"ended before, with {self._process.exitcode}:\n{self.errors}"
            assert time.monotonic() < deadline, f"never came to be:\n{self.errors}"
            time.sleep(0.02)

    def is_frozen(self) -> bool:
        return _state_and_group(self.pid)[0] == "T"

    def kill(self) -> None:
        """This process alone; its loading processes live on for a moment."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()

    def end(self) -> None:
        """It and its loading processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    def left_over(self) -> list[int]:
        """The living processes of its group."""
        living = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        found = {pid: _state_and_group(pid) for pid in living}
        return [pid for pid, (state, group) in found.items() if group == self.pid and state not in "ZX"]

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def steps(self) -> list[int]:
        """The numbers of steps done, after each step."""
        return [int(line) for line in self._steps.read_text().split()]


def _fresh(folder: Path, kind: str) -> Path:
    path = next(p for number in range(1000) if not (p := folder / f"{kind}_{number}.txt").exists())
    path.touch()
    return path


def _state_and_group(pid: int) -> tuple[str, int]:
    """One letter of a process's state, and its group; ("", 0) if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return fields[0], int(fields[2])


def _train(arguments: list[str], files: tuple[str, str, str], faults: tuple[Fault, ...]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as in a process started by hand
    output, errors, steps = (os.open(path, os.O_WRONLY | os.O_APPEND) for path in files)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    torch.set_num_threads(1)
    for fault in faults:
        fault.install()
    train_one = Trainer._train_one

    def train_and_note(trainer: Trainer, *args: Any) -> None:
        train_one(trainer, *args)
        os.write(steps, f"{trainer.step}\n".encode())

    Trainer._train_one = train_and_note  # type: ignore[method-assign]
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@contextmanager
def ended(training: Training) -> Iterator[Training]:
    """Whatever a test finds, none of its processes outlives it."""
    try:
        yield training
    finally:
        training.end()


def tiny_demo(root: Path) -> Path:
    return make_demo_dataset(root, size=(48, 48), labeled=6, unlabeled=6, val=3)


def write_config(folder: Path, demo: Path, **changes: Any) -> Path:
    """A run of 8 steps with all four terms from step 3 on; ``changes`` are dotted keys with __ for the dots."""
    dataset = {"root": str(demo), "labeled": "splits/labeled.txt", "unlabeled": "splits/unlabeled.txt"}
    options = {
        "dataset": dataset | {"name": "demo", "num_classes": 7},
        "training__contrastive__contrast_start": 3,
        "utils": {
            "checkpoint_dir": str(folder / "runs"),
            "log_per_iter": 1,
            "val_per_iter": 4,
            "save_checkpoint_every": SAVE_EVERY,
            "tensorboard": False,
        },
    }
    path = folder / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tiny_values(**options | changes)))
    return path


def run_folder(folder: Path) -> Path:
    """The newest of a working folder's runs."""
    return max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


# ------------------------------------------------------------------------------------------------ what is compared


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested containers differ, tensors bit for bit, NaN being equal to itself."""
    if type(one) is not type(other):
        return [where]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.numpy().tobytes() == other.numpy().tobytes() else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where} (keys)"]
        return [found for key in one for found in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where} (length)"]
        return [
            found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{where}.{i}")
        ]
    return [] if one == other or (one != one and other != other) else [where]


def learned(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint that must not depend on what happened on the way."""
    state = load_checkpoint(checkpoint)
    return {key: state[key] for key in ("step", "best", "facts", "method", "optimizer")}


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """log.jsonl without the speed."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in COSTS} for line in lines]


def results_differ(folder: Path, reference: Path) -> list[str]:
    """In what a finished run differs from an undisturbed one; leftovers count."""
    found = differences(learned(folder / "checkpoint.pth"), learned(reference / "checkpoint.pth"), "checkpoint")
    found += differences(learned(folder / "best_model.pth"), learned(reference / "best_model.pth"), "best")
    found += differences(log_lines(folder), log_lines(reference), "log")
    return found + [path.name for path in folder.glob("*.tmp")]


# ------------------------------------------------------------------------------------------------ drills


class Survived(NamedTuple):
    """folder: of the finished run. kills: how many processes were killed. lost: most steps that were done again."""

    folder: Path
    kills: int
    lost: int


def kill_and_resume(folder: Path, config: Path, faults: Sequence[Fault], *options: str) -> Survived:
    """Train, be killed by each of ``faults`` in turn, resume each time, finish. A fault may come too late to kill."""
    arguments = ("--config", config, "--name", "killed", "--resume", "auto", *options)
    done = kills = lost = 0
    for fault in (*faults, None):
        with ended(Training(folder, *arguments, faults=(fault,) if fault else ())) as training:
            status, steps = training.wait(), training.steps
        assert status in ((0, -signal.SIGKILL) if fault else (0,)), (status, fault, training.errors)
        kills += status != 0
        if steps:
            lost = max(lost, done - (steps[0] - 1))
            done = max(done, *steps)
    return Survived(run_folder(folder), kills, lost)


def random_kill(rng: random.Random) -> Fault:
    """Anywhere in the first steps of a process: between two steps, in an update, a validation, a checkpoint."""
    place = rng.choice((*WRITING, "step", "update", "validation"))
    most = {"step": 5, "update": 5, "validation": 1, "linked": 1}.get(place, 3)
    return Fault(place, rng.randint(1, most), kill)


def tiny_state() -> dict[str, Any]:
    """What a checkpoint holds, small: tensors of several kinds, numbers, text, nested containers."""
    generator = torch.Generator().manual_seed(0)
    return tiny_records(
        best={"mean_iou": 0.5, "step": 2},
        config=json.dumps(tiny_values()),
        facts={"labeled": 6, "labeled hash": "0123456789ab"},
        method={
            "weight": torch.randn(40, 25, generator=generator),
            "count": torch.arange(7),
            "seen": torch.tensor([True, False]),
            "scalar": torch.tensor(3.5),
        },
        optimizer={"state": {0: {"momentum_buffer": torch.randn(300, generator=generator)}}, "param_groups": []},
    )


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which disks and transfers spoil files."""
    bad, at = bytearray(data), rng.randrange(len(data))
    kind = rng.choice(("flip", "zero", "cut", "swap", "append"))
    if kind == "flip":
        bad[at] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        size = min(rng.choice((1, 16, 512, 4096)), len(bad) - at)
        bad[at : at + size] = bytes(size)
    elif kind == "cut":
        del bad[at:]
    elif kind == "swap":
        size = rng.choice((16, 64, 512))
        one, other = sorted(rng.randrange(len(bad) // size) * size for _ in range(2))
        bad[one : one + size], bad[other : other + size] = bad[other : other + size], bad[one : one + size]
    else:
        bad += rng.randbytes(rng.randint(1, 600))
    return bytes(bad)


class Fuzzed(NamedTuple):
    """refused: how many checkpoints. same: how many gave exactly what was saved. wrong: what else happened."""

    refused: int
    same: int
    wrong: list[str]


def fuzz(folder: Path, trials: int, seed: int) -> Fuzzed:
    """Spoil a checkpoint in a way drawn for each trial, and load it."""
    rng, path, state = random.Random(seed), folder / "fuzzed.pth", tiny_state()
    save_checkpoint(path, state)
    good, saved = path.read_bytes(), load_checkpoint(path)
    refused, same, wrong = 0, 0, list[str]()
    for trial in range(trials):
        spoiled = good
        while spoiled == good:  # zeros zeroed, or equal blocks swapped
            spoiled = corrupt(good, rng)
        path.write_bytes(spoiled)
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        except Exception as error:  # noqa: BLE001  # whatever comes is what is looked for
            wrong.append(f"trial {trial}: {type(error).__name__}: {error}")
        else:
            different = differences(found, saved)
            same += not different
            wrong += [f"trial {trial}: wrong data in {different}"] if different else []
    return Fuzzed(refused, same, wrong)
