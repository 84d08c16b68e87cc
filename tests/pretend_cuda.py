"""A GPU for machines without one: python3 -m tests.pretend_cuda SCRIPT ARGUMENTS --device cuda:0.

The script runs on tensors that say they lie on cuda:0 and are computed on the CPU. What a GPU would refuse is refused,
operations on tensors of two devices, and each place where the host would have to wait for the GPU is counted. Nothing
of CUDA itself runs: kernels, streams, memory and precision are not tried by this. Its last line is the waits as JSON.
"""

import contextlib
import json
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

PROJECT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")
WAITS = Counter[str]()  # "file:line operation" -> how often
# Their result's size depends on values, or they are values, for which the host waits.
READ_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount"}


class OnGpu(torch.Tensor):
    """A tensor of the CPU, ``held``, that says it is on the GPU. Operations on it are ``PretendGpu``'s."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        made = torch.Tensor._make_subclass(cls, held, held.requires_grad, dispatch_device=True)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, *_: Any) -> Any:
        raise RuntimeError(f"{operation} after the end of the script")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    is_cuda = True  # type: ignore[assignment]

    # torch's own look at where the values really are.

    def to(self, *args: Any, **options: Any) -> Tensor:
        where = options.get("device", next((one for one in args if isinstance(one, str | torch.device)), None))
        if where is not None and torch.device(where).type == "cpu" and not _called_by_optimizer():
            return self._read("to").to(*args, **options)
        args = tuple(one for one in args if not isinstance(one, str | torch.device))
        options = {key: value for key, value in options.items() if key != "device"}
        return super().to(*args, **options) if args or set(options) - {"non_blocking"} else self

    def cpu(self, *_: Any) -> Tensor:  # type: ignore[override]
        return self._read("cpu")

    def tolist(self) -> Any:
        return self._read("tolist").tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda:0 to numpy")

    __array__ = numpy  # type: ignore[assignment]

    def record_stream(self, *_: Any) -> None: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> "OnGpu":
        return OnGpu(self.held.detach().clone()).requires_grad_(self.requires_grad)

    def _read(self, how: str) -> Tensor:
        wait(how)
        return self.held.detach()


class PretendGpu(TorchDispatchMode):
    """Computes every operation on the CPU, where its tensors agree about their device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = operation.name().removeprefix("aten::").partition(".")[0], dict(kwargs or {})
        tensors = [one for one in tree_iter((args, options)) if isinstance(one, Tensor)]
        there = [one for one in tensors if isinstance(one, OnGpu)]
        here = [one for one in tensors if not isinstance(one, OnGpu) and one.dim() > 0]
        wanted = options.pop("device", None)
        to_gpu = torch.device(wanted).type == "cuda" if wanted is not None and not there else bool(there)
        if name == "copy_":
            to_gpu = isinstance(args[0], OnGpu)
        if name in ("_to_copy", "copy_"):
            if to_gpu and here and not (options.get("non_blocking") or any(one is True for one in args[2:])):
                wait(name)
        elif there and here and not _is_autograds_own():
            raise RuntimeError(f"{operation}: tensors on cuda:0 and on the cpu ({place()})")
        if there and (name in READ_VALUES or (name.startswith("index") and _has_mask(args[1:]))):
            wait(name)
        if wanted is not None:
            options["device"] = HOST
        held = {id(one.held): one for one in there}
        found = operation(*tree_map(_held, args), **tree_map(_held, options))

        def placed(one: Any) -> Any:
            return (held[id(one)] if id(one) in held else OnGpu(one)) if isinstance(one, Tensor) and to_gpu else one

        return found if name == "_local_scalar_dense" else tree_map(placed, found)


def _held(one: Any) -> Any:
    return one.held if isinstance(one, OnGpu) else one


def _has_mask(args: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in tree_iter(args))


def _is_autograds_own() -> bool:
    """In a backward pass torch's C++ makes zeros where it takes the tensors to be: on the CPU."""
    names = [frame.name for frame in traceback.extract_stack()]
    return "_engine_run_backward" in names and "backward" not in names[names.index("_engine_run_backward") :]


def _called_by_optimizer() -> bool:
    """A fused one groups parameters in C++ by the device, and moves the guard's word to where it takes them to be."""
    return Path(traceback.extract_stack(limit=3)[0].filename).parent.name == "optim"


def wait(how: str) -> None:
    WAITS[f"{place()} {how}"] += 1


def place() -> str:
    """Where the project called torch."""
    files = (frame for frame in reversed(traceback.extract_stack()) if frame.filename.startswith(str(PROJECT)))
    mine = (frame for frame in files if ".venv" not in frame.filename and frame.filename != __file__)
    return next((f"{Path(one.filename).relative_to(PROJECT)}:{one.lineno}" for one in mine), "?")


class _Stream:
    def __init__(self, *_: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...


def pretend() -> None:
    """Put what does not ask through operations in the place of torch.cuda's."""
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    torch.cuda.device_count = lambda: 1  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda *_: "pretended GPU"
    torch.cuda.max_memory_allocated = lambda *_: 0
    torch.cuda.current_stream = torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment]
    torch.__future__.set_swap_module_params_on_conversion(True)


def main() -> None:
    script, sys.argv = sys.argv[1], sys.argv[1:]
    pretend()
    status: Any = 0
    with PretendGpu():
        try:
            runpy.run_path(str(PROJECT / script), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    print(json.dumps(WAITS.most_common()))
    sys.exit(status)


if __name__ == "__main__":
    main()
