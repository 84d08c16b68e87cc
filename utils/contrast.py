"""The two contrastive terms on cosine similarities (paper: L_hc and L_lc).

Both compare every anchor with every bank entry. At VOC size that matrix has 33 620 x 5 376 numbers, so it is
computed for `chunk_size` anchors at a time and computed again in the backward pass: the peak memory does not
grow with the number of anchors, apart from their features.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_SIZE = 2048  # anchors whose similarities are in memory at once
# Log of "no such entry". Finite, because log-sum-exp over nothing but -inf has NaN gradients; exp of it is 0.
ABSENT = -1e30
# A shorter vector has no direction; the release's cosine similarity uses the same bound.
MIN_NORM = 1e-8

Bank = Tensor | Sequence[Tensor]  # one bank, or several that are used together
Counts = Tensor | Sequence[Tensor] | None


def high_level_contrast(
    features: Tensor,
    labels: Tensor,
    mask: Tensor,
    bank: Bank,
    *,
    temperature: float,
    counts: Counts = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Pull reliable features towards the bank entries of their class, away from all others (L_hc).

    For an anchor x of class c: the mean over positives p (entries of class c) of
    `-log(exp(s(x, p)/t) / (exp(s(x, p)/t) + sum over entries n of other classes of exp(s(x, n)/t)))`,
    averaged over each class's anchors, then over the classes that have anchors.

    Args:
        features: (B, D, h, w) float, of any length; the only argument that receives a gradient.
        labels: (B, h, w) int64, class of each pixel; outside 0..C-1 (`ignore_label`) it is never an anchor.
        mask: (B, h, w) bool, True where the pixel is an anchor.
        bank: (C, K, D) float, the memory bank, or several of them used together.
        temperature: t > 0; safe down to 0.01.
        counts: (C,) int64, filled entries per class, stored from index 0; one tensor for each bank. None: all
            are filled. Anchors of a class without entries are left out; such a class supplies no negatives.
        chunk_size: anchors per chunk; changes time and memory, not the result.

    Returns:
        () float32, at least 0; 0 with a graph and zero gradient if there are no anchors.

    Raises:
        ValueError: shapes do not fit together.
    """
    entries, absent = _entries(bank, counts, features=features, labels=labels, mask=mask)
    filled = ~absent
    usable = filled.any(dim=1)

    def anchor_losses(anchors: Tensor, classes: Tensor) -> Tensor:
        similarity, negatives = _similarities(anchors / temperature, classes, entries, absent)
        positives = similarity.gather(1, classes.view(-1, 1, 1).expand(-1, 1, similarity.shape[2])).squeeze(1)
        is_positive = filled[classes]  # (N, K)
        # -log(e^p / (e^p + e^n)) = softplus(n - p)
        losses = F.softplus(negatives.unsqueeze(1) - positives) * is_positive
        return losses.sum(dim=1) / is_positive.sum(dim=1)  # at least 1: `usable`

    anchors, classes, weights, _ = _gather_anchors(features, labels, mask, usable)
    return _chunked_sum(anchor_losses, anchors, weights, (classes,), chunk_size=chunk_size)


