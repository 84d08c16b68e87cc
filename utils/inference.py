"""How a network is applied to whole images: protocols, flips and scales (docs/evaluation.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config import Config, parse_size
from utils.errors import UserError
from utils.speed import full_float32

ENSEMBLE = "ensemble"
SMALLEST = 33  # pixels a side that the networks need; smaller images are padded
STRIP = 2**18  # values that are compared at once on a CPU: they stay in its cache
AT_ONCE, LARGE_WINDOW = 2**22, (1024, 1024)  # larger photographs are predicted window by window
Size = tuple[int, int]


@dataclass(frozen=True)
class Inference:
    """What is averaged, in probabilities, over one image.

    pad: (height, width) that normalized images are padded to with 0, at the right and the bottom; the prediction is
    cut back. window: (height, width) of overlapping crops, two thirds of it apart. scales: factors of the image's
    size. flip: the mirrored image too.
    """

    pad: Size | None = None
    window: Size | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @property
    def is_one_pass(self) -> bool:
        """Whether a network sees an image once and nothing is averaged."""
        return self.window is None and self.scales == (1.0,) and not self.flip

    def about(self) -> dict[str, str]:
        """What a result must tell besides the protocol; nothing for one pass."""
        window = {"window": "{} x {}".format(*self.window)} if self.window is not None else {}
        scales = {"scales": " ".join(f"{scale:g}" for scale in self.scales)} if self.scales != (1.0,) else {}
        return window | scales | ({"flip": "yes"} if self.flip else {})


def inference_for(
    config: Config, protocol: str, *, scales: tuple[float, ...] = (1.0,), flip: bool = False
) -> Inference:
    """The protocol "release", "original" or "sliding" for a configuration's dataset and training crops."""
    release = config.data.release_protocol
    if protocol == "release" and release is None:
        raise UserError(
            f'protocol "release": dataset {config.data.name} defines none (dataset.release_protocol); use "original"'
        )
    pad = parse_size(release.pad) if protocol == "release" and release and release.pad else None
    return Inference(pad, config.input_size if protocol == "sliding" else None, scales, flip)


def prediction_inference(window: str | None, *, scales: tuple[float, ...], flip: bool) -> Inference:
    """What predict.py's options ask for. window: "h,w" or None. Raises UserError for another window."""
    if window is None:
        return Inference(scales=scales, flip=flip)
    try:
        height, width = parse_size(window)
    except ValueError:
        height, width = 0, 0
    if min(height, width) < SMALLEST:
        raise UserError(f'--window {window}: expected "height,width" of at least {SMALLEST}, for example 512,512')
    return Inference(window=(height, width), scales=scales, flip=flip)


