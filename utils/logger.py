"""What a run says: a progress bar and messages on the terminal, log.jsonl and TensorBoard events in its folder."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.checkpoint import UNFINISHED
from utils.evaluate import Evaluation

# What a run costs, not what it computes: these values of a log differ from run to run.
COSTS = ("images_per_second", "seconds_per_step", "data_wait", "memory_gib")


class RunLogger:
    """Logs of one run. ``first_step``: how many steps are done; what was logged of later ones is removed.

    must_validate: the last of them will be validated again; what a first validation logged is removed too.

    silent: say and write nothing, as all processes of a run but the first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        total_steps: int,
        tensorboard: bool,
        must_validate: bool = False,
        silent: bool = False,
    ) -> None:
        self.path, self.silent = folder / "log.jsonl", silent
        self._file: Any = None
        self.writer: Any = None
        if not silent:
            self._drop_after(first_step, must_validate=must_validate)
            self._file = self.path.open("a", encoding="utf-8")
        if tensorboard and not silent:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            hidden_from = first_step + (not must_validate)
            self.writer = SummaryWriter(str(folder), purge_step=hidden_from if first_step else None)
            if must_validate:  # hidden along with the step's first validation
                self._add_points(first_step, self._logged_of(first_step))
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.05,
            mininterval=0.1 if terminal else 15, miniters=1, file=sys.stderr, disable=silent,
        )  # fmt: skip
        self._done, self._waited = first_step, 0.0
        self._asked = (time.perf_counter(), first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of log.jsonl, one point of each TensorBoard curve."""
        if self.silent:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self.writer is not None:
            self._add_points(step, values)

    def pictures(self, step: int, paths: Sequence[Path]) -> None:
        """Pictures for TensorBoard, that of each student under its own tag."""
        for own, path in enumerate(paths if self.writer is not None else ()):
            self.writer.add_image(
                f"picture/student_{own}", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC"
            )

    def progress(self, text: str) -> None:
        """Text beside the progress bar."""
        self.bar.set_postfix_str(text, refresh=False)

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        self.bar.update(1)

    def waited(self, seconds: float) -> None:
        """The step before which the loop waited so long for its images begins."""
        self._waited += seconds

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in it is no part of the steps' time."""
        begun = time.perf_counter()
        yield
        then, step = self._asked
        self._asked = (then + time.perf_counter() - begun, step)

    def seconds_per_step(self) -> tuple[float, float]:
        """Since it was last asked: the time of a step, and which share of it was waiting for images."""
        now, step = time.perf_counter(), self._done
        (then, before), self._asked = self._asked, (now, step)
        waited, self._waited = self._waited, 0.0
        return (now - then) / max(step - before, 1), waited / (now - then)

    def message(self, text: str, *, of_all: bool = False) -> None:
        """A line of its own above the progress bar; of_all: also from a process that is silent else."""
        if not self.silent or of_all:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        if self._file is not None:
            self._file.close()
        if self.writer is not None:
            self.writer.close()

    def _add_points(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def _logged_of(self, step: int) -> dict[str, float]:
        """What log.jsonl holds of a step."""
        lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return {tag: value for line in lines if line.pop("step") == step for tag, value in line.items()}

    def _drop_after(self, done: int, *, must_validate: bool) -> None:
        """Remove log lines of what will be done again; ``done``: the number of steps that will not."""
        if not self.path.exists():
            return
        kept, before = list[str](), self.path.read_text(encoding="utf-8")
        for line in before.splitlines():
            try:
                values = json.loads(line)
                again = must_validate and values["step"] == done and any(tag.startswith("val/") for tag in values)
                kept += [line] * (values["step"] <= done and not again)
            except (ValueError, KeyError, TypeError):
                continue  # a line cut off by a kill
        after = "".join(line + "\n" for line in kept)
        if after != before:  # written beside it: a full disk or a kill must not cost what was logged
            shorter = self.path.with_name(self.path.name + UNFINISHED)
            shorter.write_text(after, encoding="utf-8")
            shorter.replace(self.path)


def print_lines(lines: Sequence[str]) -> None:
    """On standard output."""
    for line in lines:
        print(line)


def print_result(evaluation: Evaluation, checkpoint: Path, *, again: Sequence[str]) -> None:
    """The table of an evaluated checkpoint and how to look at its run, on standard output. again: its command."""
    folder, command = checkpoint.parent, f"python3 {shlex.join(again)}"
    print(f"\n{evaluation.as_text()}")
    print(f"run folder          {folder}")
    for picture in sorted(folder.glob("picture_*.png")):
        print(f"picture             {picture}")
    if any(folder.glob("events.*")):
        print(f"curves              tensorboard --logdir {shlex.quote(str(folder))}")
    print(f"evaluate again      {command}")
    if "--save-output-images" not in again:
        print(f"write predictions   {command} --save-output-images")
