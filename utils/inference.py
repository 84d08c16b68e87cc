"""How a network is applied to whole images: protocols, flips and scales (METHOD 10)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config import Config, parse_size
from utils.errors import UserError

ENSEMBLE = "ensemble"
SMALLEST = 33  # pixels a side that the networks need; smaller images are padded
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

    def about(self) -> dict[str, str]:
        """What a result must tell besides the protocol; nothing for one pass."""
        scales = {"scales": " ".join(f"{scale:g}" for scale in self.scales)} if self.scales != (1.0,) else {}
        return scales | ({"flip": "yes"} if self.flip else {})


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

    What is larger than ``AT_ONCE`` pixels is predicted in windows of ``LARGE_WINDOW``.
    """
    images = torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float().div_(255)
    if inference.window is None and image.shape[0] * image.shape[1] > AT_ONCE:
        inference = replace(inference, window=LARGE_WINDOW)
    found = predict_all(networks, images, size, inference=inference, wanted=frozenset([model]))[model]
    confidence, label = found[0].max(dim=0)
    return label.byte().cpu().numpy(), confidence.cpu().numpy()


@torch.no_grad()
def predict_all(
    networks: Mapping[str, Any], images: Tensor, size: Size, *, inference: Inference, wanted: frozenset[str]
) -> dict[str, Tensor]:
    """The probabilities (B,C,*size) of every wanted network, and of the ensemble: the mean of those named student_*.

    images: (B,3,H,W) float RGB in [0,1]. networks: in evaluation mode.
    """
    students = [name for name in networks if name.startswith("student")]
    needed = [name for name in networks if name in wanted or (ENSEMBLE in wanted and name in students)]
    found = {name: predict(networks[name], images, size, inference=inference) for name in needed}
    if ENSEMBLE in wanted and ENSEMBLE not in networks:  # an exported ensemble is one network
        found[ENSEMBLE] = torch.stack([found[name] for name in students]).mean(dim=0)
    return {name: one for name, one in found.items() if name in wanted}


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
    return total / (len(inference.scales) * (1 + inference.flip))


def _probabilities(network: Any, inputs: Tensor, size: Size, inference: Inference) -> Tensor:
    """(B,C,*size) of normalized images, in one pass or window by window."""
    if inference.window is not None:
        return _resize(_by_windows(network, inputs, inference.window), size)
    height, width = inputs.shape[-2:]
    rows, columns = inference.pad or (0, 0)
    below, right = max(rows, SMALLEST) - height, max(columns, SMALLEST) - width
    if below <= 0 and right <= 0:
        return _resize(network(inputs).logits.float(), size).softmax(dim=1)
    padded = F.pad(inputs, (0, max(0, right), 0, max(0, below)))
    logits = _resize(network(padded).logits.float(), (padded.shape[-2], padded.shape[-1]))
    return _resize(logits[..., :height, :width], size).softmax(dim=1)


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
    return (total / count)[..., :height, :width]


def _starts(length: int, window: int) -> list[int]:
    """Where windows two thirds of their size apart begin, the last one at the end."""
    stride = max(1, round(window * 2 / 3))
    return [*range(0, length - window, stride), length - window]


def _resize(maps: Tensor, size: Size) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
