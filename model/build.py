"""The networks by the names that a configuration uses. A new network is one line here."""

import torch

from model.deeplabv2 import DeepLabV2
from model.deeplabv3plus import DeepLabV3Plus
from model.network import SegmentationNetwork
from model.pretrained import load_pretrained
from model.resnet import BACKBONES
from utils.config import Config
from utils.errors import WeightsError
from utils.randomness import keyed_seed

NETWORKS: dict[str, type[DeepLabV2] | type[DeepLabV3Plus]] = {
    "DeepLab": DeepLabV2,
    "DeepLabv3+": DeepLabV3Plus,
}


def build_network(
    name: str, num_classes: int, backbone: str = "resnet101", *, width: int = 64, feature_channels: int = 256
) -> SegmentationNetwork:
    """A network with random weights, drawn from torch's global generator (the caller seeds it).

    Args:
        name: a key of `NETWORKS`.
        num_classes: at least 1.
        backbone: a key of `model.resnet.BACKBONES`.
        width: channels of the backbone's first stage. Public weights need 64.
        feature_channels: D, a multiple of 32 (groups of GroupNorm).

    Raises:
        ValueError: an unknown name, or no class.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}; known: {', '.join(BACKBONES)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; a network needs at least 1")
    return NETWORKS[name](num_classes, backbone, width=width, feature_channels=feature_channels)


def build_networks(config: Config) -> list[SegmentationNetwork]:
    """The two students with random weights, each drawn with a seed of its own: they must start different."""
    networks = []
    for own in (0, 1):
        torch.manual_seed(keyed_seed(config.seed, "initial weights", own))
        networks.append(
            build_network(
                config.model,
                config.num_classes,
                config.backbone,
                width=config.backbone_width,
                feature_channels=config.feature_channels,
            )
        )
    return networks


def build_students(config: Config) -> list[SegmentationNetwork]:
    """The two students as training starts them: ``build_networks`` with the pretrained weights loaded.

    Raises:
        WeightsError: the weights cannot be found, read or trusted.
    """
    students = build_networks(config)
    for own, student in enumerate(students):
        load_pretrained(student, config.pretrained or "none", role=f"student {own}")
    if all(torch.equal(*pair) for pair in zip(*(student.parameters() for student in students), strict=True)):
        raise WeightsError(
            f"{config.pretrained}: holds a whole network, so both students would start the same and never differ; "
            "use weights of the backbone alone"
        )
    return students
