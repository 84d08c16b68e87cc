"""DeepLabv2 (Chen et al. 2018) with the head of the authors' release (docs/method.md: the networks)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.network import NetworkOutput, SegmentationNetwork, WeightsConvention
from model.resnet import ResNet

DILATIONS = (6, 12, 18, 24)


def _conv_norm(in_channels: int, out_channels: int, size: int, *, dilation: int = 1) -> list[nn.Module]:
    """A convolution that keeps the spatial size, and GroupNorm in 32 groups."""
    padding = dilation * (size // 2)
    return [
        nn.Conv2d(in_channels, out_channels, size, padding=padding, dilation=dilation),
        nn.GroupNorm(32, out_channels),
    ]


class SqueezeExcitation(nn.Module):
    """Channel gates from the image's mean (Hu et al. 2018): (B, channels, h, w) -> the same shape."""

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        squeezed = channels // reduction
        self.gates = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(inplace=True), nn.Linear(squeezed, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.gates(x.mean(dim=(2, 3)))  # (B, channels)
        return x * gates[:, :, None, None]


class DeepLabV2Head(nn.Module):
    """Atrous spatial pyramid, squeeze-and-excitation, feature, classifier.

    Shapes: high_level (B, in_channels, h, w) -> logits (B, C, h, w), features (B, D, h, w) of unit length.
    The classifier sees the feature after dropout and before normalisation.
    """

    def __init__(self, in_channels: int, num_classes: int, dim: int) -> None:
        super().__init__()
        branches = [_conv_norm(in_channels, dim, 1)]
        branches += [_conv_norm(in_channels, dim, 3, dilation=rate) for rate in DILATIONS]
        self.branches = nn.ModuleList(nn.Sequential(*layers, nn.ReLU(inplace=True)) for layers in branches)
        channels = dim * len(branches)
        self.squeeze_excitation = SqueezeExcitation(channels)
        self.fuse = nn.Sequential(*_conv_norm(channels, dim, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(dim, num_classes, 1, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, low_level: Tensor, high_level: Tensor) -> NetworkOutput:
        """`low_level` is not used: every head is called in the same way."""
        pyramid = torch.cat([branch(high_level) for branch in self.branches], dim=1)  # (B, 5 D, h, w)
        features = self.fuse(self.squeeze_excitation(pyramid))
        return NetworkOutput(self.classifier(self.dropout(features)), F.normalize(features, dim=1))


class DeepLabV2(SegmentationNetwork):
    """`num_classes` classes on a grid of stride 8; backbone: a key of `model.resnet.BACKBONES`."""

    release_names = (
        ("layer5.conv2d_list.", "head.branches."),
        ("layer5.bottleneck.0.se.", "head.squeeze_excitation.gates."),
        ("layer5.bottleneck.1.", "head.fuse.0."),
        ("layer5.bottleneck.2.", "head.fuse.1."),
        ("layer5.head.1.", "head.classifier."),
        ("", "backbone."),
    )
    release_convention = WeightsConvention(normalization="release_voc", stride_place="conv1")

    def __init__(
        self, num_classes: int, backbone: str = "resnet101", *, width: int = 64, feature_channels: int = 256
    ) -> None:
        resnet = ResNet(backbone, output_stride=8, stride_place="conv1", ceil_mode=True, width=width)
        super().__init__(resnet, DeepLabV2Head(resnet.out_channels, num_classes, feature_channels))
