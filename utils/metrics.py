"""Segmentation metrics from one integer confusion matrix."""

import numpy as np
import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all pixels seen; exact, whatever the order of the updates.

    Attributes:
        num_classes: C.
        matrix: (C, C) int64 on the CPU; rows are the true class, columns the predicted one.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"ConfusionMatrix: num_classes is {num_classes}; expected at least 1")
        self.num_classes = num_classes
        self.matrix: Tensor = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor | np.ndarray, target: Tensor | np.ndarray) -> None:
        """Count one image or batch.

        Args:
            prediction: integer tensor or array of any shape, a class in 0..C-1 wherever the target counts.
            target: the same shape, integer; a value outside 0..C-1 (`ignore_label`) is not counted.

        Raises:
            ValueError: the shapes differ, a dtype is not an integer, or a counted prediction is no class.
        """
        prediction, target = torch.as_tensor(prediction), torch.as_tensor(target)
        if prediction.shape != target.shape:
            shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            raise ValueError(f"ConfusionMatrix: prediction and target have shapes {shapes}; expected equal")
        for name, tensor in (("prediction", prediction), ("target", target)):
            if tensor.is_floating_point() or tensor.is_complex():
                raise ValueError(f"ConfusionMatrix: {name} is {tensor.dtype}; expected integer classes")
        # int64 first: a uint8 product of class and C would wrap around.
        predicted, truth = prediction.long().flatten(), target.long().flatten().to(prediction.device)
        counted = (truth >= 0) & (truth < self.num_classes)
        # Unchecked, class C of row r would be counted as class 0 of row r + 1.
        wrong = counted & ((predicted < 0) | (predicted >= self.num_classes))
        if wrong.any():
            low, high = int(predicted[counted].min()), int(predicted[counted].max())
            raise ValueError(
                f"ConfusionMatrix: predictions range from {low} to {high}; expected 0..{self.num_classes - 1}"
            )
        # What is not counted goes to one cell more: quicker than to pick out what is.
        cells = torch.where(counted, truth * self.num_classes + predicted, self.num_classes**2)
        cells = torch.bincount(cells, minlength=self.num_classes**2 + 1)[:-1]
        self.matrix += cells.reshape(self.num_classes, self.num_classes).cpu()

    def iou(self) -> Tensor:
        """(C,) float64: intersection over union per class; NaN where truth and prediction lack it."""
        matrix = self.matrix.double()
        return matrix.diag() / (matrix.sum(0) + matrix.sum(1) - matrix.diag())  # 0 / 0 is NaN

    def mean_iou(self) -> float:
        """Mean IoU over the classes present in truth or prediction; NaN when nothing was counted."""
        return float(self.iou().nanmean())

    def accuracy(self) -> Tensor:
        """(C,) float64: share of each class's true pixels predicted so; NaN where it has none."""
        return self.matrix.diag().double() / self.matrix.sum(1)

    def mean_accuracy(self) -> float:
        """Mean of `accuracy` over the classes present in the truth; NaN when nothing was counted."""
        return float(self.accuracy().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right; NaN when nothing was counted."""
        return float(self.matrix.diag().sum().double() / self.matrix.sum())
