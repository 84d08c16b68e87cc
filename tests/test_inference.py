"""Whole images: padding, overlapping windows, flips, scales, and which models are compared."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.loaders import EvaluationImage
from model import build_network
from model.network import InputNormalization, NetworkOutput
from tests.conftest import tiny_values
from utils.config import check_config
from utils.errors import UserError
from utils.evaluate import choose_models, evaluate
from utils.inference import ENSEMBLE, STRIP, Inference, classify_all, inference_for, largest, predict, predict_all
from utils.visualize import save_confusion

CPU = torch.device("cpu")


class Pixelwise(nn.Module):
    """Logits of a pixel from that pixel alone: (r, g, b) times ``factor``, on a grid as fine as the image."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.normalization = nn.Identity()
        self.factor = factor
        self.sizes: list[tuple[int, int]] = []

    def forward(self, images: Tensor) -> NetworkOutput:
        self.sizes.append((images.shape[2], images.shape[3]))
        return NetworkOutput(images * self.factor, images)


@pytest.fixture
def network() -> Any:
    torch.manual_seed(3)
    return build_network("DeepLab", 4, "resnet18", width=8, feature_channels=32).eval()


def upsampled(network: Any, inputs: Tensor, size: tuple[int, int]) -> Tensor:
    with torch.no_grad():
        return F.interpolate(network(inputs).logits, size=size, mode="bilinear", align_corners=True)


def test_original_is_softmax_of_the_upsampled_logits_at_the_labels_size(network: Any):
    image = torch.rand(2, 3, 48, 40)
    expected = upsampled(network, network.normalization(image), (96, 80)).softmax(dim=1)
    torch.testing.assert_close(predict(network, image, (96, 80), inference=Inference()), expected)


def test_padding_is_what_normalization_maps_to_zero_and_is_cut_back(network: Any):
    image = torch.rand(1, 3, 36, 34)
    inputs = torch.zeros(1, 3, 40, 50)
    inputs[..., :36, :34] = network.normalization(image)
    expected = upsampled(network, inputs, (40, 50))[..., :36, :34].softmax(dim=1)
    torch.testing.assert_close(predict(network, image, (36, 34), inference=Inference(pad=(40, 50))), expected)


def test_an_image_smaller_than_the_networks_can_take_is_padded(network: Any):
    assert predict(network, torch.rand(1, 3, 5, 70), (5, 70), inference=Inference()).shape == (1, 4, 5, 70)


def test_windows_are_two_thirds_apart_reach_the_end_and_average_probabilities():
    network = Pixelwise()
    image = torch.rand(1, 3, 50, 36)
    probabilities = predict(network, image, (50, 36), inference=Inference(window=(24, 36)))
    assert network.sizes == [(24, 36)] * 3  # rows 0, 16, and 26 = 50 - 24 in place of 32
    torch.testing.assert_close(probabilities, image.softmax(dim=1))


def test_overlapping_windows_are_averaged(network: Any):
    image = torch.rand(1, 3, 48, 60)
    inputs = network.normalization(image)
    left, right = (upsampled(network, inputs[..., at : at + 48], (48, 48)).softmax(dim=1) for at in (0, 12))
    probabilities = predict(network, image, (48, 60), inference=Inference(window=(48, 48)))
    torch.testing.assert_close(probabilities[..., :12], left[..., :12])
    torch.testing.assert_close(probabilities[..., 12:48], (left[..., 12:] + right[..., :36]) / 2)
    torch.testing.assert_close(probabilities[..., 48:], right[..., 36:])


def test_a_window_larger_than_the_image_is_padded_and_cut_back():
    network = Pixelwise()
    image = torch.rand(1, 3, 20, 30)
    probabilities = predict(network, image, (20, 30), inference=Inference(window=(40, 40)))
    assert network.sizes == [(40, 40)]
    torch.testing.assert_close(probabilities, image.softmax(dim=1))


def test_flip_makes_the_prediction_of_a_mirrored_image_the_mirrored_prediction(network: Any):
    image, inference = torch.rand(1, 3, 48, 64), Inference(flip=True)
    one = predict(network, image, (48, 64), inference=inference)
    other = predict(network, image.flip(-1), (48, 64), inference=inference)
    torch.testing.assert_close(one, other.flip(-1))
    without = predict(network, image, (48, 64), inference=Inference())
    mirrored = predict(network, image.flip(-1), (48, 64), inference=Inference()).flip(-1)
    torch.testing.assert_close(one, (without + mirrored) / 2)


