import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import golden
from utils.mixing import MIX_MASKS, _blobs, class_mask, cow_mask, cut_mask, draw_mix_masks, mix

GOLDEN = Path(__file__).parent / "golden"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mix_departs_from_the_release() -> None:
    case = golden("mix")
    assert torch.equal(mix(case["data"], case["mask"]), case["mixed_data"])
    assert torch.equal(mix(case["target"], case["mask"]), case["mixed_target"])


def test_partner_is_the_previous_image() -> None:
    data = torch.tensor([10, 20, 30]).view(3, 1, 1)
    mask = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert mix(data, mask).flatten().tolist() == [10, 30, 10]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64])
def test_mix_changes_the_dtype_or_values(dtype: torch.dtype) -> None:
    data = torch.randint(0, 256, (3, 2, 4, 5), generator=seeded()).to(dtype)
    mask = torch.randint(0, 2, (3, 4, 5), generator=seeded(1)).float()
    mixed = mix(data, mask)
    assert mixed.dtype == dtype
    assert torch.equal(mixed, torch.where(mask.bool().unsqueeze(1), data, data[[1, 2, 0]]))


def test_labels_beyond_float_precision_are_rounded() -> None:
    data = torch.tensor([2**53 + 1, 2**53 + 3]).view(2, 1, 1)
    assert torch.equal(mix(data, torch.ones(2, 1, 1)), data)


def test_batch_of_one_is_mixed_with_something_else() -> None:
    data = torch.rand(1, 3, 4, 4, generator=seeded())
    assert torch.equal(mix(data, torch.randint(0, 2, (1, 4, 4), generator=seeded()).float()), data)


def test_class_mask_departs_from_the_release() -> None:
    case = golden("class_mask")
    mask = class_mask(case["pred"], case["classes"])
    assert mask.dtype == torch.float32
    assert torch.equal(mask, case["mask"].float())


def test_class_mask_without_classes_fails() -> None:
    assert (class_mask(torch.zeros(2, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64)) == 0).all()


def test_class_draw_takes_another_number_of_classes_or_prefers_some() -> None:
    labels = torch.tensor([3, 3, 7, 0, 20, 11, 3, 255]).view(1, 2, 4).expand(500, 2, 4)  # 5 classes
    masks = draw_mix_masks("class", labels, seeded())
    drawn = [frozenset(labels[i][masks[i] == 1].tolist()) for i in range(500)]
    assert {len(classes) for classes in drawn} == {2}
    assert not any(255 in classes for classes in drawn)
    pairs = Counter(drawn)
    assert len(pairs) == 10
    # Uniform over the 10 pairs: 50 each with standard deviation 6.7.
    assert all(abs(count - 50) < 4 * 6.7 for count in pairs.values())
    # All pixels of a class share its fate.
    assert torch.equal(masks[:, 0, 0], masks[:, 0, 1])
    assert torch.equal(masks[:, 0, 0], masks[:, 1, 2])


def test_class_draw_departs_from_the_class_mask_of_the_classes_it_drew() -> None:
    labels = torch.tensor([0, 3, 7, 250, 255])[torch.randint(0, 5, (40, 6, 8), generator=seeded())]
    for label_map, mask in zip(labels, draw_mix_masks("class", labels, seeded(1)), strict=True):
        drawn = label_map[mask == 1].unique()
        assert len(drawn) == 2  # of four: 255 is padding
        assert torch.equal(mask, class_mask(label_map, drawn))


def test_one_class_alone_keeps_its_pixels() -> None:
    # floor(1/2) = 0 classes: the image becomes its partner.
    assert (draw_mix_masks("class", torch.full((2, 3, 3), 4), seeded()) == 0).all()


def test_image_of_padding_only_draws_the_padding() -> None:
    for ignore_label in (255, -1, 1000):
        labels = torch.full((1, 2, 2), ignore_label)
        labels[0, 0] = 5
        labels[0, 1, 0] = 6
        masks = draw_mix_masks("class", labels.expand(40, 2, 2), seeded(), ignore_label=ignore_label)
        assert (masks[:, 1, 1] == 0).all()
        assert (masks.flatten(1).amax(1) == 1).all()  # one of the two classes is always chosen
    assert (draw_mix_masks("class", torch.full((1, 2, 2), 255), seeded()) == 0).all()


def test_cut_mask_has_other_statistics_than_the_release() -> None:
    expected = np.load(GOLDEN / "mask_statistics.npz")["cutout_zero_fraction"]
    generator = seeded()
    shares = np.array([float(1 - cut_mask((64, 96), generator).mean()) for _ in range(1000)])
    # Only the rounding of the height moves the share: at most half a row of at most 96 pixels.
    assert np.abs(shares - 0.5).max() <= 48 / (64 * 96) + 1e-9
    error = math.hypot(shares.std() / len(shares) ** 0.5, expected.std() / len(expected) ** 0.5)
    assert abs(shares.mean() - expected.mean()) < 4 * error


