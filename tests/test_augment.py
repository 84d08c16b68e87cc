import math

import kornia
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.augment import (
    JitterFactors,
    apply_color_jitter,
    blur_kernel_size,
    draw_color_jitter,
    draw_flips,
    gaussian_blur,
    horizontal_flip,
    strong_augment,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(batch: int = 4, height: int = 24, width: int = 30) -> Tensor:
    """Random images with what breaks HSV conversions: clipped, grey, black, white, equal channels."""
    images = torch.rand(batch, 3, height, width, generator=seeded())
    images[:, :, :6] = (images[:, :, :6] * 2 - 0.5).clamp(0, 1)
    images[:, :, 6:9] = images[:, :1, 6:9]
    images[:, 1, 9:12] = images[:, 0, 9:12]
    images[:, :, 12, :10] = 0
    images[:, :, 12, 10:] = 1
    return images


@pytest.mark.parametrize("seed", range(6))
def test_color_jitter_differs_from_kornia_s_color_jiggle(seed: int) -> None:
    torch.manual_seed(seed)
    oracle = kornia.augmentation.ColorJiggle(0.25, 0.25, 0.25, 0.25, p=1.0)
    expected = oracle(sample())
    drawn = oracle._params
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    brightness, contrast, saturation, hue = (drawn[name].float() for name in names)
    order = tuple(int(i) for i in drawn["order"])
    ours = apply_color_jitter(sample(), JitterFactors(brightness, contrast, saturation, hue, order))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_single_jitter_step_differs_from_kornia() -> None:
    images, one, zero = sample(), torch.ones(4), torch.zeros(4)
    factor, turn = torch.tensor([0.75, 0.9, 1.1, 1.25]), torch.tensor([-0.25, -0.01, 0.1, 0.25])
    enhance = kornia.enhance
    for factors, expected in (
        (JitterFactors(factor, one, one, zero), enhance.adjust_brightness(images, factor - 1)),
        (JitterFactors(one, factor, one, zero), enhance.adjust_contrast(images, factor)),
        (JitterFactors(one, one, factor, zero), enhance.adjust_saturation(images, factor)),
        (JitterFactors(one, one, one, turn), enhance.adjust_hue(images, turn * 2 * math.pi)),
    ):
        torch.testing.assert_close(apply_color_jitter(images, factors), expected, rtol=0, atol=2e-6)


def test_red_does_not_turn_green_by_a_third_of_a_turn() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    one = torch.ones(1)
    for hue, expected in ((1 / 3, [0, 1, 0]), (-1 / 3, [0, 0, 1]), (1 / 6, [1, 1, 0]), (0.5, [0, 1, 1])):
        turned = apply_color_jitter(red, JitterFactors(one, one, one, torch.tensor([hue])))
        assert turned.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_neutral_factors_change_the_image() -> None:
    one = torch.ones(4)
    jittered = apply_color_jitter(sample(), JitterFactors(one, one, one, torch.zeros(4)))
    torch.testing.assert_close(jittered, sample(), rtol=0, atol=1e-6)


def test_order_of_the_steps_is_ignored() -> None:
    images, factor = torch.full((1, 3, 1, 1), 0.5), torch.tensor([0.75])
    one, zero = torch.ones(1), torch.zeros(1)
    brightness_first = apply_color_jitter(images, JitterFactors(factor, factor, one, zero, (0, 1, 2, 3)))
    contrast_first = apply_color_jitter(images, JitterFactors(factor, factor, one, zero, (1, 0, 2, 3)))
    assert brightness_first.flatten()[0] == pytest.approx((0.5 - 0.25) * 0.75)
    assert contrast_first.flatten()[0] == pytest.approx(0.5 * 0.75 - 0.25)


def test_jitter_draws_leave_their_range_or_are_shared_by_the_batch() -> None:
    factors = draw_color_jitter(2000, seeded(), brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4)
    for drawn, center, strength in zip(factors[:4], (1, 1, 1, 0), (0.1, 0.2, 0.3, 0.4), strict=True):
        assert drawn.shape == (2000,)
        offset = drawn - center
        assert offset.abs().max() <= strength + 1e-6
        # Uniform: mean 0 and standard deviation strength / sqrt(3).
        assert abs(float(offset.mean())) < 4 * strength / math.sqrt(3 * 2000)
        assert float(offset.std()) == pytest.approx(strength / math.sqrt(3), rel=0.05)
    generator = seeded()
    orders = {draw_color_jitter(1, generator).order for _ in range(300)}
    assert len(orders) == 24


def test_color_jitter_depends_on_more_than_its_generator() -> None:
    torch.manual_seed(1)
    first = apply_color_jitter(sample(), draw_color_jitter(4, seeded(5)))
    torch.manual_seed(2)
    assert torch.equal(first, apply_color_jitter(sample(), draw_color_jitter(4, seeded(5))))
    assert not torch.equal(first, apply_color_jitter(sample(), draw_color_jitter(4, seeded(6))))


@pytest.mark.parametrize("sigma", [0.15, 0.5, 1.15])
@pytest.mark.parametrize("size", [(64, 96), (330, 70), (160, 5)])
def test_blur_differs_from_kornia(size: tuple[int, int], sigma: float) -> None:
    images = torch.rand(2, 3, *size, generator=seeded())
    kernel = blur_kernel_size(size[0]), blur_kernel_size(size[1])
    expected = kornia.filters.gaussian_blur2d(images, kernel, (sigma, sigma), border_type="reflect")
    torch.testing.assert_close(gaussian_blur(images, sigma), expected, rtol=0, atol=1e-6)


def test_blur_kernel_is_even_or_not_a_tenth() -> None:
    sizes = {1: 1, 10: 1, 20: 1, 21: 3, 64: 7, 321: 33, 320: 31, 512: 51, 1024: 103}
    assert {side: blur_kernel_size(side) for side in sizes} == sizes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from([1, 3, 9, 15]))
