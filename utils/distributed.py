"""Several processes as one run, on torch's own engine: started by torchrun (under Slurm's srun too), or ``--gpus N``.

Every process trains its share of each batch. Which images a step sees and how they are cropped does not depend on the
number of processes; masks, jitter and dropout are drawn for each part of the batch that is computed at once, keyed by
its place, so that two processes draw what one does in two parts. All functions do nothing, and give back what they
got, in a run of one process.
"""

import datetime
import logging
import os
import signal
import sys
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.config import Config
from utils.errors import PeerError, UserError, leave_at_once, say

T = TypeVar("T")


class World(NamedTuple):
    """Which of how many processes this is; local_rank and local_size count those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes: folder, checkpoints, logs."""
        return self.rank == 0


ALONE = World()


def world() -> World:
    """From the environment that torchrun sets; UserError where it holds only a part of that."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and (missing := [key for key in _KEYS if key not in os.environ]):
        raise UserError(
            f"the environment has WORLD_SIZE {os.environ['WORLD_SIZE']}, but not {', '.join(missing)}: start all "
            "processes with torchrun, or unset WORLD_SIZE for a single one"
        )
    return World(*(int(os.environ.get(key, str(alone))) for key, alone in zip(_KEYS, ALONE, strict=True)))


_STATUS = "exit status"  # where a process that ends with a message tells the others its exit status and machine
_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def process_group(device: str, *, timeout: float) -> Iterator[World]:
    """Join the other processes; ``timeout``: seconds after which one that does not answer ends the run.

    device: "auto", "cpu" or "cuda". Raises PeerError, for whatever happens inside, when another process is gone. It has
    the exit status of the other's UserError: whichever ends first, the launcher sees the same one, and one speaks.
    """
    here = world()
    if here.size == 1:
        yield here
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    gpu = torch.device("cuda", here.local_rank) if on_gpu else None
    if gpu is not None:
        if here.local_size > torch.cuda.device_count():
            raise UserError(
                f"{here.local_size} processes on this machine, but GPUs: {torch.cuda.device_count()}; start one for "
                "each GPU, or give --device cpu"
            )
        torch.cuda.set_device(gpu)
    store: dist.Store | None = None
    try:
        wait = datetime.timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        # A restarted job finds the store of the one before: without a place of its own it may read where that one was.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait, device_id=gpu)
        yield here
        dist.destroy_process_group()
    except UserError as error:
        say(error)  # before the others end: then the launcher ends this process too
        if store is not None:
            with suppress(RuntimeError):  # the process that keeps the store is gone
                store.set(_STATUS, f"{error.exit_status} {_machine()}")
        raise
    except RuntimeError as error:  # gloo and NCCL know no other
        if not any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection", "timed out", "Timed out")):
            raise
        reason = str(error).splitlines()[0]
        ended = PeerError(
            f"process {here.rank} of {here.size}: another process of this run has ended or does not answer ({reason}); "
            "its own message says why. Continue with --resume auto"
        )
        with suppress(RuntimeError):
            if store is not None and store.check([_STATUS]):
                status, machine = store.get(_STATUS).decode().split()
                ended.exit_status, ended.is_said = int(status), machine == _machine()
        raise ended from None
    finally:  # after an error
        if dist.is_initialized():
            _leave_others()


def _leave_others() -> None:
    """After an error. NCCL would wait for the others to say goodbye, at the interpreter's end too, while they wait for
    this process: it ends by `leave_at_once` instead, once its message is said."""
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()
    else:
        leave_at_once()


def _machine() -> str:
    """Its number among those of the run."""
    return os.environ.get("GROUP_RANK", "0")


def ignores_hangup() -> bool:
    """Whether this process was started with nohup: it stays when its terminal goes."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def launch(count: int, config: Config | None = None) -> int:
    """Run this command in ``count`` processes on this machine; the exit status of the first one that fails, or 0.

    config: for what can be said once instead of by each process: UserError as ``part_size``.
    Raises PeerError, with the exit status that a shell would tell, if a signal that was not for all of them killed it.
    """
    if config is not None:
        part_size(config, World(size=count))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # our own messages say why
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if ignores_hangup():
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    processes = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    try:
        elastic_launch(processes, sys.executable)(*sys.argv)  # with --gpus too: each knows that it is one of them
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        killed = PeerError(
            f"process {rank} of {count} was killed by signal {-failure.exitcode}; 9 is mostly the system's, for lack "
            "of memory. Continue with --resume auto"
        )
        killed.exit_status = 128 - failure.exitcode
        raise killed from None
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def part_size(config: Config, here: World) -> int:
    """Images of a stream that one process computes at once. Raises UserError if the batch cannot be shared so."""
    whole, parts = config.training.batch_size, here.size * config.training.accumulation
    if whole % parts:
        raise UserError(
            f"training.batch_size {whole} cannot be shared among {here.size} processes x training.accumulation "
            f"{config.training.accumulation}; choose a multiple of {parts}"
        )
    return whole // parts


def parallel(method: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """What averages the gradients over the processes: ``method`` itself where there is one process."""
    if config.training.use_sync_batchnorm:
        if device.type != "cuda":
            warnings.warn(
                "training.use_sync_batchnorm has no effect on a CPU: torch has it on GPUs alone", stacklevel=2
            )
        elif dist.is_initialized():
            nn.SyncBatchNorm.convert_sync_batchnorm(method)
    if not dist.is_initialized():
        return method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's new name is not known before torch 2.15
        return DistributedDataParallel(method, broadcast_buffers=False)


# ------------------------------------------------------------------------------------------------ talking


def from_first(value: T) -> T:
    """The first process's value, plain or tensors, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def one_after_another(here: World) -> Iterator[None]:
    """On every machine its first process goes first, for example to download what the others then find."""
    if here.size > 1 and here.local_rank > 0:
        dist.barrier()
    yield
    if here.size > 1 and here.local_rank == 0:
        dist.barrier()


def largest(values: Tensor) -> Tensor:
    """Each value's maximum over the processes; the host does not wait for it."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes; integers exactly."""
    if not dist.is_initialized():
        return tensor
    summed = tensor.to(_device())
    dist.all_reduce(summed)
    return summed.to(tensor.device)


def average_(tensors: Sequence[Tensor], *, frozen: Tensor | None = None) -> None:
    """Replace floating tensors by their mean over the processes, in one message.

    frozen: () bool, where True they stay as they are.
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not dist.is_initialized() or not floats:
        return
    flat = torch.cat([tensor.flatten() for tensor in floats])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, part in zip(floats, flat.split([tensor.numel() for tensor in floats]), strict=True):
        mean = part.view_as(tensor)
        tensor.copy_(mean if frozen is None else torch.where(frozen, tensor, mean))


def gather(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of the same shapes everywhere -> those of every process, in the order of the ranks."""
    if not dist.is_initialized():
        return [list(tensors)]
    parts = [[torch.empty_like(tensor) for _ in range(dist.get_world_size())] for tensor in tensors]
    for tensor, places in zip(tensors, parts, strict=True):
        dist.all_gather(places, tensor.contiguous())
    return [list(one) for one in zip(*parts, strict=True)]


def all_messages(message: str) -> list[str]:
    """The messages of all processes that have one."""
    if not dist.is_initialized():
        return [message] if message else []
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, message)
    return [one for one in found if one]


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
