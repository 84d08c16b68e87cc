"""The two contrastive terms on cosine similarities (paper: L_hc and L_lc).

Both compare every anchor with every bank entry. With 10 labeled and 10 unlabeled images of VOC that matrix has 33 620
x 5 376 numbers, so some anchors are taken at a time. The gradient, which has a closed form, is computed along with the
loss: of all those similarities nothing is kept for the backward pass and nothing is computed twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.speed import full_float32

# Anchors whose similarities are in memory at once: few fit into a CPU's caches, many keep a GPU busy.
CHUNK_SIZE = {"cpu": 256, "cuda": 2048}
# Log of "no such entry". Finite, so that no difference of two of them is NaN; exp of it is 0.
ABSENT = -1e30
# A shorter vector has no direction; the release's cosine similarity uses the same bound.
MIN_NORM = 1e-8

Bank = Tensor | Sequence[Tensor]  # one bank, or several that are used together
Counts = Tensor | Sequence[Tensor] | None
Negatives = Literal["sum", "mean"]


def high_level_contrast(
    features: Tensor,
    labels: Tensor,
    mask: Tensor,
    bank: Bank,
    *,
    temperature: float,
    negatives: Negatives = "sum",
    counts: Counts = None,
    max_anchors: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
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
        negatives: "mean" puts the mean over entries n in the place of the sum.
        counts: (C,) int64, filled entries per class, stored from index 0; one tensor for each bank. None: all
            are filled. Anchors of a class without entries are left out; such a class supplies no negatives.
        max_anchors: draw so many anchors, the same number of each class as far as there are; None: all.
        generator: CPU generator of that draw.
        chunk_size: anchors per chunk; changes time and memory, not the result. None: what suits the device.

    Returns:
        () float32, at least 0; 0 with a graph and zero gradient if there are no anchors.

    Raises:
        ValueError: shapes do not fit together.
    """
    entries = _entries(bank, counts, negatives, features=features, labels=labels, mask=mask)
    anchors = _choose_anchors(labels, mask, entries.filled.any(dim=1), max_anchors, generator)

    def chunk(anchor: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        similarity, own = _similarities(anchor, anchors.classes[at], entries, temperature)
        positives = similarity.gather(1, own)  # (n, K)
        is_positive = entries.filled[anchors.classes[at]]
        others, share = _log_sum_exp(similarity.scatter_(1, own, ABSENT))
        others = others - entries.log_divisor[anchors.classes[at]]
        gap = others[:, None] - positives  # -log(e^p / (e^p + e^n)) = softplus(n - p)
        weight = is_positive * (anchors.weights[at] / is_positive.sum(dim=1).clamp(min=1))[:, None]
        slope = gap.sigmoid() * weight
        # d loss / d similarity: entries of other classes share what the positives of the anchor lose.
        slopes = share.mul_(slope.sum(dim=1, keepdim=True)).scatter_(1, own, -slope)
        return (F.softplus(gap) * weight).sum(), slopes @ entries.vectors / temperature

    return _sum_over_anchors(chunk, features, anchors, chunk_size)


def low_level_contrast(
    features: Tensor,
    peer_features: Tensor,
    labels: Tensor,
    mask: Tensor,
    bank: Bank,
    *,
    temperature: float,
    negatives: Negatives = "sum",
    counts: Counts = None,
    max_anchors: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
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
        negatives: "mean" puts the mean over entries n in the place of the sum.
        counts: (C,) int64, filled entries per class, stored from index 0; one tensor for each bank. None: all
            are filled. A class without entries supplies no negatives; its anchors are kept.
        max_anchors: draw so many anchors, the same number of each class as far as there are; None: all.
        generator: CPU generator of that draw.
        chunk_size: anchors per chunk; changes time and memory, not the result. None: what suits the device.

    Returns:
        () float32, at least 0; 0 with a graph and zero gradient if there are no anchors.

    Raises:
        ValueError: shapes do not fit together.
    """
    entries = _entries(bank, counts, negatives, features=features, labels=labels, mask=mask)
    if peer_features.shape != features.shape:
        shapes = f"{tuple(features.shape)} and {tuple(peer_features.shape)}"
        raise ValueError(f"contrast: features of student and peer have shapes {shapes}; expected the same")
    every_class = torch.ones(len(entries.filled), dtype=torch.bool, device=features.device)
    anchors = _choose_anchors(labels, mask, every_class, max_anchors, generator)

    def chunk(anchor: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        similarity, own = _similarities(anchor, anchors.classes[at], entries, temperature)
        positive, _ = _unit_length(_at(peer_features.detach(), anchors.pixels[at]))
        others, share = _log_sum_exp(similarity.scatter_(1, own, ABSENT))
        others = others - entries.log_divisor[anchors.classes[at]]
        gap = others - (anchor * positive).sum(dim=1) / temperature
        slope = gap.sigmoid() * anchors.weights[at]
        gradient = slope[:, None] * (share @ entries.vectors - positive) / temperature
        return (F.softplus(gap) * anchors.weights[at]).sum(), gradient

    return _sum_over_anchors(chunk, features, anchors, chunk_size)


class _Entries(NamedTuple):
    """vectors: (C*K, D) float32 of length 1. filled: (C, K) bool. bias: (C*K,) float32, 0 or ABSENT. log_divisor: (C,)
    float32, of the sum over the entries of other classes than each."""

    vectors: Tensor
    filled: Tensor
    bias: Tensor
    log_divisor: Tensor


class _Anchors(NamedTuple):
    """pixels: (N,) int64, of B*h*w. classes: (N,) int64. weights: (N,) float32: a sum -> the mean over classes of the
    means over anchors; 0 where the pixel is no anchor."""

    pixels: Tensor
    classes: Tensor
    weights: Tensor


def _unit_length(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> float32 of length 1, and (..., 1) float32 1 / length; both 0 for a zero vector."""
    vectors = vectors.float()
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    inverse = (norm > MIN_NORM) / norm.clamp(min=MIN_NORM)
    return vectors * inverse, inverse


def _entries(
    bank: Bank, counts: Counts, negatives: Negatives, *, features: Tensor, labels: Tensor, mask: Tensor
) -> _Entries:
    """Join the banks along K. Raises ValueError where shapes do not fit together."""
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
    filled = [
        b.new_ones(b.shape[:2], dtype=torch.bool)
        if count is None
        else torch.arange(b.shape[1], device=b.device) < count.unsqueeze(1)
        for b, count in zip(banks, per_bank, strict=True)
    ]
    is_filled = torch.cat(filled, dim=1)
    vectors, _ = _unit_length(torch.cat(banks, dim=1).detach())
    bias = torch.zeros_like(is_filled, dtype=torch.float32).masked_fill_(~is_filled, ABSENT)
    others = (is_filled.sum() - is_filled.sum(dim=1)).clamp(min=1)  # (C,), entries of other classes
    divisor = others if negatives == "mean" else torch.ones_like(others)
    return _Entries(vectors.flatten(0, 1), is_filled, bias.flatten(), divisor.float().log())


def _choose_anchors(
    labels: Tensor,
    mask: Tensor,
    usable: Tensor,
    max_anchors: int | None,
    generator: torch.Generator | None,
) -> _Anchors:
    """The pixels that are compared with the bank.

    labels, mask: as in the public functions. usable: (C,) bool, False for classes whose anchors are left out.
    """
    known = (labels >= 0) & (labels < len(usable))
    classes = labels.where(known, 0).flatten()  # (B*h*w,)
    chosen = (mask & known).flatten() & usable[classes]
    if max_anchors is not None and max_anchors < len(chosen):
        pixels = _draw_evenly(classes, chosen, max_anchors, generator)
    elif _host_may_wait(labels.device):
        pixels = chosen.nonzero().squeeze(1)
    else:
        pixels = torch.arange(len(chosen), device=labels.device)
    classes, is_anchor = classes[pixels], chosen[pixels]
    class_ids = torch.arange(len(usable), device=labels.device)
    per_class = ((classes.unsqueeze(1) == class_ids) & is_anchor.unsqueeze(1)).sum(dim=0)  # (C,)
    weights = is_anchor / (per_class[classes] * (per_class > 0).sum()).clamp(min=1)
    return _Anchors(pixels, classes, weights)


def _host_may_wait(device: torch.device) -> bool:
    """Whether to ask how many anchors there are. On a GPU waiting for the answer costs more than it saves: pixels that
    are no anchors then come along, with weight 0."""
    return device.type == "cpu"


def _draw_evenly(classes: Tensor, chosen: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """(count,) int64 of the N pixels, the same number of each class as far as there are; others where those run out.

    classes: (N,) int64. chosen: (N,) bool, the pixels to draw from.
    """
    key = torch.rand(len(classes), generator=generator, dtype=torch.float64).to(classes.device, non_blocking=True)
    nowhere = 1 + classes.amax()
    classes = classes.where(chosen, nowhere)
    shuffled = (classes + key).argsort()  # class by class
    of_class, place = classes[shuffled], torch.arange(len(classes), device=classes.device)
    rank = place - torch.searchsorted(of_class, of_class)  # within its class
    order = (rank.where(of_class < nowhere, len(classes)) + key[shuffled]).argsort()  # round by round
    return shuffled[order[:count]]


def _at(features: Tensor, pixels: Tensor) -> Tensor:
    """(B, D, h, w) -> (N, D) at pixels (N,) of B*h*w."""
    height, width = features.shape[2:]
    image, place = pixels // (height * width), pixels % (height * width)
    return features[image, :, place // width, place % width]


def _similarities(anchor: Tensor, classes: Tensor, entries: _Entries, temperature: float) -> tuple[Tensor, Tensor]:
    """Compare unit anchors (n, D) of classes (n,) with all entries.

    Returns: similarity / temperature (n, C*K) float32, ABSENT for slots not filled; the columns (n, K) int64 of the
    entries of each anchor's own class.
    """
    similarity = torch.addmm(entries.bias, anchor, entries.vectors.T, alpha=1 / temperature)
    per_class = entries.filled.shape[1]
    own = classes[:, None] * per_class + torch.arange(per_class, device=classes.device)
    return similarity, own


def _log_sum_exp(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, M) -> log of the summed exponentials (n,), and its gradient (n, M): softmax reads the rows only once."""
    share = values.softmax(dim=1)
    return values.amax(dim=1) - share.amax(dim=1).log(), share


def _sum_over_anchors(
    chunk: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    features: Tensor,
    anchors: _Anchors,
    chunk_size: int | None,
) -> Tensor:
    """() float32, the sum of the chunks' losses, with their gradient in the features (B, D, h, w).

    chunk: (unit anchors (n, D) float32, where in ``anchors`` they stand) -> loss and its gradient in them.
    """
    size = chunk_size or CHUNK_SIZE.get(features.device.type, CHUNK_SIZE["cuda"])
    vectors = _at(features, anchors.pixels)
    total = vectors.new_zeros((), dtype=torch.float32)
    gradient = torch.empty_like(vectors, dtype=torch.float32)
    # A bfloat16 similarity divided by 0.01 would be off by up to 0.4 in the exponent.
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False), full_float32():
        for start in range(0, len(vectors), size):
            at = slice(start, start + size)
            unit, inverse_length = _unit_length(vectors[at])
            loss, slope = chunk(unit, at)
            total += loss
            # Only what is across an anchor turns it; its length does not matter.
            gradient[at] = (slope - unit * (slope * unit).sum(dim=1, keepdim=True)) * inverse_length
    result: Tensor = _WithGradient.apply(vectors, total, gradient)
    return result


class _WithGradient(torch.autograd.Function):
    """(N, D) vectors, a value, its gradient in them -> the value, differentiable once in the vectors."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = vectors.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(ctx.dtype), None, None
