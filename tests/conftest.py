"""Tiny networks, batches and configurations that the tests share."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.demo import make_demo_dataset
from utils.batch import Batch
from utils.config import Config, check_config

# Tests that are started in the background or with nohup: what they send is heard all the same.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

CLASSES = 3


def golden(name: str) -> dict[str, Tensor]:
    """Inputs and outputs of the release, as tensors."""
    values = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in values.items()}


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def tiny_records(**records: Any) -> dict[str, Any]:
    """What a checkpoint holds, nothing learned; ``records`` are put in the place of these."""
    origin = {"commit": "0123456789ab", "torch": "2.14.1", "machine": "a CPU, 1 threads"}
    empty = {"facts": {}, "bad_files": [], "method": {}, "optimizer": {}, "scaler": {}, "must_validate": False}
    return {"step": 3, "best": {}, "config": "{}", "origin": origin, **empty, "threads": 1, "parts": 1, **records}


def tiny_values(**changes: Any) -> dict[str, Any]:
    """The JSON values of a run on a small network; ``changes`` are dotted keys with __ for the dots."""
    values: dict[str, Any] = {
        "backbone": "resnet18",
        "backbone_width": 8,
        "feature_channels": 32,
        "pretrained": "none",
        "dataset": {"root": "nowhere", "labeled": "labeled.txt", "unlabeled": "unlabeled.txt", "num_classes": CLASSES},
        "seed": 1,
        "training": {
            "batch_size": 2,
            "num_workers": 0,
            "num_iterations": 8,
            "learning_rate": 0.01,
            "data": {"input_size": "40,48"},
            "unlabeled": {},
            "contrastive": {"memory_size": 4, "memory_confidence": 0.0},
        },
        "utils": {},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        block = values
        for name in parents:
            block = block.setdefault(name, {})
        block[last] = value
    return values


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that nobody changes; a test that spoils one copies it."""
    return make_demo_dataset(tmp_path_factory.mktemp("data") / "demo", size=(48, 48), labeled=6, unlabeled=6, val=3)


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    return lambda **changes: check_config(tiny_values(**changes), source="test")


@pytest.fixture
def batches() -> Callable[..., tuple[Batch, Batch]]:
    """(labeled, unlabeled) random batches, as they reach the training step."""

    def make(size: int = 2, *, seed: int = 0, height: int = 40, width: int = 48) -> tuple[Batch, Batch]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(2 * size, 3, height, width, generator=generator)
        labels = torch.randint(0, CLASSES, (size, height, width), generator=generator)
        labels[:, :2] = 255
        valid = torch.ones(2 * size, height, width, dtype=torch.bool)
        valid[:, -3:] = False
        names = [f"image_{index}" for index in range(2 * size)]
        return (
            Batch(images[:size], labels, valid[:size], names[:size]),
            Batch(images[size:], torch.full_like(labels, 255), valid[size:], names[size:]),
        )

    return make
