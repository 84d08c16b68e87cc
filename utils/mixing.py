"""Mix masks: which pixels of an image are kept and which come from its partner (paper: mixed images).

A mask is float32, 1 where the pixel is the image's own, 0 where it comes from the partner, image i+1 mod B.
All draws come from a CPU generator, so a run is the same on every device; nothing waits for the accelerator.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from utils.speed import full_float32

NUM_LABELS = 256  # class labels are bytes, as in label images; every image draws this many numbers
COW_SIGMA = (8.0, 32.0)  # range of the smoothing's standard deviation, in pixels


def mix(data: Tensor, mask: Tensor) -> Tensor:
    """Mix each entry of a batch with the next one: `M_i * x_i + (1 - M_i) * x_(i+1 mod B)`.

    Args:
        data: (B, ..., H, W) of any dtype: images, probabilities, labels, validity.
        mask: (B, H, W), 1 keeps the entry's own pixel, 0 takes the partner's. Values between blend
            floating-point data; integer and bool data, which cannot be blended, take the larger part.

    Returns:
        The mixed batch, of the shape and dtype of `data`. A batch of one is its own partner: unchanged.
    """
    partner = data.roll(-1, dims=0)
    mask = mask.reshape(mask.shape[0], *[1] * (data.dim() - 3), *mask.shape[1:])
    if not data.is_floating_point():
        return torch.where(mask >= 0.5, data, partner)
    mask = mask.to(data.dtype)
    return mask * data + (1 - mask) * partner


def class_mask(label_map: Tensor, classes: Tensor) -> Tensor:
    """Mask of the pixels that belong to the given classes (ClassMix).

    Args:
        label_map: (H, W) int64.
        classes: (n,) int64; may be empty.

    Returns:
        (H, W) float32, 1 where the pixel's label is one of `classes`.
    """
    return (label_map.unsqueeze(0) == classes.view(-1, 1, 1)).any(dim=0).float()


def cut_mask(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Ones with a zero rectangle of half the area (CutMix).

    Args:
        size: (H, W) in pixels.
        generator: source of the rectangle's width, uniform in [W/2 + 1, W], and position, uniform.

    Returns:
        (H, W) float32 on the CPU. The zero area is half of H*W up to the rounding of the rectangle's height.
    """
    height, width = size
    cut_width = _draw_integer(width // 2 + 1, width, generator)
    cut_height = round(height * width / 2 / cut_width)
    top = _draw_integer(0, height - cut_height, generator)
    left = _draw_integer(0, width - cut_width, generator)
    mask = torch.ones(size)
    mask[top : top + cut_height, left : left + cut_width] = 0
    return mask


def cow_mask(size: tuple[int, int], sigma: float, generator: torch.Generator) -> Tensor:
    """Blobs: white Gaussian noise, smoothed, 1 where it exceeds its mean (CowMix).

    Args:
        size: (H, W) in pixels.
        sigma: standard deviation of the smoothing, in pixels: the size of the blobs.
        generator: source of the noise.

    Returns:
        (H, W) float32 on the CPU; half of it is 1 on average, but a mask of few large blobs can be far off.
    """
    return _blobs(torch.randn(size, generator=generator), sigma)


def draw_mix_masks(
    kind: str | None, label_maps: Tensor, generator: torch.Generator, *, ignore_label: int = 255
) -> Tensor:
    """Draw one mask per image.

    Args:
        kind: a key of `MIX_MASKS`; None is the same as "None", no mixing.
        label_maps: (B, H, W) int64, the class predicted at each pixel, below 256; gives the size and, for
            "class", the regions. `ignore_label` marks padding.
        generator: CPU generator; all draws come from it.
        ignore_label: value of `label_maps` that is never drawn as a class; a "class" mask is 0 there.

    Returns:
        (B, H, W) float32 on the device of `label_maps`, 1 keeps the image's own pixel.

    Raises:
        ValueError: `kind` is unknown.
    """
    kind = "None" if kind is None else kind
    if kind not in MIX_MASKS:
        raise ValueError(f"mix_mask {kind!r} is unknown; use one of {', '.join(MIX_MASKS)}")
    return MIX_MASKS[kind](label_maps, generator, ignore_label)


def _draw_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform in [low, high], both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


@full_float32()
@torch.autocast("cpu", enabled=False)  # a mask does not depend on training.precision
@torch.autocast("cuda", enabled=False)
def _blobs(noise: Tensor, sigma: float) -> Tensor:
    """Smooth (..., H, W) noise along both sides and threshold each map at its mean."""
    for dim in (-1, -2):
        at = torch.arange(noise.shape[dim], device=noise.device)
        # Columns sum to 1, border included: a dense product, since the kernel is as wide as the image anyway.
        kernel = torch.exp(-0.5 * ((at - at.unsqueeze(1)) / sigma).square())
        noise = (noise.transpose(dim, -1) @ (kernel / kernel.sum(dim=0))).transpose(dim, -1)
    return (noise > noise.mean(dim=(-2, -1), keepdim=True)).float()


def _draw_class_masks(label_maps: Tensor, generator: torch.Generator, ignore_label: int) -> Tensor:
    """Per image floor(n/2) of its n classes; one single class gives a mask of zeros, i.e. the whole partner.

    Every image draws a score per possible label, and the best-scored half of the labels present are chosen:
    uniform without replacement, and the host need not know which labels are present.
    """
    batch = label_maps.shape[0]
    scores = torch.rand(batch, NUM_LABELS, generator=generator).to(label_maps.device, non_blocking=True)
    is_class = (label_maps >= 0) & (label_maps < NUM_LABELS) & (label_maps != ignore_label)
    slots = label_maps.where(is_class, NUM_LABELS).flatten(1)  # the extra slot collects all that is no class
    present = torch.zeros(batch, NUM_LABELS + 1, dtype=torch.bool, device=label_maps.device)
    present = present.scatter(1, slots, True)[:, :NUM_LABELS]
    rank = scores.masked_fill(~present, -1.0).argsort(dim=1, descending=True).argsort(dim=1)  # 0 is the best
    chosen = rank < present.sum(dim=1, keepdim=True) // 2
    return torch.cat([chosen, chosen.new_zeros(batch, 1)], dim=1).gather(1, slots).view_as(label_maps).float()


def _draw_cut_masks(label_maps: Tensor, generator: torch.Generator, ignore_label: int) -> Tensor:
    batch, height, width = label_maps.shape
    masks = torch.stack([cut_mask((height, width), generator) for _ in range(batch)])
    return masks.to(label_maps.device, non_blocking=True)


def _draw_cow_masks(label_maps: Tensor, generator: torch.Generator, ignore_label: int) -> Tensor:
    low, high = (math.log(sigma) for sigma in COW_SIGMA)
    masks = []
    for label_map in label_maps:
        sigma = math.exp(low + (high - low) * float(torch.rand((), generator=generator)))
        noise = torch.randn(label_map.shape, generator=generator)
        # Smoothed on the accelerator: about 2 GFLOP for a Cityscapes crop.
        masks.append(_blobs(noise.to(label_map.device, non_blocking=True), sigma))
    return torch.stack(masks)


def _no_masks(label_maps: Tensor, generator: torch.Generator, ignore_label: int) -> Tensor:
    return torch.ones(label_maps.shape, device=label_maps.device)


# A new kind of mask is one function and one line here: (label_maps, generator, ignore_label) -> masks.
MIX_MASKS: dict[str, Callable[[Tensor, torch.Generator, int], Tensor]] = {
    "class": _draw_class_masks,
    "cut": _draw_cut_masks,
    "cow": _draw_cow_masks,
    "None": _no_masks,
}
