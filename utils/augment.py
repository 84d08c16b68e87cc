"""Strong augmentation of image batches on their own device (paper: strong augmentation of the mixed images).

Every draw comes from a CPU generator and is apart from its application, so that a test can apply known
factors. Images are (B, 3, H, W) float RGB in 0..1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

JITTER_PROBABILITY = 0.8  # per batch
JITTER_STRENGTH = 0.25  # of each of the four factors
BLUR_PROBABILITY = 0.5  # per batch
BLUR_SIGMA = (0.15, 1.15)  # pixels, drawn once per batch
BLUR_REACH = 6  # standard deviations, rounded up to whole pixels; what lies beyond weighs less than 6e-8


class JitterFactors(NamedTuple):
    """Factors of one batch for `apply_color_jitter`; each (B,) float32, one value per image.

    Attributes:
        brightness: `factor - 1` is added to the image; 1 changes nothing.
        contrast: the image is multiplied by it; 1 changes nothing.
        saturation: the saturation is multiplied by it; 1 changes nothing.
        hue: added to the hue, in turns (1 = the full colour circle); 0 changes nothing.
        order: in which the four steps are applied, a permutation of 0..3 (numbered as above).
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: tuple[int, ...] = (0, 1, 2, 3)


def draw_color_jitter(
    batch: int,
    generator: torch.Generator,
    *,
    brightness: float = JITTER_STRENGTH,
    contrast: float = JITTER_STRENGTH,
    saturation: float = JITTER_STRENGTH,
    hue: float = JITTER_STRENGTH,
) -> JitterFactors:
    """Draw jitter factors, uniform per image, and the order of the steps, once for the batch.

    Args:
        batch: number of images.
        generator: CPU generator.
        brightness, contrast, saturation: the factor lies within 1 +- this, in 0..1.
        hue: the shift lies within 0 +- this, in turns, in 0..0.5.

    Returns:
        Factors on the CPU.
    """
    strengths = torch.tensor([brightness, contrast, saturation, hue]).unsqueeze(1)
    centers = torch.tensor([1.0, 1.0, 1.0, 0.0]).unsqueeze(1)
    factors = centers + strengths * (2 * torch.rand(4, batch, generator=generator) - 1)
    order = tuple(torch.randperm(4, generator=generator).tolist())
    return JitterFactors(factors[0], factors[1], factors[2], factors[3], order)


def apply_color_jitter(images: Tensor, factors: JitterFactors) -> Tensor:
    """Shift brightness, contrast, saturation and hue of each image by its own factors.

    The transform is the one the release used, which kornia now calls ColorJiggle: brightness is added and
    contrast multiplied, without regard to the image's mean; saturation and hue are changed in HSV.

    Args:
        images: (B, 3, H, W) float RGB in 0..1 (clamped to it first).
        factors: B factors of each kind, on any device.

    Returns:
        (B, 3, H, W) in 0..1.
    """
    brightness, contrast, saturation, hue = (
        factor.to(images.device, images.dtype, non_blocking=True).view(-1, 1, 1, 1) for factor in factors[:4]
    )
    steps = (
        lambda x: x + (brightness - 1),
        lambda x: x * contrast,
        lambda x: _shift_hsv(x, saturation=saturation),
        lambda x: _shift_hsv(x, hue=hue),
    )
    images = images.clamp(0, 1)
    for step in factors.order:
        images = steps[step](images).clamp(0, 1)
    return images


def blur_kernel_size(side: int) -> int:
    """Odd kernel size of about a tenth of an image's side: a tenth rounded up, less one if that is even."""
    tenth = math.ceil(side / 10)
    return tenth - 1 + tenth % 2


