"""Faster arithmetic, where the configuration asks for it. Evaluation always computes in float32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from utils.config import Config


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """In it networks compute as ``training.precision`` says; losses and similarities stay in float32 by themselves."""
    if config.training.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def arrange(method: nn.Module, config: Config) -> None:
    """Prepare a method's networks: the order of their weights in memory, TensorFloat-32, compilation."""
    torch.set_float32_matmul_precision("high" if config.training.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config.training.precision == "tf32"
    if config.training.channels_last:
        method.to(memory_format=torch.channels_last)
    if config.training.compile:
        for student in method.students:  # type: ignore[union-attr]
            student.compile()
        for teacher in method.teachers:  # type: ignore[union-attr]
            teacher.network.compile()
