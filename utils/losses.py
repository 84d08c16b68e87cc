"""Per-pixel losses and the weights of pseudo-labels (paper: supervised and cross-teacher terms).

Nothing here waits for the accelerator: every result stays a tensor. Losses are computed in float32.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CONFIDENCE_THRESHOLD = 0.968  # from this probability on a pseudo-label counts as confident
POWER = 6  # exponent of the "power" weight
LEAST_SHARE = 1e-3  # of a class among pseudo-labels, over its share of the labels, that `pseudo_label_shift` knows
RAMP_UP_STEPS = 10_000  # the "sigmoid" weight reaches 1 at this step


def cross_entropy(logits: Tensor, target: Tensor, ignore_label: int, shift: Tensor | None = None) -> Tensor:
    """Mean cross entropy over the labeled pixels (L_sup).

    Args:
        logits: (B, C, H, W) float.
        target: (B, H, W) int64, a class in 0..C-1 or `ignore_label` (no label there).
        ignore_label: value of `target` that is left out of the mean.
        shift: (C,) float32, added to the logits of each pixel (`logit_shift`); None: nothing is added.

    Returns:
        () float32. Without a single labeled pixel it is 0 with a graph, never NaN.
    """
    if shift is not None:
        logits = logits.float() + shift.view(-1, 1, 1)
    total = F.cross_entropy(logits.float(), target, ignore_index=ignore_label, reduction="sum")
    return total / (target != ignore_label).sum().clamp(min=1)


def logit_shift(class_shares: np.ndarray, strength: float) -> Tensor:
    """What logit adjustment adds to the logits (Menon et al. 2021, Long-tail learning via logit adjustment).

    Args:
        class_shares: (C,) float, the share of each class among the labeled pixels.
        strength: 0 adds nothing; 1 leads to predictions as if all classes were equally frequent.

    Returns:
        (C,) float32: `strength * log(share)`; for a class without a labeled pixel that of the rarest one that has some.
    """
    shares = torch.as_tensor(class_shares, dtype=torch.float32)
    return strength * shares.clamp(min=float(shares[shares > 0].min())).log()


def pseudo_label_shift(class_shares: Tensor, pseudo_label_shares: Tensor) -> Tensor:
    """What the logits of the cross-teacher term lack besides `logit_shift`, because pseudo-labels have other shares.

    Pseudo-labels hold far fewer pixels of a rare class than there are. Taught as they come, they push the class down on
    the pixels of all others. This takes most of that push away; all of it where all pixels look alike.

    Args:
        class_shares, pseudo_label_shares: (C,) float32, each class's share of the labeled and pseudo-labeled pixels.

    Returns:
        (C,) float32: `log(pseudo_label_share / class_share)`, the quotient not below `LEAST_SHARE`; 0 for a class
        without a labeled pixel.
    """
    has_labels = class_shares > 0
    quotient = pseudo_label_shares / class_shares.where(has_labels, 1.0)
    return quotient.clamp(min=LEAST_SHARE).log().where(has_labels, 0.0)


def weighted_cross_entropy(
    logits: Tensor, pseudo_label: Tensor, weight: Tensor, ignore_label: int, shift: Tensor | None = None
) -> Tensor:
    """Cross entropy with pseudo-labels, each pixel weighted (L_ct).

    The mean runs over **all** B*H*W pixels, those of weight 0 and of `ignore_label` included: few confident
    pixels make a small loss, not a loss on few pixels.

    Args:
        logits: (B, C, H, W) float.
        pseudo_label: (B, H, W) int64, a class in 0..C-1 or `ignore_label` (contributes 0).
        weight: (B, H, W) float, no gradient; 0 leaves the pixel out, 1 counts it fully.
        ignore_label: value of `pseudo_label` that contributes 0.
        shift: (C,) float32, added to the logits of each pixel (`logit_shift`); None: nothing is added.

    Returns:
        () float32.
    """
    if shift is not None:
        logits = logits.float() + shift.view(-1, 1, 1)
    per_pixel = F.cross_entropy(logits.float(), pseudo_label, ignore_index=ignore_label, reduction="none")
    return (weight.detach() * per_pixel).mean()


def mean_squared_error(logits: Tensor, probabilities: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean of (softmax(logits) - probabilities)^2 over all pixels and classes (`consistency_loss: "MSE"`).

    Args:
        logits: (B, C, H, W) float.
        probabilities: (B, C, H, W) float, the target distribution of each pixel; no gradient reaches it.
        valid: (B, H, W) bool, False where the pixel is only padding and contributes 0 (it still counts in the
            mean, as in `weighted_cross_entropy`); None: every pixel is valid.

    Returns:
        () float32.
    """
    squared = (logits.float().softmax(dim=1) - probabilities.detach().float()).square()
    if valid is not None:
        squared = squared * valid.unsqueeze(1)
    return squared.mean()


