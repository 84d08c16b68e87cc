"""The networks against the release's outputs, their shapes, and the contracts that training relies on."""

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.build import NETWORKS, build_network
from model.deeplabv3plus import PooledBatchNorm2d
from model.network import InputNormalization, SegmentationNetwork
from model.pretrained import load_release_weights
from model.resnet import BACKBONES, ResNet

GOLDEN = Path(__file__).parent / "golden"
STRIDE = {"DeepLab": 8, "DeepLabv3+": 4}


def golden_weights(case: str, seed: int) -> dict[str, Tensor]:
    """The weights that the golden outputs were computed with (recipe: tests/golden/README.md)."""
    weights = {}
    for name, shape in json.loads((GOLDEN / f"{case}_state_dict.json").read_text()).items():
        random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        if name.endswith("running_var"):
            value = 0.75 + 0.5 * random.rand(*shape)
        elif len(shape) >= 2:
            value = random.randn(*shape) * np.sqrt(1 / np.prod(shape[1:]))
        elif name.endswith("weight"):
            value = 1 + 0.1 * random.randn(*shape)
        else:
            value = 0.1 * random.randn(*shape)
        weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights


@pytest.mark.parametrize(("name", "case"), [("DeepLab", "deeplabv2"), ("DeepLabv3+", "deeplabv3plus")])
def test_outputs_equal_the_release(name: str, case: str) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    network = build_network(name, 21).eval()
    load_release_weights(network, golden_weights(case, int(golden["weight_seed"])))
    with torch.no_grad():
        output = network(torch.from_numpy(golden["image"]))
    # DeepLabv3+'s features reach 106: there 1e-4 alone is less than a change of thread count makes.
    np.testing.assert_allclose(output.features, golden["feat"], atol=1e-4, rtol=1e-4)
    assert np.abs(output.logits.numpy() - golden["out"]).max() < 1e-3 * np.abs(golden["out"]).max()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_backbone_gives_logits_and_features_on_one_grid(name: str, backbone: str) -> None:
    network = build_network(name, 3, backbone)
    with torch.no_grad():
        output = network(torch.rand(1, 3, 33, 50))  # training mode, batch of one, odd and even sizes
    height, width = (-(-size // STRIDE[name]) for size in (33, 50))
    if name == "DeepLab":
        # ceil_mode of max pooling: 50 -> 25 -> 13 -> 7, but 33 -> 17 -> 9 -> 5.
        assert output.features.norm(dim=1).allclose(torch.ones(1, height, width))
    assert output.logits.shape == (1, 3, height, width)
    assert output.features.shape == (1, 256, height, width)
    assert output.logits.isfinite().all()


def test_max_pooling_of_deeplabv2_rounds_up() -> None:
    with torch.no_grad():
        output = build_network("DeepLab", 2, "resnet18")(torch.rand(1, 3, 64, 128))
    assert output.logits.shape[2:] == (9, 17)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_image_trains(name: str) -> None:
    network = build_network(name, 1, "resnet18").train()
    output = network(torch.rand(1, 3, 33, 33))
    (output.logits.square().mean() + output.features[:, 0].mean()).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not without


def test_pooled_batch_norm_is_batch_norm_but_for_a_single_value() -> None:
    norm, plain = PooledBatchNorm2d(4), nn.BatchNorm2d(4)
    batch = torch.randn(2, 4, 1, 1)
    assert torch.equal(norm(batch), plain(batch))
    before = norm.running_mean.clone()
    single = norm(batch[:1])
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(single, norm.eval()(batch[:1]))


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_groups_hold_every_parameter_once(name: str) -> None:
    network = build_network(name, 2, "resnet18")
    groups = [*network.backbone.parameters(), *network.head.parameters()]
    assert len({id(parameter) for parameter in groups}) == len(groups)
    assert {id(parameter) for parameter in groups} == {id(parameter) for parameter in network.parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_seed_decides_the_weights(name: str) -> None:
    def build(seed: int) -> SegmentationNetwork:
        torch.manual_seed(seed)
        return build_network(name, 2, "resnet18")

    first, again, other = build(0).state_dict(), build(0).state_dict(), build(1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["backbone.conv1.weight"], other["backbone.conv1.weight"])
    assert not torch.equal(first["head.classifier.weight"], other["head.classifier.weight"])


def test_initial_weights_follow_the_method() -> None:
    torch.manual_seed(0)
    v2, v3 = (build_network(name, 2, "resnet18") for name in NETWORKS)
    for network in (v2, v3):
        weight = network.backbone.layer3[1].conv1.weight  # fan-out 256 * 9
        assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert v2.head.branches[1][0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert v3.head.aspp.branches[1].weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


def dilations(backbone: ResNet) -> list[list[int]]:
    layers = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    return [sorted({block.conv2.dilation[0] for block in layer}) for layer in layers]


def test_dilation_replaces_the_strides_beyond_the_output_stride() -> None:
    assert dilations(ResNet("resnet34", output_stride=8)) == [[1], [1], [2], [4]]
    assert dilations(ResNet("resnet34", output_stride=16, multi_grid=(1, 2, 4))) == [[1], [1], [1], [2, 4, 8]]
    assert dilations(ResNet("resnet34")) == [[1], [1], [1], [1]]


def test_stride_place_travels_with_state_dict_and_copy() -> None:
    caffe = ResNet("resnet50", stride_place="conv1")
    block = caffe.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    other = ResNet("resnet50", stride_place="conv2")
    other.load_state_dict(caffe.state_dict())
    for backbone in (other, copy.deepcopy(other)):
        assert backbone.stride_place == "conv1"
        assert backbone.layer2[0].conv1.stride == (2, 2)
        assert backbone.layer2[0].conv2.stride == (1, 1)


def test_normalization_travels_with_the_state_dict() -> None:
    loaded = InputNormalization("imagenet")
    loaded.load_state_dict(InputNormalization("coco").state_dict())
    photograph = torch.rand(1, 3, 4, 4)
    assert torch.equal(loaded(photograph), InputNormalization("coco")(photograph))


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4)])
def test_normalization_refuses_what_is_not_a_float_batch(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected float of shape \(B, 3, H, W\)"):
        InputNormalization()(images)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"known: DeepLab, DeepLabv3\+"):
        build_network("DeepLabv4", 2)
    with pytest.raises(ValueError, match="known: resnet18, resnet34, resnet50, resnet101"):
        build_network("DeepLab", 2, "resnet19")
    with pytest.raises(ValueError, match="needs at least 1"):
        build_network("DeepLab", 0, "resnet18")
    with pytest.raises(ValueError, match="known: imagenet, coco"):
        InputNormalization("voc")
    with pytest.raises(ValueError, match="known: conv1, conv2"):
        ResNet("resnet50", stride_place="conv3")
    with pytest.raises(ValueError, match="8, 16 or 32"):
        ResNet("resnet18", output_stride=4)
