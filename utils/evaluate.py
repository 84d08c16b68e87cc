"""Evaluation of all five models in one pass, and the tables of its results (METHOD 10)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics import ConfusionMatrix

ENSEMBLE = "ensemble"
PIXELS_AT_ONCE = 2**20  # the probabilities of five models at the labels' size are in memory together


class LabeledImage(Protocol):
    """image (3,H,W) uint8 RGB; label (h,w) int64 at the size that counts; id."""

    @property
    def image(self) -> Tensor: ...
    @property
    def label(self) -> Tensor: ...
    @property
    def id(self) -> str: ...


@dataclass(frozen=True)
class Evaluation:
    """Confusion matrices by model name, with what is needed to know which numbers they are."""

    confusion: Mapping[str, ConfusionMatrix]
    class_names: Sequence[str]
    about: Mapping[str, Any]  # protocol, split, split hash, number of images, step, seed, commit, ...

    def mean_iou(self, model: str = ENSEMBLE) -> float:
        return float(self.confusion[model].mean_iou())

    def scalars(self) -> dict[str, float]:
        """mIoU of each model, for logs."""
        return {f"val/{name}": self.mean_iou(name) for name in self.confusion}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; shares of 1; null where a class is absent."""
        models = {}
        for name, confusion in self.confusion.items():
            iou = [float(value) for value in confusion.iou()]
            models[name] = {
                "mean_iou": _number(self.mean_iou(name)),
                "pixel_accuracy": _number(confusion.pixel_accuracy()),
                "mean_accuracy": _number(confusion.mean_accuracy()),
                "iou": {label: _number(value) for label, value in zip(self.class_names, iou, strict=True)},
            }
        return {**self.about, "models": models}

    def as_text(self) -> str:
        """IoU in percent: a row a class, a column a model."""
        names = list(self.confusion)
        iou = {name: [float(value) for value in confusion.iou()] for name, confusion in self.confusion.items()}
        width = max(len("pixel accuracy"), *(len(label) for label in self.class_names))

        def row(label: str, values: Iterable[float]) -> str:
            cells = ("-" if value != value else f"{100 * value:.2f}" for value in values)
            return f"{label:<{width}}" + "".join(
                f"{cell:>{len(name) + 2}}" for name, cell in zip(names, cells, strict=True)
            )

        lines = [", ".join(f"{key} {value}" for key, value in self.about.items()), ""]
        lines += [f"{'IoU in %':<{width}}" + "".join(f"{name:>{len(name) + 2}}" for name in names)]
        lines += [row(label, (iou[name][index] for name in names)) for index, label in enumerate(self.class_names)]
        lines += ["-" * len(lines[-1]), row("mean IoU", (self.mean_iou(name) for name in names))]
        lines += [row("pixel accuracy", (float(self.confusion[name].pixel_accuracy()) for name in names))]
        absent = [
            label for i, label in enumerate(self.class_names) if all(values[i] != values[i] for values in iou.values())
        ]
        if absent:
            lines += ["", f"in no label and no prediction, so not part of the mean: {', '.join(absent)}"]
        return "\n".join(lines) + "\n"


@torch.no_grad()
def evaluate(
    models: Mapping[str, Any],
    batches: Iterable[Sequence[LabeledImage]],
    *,
    class_names: Sequence[str],
    device: torch.device,
    pad: tuple[int, int] | None = None,
    about: Mapping[str, Any],
    on_prediction: Callable[[str, Tensor], None] | None = None,
) -> Evaluation:
    """Compare every model, and the ensemble of those named student_*, with the labels.

    Logits are upsampled to the label's size. pad: (height, width) that normalized images are padded to with 0, at the
    right and the bottom; the prediction is cut back. on_prediction: is given each id with the ensemble's (h,w) uint8
    prediction. The models' training mode is left as it was.
    """
    confusion = {name: ConfusionMatrix(len(class_names)) for name in (*models, ENSEMBLE)}
    modes = {name: model.training for name, model in models.items()}
    count = 0
    for model in models.values():
        model.eval()
    for batch in batches:
        for images, labels, ids in _same_sizes(batch, device):
            probabilities = {name: _probabilities(model, images, labels, pad) for name, model in models.items()}
            students = [one for name, one in probabilities.items() if name.startswith("student")]
            probabilities[ENSEMBLE] = torch.stack(students).mean(dim=0)
            for name, one in probabilities.items():
                confusion[name].update(one.argmax(dim=1), labels)
            prediction = probabilities[ENSEMBLE].argmax(dim=1)
            count += len(ids)
            if on_prediction is not None:
                for identifier, label_map in zip(ids, prediction.byte().cpu(), strict=True):
                    on_prediction(identifier, label_map)
    for name, model in models.items():
        model.train(modes[name])
    return Evaluation(confusion, class_names, {**about, "images": count})


def _number(value: float | Tensor) -> float | None:
    """JSON knows no NaN."""
    return None if value != value else float(value)


def _probabilities(model: Any, images: Tensor, labels: Tensor, pad: tuple[int, int] | None) -> Tensor:
    """(B,3,H,W) in [0,1] -> (B,C,h,w) at the labels' size."""
    inputs = model.normalization(images)
    if pad is not None:
        height, width = inputs.shape[-2:]
        below, right = max(0, pad[0] - height), max(0, pad[1] - width)
        inputs = F.pad(inputs, (0, right, 0, below))
        logits = F.interpolate(
            model(inputs).logits.float(), size=inputs.shape[-2:], mode="bilinear", align_corners=True
        )
        return logits[..., :height, :width].softmax(dim=1)
    logits = F.interpolate(model(inputs).logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=True)
    return logits.softmax(dim=1)


def _same_sizes(batch: Sequence[LabeledImage], device: torch.device) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Neighbours of the same sizes together: images (B,3,H,W) float in [0,1], labels (B,h,w), ids."""
    for (_, label_size), group in groupby(batch, key=lambda item: (item.image.shape, item.label.shape)):
        waiting = list(group)
        at_once = max(1, PIXELS_AT_ONCE // label_size.numel())
        while waiting:
            items, waiting = waiting[:at_once], waiting[at_once:]
            images = torch.stack([item.image for item in items]).to(device).float().div_(255)
            yield images, torch.stack([item.label for item in items]).to(device), [item.id for item in items]
