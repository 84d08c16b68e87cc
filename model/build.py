"""The networks by the names that a configuration uses. A new network is one line here."""

import logging
from collections.abc import Sequence

import torch

from model.deeplabv2 import DeepLabV2
from model.deeplabv3plus import DeepLabV3Plus
from model.network import SegmentationNetwork
from model.pretrained import load_pretrained
from model.resnet import BACKBONES
from utils.config import Config
from utils.randomness import keyed_seed

logger = logging.getLogger(__name__)

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
    for own, (student, weights) in enumerate(zip(students, config.pretrained_by_peer, strict=True)):
        load_pretrained(student, weights, peer=own)
    if _are_equal(students):  # a file of one whole network
        logger.warning("student 1 takes the backbone alone, its head stays random: the students must start different")
        students[1] = build_networks(config)[1]
        load_pretrained(students[1], config.pretrained_by_peer[1], peer=1, backbone_only=True)
    return students


def _are_equal(networks: Sequence[SegmentationNetwork]) -> bool:
    return all(torch.equal(*pair) for pair in zip(*(network.parameters() for network in networks), strict=True))
