"""Teachers: moving averages of the students, and predictions that leave no trace (paper: section 3.2)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.network import NetworkOutput, SegmentationNetwork
from utils.schedule import ema_alpha


@torch.no_grad()
def predict_frozen(network: SegmentationNetwork, images: Tensor, *, norm: str) -> NetworkOutput:
    """A network's output without gradient, without dropout, and without touching its BatchNorm statistics.

    images: (B,3,H,W) RGB in [0,1]. norm: "batch" takes BatchNorm's statistics from these images, "running" takes the
    running ones.
    """
    with _prediction_mode(network, norm):
        return network(network.normalization(images))


def predict_probabilities(network: SegmentationNetwork, images: Tensor, *, norm: str) -> Tensor:
    """(B,3,H,W) RGB in [0,1] -> (B,C,H,W) probabilities at the images' size, no gradient."""
    return upsample(predict_frozen(network, images, norm=norm).logits, images).softmax(dim=1)


def upsample(logits: Tensor, like: Tensor) -> Tensor:
    """(B,C,h,w) -> (B,C,H,W) of another tensor's last two sizes, bilinearly, in float32."""
    return F.interpolate(logits.float(), size=like.shape[-2:], mode="bilinear", align_corners=True)


class EmaTeacher(nn.Module):
    """The moving average of a student: a full copy at first, buffers included; then parameters and buffers follow.

    decay: largest share that the teacher keeps of itself in an update. norm: see ``predict_frozen``.
    """

    def __init__(self, student: SegmentationNetwork, decay: float = 0.99, norm: str = "batch") -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.decay, self.norm = decay, norm

    @torch.no_grad()
    def update(self, student: nn.Module, step: int, *, frozen: Tensor | None = None) -> None:
        """teacher = alpha * teacher + (1 - alpha) * student, alpha = min(1 - 1/(step + 1), decay).

        frozen: () bool on the device, where True the teacher stays as it is; the student must be finite all the same.
        """
        mine, theirs = list(self._averaged(self.network)), list(self._averaged(student))
        share = 1 - ema_alpha(step, self.decay)
        if frozen is None:
            torch._foreach_lerp_(mine, theirs, share)
        else:  # the same, without asking for the answer
            change = torch._foreach_sub(theirs, mine)
            torch._foreach_mul_(change, share * ~frozen)
            torch._foreach_add_(mine, change)
        for own, other in zip(self.network.buffers(), student.buffers(), strict=True):
            if not own.is_floating_point():  # counters and flags
                own.copy_(other)

    def predict(self, images: Tensor) -> Tensor:
        """(B,3,H,W) RGB in [0,1] -> (B,C,H,W) probabilities, no gradient."""
        return predict_probabilities(self.network, images, norm=self.norm)

    @staticmethod
    def _averaged(network: nn.Module) -> Iterator[Tensor]:
        yield from network.parameters()
        yield from (buffer for buffer in network.buffers() if buffer.is_floating_point())


@contextmanager
def _prediction_mode(network: nn.Module, norm: str) -> Iterator[None]:
    """Evaluation mode, but for BatchNorm with batch statistics, which then leaves its running ones alone."""
    modes = {module: module.training for module in network.modules()}
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and norm == "batch"]
    tracked = [module.track_running_stats for module in norms]
    try:
        network.eval()
        for one in norms:
            one.training, one.track_running_stats = True, False
        yield
    finally:
        for one, was in zip(norms, tracked, strict=True):
            one.track_running_stats = was
        for module, training in modes.items():
            module.training = training