def confident_share(confidence: Tensor, valid: Tensor | None = None, threshold: float = CONFIDENCE_THRESHOLD) -> Tensor:
    """Share of the batch's pixels whose confidence reaches `threshold`.

    Args:
        confidence: (B, H, W) float, probability of the pseudo-label, in 0..1.
        valid: (B, H, W) bool, False where the pixel is only padding; None: all are valid. Padding is left out
            of numerator and denominator: the weight of real pixels must not depend on how much was padded.
        threshold: probability, inclusive.

    Returns:
        () float32 in 0..1; 0 when no pixel is valid.
    """
    confident = confidence >= threshold
    if valid is None:
        return confident.float().mean()
    return (confident & valid).sum().float() / valid.sum().clamp(min=1)


def pixels_of_class(labels: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """(C,) float32, the summed weight (B, H, W) of the pixels of each class in labels (B, H, W) int64."""
    return torch.stack([(weight * (labels == index)).sum() for index in range(num_classes)])


PixelWeight = Callable[[Tensor, Tensor | None, int, float], Tensor]  # confidence, valid, step, threshold


def _ramp_up(step: int) -> float:
    return math.exp(-5.0 * (1.0 - min(step / RAMP_UP_STEPS, 1.0)) ** 2)


# Each returns (B, H, W) or a scalar that is expanded to it. A new weight is one line here.
PIXEL_WEIGHTS: dict[str, PixelWeight] = {
    "threshold_uniform": lambda confidence, valid, _, limit: confident_share(confidence, valid, limit),
    "threshold": lambda confidence, valid, _, limit: confidence >= limit,
    "power": lambda confidence, valid, step, _: confidence**POWER,
    "sigmoid": lambda confidence, valid, step, _: torch.full_like(confidence, _ramp_up(step)),
}


def pixel_weight(
    kind: str | Literal[False] | None,
    confidence: Tensor,
    *,
    step: int,
    valid: Tensor | None = None,
    threshold: float = CONFIDENCE_THRESHOLD,
) -> Tensor:
    """Weight of each pseudo-labeled pixel (paper: cross-teacher term).

    Args:
        kind: a key of `PIXEL_WEIGHTS`; False or None: weight 1 everywhere.
        confidence: (B, H, W) float, probability of the pseudo-label, in 0..1.
        step: training step, used by "sigmoid" only.
        valid: (B, H, W) bool, False where the pixel is only padding (weight 0); None: all are valid.
        threshold: probability from which on a pixel counts as confident.

    Returns:
        (B, H, W) float32 without gradient, in 0..1.

    Raises:
        ValueError: `kind` is unknown.
    """
    confidence = confidence.detach().float()
    if kind is None or kind is False:
        weight = torch.ones_like(confidence)
    elif kind in PIXEL_WEIGHTS:
        weight = PIXEL_WEIGHTS[kind](confidence, valid, step, threshold).float().expand_as(confidence)
    else:
        known = ", ".join(PIXEL_WEIGHTS)
        raise ValueError(f"pixel_weight {kind!r} is unknown; use one of {known}, or false for weight 1")
    return weight if valid is None else weight * valid
