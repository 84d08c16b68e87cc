"""Teachers: the moving average, and predictions that leave no trace."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.build import build_network
from model.teacher import EmaTeacher, predict_frozen, predict_probabilities

GOLDEN = np.load(Path(__file__).parent / "golden" / "ema.npz")


class OneTensor(nn.Module):
    def __init__(self, value: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(value).clone())


def test_130_updates_equal_the_release():
    teacher = EmaTeacher(OneTensor(GOLDEN["w_teacher_init"]), decay=float(GOLDEN["alpha"]))
    for step in range(int(GOLDEN["steps"])):
        teacher.update(OneTensor(GOLDEN[f"student_{step}"]), step)
    np.testing.assert_allclose(teacher.network.weight, GOLDEN["teacher_final"], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network("DeepLab", 3, "resnet18")


def test_a_teacher_starts_as_a_full_copy_and_averages_batchnorm_buffers_too(network: nn.Module):
    student = EmaTeacher(network).network
    teacher = EmaTeacher(student, decay=0.5)
    for own, other in zip(teacher.network.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.equal(own, other)
    with torch.no_grad():
        student.backbone.bn1.running_mean.add_(2.0)
    teacher.update(student, step=10)
    assert torch.allclose(teacher.network.backbone.bn1.running_mean, torch.ones(64))


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_predicting_changes_nothing_and_draws_nothing(network: nn.Module, norm: str):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(2, 3, 33, 33)
    first, second = (predict_frozen(network, images, norm=norm).logits for _ in range(2))
    assert torch.equal(first, second), "dropout is off"
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules()), "the student goes on in training mode"
    assert not first.requires_grad


def test_batch_statistics_depend_on_the_batch_and_running_ones_do_not(network: nn.Module):
    images = torch.rand(2, 3, 33, 33)
    alone = {norm: predict_frozen(network, images[:1], norm=norm).logits for norm in ("batch", "running")}
    together = {norm: predict_frozen(network, images, norm=norm).logits[:1] for norm in ("batch", "running")}
    assert torch.allclose(alone["running"], together["running"], atol=1e-5)
    assert not torch.allclose(alone["batch"], together["batch"], atol=1e-3)


def test_probabilities_have_the_size_of_the_image_and_sum_to_one(network: nn.Module):
    probabilities = predict_probabilities(network, torch.rand(1, 3, 33, 41), norm="running")
    assert probabilities.shape == (1, 3, 33, 41)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(1, 33, 41))
