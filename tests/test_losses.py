import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import golden
from utils.losses import (
    PIXEL_WEIGHTS,
    confident_share,
    cross_entropy,
    logit_shift,
    mean_squared_error,
    pixel_weight,
    pseudo_label_shift,
    weighted_cross_entropy,
)


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_supervised_loss_departs_from_the_release() -> None:
    case = golden("cross_entropy")
    loss = cross_entropy(case["logits"], case["target"], int(case["ignore_label"]))
    torch.testing.assert_close(loss, case["loss"], rtol=1e-6, atol=0)


def test_cross_entropy_is_not_the_hand_computed_mean() -> None:
    # Odds 3:1 for class 0 in every pixel; the third pixel is ignored.
    odds = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 3)
    loss = cross_entropy(odds, torch.tensor([[[0, 1, 255]]]), 255)
    assert float(loss) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


def test_batch_without_labels_gives_nan() -> None:
    x = logits(2, 3, 4, 4)
    loss = cross_entropy(x, torch.full((2, 4, 4), 255), 255)
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_half_precision_logits_give_a_half_precision_loss() -> None:
    x, target = logits(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    assert cross_entropy(x.bfloat16(), target, 255).dtype == torch.float32
    assert mean_squared_error(x.bfloat16(), x.detach().softmax(1).bfloat16()).dtype == torch.float32


def test_cross_teacher_loss_departs_from_the_release() -> None:
    case = golden("weighted_cross_entropy")
    loss = weighted_cross_entropy(case["logits"], case["target"], case["weight"], int(case["ignore_label"]))
    torch.testing.assert_close(loss, case["loss"], rtol=1e-6, atol=0)


def test_few_confident_pixels_weigh_as_much_as_many() -> None:
    x, label = logits(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    weight = torch.zeros(2, 4, 4)
    weight[0, 1, 2] = 1
    loss = weighted_cross_entropy(x, label, weight, 255)
    one_pixel = F.cross_entropy(x[:1, :, 1, 2], label[:1, 1, 2])
    torch.testing.assert_close(loss, one_pixel / 32)  # the mean is over all pixels


def test_pixels_of_weight_zero_receive_a_gradient() -> None:
    x, weight = logits(1, 3, 2, 2), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    weighted_cross_entropy(x, torch.zeros(1, 2, 2, dtype=torch.int64), weight, 255).backward()
    assert x.grad is not None
    assert torch.equal((x.grad != 0).any(dim=1), weight != 0)


def test_weights_receive_a_gradient() -> None:
    weight = torch.ones(1, 2, 2, requires_grad=True)
    weighted_cross_entropy(logits(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64), weight, 255).backward()
    assert weight.grad is None


def test_squared_error_departs_from_the_release() -> None:
    case = golden("mse")
    loss = mean_squared_error(case["logits"], case["soft_target"])
    torch.testing.assert_close(loss, case["loss"], rtol=1e-6, atol=0)


def test_squared_error_trains_on_padding() -> None:
    x, target = logits(1, 2, 2, 2), torch.full((1, 2, 2, 2), 0.5)
    valid = torch.tensor([[[True, False], [True, True]]])
    loss = mean_squared_error(x, target, valid=valid)
    loss.backward()
    expected = ((x.detach().softmax(1) - 0.5) ** 2)[:, :, valid[0]].sum() / 8  # padding counts in the mean
    torch.testing.assert_close(loss.detach(), expected)
    assert x.grad is not None
    assert (x.grad[:, :, 0, 1] == 0).all()
    assert (x.grad[:, :, 0, 0] != 0).all()


def test_squared_error_trains_the_teacher() -> None:
    target = torch.full((1, 2, 2, 2), 0.5, requires_grad=True)
    mean_squared_error(logits(1, 2, 2, 2), target).backward()
    assert target.grad is None


def test_pixel_weights_depart_from_the_release() -> None:
    case = golden("pixel_weights")
    confidence, threshold = case["confidence"], float(case["threshold"])

    def weight(kind: str, step: int = 0) -> Tensor:
        return pixel_weight(kind, confidence, step=step, threshold=threshold)

    uniform = case["threshold_uniform"].expand_as(confidence)
    torch.testing.assert_close(weight("threshold_uniform"), uniform, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight("power"), case["power6"], rtol=1e-6, atol=0)
    for step, expected in zip(case["sigmoid_iterations"], case["sigmoid"], strict=True):
        expected = expected.float().expand_as(confidence)
        torch.testing.assert_close(weight("sigmoid", int(step)), expected, rtol=1e-6, atol=0)


def test_threshold_is_the_release_s_power() -> None:
    confidence = torch.tensor([[[0.2, 0.967, 0.968, 1.0]]])
    assert pixel_weight("threshold", confidence, step=0).tolist() == [[[0, 0, 1, 1]]]


@pytest.mark.parametrize("kind", [False, None])
def test_weighting_cannot_be_switched_off(kind: Any) -> None:
    assert (pixel_weight(kind, torch.rand(1, 2, 3), step=0) == 1).all()


@pytest.mark.parametrize("kind", ["treshold", "", True])
def test_unknown_weight_is_silently_one(kind: Any) -> None:
    with pytest.raises(ValueError, match="threshold_uniform, threshold, power, sigmoid"):
        pixel_weight(kind, torch.rand(1, 2, 2), step=0)


@pytest.mark.parametrize("kind", [*PIXEL_WEIGHTS, None])
def test_padding_carries_weight(kind: str | None) -> None:
    confidence = torch.tensor([[[0.99, 0.99, 0.99, 0.5]], [[0.99, 0.4, 0.99, 0.99]]])
    valid = torch.tensor([[[True, True, False, False]], [[True, True, False, False]]])
    weight = pixel_weight(kind, confidence, step=10_000, valid=valid)
    assert weight.dtype == torch.float32
    assert weight.shape == confidence.shape
    assert (weight[~valid] == 0).all()
    without = pixel_weight(kind, confidence[:, :, :2], step=10_000)
    torch.testing.assert_close(weight[:, :, :2], without)  # how much was padded must not matter


def test_share_without_any_valid_pixel_is_nan() -> None:
    assert confident_share(torch.ones(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)) == 0


def test_share_counts_padding() -> None:
    confidence = torch.tensor([[[1.0, 0.5, 1.0, 1.0]]])
    assert confident_share(confidence) == 0.75
    assert confident_share(confidence, torch.tensor([[[True, True, False, False]]])) == 0.5


@pytest.mark.parametrize("kind", PIXEL_WEIGHTS)
def test_losses_wait_for_the_accelerator(kind: str) -> None:
    # A meta tensor has no values: whatever needs one on the host raises.
    x = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    label = torch.empty(2, 4, 4, device="meta", dtype=torch.int64)
    valid = torch.empty(2, 4, 4, device="meta", dtype=torch.bool)
    weight = pixel_weight(kind, x.softmax(1).amax(1), step=5, valid=valid)
    loss = weighted_cross_entropy(x, label, weight, 255) + cross_entropy(x, label, 255)
    loss = loss + mean_squared_error(x, x.softmax(1), valid=valid) * confident_share(weight, valid)
    loss.backward()
    assert x.grad is not None


def test_logit_adjustment_does_not_make_the_balanced_prediction_the_best_one() -> None:
    # Pixels that look alike, half of class 0, a quarter each of 1 and 2: the best prediction is balanced at strength 1.
    target, shares = torch.tensor([[[0, 0, 1, 2]]]), np.array([0.5, 0.25, 0.25])
    for strength, best in ((0.0, shares), (0.5, np.sqrt(shares)), (1.0, np.ones(3))):
        x = torch.tensor(best, dtype=torch.float32).log().view(1, 3, 1, 1).expand(1, 3, 1, 4).clone().requires_grad_()
        cross_entropy(x, target, 255, logit_shift(shares, strength)).backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.sum(dim=(0, 2, 3)), torch.zeros(3), atol=1e-7, rtol=0)


def test_pseudo_labels_that_lack_a_rare_class_do_not_unlearn_it_where_their_shares_are_adjusted() -> None:
    # Pixels that look alike: of eight, four are of class 0, two each of 1 and 2. Pseudo-labels are right but for one of
    # class 2, which they call 0. What the labels teach, at any strength, is then best for the pseudo-labels as well.
    pseudo_label, shares = torch.tensor([[[0, 0, 0, 0, 1, 1, 2, 0]]]), np.array([0.5, 0.25, 0.25])
    taught = torch.tensor([5 / 8, 2 / 8, 1 / 8])
    for strength in (0.0, 0.5, 1.0):
        learned = torch.tensor(shares ** (1 - strength)).float().log()  # see the test above
        x = learned.view(1, 3, 1, 1).expand(1, 3, 1, 8).clone().requires_grad_()
        shift = logit_shift(shares, strength)
        weight = torch.full((1, 1, 8), 0.5)
        for given, balanced in ((shift, False), (shift + pseudo_label_shift(torch.tensor(shares), taught), True)):
            (slope,) = torch.autograd.grad(weighted_cross_entropy(x, pseudo_label, weight, 255, given), x)
            of_class_2 = slope.sum(dim=(0, 2, 3))[2]
            assert (abs(of_class_2) < 1e-7) == balanced
            assert balanced or of_class_2 > 0.05, "its logit would fall"


def test_the_shift_of_pseudo_labels_has_a_limit_and_leaves_classes_without_labels_alone() -> None:
    found = pseudo_label_shift(torch.tensor([0.75, 0.25, 0.0]), torch.tensor([0.9, 0.0, 0.1]))
    torch.testing.assert_close(found, torch.tensor([np.log(1.2), np.log(1e-3), 0.0], dtype=torch.float32))


def test_logit_adjustment_is_infinite_for_a_class_without_labels() -> None:
    shift = logit_shift(np.array([0.75, 0.0, 0.25]), 2.0)
    torch.testing.assert_close(shift, 2 * torch.tensor([0.75, 0.25, 0.25]).log())