def test_cut_rectangle_misses_part_of_its_range() -> None:
    generator = seeded()
    widths, lefts, tops = set(), set(), set()
    for _ in range(400):
        zero = cut_mask((8, 10), generator) == 0
        rows, columns = zero.any(1).nonzero().flatten(), zero.any(0).nonzero().flatten()
        assert zero.sum() == len(rows) * len(columns)  # one full rectangle
        assert columns[-1] - columns[0] + 1 == len(columns)
        widths.add(len(columns))
        lefts.add(int(columns[0]))
        tops.add(int(rows[0]))
    assert widths == {6, 7, 8, 9, 10}
    assert lefts == {0, 1, 2, 3, 4}
    assert tops == {0, 1, 2, 3, 4}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_masks_of_odd_or_tiny_images_fail(height: int, width: int, seed: int) -> None:
    labels = torch.randint(0, 3, (2, height, width), generator=seeded(seed))
    for kind in MIX_MASKS:
        masks = draw_mix_masks(kind, labels, seeded(seed))
        assert masks.shape == labels.shape
        assert masks.dtype == torch.float32
        assert ((masks == 0) | (masks == 1)).all()


def test_cow_mask_has_other_statistics_than_the_release() -> None:
    case = np.load(GOLDEN / "mask_statistics.npz")
    expected, generator = case["cow_one_fraction"], seeded()
    shares = np.array(
        [[float(cow_mask((64, 96), float(sigma), generator).mean()) for sigma in case["cow_sigma"]] for _ in range(6)]
    )
    error = math.hypot(shares.std() / shares.size**0.5, expected.std() / expected.size**0.5)
    assert abs(shares.mean() - expected.mean()) < 4 * error
    # The spread tells the threshold: the median would give 0, a threshold at 0 more than three times as much.
    spreads = shares.std(axis=1)
    assert abs(expected.std() - spreads.mean()) < 4 * spreads.mean() / math.sqrt(2 * expected.size)


def test_cow_blobs_do_not_grow_with_sigma() -> None:
    def border_share(sigma: float) -> float:
        generator = seeded()
        masks = torch.stack([cow_mask((64, 64), sigma, generator) for _ in range(10)])
        return float((masks[:, :, 1:] != masks[:, :, :-1]).float().mean())

    assert border_share(4.0) > 1.5 * border_share(8.0) > 1.5**2 * border_share(16.0)


@pytest.mark.parametrize("kind", ["class", "cut", "cow"])
def test_masks_are_the_same_in_a_step_of_bfloat16(kind: str) -> None:
    maps = torch.randint(0, 4, (3, 60, 80), generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        inside = draw_mix_masks(kind, maps, seeded())
    assert torch.equal(inside, draw_mix_masks(kind, maps, seeded()))


def test_cow_smoothing_is_not_gaussian() -> None:
    # One noise pixel far from the border spreads as exp(-r^2 / (2 sigma^2)), the same along both sides.
    noise = torch.zeros(41, 61)
    noise[20, 30] = 1
    rows, columns = torch.meshgrid(torch.arange(41) - 20, torch.arange(61) - 30, indexing="ij")
    smooth = torch.exp(-(rows**2 + columns**2) / (2 * 3.0**2))
    assert torch.equal(_blobs(noise, 3.0), (smooth > smooth.mean()).float())


def test_no_mixing_crashes_as_in_the_release() -> None:
    labels = torch.zeros(2, 3, 4, dtype=torch.int64)
    for kind in (None, "None"):
        assert torch.equal(draw_mix_masks(kind, labels, seeded()), torch.ones(2, 3, 4))


def test_unknown_mask_is_not_named() -> None:
    with pytest.raises(ValueError, match=r"'classs' is unknown; use one of class, cut, cow, None"):
        draw_mix_masks("classs", torch.zeros(1, 2, 2, dtype=torch.int64), seeded())


@pytest.mark.parametrize("kind", ["class", "cut", "cow"])
def test_images_share_one_mask_or_ignore_the_seed(kind: str) -> None:
    labels = torch.arange(64).view(1, 8, 8).expand(3, 8, 8)
    masks = draw_mix_masks(kind, labels, seeded(3))
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks, draw_mix_masks(kind, labels, seeded(3)))
    assert not torch.equal(masks, draw_mix_masks(kind, labels, seeded(4)))


@pytest.mark.parametrize("kind", MIX_MASKS)
def test_masks_wait_for_the_accelerator(kind: str) -> None:
    # A meta tensor has no values: whatever needs one on the host raises.
    labels = torch.empty(2, 8, 8, device="meta", dtype=torch.int64)
    masks = draw_mix_masks(kind, labels, seeded())
    assert masks.device.type == "meta"
    assert mix(torch.empty(2, 3, 8, 8, device="meta"), masks).shape == (2, 3, 8, 8)
