import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from utils.evaluate import Evaluation
from utils.metrics import ConfusionMatrix

GOLDEN = Path(__file__).parent / "golden"


def confusion(prediction: list[int], target: list[int], num_classes: int) -> ConfusionMatrix:
    result = ConfusionMatrix(num_classes)
    result.update(torch.tensor(prediction), torch.tensor(target))
    return result


def test_miou_departs_from_the_release() -> None:
    case = np.load(GOLDEN / "miou.npz")
    result = ConfusionMatrix(int(case["num_classes"]))
    for prediction, target in zip(case["prediction"], case["target"], strict=True):
        result.update(prediction, target)
    np.testing.assert_array_equal(result.matrix.numpy(), case["confusion"])
    np.testing.assert_allclose(result.iou().numpy(), case["iou"], rtol=1e-12)
    assert result.mean_iou() == pytest.approx(float(case["miou"]), rel=1e-12)


def test_rows_and_columns_are_swapped() -> None:
    result = confusion([0, 1, 1, 1], [0, 0, 0, 1], 2)
    assert result.matrix.tolist() == [[1, 2], [0, 1]]
    assert result.iou().tolist() == pytest.approx([1 / 3, 1 / 3])
    assert result.accuracy().tolist() == pytest.approx([1 / 3, 1])
    assert result.mean_accuracy() == pytest.approx(2 / 3)
    assert result.pixel_accuracy() == pytest.approx(1 / 2)


def test_measures_differ_from_torchmetrics() -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 5, (2, 30, 31))
    prediction = torch.where(torch.rand(target.shape) < 0.6, target, torch.randint(0, 5, target.shape))
    target[torch.rand(target.shape) < 0.1] = 255
    result = ConfusionMatrix(5)
    result.update(prediction, target)
    arguments = (prediction, target, 5)
    assert torch.equal(result.matrix, multiclass_confusion_matrix(*arguments, ignore_index=255))
    expected = multiclass_jaccard_index(*arguments, average="none", ignore_index=255)
    torch.testing.assert_close(result.iou().float(), expected)
    micro = multiclass_accuracy(*arguments, average="micro", ignore_index=255)
    macro = multiclass_accuracy(*arguments, average="macro", ignore_index=255)
    assert result.pixel_accuracy() == pytest.approx(float(micro), rel=1e-6)
    assert result.mean_accuracy() == pytest.approx(float(macro), rel=1e-6)


def test_absent_class_drags_the_mean_down() -> None:
    result = confusion([0, 0, 1], [0, 0, 0], 4)  # class 1 only predicted, 2 and 3 nowhere
    assert result.iou()[:2].tolist() == pytest.approx([2 / 3, 0])
    assert result.iou()[2:].isnan().all()
    assert result.mean_iou() == pytest.approx(1 / 3)
    assert result.mean_accuracy() == pytest.approx(2 / 3)  # class 1 has no true pixel


def test_ignored_target_is_counted() -> None:
    result = confusion([0, 9, 1, -3], [255, -1, 1, 3], 3)  # 3 is the first value that is no class
    assert result.matrix.sum() == 1
    assert result.matrix[1, 1] == 1


def test_all_ignored_raises_instead_of_nan() -> None:
    result = confusion([0, 1], [255, 255], 2)
    assert result.matrix.sum() == 0
    assert all(math.isnan(x) for x in (result.mean_iou(), result.mean_accuracy(), result.pixel_accuracy()))


@pytest.mark.parametrize("wrong", [2, -1])
def test_prediction_outside_the_classes_lands_in_another_row(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        confusion([wrong, 0], [0, 0], 2)


def test_byte_labels_wrap_around() -> None:
    result = ConfusionMatrix(150)
    labels = np.full((2, 2), 149, dtype=np.uint8)
    result.update(labels, labels)
    assert result.matrix[149, 149] == 4
    assert result.matrix.sum() == 4


def test_shapes_that_only_broadcast_are_accepted() -> None:
    with pytest.raises(ValueError, match="shapes"):
        ConfusionMatrix(2).update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))


def test_probabilities_are_taken_for_classes() -> None:
    with pytest.raises(ValueError, match=r"prediction is torch\.float32"):
        ConfusionMatrix(2).update(torch.zeros(3), torch.zeros(3, dtype=torch.int64))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 5)), max_size=40), st.integers(0, 40))
def test_result_depends_on_how_the_pixels_are_split(pixels: list[tuple[int, int]], cut: int) -> None:
    prediction, target = torch.tensor(pixels, dtype=torch.int64).reshape(-1, 2).T
    whole, parts = ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(prediction, target)
    parts.update(prediction[:cut], target[:cut])
    parts.update(prediction[cut:], target[cut:])
    assert parts.matrix.dtype == torch.int64
    assert torch.equal(whole.matrix, parts.matrix)
    assert whole.matrix.sum() == sum(0 <= truth < 4 for _, truth in pixels)


def test_a_result_is_written_last_and_nothing_of_other_models_stays(tmp_path: Path) -> None:
    both = Evaluation({name: confusion([0, 1], [0, 1], 2) for name in ("student_0", "teacher_1")}, ["a", "b"], {})
    both.write(tmp_path)
    one = Evaluation({"student_0": confusion([0, 1], [0, 0], 2)}, ["a", "b"], {})
    (tmp_path / "result.txt").unlink()
    (tmp_path / "result.txt").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match=r"result\.txt"):
        one.write(tmp_path)
    assert not (tmp_path / "result.json").exists()
    (tmp_path / "result.txt").rmdir()
    one.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"confusion_student_0.csv", "result.json", "result.txt"}