def low_level_contrast(
    features: Tensor,
    peer_features: Tensor,
    labels: Tensor,
    mask: Tensor,
    bank: Bank,
    *,
    temperature: float,
    counts: Counts = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Pull unreliable features towards the peer student's feature of the same pixel (L_lc).

    For an anchor x of class c with the peer's feature y:
    `-log(exp(s(x, y)/t) / (exp(s(x, y)/t) + sum over entries n of other classes of exp(s(x, n)/t)))`,
    averaged over each class's anchors, then over the classes that have anchors.

    Args:
        features: (B, D, h, w) float, of any length; the only argument that receives a gradient.
        peer_features: (B, D, h, w) float, the positives; detached here.
        labels: (B, h, w) int64, the peer's predicted class; a value outside 0..C-1 is never an anchor.
        mask: (B, h, w) bool, True where the pixel is an anchor.
        bank: (C, K, D) float, or several of them whose entries all are negatives (the paper: both students').
        temperature: t > 0; safe down to 0.01.
        counts: (C,) int64, filled entries per class, stored from index 0; one tensor for each bank. None: all
            are filled. A class without entries supplies no negatives; its anchors are kept.
        chunk_size: anchors per chunk; changes time and memory, not the result.

    Returns:
        () float32, at least 0; 0 with a graph and zero gradient if there are no anchors.

    Raises:
        ValueError: shapes do not fit together.
    """
    entries, absent = _entries(bank, counts, features=features, labels=labels, mask=mask)
    if peer_features.shape != features.shape:
        shapes = f"{tuple(features.shape)} and {tuple(peer_features.shape)}"
        raise ValueError(f"contrast: features of student and peer have shapes {shapes}; expected the same")

    def anchor_losses(anchors: Tensor, classes: Tensor, positives: Tensor) -> Tensor:
        anchors = anchors / temperature
        _, negatives = _similarities(anchors, classes, entries, absent)
        return F.softplus(negatives - (anchors * _unit_length(positives)).sum(dim=1))

    usable = torch.ones(len(entries), dtype=torch.bool, device=features.device)
    anchors, classes, weights, pixels = _gather_anchors(features, labels, mask, usable)
    positives = peer_features.detach().movedim(1, -1)[pixels]
    return _chunked_sum(anchor_losses, anchors, weights, (classes, positives), chunk_size=chunk_size)


def _unit_length(vectors: Tensor) -> Tensor:
    """(..., D) -> float32 of length 1; a zero vector stays zero, with zero gradient (not 1 / MIN_NORM)."""
    vectors = vectors.float()
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * (norm > MIN_NORM) / norm.clamp(min=MIN_NORM)


def _entries(bank: Bank, counts: Counts, *, features: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Join the banks along K, detached -> unit entries (C, K, D) float32, unfilled slots (C, K) bool."""
    banks = [bank] if isinstance(bank, Tensor) else list(bank)
    per_bank: list[Tensor | None] = [None] * len(banks)
    if counts is not None:
        per_bank = [counts] if isinstance(counts, Tensor) else list(counts)
    if len(per_bank) != len(banks):
        raise ValueError(f"contrast: {len(per_bank)} counts for {len(banks)} banks; expected one for each")
    grid = (features.shape[0], *features.shape[2:])
    if tuple(labels.shape) != grid or tuple(mask.shape) != grid:
        shapes = f"labels {tuple(labels.shape)} and mask {tuple(mask.shape)}"
        raise ValueError(f"contrast: {shapes} do not fit features {tuple(features.shape)}; expected {grid}")
    if any(b.shape[-1] != features.shape[1] for b in banks):
        widths = [b.shape[-1] for b in banks]
        raise ValueError(f"contrast: features have {features.shape[1]} channels, bank entries {widths}")
    absent = [
        b.new_zeros(b.shape[:2], dtype=torch.bool)
        if filled is None
        else torch.arange(b.shape[1], device=b.device) >= filled.unsqueeze(1)
        for b, filled in zip(banks, per_bank, strict=True)
    ]
    return _unit_length(torch.cat(banks, dim=1).detach()), torch.cat(absent, dim=1)


def _gather_anchors(
    features: Tensor, labels: Tensor, mask: Tensor, usable: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Collect the anchors of all images.

    Args:
        features, labels, mask: as in the public functions.
        usable: (C,) bool, False for classes whose anchors are left out.

    Returns:
        anchors (N, D), classes (N,) int64, weights (N,) float32 that turn a sum into the mean over classes of
        the means over anchors, and the anchors' pixels as an index of three (N,) tensors.
    """
    class_ids = torch.arange(len(usable), device=labels.device)
    known = (labels >= 0) & (labels < len(usable))
    chosen = mask & known & usable[labels.where(known, 0)]
    pixels = chosen.nonzero(as_tuple=True)  # the one place where the host waits: N is data-dependent
    classes = labels[pixels]
    per_class = (classes.unsqueeze(1) == class_ids).sum(dim=0)  # (C,)
    weights = 1.0 / (per_class[classes] * (per_class > 0).sum())
    return features.movedim(1, -1)[pixels], classes, weights, pixels


def _similarities(anchors: Tensor, classes: Tensor, entries: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
    """Compare anchors with all entries.

    Args:
        anchors: (N, D) float32 of length 1 / temperature.
        classes: (N,) int64.
        entries, absent: (C, K, D), (C, K) as `_entries` returns them.

    Returns:
        similarity / temperature (N, C, K), ABSENT for slots not filled; log of the summed exponentials of the
        entries of other classes (N,), about ABSENT if there are none.
    """
    similarity = (anchors @ entries.flatten(0, 1).T).view(-1, *absent.shape).masked_fill_(absent, ABSENT)
    class_ids = torch.arange(len(entries), device=classes.device)
    is_own = classes.unsqueeze(1) == class_ids  # (N, C)
    return similarity, similarity.logsumexp(dim=2).masked_fill(is_own, ABSENT).logsumexp(dim=1)


def _chunked_sum(
    anchor_losses: Callable[..., Tensor],
    anchors: Tensor,
    weights: Tensor,
    others: tuple[Tensor, ...],
    *,
    chunk_size: int,
) -> Tensor:
    """Sum of weights * anchor_losses(unit anchors, *others), in chunks recomputed in the backward pass."""

    def chunk_loss(anchors: Tensor, weights: Tensor, *others: Tensor) -> Tensor:
        # A bfloat16 similarity divided by 0.01 would be off by up to 0.4 in the exponent.
        with torch.autocast(anchors.device.type, enabled=False):
            return (weights * anchor_losses(_unit_length(anchors), *others)).sum()

    total = anchors[:0].float().sum()  # 0 with a graph, also when there are no anchors
    for start in range(0, len(anchors), chunk_size):
        chunk = [tensor[start : start + chunk_size] for tensor in (anchors, weights, *others)]
        # Nothing here is random: saving the random state would only cost time.
        total = total + checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total
