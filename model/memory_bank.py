"""The memory banks (paper: section 3.3; docs/method.md: banks)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Candidates(NamedTuple):
    """What one batch offers to a bank, the surest pixels of each class first.

    scores: (C,m) float32, the teacher's probability, -1 where there is no further pixel. features: (C,m,D) float32.
    seen: (C,) bool, the classes of the ground truth.
    """

    scores: Tensor
    features: Tensor
    seen: Tensor


class MemoryBank(nn.Module):
    """Per class a first-in-first-out buffer of a teacher's features on labeled pixels.

    Buffers:
        entries: (C,K,D) float32, oldest first; slots not yet filled are 0.
        counts: (C,) int64, filled entries of each class.
        seen: (C,) bool, True once the class occurred in a ground truth.
        born: (C,K) int64, the step of which each entry is; for logs.
    """

    entries: Tensor
    born: Tensor
    counts: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, size: int = 256, dim: int = 256) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(num_classes, size, dim))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("born", torch.zeros(num_classes, size, dtype=torch.int64))

    @torch.no_grad()
    def add(
        self, features: Tensor, probabilities: Tensor, labels: Tensor, max_new: int, threshold: float = 0.95
    ) -> None:
        """Take each class's ``max_new`` most confident pixels among those that the teacher gets right and is sure of.

        features: (B,D,h,w) of the teacher; probabilities: (B,C,h,w), not logits: the release compares a logit with the
        threshold here; labels: (B,h,w) int64 ground truth, values outside 0..C-1 are no pixels.
        """
        self.take([self.candidates(features, probabilities, labels, max_new, threshold)], max_new)

    @torch.no_grad()
    def candidates(
        self, features: Tensor, probabilities: Tensor, labels: Tensor, max_new: int, threshold: float = 0.95
    ) -> Candidates:
        """What ``add`` would take of a batch, at most ``max_new`` a class."""
        classes, _, dim = self.entries.shape
        truth = labels.flatten()  # (N,)
        confidence, predicted = probabilities.float().movedim(1, -1).reshape(-1, classes).max(dim=1)
        of_class = truth == torch.arange(classes, device=truth.device)[:, None]  # (C,N)
        score = torch.where(of_class & (predicted == truth) & (confidence >= threshold), confidence, -1.0)
        # A stable sort: which of equally confident pixels comes first is the same on every device.
        score, pixel = (part[:, :max_new] for part in score.sort(dim=1, descending=True, stable=True))
        new = features.float().movedim(1, -1).reshape(-1, dim)[pixel]  # (C,m,D)
        return Candidates(score, new, of_class.any(dim=1))

    @torch.no_grad()
    def take(self, offers: Sequence[Candidates], max_new: int, *, step: int = 0, frozen: Tensor | None = None) -> None:
        """Add each class's ``max_new`` surest candidates of all offers, at most K, as if they had come in one batch.

        step: of which they are. frozen: () bool on the device, where True the bank stays as it is.
        """
        size, dim = self.entries.shape[1:]
        most = min(max_new, size)  # of more, the first to go would be the surest
        score = torch.cat([offer.scores for offer in offers], dim=1)
        score, order = (part[:, :most] for part in score.sort(dim=1, descending=True, stable=True))
        new = torch.cat([offer.features for offer in offers], dim=1)
        new = new.gather(1, order[..., None].expand(-1, -1, dim))  # (C,m,D)
        seen = torch.stack([offer.seen for offer in offers]).any(dim=0)
        if frozen is not None:
            score, seen = score.where(~frozen, -1.0), seen & ~frozen
        self.seen |= seen
        arrived = (score >= 0).sum(dim=1)

        # Slot j of a class holds the j-th of (old entries, new entries) once the oldest `leaving` are gone.
        total = self.counts + arrived
        leaving = (total - size).clamp(min=0)
        position = torch.arange(size, device=score.device) + leaving[:, None]  # (C,K)
        from_new = size + position - self.counts[:, None]
        index = torch.where(position < self.counts[:, None], position, from_new)
        filled = position < total[:, None]
        both = torch.cat((self.entries, new), dim=1)
        kept = both.gather(1, index.where(filled, 0)[..., None].expand(-1, -1, dim))
        self.entries.copy_(kept * filled[..., None])
        both = torch.cat((self.born, torch.full_like(score, step, dtype=torch.int64)), dim=1)
        self.born.copy_(both.gather(1, index.where(filled, 0)) * filled)
        self.counts.copy_(total.clamp(max=size))

    @torch.no_grad()
    def pretend_full(self) -> None:
        """Random entries for every class, for measurements: nothing sensible can be learned from them."""
        self.entries.normal_()
        self.counts.fill_(self.entries.shape[1])
        self.seen.fill_(True)

    def is_ready(self) -> Tensor:
        """() bool: every class seen so far is full, and there is one."""
        return self.seen.any() & ((self.counts == self.entries.shape[1]) | ~self.seen).all()

    def age(self, step: int) -> Tensor:
        """(C,) float32: how many steps ago a class's entries came, on average; NaN where there are none."""
        filled = torch.arange(self.born.shape[1], device=self.born.device) < self.counts[:, None]
        return ((step - self.born) * filled).sum(dim=1) / self.counts

    def fill(self) -> Tensor:
        """() float32: filled share of the slots of the classes seen; 0 before there is one."""
        slots = self.seen.sum() * self.entries.shape[1]
        return (self.counts * self.seen).sum() / slots.clamp(min=1)
