"""What ``adjust_logits`` remembers of the pseudo-labels: their class shares (docs/method.md, cross-teacher term)."""

import torch
from torch import Tensor, nn

from utils.distributed import average_
from utils.losses import pixels_of_class, pseudo_label_shift


class PseudoLabelShares(nn.Module):
    """For each student the class shares of the pseudo-labels that it learns, as a moving average over steps.

    labeled: (C,) float32, the class shares of the labeled pixels, with which the averages start. decay: what an average
    keeps of itself in a step.

    Buffers:
        average: (2,C) float32, in ``state_dict``.
        counted: (2,C) float32, the summed weights of this step's pixels so far.
    """

    average: Tensor
    counted: Tensor
    labeled: Tensor

    def __init__(self, labeled: Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("average", labeled.repeat(2, 1))
        self.register_buffer("counted", torch.zeros_like(self.average), persistent=False)
        self.register_buffer("labeled", labeled, persistent=False)

    def shift(self, own: int) -> Tensor:
        """(C,) float32, what student ``own``'s logits lack: see ``pseudo_label_shift``."""
        return pseudo_label_shift(self.labeled, self.average[own])

    @torch.no_grad()
    def count(self, own: int, pseudo_label: Tensor, weight: Tensor) -> None:
        """pseudo_label: (B,H,W) int64; weight: (B,H,W) float32, how much each pixel counts in the loss."""
        self.counted[own].add_(pixels_of_class(pseudo_label, weight, self.counted.shape[1]))

    @torch.no_grad()
    def follow(self, *, frozen: Tensor | None = None) -> None:
        """Take in what the step counted, in all processes. frozen: () bool, where True the averages stay."""
        average_([self.counted])
        total = self.counted.sum(dim=1, keepdim=True)
        change = (1 - self.decay) * (total > 0)  # no pseudo-labels: no change
        if frozen is not None:
            change = change * ~frozen
        self.average.lerp_(self.counted / total.where(total > 0, 1.0), change)
        self.counted.zero_()
