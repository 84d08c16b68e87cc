"""Several processes, over gloo on the CPU: they compute what one process does, and end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loaders import Positions
from model.memory_bank import MemoryBank
from tests.conftest import tiny_values
from tests.test_scripts import ENVIRONMENT, PROJECT, SCRIPTS, run, write_config
from utils.checkpoint import load_checkpoint
from utils.config import check_config
from utils.distributed import ALONE, World, launch, part_size, process_group, world
from utils.errors import UserError
from utils.logger import COSTS

# ------------------------------------------------------------------------------------------------ the same images


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_the_parts_of_a_step_make_the_batch_of_one_process(processes: int, accumulation: int):
    config = check_config(tiny_values(training__batch_size=4, training__accumulation=accumulation), source="test")
    whole = list(Positions(range(3, 6), 4, ALONE))
    assert whole == list(range(12, 24))
    parts = []
    for rank in range(processes):
        here = World(rank, processes)
        own, size = list(Positions(range(3, 6), 4, here)), part_size(config, here)
        assert size * accumulation * processes == 4
        parts.append(np.array(own).reshape(3, -1))  # a row a step
    assert np.concatenate(parts, axis=1).flatten().tolist() == whole


def test_a_batch_that_cannot_be_shared_is_refused():
    config = check_config(tiny_values(training__batch_size=5), source="test")
    with pytest.raises(UserError, match=r"batch_size 5 cannot be shared among 2 processes .* a multiple of 2"):
        part_size(config, World(0, 2))


def test_a_part_of_torchrun_s_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    for key in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="WORLD_SIZE 4, but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE"):
        world()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert world() == ALONE


@pytest.mark.parametrize(("hangup", "told"), [(signal.SIG_IGN, "SIGTERM,SIGINT,SIGQUIT"), (signal.SIG_DFL, None)])
def test_the_launcher_too_stays_under_nohup_when_its_terminal_goes(
    monkeypatch: pytest.MonkeyPatch, hangup: signal.Handlers, told: str | None
):
    seen: list[str | None] = []
    monkeypatch.setattr(
        "torch.distributed.launcher.api.elastic_launch",
        lambda *_: lambda *_: seen.append(os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")),
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    before = signal.signal(signal.SIGHUP, hangup)
    try:
        assert launch(2) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [told]


def test_a_bank_takes_from_several_offers_what_it_would_take_from_one_batch():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(4, 5, 6, 7, generator=generator)
    probabilities = (4 * torch.rand(4, 3, 6, 7, generator=generator)).softmax(dim=1)
    labels = torch.randint(0, 4, (4, 6, 7), generator=generator)
    one, other = MemoryBank(3, size=8, dim=5), MemoryBank(3, size=8, dim=5)
    for _ in range(2):
        one.add(features, probabilities, labels, 5, threshold=0.4)
        parts = zip(features.split(2), probabilities.split(2), labels.split(2), strict=True)
        other.take([other.candidates(*part, 5, threshold=0.4) for part in parts], 5)
    assert one.counts.tolist() == other.counts.tolist()
    assert torch.equal(one.entries, other.entries)
    assert torch.equal(one.seen, other.seen)


# ------------------------------------------------------------------------------------------------ the same weights


def torchrun(*arguments: object, processes: int = 2, options: tuple[str, ...] = ("--standalone",)) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(processes)]
    return [*command, *map(str, arguments)]


def finish(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, env=environment or ENVIRONMENT, timeout=200
    )


def final(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights, teachers and banks at the end, and the lines of the log."""
    (one,) = folder.glob("runs/*/checkpoint.pth")
    lines = [json.loads(line) for line in (one.parent / "log.jsonl").read_text().splitlines()]
    return load_checkpoint(one)["method"], [{k: v for k, v in line.items() if k not in COSTS} for line in lines]