def test_scales_average_the_predictions_of_resized_images(network: Any):
    image = torch.rand(1, 3, 40, 60)
    both = predict(network, image, (40, 60), inference=Inference(scales=(1.0, 1.5)))
    large = F.interpolate(network.normalization(image), (60, 90), mode="bilinear", align_corners=True)
    expected = (
        upsampled(network, network.normalization(image), (40, 60)).softmax(dim=1)
        + upsampled(network, large, (40, 60)).softmax(dim=1)
    ) / 2
    torch.testing.assert_close(both, expected)


def test_the_ensemble_is_the_mean_of_the_students_and_only_what_is_needed_runs():
    networks = {"student_0": Pixelwise(), "student_1": Pixelwise(5.0), "teacher_0": Pixelwise()}
    image = torch.rand(1, 3, 40, 40)
    found = predict_all(networks, image, (40, 40), inference=Inference(), wanted=frozenset(["ensemble"]))
    assert set(found) == {"ensemble"}
    torch.testing.assert_close(found["ensemble"], (image.softmax(dim=1) + (5 * image).softmax(dim=1)) / 2)
    assert networks["teacher_0"].sizes == []


INFERENCES = [
    Inference(),
    Inference(pad=(60, 80)),
    Inference(flip=True),
    Inference(window=(40, 40)),
    Inference(scales=(1.0, 1.5)),
]


@pytest.mark.parametrize("inference", INFERENCES, ids=str)
@pytest.mark.parametrize("size", [(48, 64), (96, 130)])
def test_classes_are_those_of_the_largest_probabilities(inference: Inference, size: tuple[int, int]):
    networks = {}
    for name in ("student_0", "student_1", "teacher_0"):
        torch.manual_seed(len(networks))
        networks[name] = build_network("DeepLab", 4, "resnet18", width=8, feature_channels=32).eval()
    images, wanted = torch.rand(3, 3, 48, 64), frozenset(["student_1", "teacher_0", ENSEMBLE])
    classes = classify_all(networks, images, size, inference=inference, wanted=wanted)
    probabilities = predict_all(networks, images, size, inference=inference, wanted=wanted)
    assert classes.keys() == wanted
    for name, label in classes.items():
        assert label.dtype == torch.uint8
        assert label.shape == (3, *size)
        highest = probabilities[name].amax(dim=1)
        of_label = probabilities[name].gather(1, label.long()[:, None])[:, 0]
        assert (of_label >= highest - 1e-6).all(), "another class only where both are equal but for rounding"
        assert (label == probabilities[name].argmax(dim=1)).float().mean() > 0.999


def test_classes_of_images_larger_than_a_strip_are_whole():
    side = int((STRIP / 3) ** 0.5) + 40  # several strips an image, the last one shorter
    images = torch.rand(2, 3, side, side)
    networks = {"student_0": Pixelwise(), "student_1": Pixelwise()}
    found = classify_all(
        networks, images, (side, side), inference=Inference(), wanted=frozenset(["student_0", ENSEMBLE])
    )
    for label in found.values():
        torch.testing.assert_close(label, images.argmax(dim=1).byte())


def test_the_largest_is_the_first_of_equal_values():
    maps = torch.randint(0, 3, (2, 21, 9, 7)).float()
    torch.testing.assert_close(largest(maps).long(), torch.from_numpy(maps.numpy().argmax(axis=1)))
    assert largest(torch.rand(1, 1, 2, 2)).sum() == 0, "one class"


def test_protocols_of_a_configuration():
    dataset = {"root": "x", "labeled": "a", "unlabeled": "b", "num_classes": 3, "release_protocol": {"pad": "505,505"}}
    config = check_config(tiny_values(dataset=dataset), source="test")
    assert inference_for(config, "original") == Inference()
    assert inference_for(config, "release") == Inference(pad=(505, 505))
    assert inference_for(config, "sliding", flip=True) == Inference(window=(40, 48), flip=True)
    del dataset["release_protocol"]
    with pytest.raises(UserError, match=r'dataset custom defines none .*use "original"'):
        inference_for(check_config(tiny_values(dataset=dataset), source="test"), "release")


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate_by_hand(models: list[str] | None = None) -> Any:
    """One image of 40 x 40: class 0 left, 1 right, and no class 2; one network is right, the other says 0."""
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[0, :, :20], image[1, :, 20:] = 255, 255
    label = torch.zeros(40, 40, dtype=torch.int64)
    label[:, 20:] = 1
    label[:10] = 255
    networks = {"student": Pixelwise(), "teacher": Pixelwise(-1.0)}
    return evaluate(
        networks, [[EvaluationImage(image, label, "a")]], class_names=["left", "right", "none"], device=CPU,
        inference=Inference(), about={"split": "val"}, models=models,
    )  # fmt: skip