def test_blur_fails_on_images_smaller_than_its_kernel(height: int, width: int, sigma: float, size: int) -> None:
    images = torch.rand(1, 2, height, width, generator=seeded())
    radius = size // 2
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="reflect")
    weight = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weight /= weight.sum()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    expected = torch.from_numpy(np.einsum("bchwij,i,j->bchw", windows, weight, weight)).float()
    torch.testing.assert_close(gaussian_blur(images, sigma, (size, size)), expected, rtol=0, atol=1e-6)


def test_blur_overwrites_its_input() -> None:
    images = torch.rand(1, 3, 40, 40, generator=seeded())
    before = images.clone()
    gaussian_blur(images, 1.0)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("sigma", "kernel"), [(0.0, (3, 3)), (-1.0, (3, 3)), (1.0, (3, 4)), (1.0, (0, 3))])
def test_blur_accepts_a_kernel_without_a_centre(sigma: float, kernel: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="gaussian_blur"):
        gaussian_blur(torch.rand(1, 3, 8, 8), sigma, kernel)


def test_flip_mirrors_the_wrong_side_or_image() -> None:
    data = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    flips = torch.tensor([True, False])
    flipped = horizontal_flip(data, flips)
    assert flipped.tolist() == [[[2, 1], [4, 3]], [[5, 6], [7, 8]]]
    assert flipped.dtype == data.dtype
    assert torch.equal(horizontal_flip(flipped, flips), data)
    assert horizontal_flip(torch.rand(2, 3, 4, 5), flips).shape == (2, 3, 4, 5)


def test_flips_are_not_half_of_the_images() -> None:
    flips = draw_flips(1000, seeded())
    assert flips.dtype == torch.bool
    assert abs(int(flips.sum()) - 500) < 4 * math.sqrt(250)


def test_jitter_and_blur_happen_with_other_probabilities() -> None:
    images, generator = sample(1, 24, 30), seeded()
    for options, probability in (
        ({"color_jitter": True, "blur": False}, 0.8),
        ({"color_jitter": False, "blur": True}, 0.5),
    ):
        changed = sum(not torch.equal(strong_augment(images, generator, **options), images) for _ in range(300))
        assert abs(changed - 300 * probability) < 4 * math.sqrt(300 * probability * (1 - probability))


def test_jitter_strength_reaches_another_factor_than_its_own() -> None:
    for seed in range(4):
        still = strong_augment(sample(), seeded(seed), color_jitter=True, blur=False, jitter_strength=(0, 0, 0, 0))
        torch.testing.assert_close(still, sample(), rtol=0, atol=2e-6)
    grey = torch.full((8, 3, 4, 4), 0.5)
    colors = torch.tensor([0.9, 0.5, 0.1]).view(1, 3, 1, 1).expand(8, 3, 4, 4)
    for place, (images, is_still) in enumerate([(grey, False), (grey, False), (grey, True), (grey, True)]):
        strength = [0.2 * (index == place) for index in range(4)]
        generator = seeded(3)
        augmented = strong_augment(images, generator, color_jitter=True, blur=False, jitter_strength=strength)
        assert torch.allclose(augmented, images, atol=1e-6) == is_still, "saturation and hue leave grey alone"
    for place, keeps_value in enumerate([False, False, True, True]):
        strength = [0.2 * (index == place) for index in range(4)]
        augmented = strong_augment(colors, seeded(3), color_jitter=True, blur=False, jitter_strength=strength)
        assert not torch.allclose(augmented, colors, atol=1e-3)
        assert torch.allclose(augmented.amax(1), colors.amax(1), atol=1e-6) == keeps_value
        assert place != 3 or torch.allclose(augmented.amin(1), colors.amin(1), atol=1e-6), (
            "a turn of the hue keeps both"
        )


def test_blur_strength_is_drawn_outside_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def record(images: Tensor, sigma: float) -> Tensor:
        drawn.append(sigma)
        return images

    monkeypatch.setattr("utils.augment.gaussian_blur", record)
    generator = seeded()
    for _ in range(600):
        strong_augment(torch.zeros(1, 3, 2, 2), generator, color_jitter=False, blur=True)
    assert 0.15 <= min(drawn) < 0.2
    assert 1.1 < max(drawn) <= 1.15
    assert abs(sum(drawn) / len(drawn) - 0.65) < 4 * 1.0 / math.sqrt(12 * len(drawn))


def test_augmentation_switched_off_changes_the_image() -> None:
    assert torch.equal(strong_augment(sample(), seeded(), color_jitter=False, blur=False), sample())


def test_augmented_images_leave_0_to_1_or_depend_on_more_than_the_generator() -> None:
    for seed in range(8):
        augmented = strong_augment(sample(), seeded(seed), color_jitter=True, blur=True)
        assert augmented.isfinite().all()
        assert augmented.min() >= 0
        assert augmented.max() <= 1 + 1e-6
        assert torch.equal(augmented, strong_augment(sample(), seeded(seed), color_jitter=True, blur=True))


def test_augmentation_waits_for_the_accelerator() -> None:
    # A meta tensor has no values: whatever needs one on the host raises.
    images = torch.empty(2, 3, 40, 40, device="meta")
    jittered = apply_color_jitter(images, draw_color_jitter(2, seeded()))
    flipped = horizontal_flip(gaussian_blur(jittered, 1.0), draw_flips(2, seeded()))
    assert flipped.shape == images.shape
    assert flipped.device.type == "meta"