def gaussian_blur(images: Tensor, sigma: float, kernel_size: tuple[int, int] | None = None) -> Tensor:
    """Gaussian blur, both sides separately, the border reflected without repeating the outermost pixel.

    A few shifted copies are added up, 8 times faster on a CPU than a dense convolution: beyond `BLUR_REACH`
    standard deviations (7 pixels for the largest sigma drawn) a wider kernel weighs nothing.

    Args:
        images: (..., H, W) float; sides of one pixel and sides shorter than the kernel are fine.
        sigma: standard deviation in pixels, above 0.
        kernel_size: (height, width), odd; None: `blur_kernel_size` of each side.

    Returns:
        The blurred images, same shape and dtype.

    Raises:
        ValueError: `sigma` is not positive or a kernel size is not odd.
    """
    if kernel_size is None:
        kernel_size = blur_kernel_size(images.shape[-2]), blur_kernel_size(images.shape[-1])
    if sigma <= 0 or any(size < 1 or size % 2 == 0 for size in kernel_size):
        raise ValueError(f"gaussian_blur: sigma {sigma}, kernel {kernel_size}; expected sigma > 0, odd sizes")
    for dim, size in zip((-2, -1), kernel_size, strict=True):
        radius = min(size // 2, math.ceil(BLUR_REACH * sigma))
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
        length = images.shape[dim]
        padded = images.index_select(dim, _reflected(length, radius, images.device))
        images = torch.zeros_like(images)
        for start, weight in enumerate(weights):
            images.add_(padded.narrow(dim, start, length), alpha=weight / sum(weights))
    return images


def draw_flips(batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) bool on the CPU, True with probability 0.5: which images to flip."""
    return torch.rand(batch, generator=generator) < 0.5


def horizontal_flip(data: Tensor, flips: Tensor) -> Tensor:
    """Mirror some entries of a batch left to right.

    Args:
        data: (B, ..., W) of any dtype: images, probabilities, labels, masks.
        flips: (B,) bool on any device, True where the entry is mirrored.

    Returns:
        Same shape and dtype as `data`. Applied twice with the same flips it gives back `data`.
    """
    flips = flips.to(data.device, non_blocking=True).view(-1, *[1] * (data.dim() - 1))
    return torch.where(flips, data.flip(-1), data)


def strong_augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    color_jitter: bool,
    blur: bool,
    jitter_strength: Sequence[float] = (JITTER_STRENGTH,) * 4,
) -> Tensor:
    """Colour jitter with probability 0.8 and blur with probability 0.5, each drawn once for the batch.

    Args:
        images: (B, 3, H, W) float RGB in 0..1. Pass nothing else: labels and probabilities are not jittered.
        generator: CPU generator.
        color_jitter: whether jitter may happen.
        blur: whether blur may happen.
        jitter_strength: of brightness, contrast, saturation, hue, see `draw_color_jitter`.

    Returns:
        (B, 3, H, W) in 0..1.
    """
    if color_jitter and float(torch.rand((), generator=generator)) < JITTER_PROBABILITY:
        brightness, contrast, saturation, hue = jitter_strength
        factors = draw_color_jitter(
            images.shape[0], generator, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )
        images = apply_color_jitter(images, factors)
    if blur and float(torch.rand((), generator=generator)) < BLUR_PROBABILITY:
        low, high = BLUR_SIGMA
        images = gaussian_blur(images, low + (high - low) * float(torch.rand((), generator=generator)))
    return images


def _shift_hsv(images: Tensor, *, saturation: Tensor | float = 1.0, hue: Tensor | float = 0.0) -> Tensor:
    """Multiply the saturation and turn the hue of (B, 3, H, W) RGB images in 0..1."""
    red, green, blue = images.unbind(1)
    value, lowest = images.amax(1), images.amin(1)
    chroma = value - lowest
    divisor = chroma.where(chroma > 0, 1.0)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )  # hue in sixths of a turn; grey pixels have hue 0
    # Black has no saturation; the clamp only avoids 0 / 0.
    strength = (chroma / value.clamp(min=1e-8)).unsqueeze(1)
    chroma = value.unsqueeze(1) * (strength * saturation).clamp(0, 1)
    # Each channel falls from `value` by up to `chroma`, with the distance of its hue on the colour circle:
    # red, green and blue are 5, 3 and 1 sixths of a turn from where the fall starts.
    channel = torch.arange(5, 0, -2, device=images.device).view(1, 3, 1, 1)
    distance = torch.remainder(channel + sixth.unsqueeze(1) + 6 * hue, 6)
    return value.unsqueeze(1) - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def _reflected(length: int, radius: int, device: torch.device) -> Tensor:
    """(length + 2 * radius,) int64: index of the pixel that stands at -radius .. length + radius - 1."""
    period = max(2 * (length - 1), 1)
    at = torch.arange(-radius, length + radius, device=device) % period
    return torch.minimum(at, period - at)
