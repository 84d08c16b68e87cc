"""The memory bank against the release's, entry for entry, and by hand."""

from pathlib import Path

import numpy as np
import torch

from model.memory_bank import MemoryBank

GOLDEN = np.load(Path(__file__).parent / "golden" / "memory_bank.npz")


def test_fourteen_steps_equal_the_release_entry_for_entry():
    size, classes = int(GOLDEN["size"]), int(GOLDEN["num_classes"])
    bank = MemoryBank(classes, size=size, dim=GOLDEN["feat_0"].shape[1])
    max_new = max(2 * size // int(GOLDEN["labeled_samples"]), int(GOLDEN["batch_size"]))
    for step in range(int(GOLDEN["steps"])):
        features, probabilities, labels = (
            torch.from_numpy(GOLDEN[f"{name}_{step}"]) for name in ("feat", "prob", "label")
        )
        bank.add(features, probabilities, labels.long(), max_new, threshold=float(GOLDEN["threshold"]))
        np.testing.assert_array_equal(bank.counts, GOLDEN[f"size_{step}"])
        np.testing.assert_allclose(bank.entries, GOLDEN[f"bank_{step}"], rtol=1e-5)


def pixels(*values: tuple[float, float, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(feature, probability of class 0, label) of each pixel of one image of two classes."""
    features, first, labels = zip(*values, strict=True)
    probability = torch.tensor(first)
    return (
        torch.tensor(features).view(1, 1, 1, -1),
        torch.stack((probability, 1 - probability)).view(1, 2, 1, -1),
        torch.tensor(labels).view(1, 1, -1),
    )


def test_only_right_and_sure_pixels_enter():
    bank = MemoryBank(2, size=4, dim=1)
    bank.add(*pixels((1.0, 0.96, 0), (2.0, 0.94, 0), (3.0, 0.99, 1), (4.0, 0.01, 1), (5.0, 0.99, 255)), max_new=9)
    assert bank.entries[..., 0].tolist() == [[1, 0, 0, 0], [4, 0, 0, 0]]
    assert bank.counts.tolist() == [1, 1]


def test_the_most_confident_enter_when_there_are_too_many():
    bank = MemoryBank(2, size=4, dim=1)
    bank.add(*pixels((1.0, 0.96, 0), (2.0, 0.99, 0), (3.0, 0.98, 0)), max_new=2)
    assert set(bank.entries[0, :2, 0].tolist()) == {2.0, 3.0}


def test_the_oldest_entries_leave_first():
    bank = MemoryBank(1, size=3, dim=1)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        bank.add(
            torch.full((1, 1, 1, 1), value), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), max_new=1
        )
    assert bank.entries[0, :, 0].tolist() == [3, 4, 5]


def test_of_more_new_pixels_than_slots_the_surest_fill_the_bank():
    bank = MemoryBank(2, size=2, dim=1)
    bank.add(*pixels((1.0, 0.96, 0), (2.0, 0.99, 0), (3.0, 0.98, 0), (4.0, 0.97, 0)), max_new=4)
    assert bank.counts.tolist() == [2, 0]
    assert set(bank.entries[0, :, 0].tolist()) == {2.0, 3.0}


def test_a_class_never_seen_does_not_hold_back_the_start_but_one_seen_does():
    bank = MemoryBank(3, size=1, dim=1)
    assert not bank.is_ready()
    bank.add(
        *pixels((1.0, 0.5, 0))[:1],
        torch.tensor([0.5, 0.5, 0.0]).view(1, 3, 1, 1),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        max_new=1,
    )
    assert not bank.is_ready(), "class 0 is seen but not yet held"
    bank.add(
        torch.ones(1, 1, 1, 1),
        torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1),
        torch.zeros(1, 1, 1, dtype=torch.int64),
        max_new=1,
    )
    assert bank.is_ready()
    assert bank.fill() == 1