def test_results_hold_every_measure_and_say_which_class_was_absent(tmp_path: Path):
    evaluation = evaluate_by_hand()
    assert evaluation.main == "student", "no ensemble without two students"
    result = evaluation.as_dict()
    assert result["in no label"] == ["none"]
    student, teacher = result["models"]["student"], result["models"]["teacher"]
    assert student == {
        "mean_iou": 1.0, "pixel_accuracy": 1.0, "mean_accuracy": 1.0, "iou": {"left": 1.0, "right": 1.0, "none": None},
    }  # fmt: skip
    # Left the teacher's logits are -1, 0, 0, right 0, -1, 0: never the true class.
    assert teacher["pixel_accuracy"] == 0.0
    assert "in no label and no prediction, so in no mean: none" in evaluation.as_text()
    evaluation.write(tmp_path, best=None)
    assert json.loads((tmp_path / "result.json").read_text())["models"]["student"] == student
    with (tmp_path / "confusion_student.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["left", "right", "none"]
    assert rows[1:] == [["left", "600", "0", "0"], ["right", "0", "600", "0"], ["none", "0", "0", "0"]]
    matrix = evaluation.confusion["student"].matrix.numpy()
    save_confusion(tmp_path / "confusion.png", matrix, class_names=evaluation.class_names, title="test")
    with Image.open(tmp_path / "confusion.png") as picture:
        colors = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colors) > 10


def test_a_class_that_only_some_models_predict_is_told():
    image = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    image[:2] = 0
    item = EvaluationImage(image, torch.zeros(40, 40, dtype=torch.int64), "a")
    networks = {"student": Pixelwise(), "teacher": Pixelwise(-1.0)}
    evaluation = evaluate(
        networks, [[item]], class_names=["a", "b", "c"], device=CPU, inference=Inference(), about={}
    )  # fmt: skip
    assert "in no label but predicted, so IoU 0 in the mean of: c (student)" in evaluation.as_text()


def test_only_the_models_asked_for_are_compared():
    assert list(evaluate_by_hand(["teacher"]).confusion) == ["teacher"]
    networks = {"student_0": 0, "student_1": 0, "teacher_0": 0}
    assert choose_models(networks, ["ensemble", "student_1"]) == ["student_1", "ensemble"]
    assert choose_models(networks, None) == ["student_0", "student_1", "teacher_0", "ensemble"]
    with pytest.raises(UserError, match="no model teacher_1; it has: student_0, student_1, teacher_0, ensemble"):
        choose_models(networks, ["teacher_1"])


@pytest.mark.parametrize("preset", ["imagenet", "coco", "release_voc", "release_cityscapes"])
def test_one_photograph_through_every_input_convention(preset: str):
    """By hand, as each convention's own loader does it: from uint8, in float64."""
    photograph = torch.randint(0, 256, (1, 3, 4, 5), dtype=torch.uint8)
    red, green, blue = photograph[0].double()
    expected = {
        "imagenet": [(red / 255 - 0.485) / 0.229, (green / 255 - 0.456) / 0.224, (blue / 255 - 0.406) / 0.225],
        "coco": [blue - 104.00698793, green - 116.66876762, red - 122.67891434],
        # Caffe's mean is subtracted from its own channel, then the channels are turned around.
        "release_voc": [red - 122.67891434, green - 116.66876762, blue - 104.00698793],
        # The mean of Cityscapes' red is subtracted from blue, and of blue from red.
        "release_cityscapes": [blue - 73.15835921, green - 82.90891754, red - 72.39239876],
    }[preset]
    given = InputNormalization(preset)(photograph.float().div(255))
    torch.testing.assert_close(given[0], torch.stack(expected).float(), atol=2e-5, rtol=1e-5)
