"""What can be known of CUDA without a GPU: no operation takes tensors of two devices, and no ordinary step waits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretend_cuda import GPU, WAITS, PretendGpu
from tests.test_scripts import ENVIRONMENT, PROJECT, SCRIPTS, run, write_config

OPTIONS = {
    "training__num_iterations": 2,
    "training__logit_adjustment": 0.5,
    "training__channels_last": True,
    "training__unlabeled__adjust_logits": True,
    "training__contrastive__max_anchors": 16,
    "training__contrastive__contrast_start": 1,
    "utils__log_per_iter": 100,
    "utils__val_per_iter": 100,
    "utils__save_checkpoint_every": 100,
}


def on_gpu(*args: Any) -> dict[str, int]:
    """Runs a script -> place and kind of each wait of the host, and how often."""
    command = [sys.executable, "-m", "tests.pretend_cuda", *map(str, args)]
    done = subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS.values())
def test_a_run_computes_what_it_does_on_the_cpu_and_waits_no_more_for_more_steps(
    tmp_path: Path, demo: Path, script: str
):
    start = (script, "--config", write_config(tmp_path, demo, **OPTIONS), "--name")
    waits = on_gpu(*start, "gpu", "--device", "cuda:0")
    assert on_gpu(*start, "longer", "--device", "cuda:0", "--set", "training.num_iterations=5") == waits
    assert run(*start, "cpu", "--device", "cpu").returncode == 0
    (gpu,), (cpu,) = (list((tmp_path / "runs").glob(f"*-{name}")) for name in ("gpu", "cpu"))
    there, here = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (gpu, cpu))
    # Not bits: sums are taken in another order, contrast in larger parts.
    torch.testing.assert_close(there["method"], here["method"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_what_is_done_with_a_checkpoint_keeps_to_one_device(tmp_path: Path, demo: Path):
    start = (SCRIPTS["DeepLabv3+"], "--config", write_config(tmp_path, demo, **OPTIONS), "--name", "gpu")
    on_gpu(*start, "--device", "cuda:0", "--set", "utils.save_checkpoint_every=1")
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "checkpoint.pth").unlink()  # the step before is left
    assert "utils/trainer.py" in str(on_gpu(*start, "--device", "cuda:0", "--resume", "auto")), "state for the GPU"
    on_gpu("evaluateSSL.py", "-m", folder, "--gpu", "0", "--flip", "--protocol", "sliding")
    on_gpu("predict.py", folder, demo / "JPEGImages", tmp_path / "predictions", "--gpu", "0", "--confidence")


def test_the_stand_in_refuses_what_a_gpu_would_and_counts_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    WAITS.clear()
    with PretendGpu():
        values = torch.arange(3.0).to(GPU, non_blocking=True).requires_grad_()
        (values * 2).sum().backward()
        assert getattr(values.grad, "device", None) == GPU
        assert not WAITS
        with pytest.raises(RuntimeError, match=r"add.Tensor: tensors on cuda:0 and on the cpu \(tests/test_pretend"):
            values + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            values.detach().numpy()
        for waits in (
            lambda: values.sum().item(),
            lambda: bool(values[0] > 0),
            lambda: values[values > 1],
            lambda: values.nonzero(),
            lambda: values.cpu(),
            lambda: torch.ones(3).to(GPU),
        ):
            WAITS.clear()
            waits()
            assert WAITS.total() == 1
