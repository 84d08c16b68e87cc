"""DeepLabv3+ (Chen et al. 2018b) in the variant of the authors' release (docs/method.md: the networks)."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.network import NetworkOutput, SegmentationNetwork, WeightsConvention
from model.resnet import ResNet

LOW_LEVEL_DIM = 48
DILATIONS = (6, 12, 18)

_leaky_relu = partial(F.leaky_relu, negative_slope=0.01)


class PooledBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of (B, channels, 1, 1) that also works in training mode for a batch of one.

    One value a channel has no variance (PyTorch raises): such a batch is normalised with the running
    statistics and leaves them as they are. `SyncBatchNorm.convert_sync_batchnorm` replaces this class like
    any BatchNorm; the statistics are then over all processes.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class AtrousSpatialPyramid(nn.Module):
    """1x1, three dilated 3x3 and a global-pooling branch: (B, in_channels, h, w) -> (B, dim, h, w).

    The layout of Rota Bulo et al. (In-Place ABN, 2018): one BatchNorm over the concatenated branches, leaky
    ReLUs, and the pooled branch added after the 1x1 reduction, before the last BatchNorm.
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(in_channels, dim, 1, bias=False)])
        self.branches.extend(
            nn.Conv2d(in_channels, dim, 3, padding=rate, dilation=rate, bias=False) for rate in DILATIONS
        )
        self.branches_norm = nn.BatchNorm2d(dim * len(self.branches))
        self.reduce = nn.Conv2d(dim * len(self.branches), dim, 1, bias=False)
        self.pool = nn.Conv2d(in_channels, dim, 1, bias=False)
        self.pool_norm = PooledBatchNorm2d(dim)
        self.pool_reduce = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.cat([branch(x) for branch in self.branches], dim=1)  # (B, 4 dim, h, w)
        pooled = self.pool(x.mean(dim=(2, 3), keepdim=True))  # (B, dim, 1, 1)
        reduced = self.reduce(_leaky_relu(self.branches_norm(branches)))
        pooled = self.pool_reduce(_leaky_relu(self.pool_norm(pooled)))
        return _leaky_relu(self.norm(reduced + pooled))


def _conv_norm_relu(in_channels: int, out_channels: int, size: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class DeepLabV3PlusHead(nn.Module):
    """Pyramid on layer4, upsampled and joined with layer1; two 3x3 convolutions; classifier.

    Shapes: low_level (B, low_level_channels, h, w), high_level (B, in_channels, h', w') ->
    logits (B, C, h, w), features (B, D, h, w), which are not normalised.
    """

    def __init__(self, in_channels: int, low_level_channels: int, num_classes: int, dim: int) -> None:
        super().__init__()
        self.aspp = AtrousSpatialPyramid(in_channels, dim)
        self.low_level = nn.Sequential(*_conv_norm_relu(low_level_channels, LOW_LEVEL_DIM, 1))
        self.fuse = nn.Sequential(
            *_conv_norm_relu(dim + LOW_LEVEL_DIM, dim, 3),
            *_conv_norm_relu(dim, dim, 3),
        )
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, low_level: Tensor, high_level: Tensor) -> NetworkOutput:
        low_level = self.low_level(low_level)
        pyramid = F.interpolate(self.aspp(high_level), size=low_level.shape[2:], mode="bilinear", align_corners=True)
        features = self.fuse(torch.cat([pyramid, low_level], dim=1))
        return NetworkOutput(self.classifier(features), features)


class DeepLabV3Plus(SegmentationNetwork):
    """`num_classes` classes on a grid of stride 4; backbone: a key of `model.resnet.BACKBONES`.

    Its stem is that of the backbone's public ImageNet weights, so that they fit it whole: deep for resnet101 (the
    release's), plain for the others (torchvision's).
    """

    release_names = (
        ("head.aspp.map_convs.", "head.aspp.branches."),
        ("head.aspp.map_bn.", "head.aspp.branches_norm."),
        ("head.aspp.red_conv.", "head.aspp.reduce."),
        ("head.aspp.global_pooling_conv.", "head.aspp.pool."),
        ("head.aspp.global_pooling_bn.", "head.aspp.pool_norm."),
        ("head.aspp.pool_red_conv.", "head.aspp.pool_reduce."),
        ("head.aspp.red_bn.", "head.aspp.norm."),
        ("head.reduce.", "head.low_level."),
        ("head.last_conv.", "head.fuse."),
        ("classifier.", "head.classifier."),
        ("backbone.", "backbone."),
    )
    release_convention = WeightsConvention(normalization="release_voc", stride_place="conv2")

    def __init__(
        self, num_classes: int, backbone: str = "resnet101", *, width: int = 64, feature_channels: int = 256
    ) -> None:
        resnet = ResNet(
            backbone,
            output_stride=16,
            multi_grid=(1, 2, 4),  # dilations 2, 4, 8 in layer4
            deep_stem=backbone == "resnet101",
            width=width,
        )
        head = DeepLabV3PlusHead(resnet.out_channels, resnet.low_level_channels, num_classes, feature_channels)
        super().__init__(resnet, head)
