"""Running a study: what is not done yet, one run on each place at a time, stopped by a signal, gone on with later."""

import fcntl
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.config import dump_config
from utils.errors import UserError
from utils.files import write_json
from utils.run import code_version, noting_signals
from utils.study import Job, Measurement, Study, finished_before, process_command, read_json, shown, steps_text

PAUSE = 0.1  # seconds between two looks at the processes
ESTIMATE = re.compile(r"^estimated time\s+([\d.]+) hours", re.MULTILINE)
Say = Callable[[str], None]


class _Running(NamedTuple):
    job: Job | Measurement
    place: str | None
    process: subprocess.Popen[bytes]
    files: tuple[Any, ...]


class Runner:
    """Runs a study's jobs and measurements. places: devices, or None where the script chooses; one at a time on each.

    A run is a process in a session of its own, so that a terminal's Ctrl-C reaches it once, from here. It inherits a
    lock on its job's folder: should this process be killed, the next one waits for what it left behind.
    """

    def __init__(self, study: Study, places: Sequence[str | None], *, say: Say) -> None:
        self.study, self.places, self.say = study, list(places), say
        self.stop_signal: int | None = None
        self.failed: list[Job | Measurement] = []
        self.problem: UserError | None = None
        self._commit = ""
        self._signals: list[int] = []
        self._passed_on = set[int]()
        self._running: list[_Running] = []
        self._told_to_wait: set[str] = set()

    def run(self) -> None:
        """Run what is not done, until all is, or until a signal came and every process has saved and ended."""
        everything: list[Job | Measurement] = [*self.study.jobs, *self.study.measurements]
        waiting = [job for job in everything if job.finished() is None]
        if waiting:
            self._commit = refuse_other_commit(self.study)
        _write_plan(self.study)
        with noting_signals(lambda number, _: self._signals.append(number)):
            while self._running or (waiting and self.stop_signal is None):
                if self.stop_signal is None:
                    self._start_some(waiting)
                time.sleep(PAUSE)
                self._pass_on_signals()
                self._collect()
                waiting = [job for job in waiting if not (isinstance(job, Measurement) and job.job in self.failed)]
        _write_plan(self.study)  # once more: another process may have finished other rows of this study meanwhile
        if self.problem is not None and self.stop_signal is None:
            raise self.problem

    def _pass_on_signals(self) -> None:
        """Each signal once to each run: the first lets it finish its step and save, the second ends it."""
        while self._signals:
            number = self._signals.pop(0)
            if self.stop_signal is None:
                self.stop_signal = number
                self.say(
                    f"signal {number}: finishing a step and saving, runs: {len(self._running)}; a second one ends them"
                )
            self._passed_on.add(number)
            for one in self._running:
                one.process.send_signal(number)

    def _start_some(self, waiting: list[Job | Measurement]) -> None:
        """Start the next jobs on the places that are free; those that another process works on are left for later."""
        free = list(self.places)
        for one in self._running:
            free.remove(one.place)
        for job in list(waiting) if free else ():
            if not free:
                return
            if not job.is_ready:
                continue
            lock = _lock(job.folder)
            if lock is None:
                if job.name not in self._told_to_wait:
                    self.say(f"wait  {job.name}: another process is at it")
                self._told_to_wait.add(job.name)
                continue
            waiting.remove(job)
            if job.finished() is not None:  # by that other process
                lock.close()
                continue
            if self._code_has_changed():
                waiting.clear()
                lock.close()
                return
            self._start(job, free.pop(0), lock)

    def _code_has_changed(self) -> bool:
        """Whether another run would be of another version than those before it, and no table could hold it."""
        now = code_version()
        if now != self._commit:
            self.problem = UserError(
                f"the code was {self._commit} when the study began and is {now} now, and no table could hold both: "
                f"no further run was started; go back to {self._commit}, or choose another --name"
            )
        return self.problem is not None

    def _start(self, job: Job | Measurement, place: str | None, lock: Any) -> None:
        job.failure.unlink(missing_ok=True)
        output = (job.folder / "output.txt").open("ab")
        process = subprocess.Popen(
            process_command(job.on(place)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(len(self.places)),
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
        self._running.append(_Running(job, place, process, (lock, output)))
        self.say(f"start {job.name}" + (f" on {place}" if place else ""))

    def _collect(self) -> None:
        """Note the runs that have ended."""
        for one in [one for one in self._running if one.process.poll() is not None]:
            self._running.remove(one)
            for file in one.files:
                file.close()
            status = one.process.returncode
            if status == 0 and one.job.finished() is not None:
                self.say(f"done  {one.job.name}")
            elif (-status if status < 0 else status - 128) in self._passed_on:
                self.say(f"saved {one.job.name}")
            else:
                self.failed.append(one.job)
                message = last_error((one.job.folder / "output.txt").read_text(encoding="utf-8", errors="replace"))
                message = message if status else one.job.no_result
                write_json(one.job.failure, {"status": status, "message": message})
                self.say(f"FAILED {one.job.name}: exit status {status}: {message}")


def environment(places: int) -> dict[str, str]:
    """Of a run's process: it has its share of the cores."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // places)), **os.environ}


def last_error(text: str) -> str:
    """The last message of a process: its last line that says error, else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if re.match(r"error: |\S+: error: |[\w.]*Error: ", line)]
    return (errors or lines or ["no message"])[-1]


def describe_plan(study: Study, places: Sequence[str | None]) -> Iterator[str]:
    """The lines of ``--dry-run``: each run, and hours from a measured step of each row. Writes nothing."""
    done = {job: job.finished() is not None for job in study.jobs}
    left = sum(not is_done for is_done in done.values())
    if left:
        refuse_other_commit(study)
    yield f"{len(study.cells)} rows, {len(study.jobs)} runs of {steps_text(study)} steps, {left} to do; {study.folder}"
    hours, unknown, longest = 0.0, 0, 0.0
    for cell in study.cells:
        jobs = [job for job in study.jobs if job.cell == cell]
        yield f"\n{cell.label}"
        for job in jobs:
            yield f"  seed {job.seed}: {'done' if done[job] else 'to do'}\n    {shown(job.command)}"
        todo = [job for job in jobs if not done[job]]
        if not todo:
            continue
        estimate = measure(todo[0], places)
        if isinstance(estimate, str):
            unknown += len(todo)
            yield f"  no estimate: {estimate}"
        else:
            hours, longest = hours + estimate * len(todo), max(longest, estimate)
            yield f"  {estimate:.2f} hours a run, {estimate * len(todo):.2f} hours for {len(todo)}"
    if study.measurements:
        splits = ", ".join(dict.fromkeys(one.split for one in study.measurements))
        yield f"\nthen each run is measured once on: {splits}; not in the estimate"
    if left > unknown:
        both = max(longest, hours / len(places))
        at_once = f", {both:.2f} hours with {len(places)} at a time" if len(places) > 1 else ""
        yield f"\nestimated time        {hours:.2f} hours{at_once}; runs that have begun count in full"
    if unknown:
        yield f"\nno estimate for {unknown} of {left} runs"


def measure(job: Job, places: Sequence[str | None]) -> float | str:
    """The hours of a run, by the training script's own ``--dry-run``; its last message where it does not say."""
    start = job.command[: job.command.index("--resume")]
    rest = job.command[job.command.index("--resume") + 2 :]
    device = ["--device", places[0]] if places[0] else []
    done = subprocess.run(
        [*process_command((*start, *rest)), "--dry-run", *device],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(len(places)),
        check=False,
    )
    found = ESTIMATE.search(done.stdout)
    return float(found[1]) if found else last_error(done.stderr)


def check_places(devices: Sequence[str] | None, jobs: int | None) -> list[str | None]:
    """Where runs take place, from ``--devices`` and ``--jobs``."""
    if jobs is not None and jobs < 1:
        raise UserError("--jobs must be at least 1")
    if not devices:
        return [None] * (jobs or 1)
    if jobs is not None:
        raise UserError("--devices runs one at a time on each device it names; leave out --jobs")
    if len(set(devices)) < len(devices):
        raise UserError("--devices names a device twice; one run at a time is on each")
    return list(devices)


def begun_message(study: Study) -> str:
    """What is there to do."""
    done = sum(job.finished() is not None for job in study.jobs)
    return f"{len(study.jobs)} runs of {steps_text(study)} steps, {done} already done; logs in {study.folder}"


def stopped_message(study: Study) -> str:
    """What to do after a signal."""
    done = sum(job.finished() is not None for job in study.jobs)
    return f"stopped, {done} of {len(study.jobs)} runs are done; the same command goes on: {shown(study.command)}"


def _write_plan(study: Study) -> None:
    """study.json, and a job.json in each run's folder: what a report needs, now or later, of runs done or not.

    Other runs of the study that are done, by a command for other rows or seeds, stay in it.
    """
    for job in study.jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        about = {"label": job.cell.label, "seed": job.seed, "command": shown(job.command)}
        write_json(job.folder / "job.json", about | {"config": dump_config(job.config)})
    names, others = [job.name for job in study.jobs], [path.name for path in finished_before(study)]
    earlier = (read_json(study.folder / "study.json") or {}).get("commands", []) if others else []
    commands = [*(one for one in earlier if one != shown(study.command)), shown(study.command)]
    write_json(study.folder / "study.json", {"name": study.name, "commands": commands, "jobs": [*others, *names]})


def _lock(folder: Path) -> Any:
    """An open file with a lock that the run's process inherits; None while another process has it."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def refuse_other_commit(study: Study) -> str:
    """The code's version; UserError if what is done was computed by another one: no table could hold both."""
    now = code_version()
    for folder in [*(job.finished() for job in study.jobs), *finished_before(study).values()]:
        then = (read_json(folder / "result.json") or {}).get("commit", now) if folder is not None else now
        if then != now:
            raise UserError(
                f"{folder} was computed by commit {then}, the code is {now} now, and both cannot share a table; check "
                f"out {then.partition('+')[0]}, or choose another --name"
            )
    return now
