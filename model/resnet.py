"""ResNet backbones (He et al. 2016) with the strides, dilations and stems that semantic segmentation uses.

torchvision's blocks are not reused: its `BasicBlock` refuses dilation, the first block of its dilated stages
keeps the previous stage's dilation, and its stride sits on the 3x3 convolution only. Names follow it.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

STRIDE_PLACES = ("conv1", "conv2")


def _conv(in_channels: int, out_channels: int, size: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the spatial size at stride 1."""
    padding = dilation * (size // 2)
    return nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity where the shape allows it, else a 1x1 convolution."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride=stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: (B, in_channels, h, w) -> (B, channels, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: (B, in_channels, h, w) -> (B, 4 * channels, h / stride, w / stride)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.stride = stride
        self.conv1 = _conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv(channels, channels, 3, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _conv(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def set_stride_place(self, place: str) -> None:
        """Give the stride to `place`, "conv1" or "conv2"; the other one gets 1."""
        for name in STRIDE_PLACES:
            stride = self.stride if name == place else 1
            getattr(self, name).stride = (stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.downsample(x))


# name -> (block, number of blocks in layer1..layer4)
BACKBONES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """A ResNet without its classifier: normalised images (B, 3, H, W) -> (layer1's output, layer4's output).

    layer1's output, (B, low_level_channels, H/4, W/4), is the low-level feature of DeepLabv3+; layer4's is
    (B, out_channels, H/output_stride, W/output_stride). Sizes are rounded up.

    Args:
        name: a key of `BACKBONES`.
        output_stride: 8, 16 or 32. A stage that would go beyond it has stride 1, and all its blocks are
            dilated by what the strides lack.
        multi_grid: factors on the dilation of layer4's blocks, repeated when there are more blocks.
        deep_stem: three 3x3 convolutions (width, width and 2 * width channels) in place of the 7x7 one.
        stride_place: "conv1" (1x1, Caffe) or "conv2" (3x3, torchvision): which convolution of a bottleneck
            has the stride. No parameter's shape depends on it, so it belongs to the weights' description and
            travels in the state dict as the buffer `stride_in_conv1`. It says nothing about basic blocks.
        ceil_mode: whether max pooling rounds its output size up (Caffe).
        width: channels of the first stage; the others have 2, 4 and 8 times as many. Public weights need 64.

    Set `recompute` to keep only the blocks' inputs for the backward pass and compute what is in them again there.

    Raises:
        ValueError: unknown name, output stride or stride place.
    """

    stride_in_conv1: Tensor

    def __init__(
        self,
        name: str,
        *,
        output_stride: int = 32,
        multi_grid: Sequence[int] = (1,),
        deep_stem: bool = False,
        stride_place: str = "conv2",
        ceil_mode: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        if name not in BACKBONES:
            raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is {output_stride}; it must be 8, 16 or 32")
        block, depths = BACKBONES[name]
        self.name, self.deep_stem, self.recompute = name, deep_stem, False
        self.low_level_channels, self.out_channels = width * block.expansion, 8 * width * block.expansion

        in_channels = 2 * width if deep_stem else width
        self.conv1 = _deep_stem(width) if deep_stem else nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=ceil_mode)
        stages = []
        reached = 4  # stride of the feature grid so far
        for depth, channels, undilated in zip(
            depths, (width, 2 * width, 4 * width, 8 * width), (4, 8, 16, 32), strict=True
        ):
            stride = 2 if reached < min(undilated, output_stride) else 1
            reached *= stride
            blocks = []
            for index in range(depth):
                grid = multi_grid[index % len(multi_grid)] if undilated == 32 else 1
                dilation = grid * undilated // reached
                blocks.append(block(in_channels, channels, stride=stride, dilation=dilation))
                in_channels, stride = channels * block.expansion, 1
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.register_buffer("stride_in_conv1", torch.tensor(False))
        self.set_stride_place(stride_place)
        self.register_load_state_dict_post_hook(_apply_stride_place)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stride_place(self) -> str:
        """The convolution of a bottleneck that has the stride: "conv1" or "conv2"."""
        return "conv1" if self.stride_in_conv1 else "conv2"

    def set_stride_place(self, place: str) -> None:
        """Move the stride of every bottleneck to "conv1" (1x1) or "conv2" (3x3); ValueError otherwise."""
        if place not in STRIDE_PLACES:
            raise ValueError(f"unknown stride place {place!r}; known: {', '.join(STRIDE_PLACES)}")
        self.stride_in_conv1.fill_(place == "conv1")
        for block in self.modules():
            if isinstance(block, Bottleneck):
                block.set_stride_place(place)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        low_level = self._through(self.layer1, x)
        return low_level, self._through(self.layer4, self._through(self.layer3, self._through(self.layer2, low_level)))

    def _through(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return stage(x)
        for block in stage:
            contexts = functools.partial(_first_and_again, block)
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return x


def _first_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """BatchNorm's running statistics must see a batch once, not again when the block is recomputed."""
    return nullcontext(), _untouched_statistics(block)


@contextmanager
def _untouched_statistics(block: nn.Module) -> Iterator[None]:
    """BatchNorm normalizes with the batch's statistics, and its running ones stay as they are."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:  # a counter to throw away: SyncBatchNorm refuses to work without one
        norm.momentum, norm.num_batches_tracked = 0.0, torch.tensor(0, device=norm.weight.device)
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _deep_stem(width: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(3, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        _conv(width, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        _conv(width, 2 * width, 3),
    )


def _apply_stride_place(backbone: nn.Module, incompatible_keys: object) -> None:
    """After `load_state_dict`: bring the convolutions in line with the loaded `stride_in_conv1`."""
    assert isinstance(backbone, ResNet)
    backbone.set_stride_place(backbone.stride_place)
