"""Nothing learns from a step whose loss or gradient is not finite, and nobody waits to find out.

The verdict on a step is a number on its device. After a bad one no update changes anything there any more, until the
host reads the verdicts: at once on a CPU; on a GPU every few steps, since waiting at each would leave it idle.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import all_messages, largest

Losses = Mapping[tuple[str, int], Tensor]


class Failure(NamedTuple):
    """The first bad step, and what was not finite in it."""

    step: int
    what: str


class Verdict(NamedTuple):
    """told: (2,) of all processes, whether the step was bad and the signal that ends the run. values: (n,) losses."""

    step: int
    told: Tensor
    values: Tensor
    names: list[tuple[str, int]]
    ids: list[str]


class Guard:
    """Watches the steps of a run. buffers: those that a forward pass changes, BatchNorm's running statistics.

    broken: () bool, True after a bad step: nothing may be changed.
    """

    def __init__(self, buffers: Sequence[Tensor], device: torch.device) -> None:
        self.buffers = list(buffers)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self.agreed_signal: int | None = None
        self._unread: list[Verdict] = []

    def watch(self) -> None:
        """A step begins."""
        self._before = _blocks(self.buffers)

    def judge(
        self, losses: Losses, gradients: Sequence[Tensor], *, step: int, ids: list[str], signal: int, scaled: bool
    ) -> Tensor:
        """Judge a step between its backward pass and its update -> () float32, 1 if the weights must not be updated.

        After a bad step the buffers are as before it. ids: names of the images. signal: that the process received, 0
        if none. scaled: the loss was scaled up for float16, so that an infinite gradient is only too large a scale.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        infinite = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        bad = ~torch.isfinite(values).all()
        bad = bad if scaled else bad | infinite
        told = largest(torch.stack([bad.float(), torch.full_like(values[0], signal)]))
        self.broken = self.broken | (told[0] > 0)
        now = _blocks(self.buffers)
        _fill(self.buffers, [torch.where(self.broken, *both) for both in zip(self._before, now, strict=True)])
        self._unread.append(Verdict(step, told, values, list(losses), ids))
        return (self.broken | infinite).float()

    def rewind(self) -> None:
        """The step that was begun will not be judged: the buffers are as before it again."""
        _fill(self.buffers, self._before)

    def read(self, *, together: bool = True) -> Failure | None:
        """Wait for the verdicts on the steps since the last reading.

        together: all processes read now, and tell each other what they saw.
        """
        if not self._unread:
            return None
        told = torch.stack([verdict.told for verdict in self._unread]).tolist()
        self.agreed_signal = int(told[-1][1]) or None
        first = next((verdict for verdict, (bad, _) in zip(self._unread, told, strict=True) if bad), None)
        self._unread.clear()
        return None if first is None else Failure(first.step, _explain(first, together=together))


def _explain(verdict: Verdict, *, together: bool) -> str:
    values, ids = verdict.values.tolist(), ", ".join(verdict.ids)
    bad = [
        f"{term} of student {own} is {value}"
        for (term, own), value in zip(verdict.names, values, strict=True)
        if value != value or value in (float("inf"), -float("inf"))
    ]
    mine = f"{', '.join(bad)} (images {ids})" if bad else ""
    found = all_messages(mine) if together else [mine] if mine else []
    return "; ".join(found) or f"a gradient is not finite, though every loss is (images {ids})"


def _blocks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of many tensors, all of one type in one tensor: few operations instead of many."""
    kinds = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [torch.cat([tensor.flatten() for tensor in tensors if tensor.dtype == kind]) for kind in kinds]


def _fill(tensors: Sequence[Tensor], blocks: Sequence[Tensor]) -> None:
    """Write the blocks back."""
    for block in blocks:
        places = [tensor for tensor in tensors if tensor.dtype == block.dtype]
        parts = block.split([tensor.numel() for tensor in places])
        torch._foreach_copy_(places, [part.view_as(place) for part, place in zip(parts, places, strict=True)])
