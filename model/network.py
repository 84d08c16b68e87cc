"""What every segmentation network here is: input normalisation, backbone and head.

Callers write `network(network.normalization(images))`, where images are RGB in [0, 1].
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from model.resnet import ResNet


class NetworkOutput(NamedTuple):
    """Both on the network's feature grid h x w."""

    logits: Tensor  # (B, C, h, w)
    features: Tensor  # (B, D, h, w), D = 256 by default


class WeightsConvention(NamedTuple):
    """What a weights file expects of its network and cannot say itself."""

    normalization: str  # a key of NORMALIZATIONS
    stride_place: str  # see model.resnet.ResNet


class Normalization(NamedTuple):
    """`mean` and `std` are in the network's channel order and on its scale."""

    bgr: bool
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATIONS = {
    # torchvision's and timm's ImageNet weights.
    "imagenet": Normalization(False, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Caffe's: blue first, 0..255, only the mean subtracted.
    "coco": Normalization(True, 255.0, (104.00698793, 116.66876762, 122.67891434), (1.0, 1.0, 1.0)),
    # What the release trains and evaluates with, whatever its weights were made for: its VOC loader turns Caffe's
    # image around after the subtraction, its Cityscapes loader subtracts the dataset's RGB mean from BGR images.
    "release_voc": Normalization(False, 255.0, (122.67891434, 116.66876762, 104.00698793), (1.0, 1.0, 1.0)),
    "release_cityscapes": Normalization(True, 255.0, (73.15835921, 82.90891754, 72.39239876), (1.0, 1.0, 1.0)),
}


class InputNormalization(nn.Module):
    """RGB images (B, 3, H, W), float in [0, 1] -> what the network's weights were trained on, same shape.

    It belongs to the weights, not to the data; its buffers make checkpoints and copies carry it.

    Buffers:
        bgr: () bool, True where the network expects blue first.
        scale: () float, 1 or 255: the network's value of white.
        mean, std: (3,) float, in the network's channel order and on its scale.
    """

    bgr: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, preset: str = "imagenet") -> None:
        super().__init__()
        self.register_buffer("bgr", torch.tensor(False))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        self.set_preset(preset)

    def set_preset(self, name: str) -> None:
        """Take the values of `NORMALIZATIONS[name]`; ValueError for an unknown name."""
        if name not in NORMALIZATIONS:
            raise ValueError(f"unknown input normalization {name!r}; known: {', '.join(NORMALIZATIONS)}")
        preset = NORMALIZATIONS[name]
        self.bgr.fill_(preset.bgr)
        self.scale.fill_(preset.scale)
        self.mean.copy_(torch.tensor(preset.mean))
        self.std.copy_(torch.tensor(preset.std))

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; "
                "expected float of shape (B, 3, H, W), RGB in [0, 1]"
            )
        # `where` on a buffer rather than `if`: reading it would make the CPU wait for the GPU.
        images = torch.where(self.bgr, images.flip(1), images)
        return (images * self.scale - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)


class SegmentationNetwork(nn.Module):
    """Normalised images (B, 3, H, W), H and W at least 33 -> `NetworkOutput`.

    Children: `normalization` (applied by the caller, before the network), `backbone`, and `head`, which maps
    the backbone's (low_level, high_level) features to a `NetworkOutput`.
    """

    # The parameters' names in the authors' release: (its prefix, ours), ours covering every parameter.
    release_names: ClassVar[tuple[tuple[str, str], ...]]
    # Where the strides of the release's network sit, and what its VOC loader feeds it.
    release_convention: ClassVar[WeightsConvention]

    def __init__(self, backbone: ResNet, head: nn.Module) -> None:
        super().__init__()
        self.normalization = InputNormalization()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> NetworkOutput:
        low_level, high_level = self.backbone(images)
        output: NetworkOutput = self.head(low_level, high_level)
        return output