FROZEN = """
import runpy, sys, torch
class Frozen(torch.nn.BatchNorm2d):
    '''BatchNorm that always uses its running statistics and leaves them alone.'''
    def forward(self, x):
        known = self.running_mean, self.running_var, self.weight, self.bias
        return torch.nn.functional.batch_norm(x, *known, eps=self.eps)
torch.nn.BatchNorm2d = Frozen
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does_by_accumulation(tmp_path: Path, demo: Path):
    """Losses, weights, teachers and banks after ten steps within 1e-5, with BatchNorm frozen."""
    (tmp_path / "frozen.py").write_text(FROZEN)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(PROJECT)}
    states = {}
    for name, accumulation in (("one", 2), ("two", 1)):
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(
            folder, demo, training__batch_size=4, training__num_iterations=10, training__accumulation=accumulation,
            training__contrastive={"memory_size": 4, "memory_confidence": 0.0, "contrast_start": 3},
            training__unlabeled={"pixel_weight": False, "adjust_logits": True}, training__learning_rate=0.001,
        )  # fmt: skip
        arguments = [tmp_path / "frozen.py", SCRIPTS["DeepLab"], "-c", config, "-n", "x", "--device", "cpu"]
        command = torchrun(*arguments) if name == "two" else [sys.executable, *map(str, arguments)]
        done = finish(command, environment)
        assert done.returncode == 0, done.stderr
        states[name] = final(folder)
    (one, log), (two, other_log) = states["one"], states["two"]
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-5, msg=name)
    assert any("low_level/1" in line for line in log), "the contrastive terms were on"
    assert len(log) == len(other_log)
    of_one_part = ("pseudo_label/", "agreement/", "anchors", "gradient_norm/")  # they describe what one process saw
    for line, other in zip(log, other_log, strict=True):
        shared = {key for key in line if not key.startswith(of_one_part)}
        assert shared == {key for key in other if not key.startswith(of_one_part)}
        for key in shared:
            assert line[key] == pytest.approx(other[key], abs=1e-4), key


@pytest.mark.slow
def test_gpus_starts_the_processes_and_a_run_goes_on_with_another_number_of_them(tmp_path: Path, demo: Path):
    config = write_config(tmp_path, demo, training__batch_size=4, training__num_iterations=4)
    done = run(SCRIPTS["DeepLabv3+"], "-c", config, "-n", "x", "--device", "cpu", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout.count("mean IoU") == 1, "one process speaks"
    assert json.loads((folder / "result.json").read_text())["images"] == 3, "each image once, though 3 is odd"
    alone = run("evaluateSSL.py", "-m", folder / "checkpoint.pth")
    assert (
        json.loads((folder / "evaluation-val-original/result.json").read_text())["models"]
        == (json.loads((folder / "result.json").read_text())["models"])
    ), alone.stderr
    again = run(SCRIPTS["DeepLabv3+"], "-c", config, "-n", "x", "--device", "cpu", "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert "resumed with other parts 2, now 1" in again.stderr


@pytest.mark.slow
def test_a_wrong_input_of_several_processes_is_one_message_with_its_status(tmp_path: Path, demo: Path):
    config = write_config(tmp_path, demo, training__batch_size=4)
    for arguments, message, status in (
        (["--set", "training.batch_size=3"], "cannot be shared among 2 processes", 2),
        (["--data-root", tmp_path / "gone"], "gone: no such folder", 2),
        (["--set", "pretrained=gone.pth"], "no weights file gone.pth", 5),
    ):
        done = run(SCRIPTS["DeepLab"], "-c", config, "-n", "x", "--device", "cpu", "--gpus", 2, *arguments)
        assert done.returncode == status, done.stderr
        assert message in done.stderr
        assert done.stderr.count(message) == 1, done.stderr
        assert done.stderr.count("error:") == 1, done.stderr
        assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ ending together


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def ranks_of(launcher: int) -> list[int]:
    """The processes that a launcher has started, in their order."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == launcher and b"cross_teacher" in (folder / "cmdline").read_bytes():
            found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step_and_go_on(tmp_path: Path, demo: Path):
    config = write_config(tmp_path, demo, training__batch_size=4, training__num_iterations=60, utils__val_per_iter=30)
    arguments = (SCRIPTS["DeepLab"], "-c", config, "-n", "x", "--device", "cpu")
    process = subprocess.Popen(
        torchrun(*arguments), cwd=PROJECT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for(tmp_path, "runs/*/checkpoint.pth", process)
        os.kill(ranks_of(process.pid)[-1], signal.SIGTERM)  # one of them alone
        message = process.communicate(timeout=120)[1]
        assert process.returncode != 0
        assert "stopped by signal 15 after step" in message
        assert ranks_of(process.pid) == []
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    done = finish(torchrun(*arguments, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert "step 60" in done.stdout


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_a_restart_finishes_it(tmp_path: Path, demo: Path):
    config = write_config(
        tmp_path, demo, training__batch_size=4, training__num_iterations=40, training__process_timeout=60,
        utils__val_per_iter=20,
    )  # fmt: skip
    arguments = (SCRIPTS["DeepLab"], "-c", config, "-n", "x", "--device", "cpu", "--resume", "auto")
    process = subprocess.Popen(
        torchrun(*arguments, options=("--standalone", "--max-restarts", "1")), cwd=PROJECT, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(tmp_path, "runs/*/checkpoint.pth", process)
        os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
        said, message = process.communicate(timeout=180)
        assert process.returncode == 0, message
        assert "step 40" in said
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert len(list((tmp_path / "runs").iterdir())) == 1


ENDS = """
import os, signal, sys, time
import torch.distributed as dist
from utils.distributed import launch, process_group
from utils.errors import WeightsError, run_script
def main():
    _, how, *several = sys.argv
    if several and "RANK" not in os.environ:
        return launch(2)
    try:
        with process_group("cpu", timeout=60) as here:
            if here.is_first and how == "raises":
                raise WeightsError("no such weights")
            if here.is_first:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()
    finally:
        time.sleep(5 if here.is_first else 0)
run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "message"),
    [("raises", 5, "error: no such weights"),
     ("killed", 137, "process 0 of 2 was killed by signal 9")],
)  # fmt: skip
def test_the_exit_status_is_that_of_the_process_that_failed_whichever_ends_first(
    tmp_path: Path, how: str, status: int, message: str
):
    (tmp_path / "ends.py").write_text(ENDS)
    environment = ENVIRONMENT | {"PYTHONPATH": str(PROJECT)}
    done = finish([sys.executable, str(tmp_path / "ends.py"), how, "--gpus", "2"], environment)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert how != "raises" or done.stderr.count("error:") == 1, done.stderr


LEAVES = """
import atexit, sys
import torch.distributed as dist
from utils.distributed import _leave_others
from utils.errors import UserError, run_script
dist.get_backend = lambda: sys.argv[1]
dist.destroy_process_group = lambda: print("waited for the others")
atexit.register(print, "ended as usual")
def main():
    try:
        raise UserError("why") if sys.argv[2] == "known" else KeyError("bug")
    finally:
        _leave_others()
run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "error", "status", "output", "message"),
    [
        ("nccl", "known", 2, "", "error: why\n"),
        ("nccl", "bug", 1, "", "KeyError: 'bug'\n"),
        ("gloo", "known", 2, "waited for the others\nended as usual\n", "error: why\n"),
    ],
)
def test_after_an_error_a_process_on_a_gpu_waits_for_no_other(
    tmp_path: Path, backend: str, error: str, status: int, output: str, message: str
):
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [sys.executable, str(tmp_path / "leaves.py"), backend, error]
    done = finish(command, ENVIRONMENT | {"PYTHONPATH": str(PROJECT)})
    assert (done.returncode, done.stdout) == (status, output)
    assert done.stderr.endswith(message)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    for key, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "1212", strict=True):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on this machine, but GPUs: 1"), process_group("auto", timeout=5):
        pass


@pytest.mark.slow
def test_two_machines_train_together(tmp_path: Path, demo: Path):
    """Two torchrun agents, as on two machines, here both on this one."""
    config = write_config(tmp_path, demo, training__batch_size=4, training__num_iterations=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for rank in (0, 1):
        options = ("--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port))
        command = torchrun(SCRIPTS["DeepLab"], "-c", config, "-n", "x", "--device", "cpu", processes=1, options=options)
        agents.append(subprocess.Popen(command, cwd=PROJECT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True))  # fmt: skip
    said = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "mean IoU" in said[0][0]
    assert "mean IoU" not in said[1][0]
