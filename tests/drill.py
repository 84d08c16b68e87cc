"""Fire drill: everything that may happen to a long run happens to short ones. ``python -m tests.drill`` (CPU, minutes).

Prints a table and ends with status 1 if anything did not survive. "Survived" means: the right status and message, no
process and no temporary file left, and, resumed, the same bits as a run that nothing happened to.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests import faults
from tests.faults import SAVE_EVERY, Fault, Training, ended, results_differ, run_folder, write_config
from tests.test_distributed import finish, ranks_of, torchrun
from tests.test_scripts import ENVIRONMENT


class Place(NamedTuple):
    """folder: to work in, empty. demo: the dataset. undisturbed: folder of a run that nothing happened to."""

    folder: Path
    demo: Path
    undisturbed: Path


class Trial(NamedTuple):
    """problem: why it did not survive, or nothing. lost: steps done again."""

    problem: str
    lost: int = 0


def stop_and_resume(place: Place, demo: Path, fault: Fault, *, status: int, **changes: object) -> Trial:
    """Train until a fault stops the run with ``status``, resume, compare."""
    config = write_config(place.folder, demo, training__num_workers=1, **changes)
    arguments = ("--config", config, "--name", "drill", "--resume", "auto")
    with ended(Training(place.folder, *arguments, faults=(fault,))) as first:
        found, orphans = first.wait(), first.left_over()
        if demo != place.demo:  # a copy that the fault may have spoiled
            shutil.rmtree(demo)
            shutil.copytree(place.demo, demo)
    if found != status or orphans or "Traceback" in first.errors:
        return Trial(f"status {found}, expected {status}, {len(orphans)} processes left:\n{first.errors}")
    with ended(Training(place.folder, *arguments)) as second:
        if second.wait() != 0:
            return Trial(f"could not go on:\n{second.errors}")
    different = results_differ(run_folder(place.folder), place.undisturbed)
    lost = first.steps[-1] - (second.steps[0] - 1) if second.steps else 0
    return Trial(f"{len(different)} differences, for example {different[0]}" if different else "", lost)


def killed(place: Place, rng: random.Random) -> Trial:
    """kill -9 four times, anywhere."""
    config = write_config(place.folder, place.demo, training__num_workers=rng.choice((0, 1)))
    survived = faults.kill_and_resume(place.folder, config, [faults.random_kill(rng) for _ in range(4)])
    different = results_differ(survived.folder, place.undisturbed)
    return Trial(f"{len(different)} differences, for example {different[0]}" if different else "", survived.lost)


def fuzzed(place: Place, rng: random.Random) -> Trial:
    """One checkpoint, spoiled in one way."""
    wrong = faults.fuzz(place.folder, 1, rng.randrange(2**32)).wrong
    return Trial("; ".join(wrong))


def full_disk(place: Place, rng: random.Random) -> Trial:
    fault = Fault("step", rng.randint(3, 7), faults.limit_files, (50_000,))
    return stop_and_resume(place, place.demo, fault, status=3)


def dead_loader(place: Place, rng: random.Random) -> Trial:
    chosen = rng.choice((("training sample", 9), ("validation sample", 2), ("update", 6), ("opened", 3)))
    action = faults.kill if "sample" in chosen[0] else faults.kill_a_loader
    return stop_and_resume(place, place.demo, Fault(*chosen, action), status=3)


def hanging_loader(place: Place, rng: random.Random) -> Trial:
    copy = shutil.copytree(place.demo, place.folder / "data")
    fault = Fault("step", 2, faults.hang, (str(copy / "JPEGImages"), rng.choice(("unlabeled_", "labeled_", "val_"))))
    return stop_and_resume(place, copy, fault, status=3, training__data__timeout=2)


def told_to_stop(place: Place, rng: random.Random) -> Trial:
    number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    fault = Fault("step", rng.randint(1, 7), rng.choice((faults.send, faults.send_to_group)), (number,))
    return stop_and_resume(place, place.demo, fault, status=128 + number)


def killed_rank(place: Place, rng: random.Random) -> Trial:
    """One of two processes is killed; the job ends, and started again with two it goes on."""
    step = rng.randint(2, 6)
    folders = [place.folder / name for name in ("undisturbed", "killed")]
    for folder in folders:
        folder.mkdir()
        config = write_config(folder, place.demo)
        command = torchrun(faults.SCRIPT, "--config", config, "--name", "x", "--device", "cpu", "--resume", "auto")
        if folder.name == "killed":
            status, errors = kill_one_rank(command, folder, step)
            if status == 0:
                return Trial(f"the job went on without one of its processes:\n{errors}")
        done = finish(command)
        if done.returncode != 0:
            return Trial(f"status {done.returncode}:\n{done.stderr}")
    different = results_differ(run_folder(folders[1]), run_folder(folders[0]))
    return Trial(f"{len(different)} differences, for example {different[0]}" if different else "")


def kill_one_rank(command: list[str], folder: Path, step: int) -> tuple[int, str]:
    """Start a job, kill its second process once a step is logged; its status and messages."""
    process = subprocess.Popen(command, cwd=faults.PROJECT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        while not any(f'"step": {step},' in log.read_text() for log in folder.glob("runs/*/log.jsonl")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
        _, errors = process.communicate(timeout=faults.PATIENCE)
        return process.returncode, errors
    finally:
        process.kill()


class Drill(NamedTuple):
    """trials: how many by default. may_lose: steps that may have to be done again."""

    run: Callable[[Place, random.Random], Trial]
    trials: int
    may_lose: int


DRILLS = {
    "kill -9, four times": Drill(killed, 30, SAVE_EVERY),
    "spoiled checkpoint": Drill(fuzzed, 1000, 0),
    "full disk": Drill(full_disk, 4, SAVE_EVERY),
    "dead loader": Drill(dead_loader, 6, SAVE_EVERY),
    "hanging loader": Drill(hanging_loader, 3, SAVE_EVERY),
    "signal": Drill(told_to_stop, 8, 0),
    "killed rank": Drill(killed_rank, 2, SAVE_EVERY),
}


def trials_of(drill: Drill, count: int, seed: int, root: Path, place: Place) -> Iterator[Trial]:
    for number in range(count):
        folder = root / f"{drill.run.__name__}_{number}"
        folder.mkdir()
        try:
            trial = drill.run(place._replace(folder=folder), random.Random(f"{seed} {number}"))
        except AssertionError as error:  # a process that did not end, or ended in another way
            trial = Trial(str(error))
        if trial.lost > drill.may_lose:
            trial = Trial(f"{trial.lost} steps lost, at most {drill.may_lose} may be; {trial.problem}", trial.lost)
        shutil.rmtree(folder)
        yield trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, metavar="N", help="of each fault, instead of the table's own numbers")
    parser.add_argument("--only", choices=DRILLS, metavar="NAME", help=f"one of: {', '.join(DRILLS)}")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, default 0")
    args = parser.parse_args()
    problems = []
    print(f"{'fault':<22}{'trials':>8}{'survived':>10}{'lost at most':>14}{'seconds':>9}")
    with tempfile.TemporaryDirectory(prefix="drill-") as name:
        root = Path(name)
        demo = faults.tiny_demo(root / "demo")
        with ended(Training(root, "--config", write_config(root, demo), "--name", "undisturbed")) as training:
            assert training.wait() == 0, training.errors
        place = Place(root, demo, run_folder(root))
        for fault, drill in DRILLS.items():
            if args.only not in (None, fault):
                continue
            start = time.perf_counter()
            trials = list(trials_of(drill, args.trials or drill.trials, args.seed, root, place))
            bad = [f"{fault}, trial {number}: {t.problem}" for number, t in enumerate(trials) if t.problem]
            problems += bad
            lost, seconds = max(trial.lost for trial in trials), time.perf_counter() - start
            shown = f"{lost} steps" if drill.run is not fuzzed else "-"
            print(f"{fault:<22}{len(trials):>8}{len(trials) - len(bad):>10}{shown:>14}{seconds:>9.1f}", flush=True)
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