def predict_photo(
    networks: Mapping[str, Any],
    image: np.ndarray,
    size: Size,
    *,
    model: str,
    inference: Inference,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """(h,w,3) uint8 RGB of any size -> (H,W) uint8 classes and (H,W) float32 probabilities of them, (H,W) = size.

    What is larger than ``AT_ONCE`` pixels is predicted in windows of ``LARGE_WINDOW``, which are no larger than it.
    """
    images = torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float().div_(255)
    if inference.window is None and image.shape[0] * image.shape[1] > AT_ONCE:
        rows, columns = (min(one, max(side, SMALLEST)) for one, side in zip(LARGE_WINDOW, image.shape[:2], strict=True))
        inference = replace(inference, window=(rows, columns))
    found = predict_all(networks, images, size, inference=inference, wanted=frozenset([model]))[model]
    confidence, label = found[0].max(dim=0)
    return label.byte().cpu().numpy(), confidence.cpu().numpy()


@torch.no_grad()
@full_float32()
def predict_all(
    networks: Mapping[str, Any], images: Tensor, size: Size, *, inference: Inference, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """The probabilities (B,C,*size) of every wanted network, and of the ensemble: the mean of those named student_*.

    images: (B,3,H,W) float RGB in [0,1]. networks: in evaluation mode.
    """
    students, needed = _needed(networks, wanted)
    found = dict[str, Tensor]()
    for name in needed:  # of a large photograph there is not room for many
        one = predict(networks[name], images, size, inference=inference)
        if ENSEMBLE in wanted and name in students:
            share = one.div(len(students)) if name in wanted else one.div_(len(students))
            found[ENSEMBLE] = found[ENSEMBLE].add_(share) if ENSEMBLE in found else share
        if name in wanted:
            found[name] = one
    return found


@torch.no_grad()
@full_float32()
def classify_all(
    networks: Mapping[str, Any], images: Tensor, size: Size, *, inference: Inference, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """The most probable class (B,*size) uint8 by every wanted model: ``predict_all``'s argmax, but quicker.

    A network's own classes need no probabilities: the largest logit has the largest. Upsampled outputs are there for
    one image at a time on a CPU, and are compared strip by strip.
    """
    students, needed = _needed(networks, wanted)
    if inference.is_one_pass:
        # On CPUs an output is enlarged several times as fast when all classes of a pixel are neighbours.
        order = torch.channels_last if images.device.type == "cpu" else torch.contiguous_format
        passes = ((name, networks[name].normalization(images)) for name in needed)
        outputs = {
            name: _one_pass(networks[name], inputs, inference).contiguous(memory_format=order)
            for name, inputs in passes
        }
    else:
        outputs = {name: predict(networks[name], images, size, inference=inference) for name in needed}
    found = {name: images.new_empty(len(images), *size, dtype=torch.uint8) for name in wanted}
    for part in _parts(len(images), size, next(iter(outputs.values()))):
        maps = {name: one[part] for name, one in outputs.items()}
        if inference.is_one_pass:
            maps = {name: _enlarge(one, images.shape[-2:], size, inference) for name, one in maps.items()}
        for rows in _strips(next(iter(maps.values()))):
            strips = {name: one[:, :, rows].contiguous() for name, one in maps.items()}
            for name in wanted & strips.keys():
                found[name][part, rows] = largest(strips[name])
            if ENSEMBLE in wanted and ENSEMBLE not in networks:
                shares = [strips[name].softmax(dim=1) if inference.is_one_pass else strips[name] for name in students]
                found[ENSEMBLE][part, rows] = largest(sum(shares[1:], start=shares[0]))
    return found


def largest(maps: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,H,W) uint8: the class of the largest value, the first of equal ones."""
    if maps.device.type != "cpu":
        return maps.argmax(dim=1).byte()
    # torch's argmax over any dimension but the last is slow on CPUs: here class by class against the best so far.
    best = maps[:, 0].clone()
    label = torch.zeros(best.shape, dtype=torch.uint8)
    is_larger = torch.empty(best.shape, dtype=torch.bool)
    as_number = is_larger.view(torch.uint8)  # the same bytes, 0 or 1
    for index in range(1, maps.shape[1]):
        one = maps[:, index]
        torch.gt(one, best, out=is_larger)
        torch.maximum(best, one, out=best)
        torch.maximum(label, as_number.mul_(index), out=label)
    return label


@torch.no_grad()
def predict(network: Any, images: Tensor, size: Size, *, inference: Inference) -> Tensor:
    """(B,3,H,W) float RGB in [0,1] -> (B,C,*size) probabilities of a network in evaluation mode."""
    inputs = network.normalization(images)
    total: Tensor | float = 0.0
    for scale in inference.scales:
        height, width = (max(1, round(side * scale)) for side in inputs.shape[-2:])
        scaled = inputs if scale == 1 else _resize(inputs, (height, width))
        for mirrored in (False, True)[: 1 + inference.flip]:
            one = _probabilities(network, scaled.flip(-1) if mirrored else scaled, size, inference)
            total = total + (one.flip(-1) if mirrored else one)
    assert isinstance(total, Tensor)
    return total.div_(len(inference.scales) * (1 + inference.flip))


def _probabilities(network: Any, inputs: Tensor, size: Size, inference: Inference) -> Tensor:
    """(B,C,*size) of normalized images, in one pass or window by window."""
    if inference.window is not None:
        return _resize(_by_windows(network, inputs, inference.window), size)
    return _enlarge(_one_pass(network, inputs, inference), inputs.shape[-2:], size, inference).softmax(dim=1)


def _one_pass(network: Any, inputs: Tensor, inference: Inference) -> Tensor:
    """Normalized images (B,3,H,W), padded -> logits (B,C,h,w) on the network's grid."""
    height, width = inputs.shape[-2:]
    rows, columns = _padded_size((height, width), inference)
    if (rows, columns) != (height, width):
        inputs = F.pad(inputs, (0, columns - width, 0, rows - height))
    logits: Tensor = network(inputs).logits
    return logits.float()


def _enlarge(logits: Tensor, image_size: Sequence[int], size: Size, inference: Inference) -> Tensor:
    """What ``_one_pass`` gave for images of a size, the padding cut off -> (B,C,*size)."""
    height, width = image_size
    padded = _padded_size((height, width), inference)
    if padded == (height, width):
        return _resize(logits, size)
    return _resize(_resize(logits, padded)[..., :height, :width], size)


def _padded_size(image_size: Size, inference: Inference) -> Size:
    rows, columns = inference.pad or (0, 0)
    return max(image_size[0], rows, SMALLEST), max(image_size[1], columns, SMALLEST)


def _needed(networks: Mapping[str, Any], wanted: frozenset[str]) -> tuple[list[str], list[str]]:
    """The students, and the networks that must run."""
    students = [name for name in networks if name.startswith("student")]
    return students, [name for name in networks if name in wanted or (ENSEMBLE in wanted and name in students)]


def _parts(images: int, size: Size, maps: Tensor) -> list[slice]:
    """Images of which all upsampled outputs are in memory together: on a CPU few, for they leave its cache."""
    at_once = images if maps.device.type != "cpu" else max(1, STRIP // (maps.shape[1] * size[0] * size[1]))
    return [slice(start, start + at_once) for start in range(0, images, at_once)]


def _strips(maps: Tensor) -> list[slice]:
    """Rows of (B,C,H,W) that are compared together."""
    count, classes, height, width = maps.shape
    rows = height if maps.device.type != "cpu" else max(1, STRIP // (count * classes * width))
    return [slice(start, start + rows) for start in range(0, height, rows)]


def _by_windows(network: Any, inputs: Tensor, window: Size) -> Tensor:
    """(B,C,H,W): the mean of the probabilities of all windows that show a pixel."""
    height, width = inputs.shape[-2:]
    inputs = F.pad(inputs, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    rows, columns = inputs.shape[-2:]
    total, count = None, inputs.new_zeros(rows, columns)
    for top in _starts(rows, window[0]):
        for left in _starts(columns, window[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            one = _resize(network(inputs[place]).logits.float(), window).softmax(dim=1)
            if total is None:
                total = one.new_zeros(*one.shape[:2], rows, columns)
            total[place] += one
            count[place] += 1
    assert total is not None
    return total.div_(count)[..., :height, :width]


def _starts(length: int, window: int) -> list[int]:
    """Where windows two thirds of their size apart begin, the last one at the end."""
    stride = max(1, round(window * 2 / 3))
    return [*range(0, length - window, stride), length - window]


def _resize(maps: Tensor, size: Size) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
