"""Faster arithmetic and less memory, where the configuration asks for it. Evaluation always computes in float32."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from utils.config import Config

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """In it networks compute as ``training.precision`` says; losses and similarities stay in float32 by themselves."""
    dtype = PRECISIONS.get(config.training.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def loss_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that float16 holds its gradients; with another precision it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16")


@contextmanager
def full_float32() -> Iterator[None]:
    """In it no GPU shortens the mantissas of float32, as cuDNN's convolutions do unless told otherwise."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def set_float32(config: Config) -> None:
    """Of the whole process: whether a GPU may shorten the mantissas of float32."""
    torch.set_float32_matmul_precision("high" if config.training.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config.training.precision == "tf32"


def arrange(method: Any, config: Config) -> None:
    """Prepare a method's networks: order of their weights in memory, TensorFloat-32, recomputation, compilation."""
    set_float32(config)
    if config.training.channels_last:
        method.to(memory_format=torch.channels_last)
    networks = [*method.students, *(teacher.network for teacher in method.teachers)]
    for network in networks:
        network.backbone.recompute = config.training.checkpoint_activations
        if config.training.compile:
            network.compile()


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next tensor, in a process that computes on the CPU.

    glibc gives large blocks back to the system at once and fetches them again, page by page, for the next operation:
    a good part of a step's time. Nothing happens with another C library.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    trim_threshold, mmap_max, never = -1, -4, -1  # names and values of <malloc.h>
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, never)


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors held on a GPU, or that this process held in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
