"""Evaluation of several models in one pass, and the tables of its results (docs/evaluation.md)."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.distributed import total
from utils.errors import UserError
from utils.files import write_json, write_whole
from utils.inference import ENSEMBLE, Inference, classify_all
from utils.metrics import ConfusionMatrix

PIXELS_AT_ONCE = 2**20  # of labels; on a GPU the outputs of all models at that size are in memory together


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

    @property
    def main(self) -> str:
        """The model that stands for the run: the ensemble, or the first where it was not asked for."""
        return ENSEMBLE if ENSEMBLE in self.confusion else next(iter(self.confusion))

    def mean_iou(self, model: str | None = None) -> float:
        """Of the main model, or another one."""
        return float(self.confusion[model or self.main].mean_iou())

    def scalars(self) -> dict[str, float]:
        """mIoU of each model, and the IoU of each class that has one, for logs."""
        means = {f"val/{name}": self.mean_iou(name) for name in self.confusion}
        for name, confusion in self.confusion.items():
            for label, value in zip(self.class_names, confusion.iou().tolist(), strict=True):
                means |= {f"val_iou/{name}/{label}": value} if value == value else {}
        return means

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
        absent = [self.class_names[index] for index in self._absent()]
        return {**self.about, "in no label": absent, "models": models}

    def write(self, folder: Path, **more: Any) -> None:
        """Each model's counts as confusion_<model>.csv, result.txt, and last result.json (with ``more``).

        Where there is a result.json, all of it is of one evaluation.
        """
        for other in [folder / "result.json", *folder.glob("confusion_*.csv")]:
            other.unlink(missing_ok=True)
        for name, confusion in self.confusion.items():
            text = io.StringIO(newline="")
            rows = csv.writer(text)
            rows.writerow(["pixels of (row) predicted as (column)", *self.class_names])
            pairs = zip(self.class_names, confusion.matrix.tolist(), strict=True)
            rows.writerows([label, *counts] for label, counts in pairs)
            write_whole(folder / f"confusion_{name}.csv", text.getvalue().encode())
        write_whole(folder / "result.txt", self.as_text().encode())
        write_json(folder / "result.json", self.as_dict() | more)

    def _absent(self) -> list[int]:
        """The classes that no label holds."""
        matrix = self.confusion[self.main].matrix
        return [index for index, count in enumerate(matrix.sum(dim=1).tolist()) if count == 0]

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
        lines += [row("pixel accuracy", (self.confusion[name].pixel_accuracy() for name in names))]
        lines += [row("mean accuracy", (self.confusion[name].mean_accuracy() for name in names))]
        absent = {index: [name for name in names if iou[name][index] == 0] for index in self._absent()}
        unseen = [self.class_names[index] for index, models in absent.items() if not models]
        wrong = [
            f"{self.class_names[index]}{'' if models == names else ' (' + ', '.join(models) + ')'}"
            for index, models in absent.items()
            if models
        ]
        lines += ["", f"in no label and no prediction, so in no mean: {', '.join(unseen)}"] if unseen else []
        lines += ["", f"in no label but predicted, so IoU 0 in the mean of: {', '.join(wrong)}"] if wrong else []
        return "\n".join(lines) + "\n"


@torch.no_grad()
def evaluate(
    networks: Mapping[str, Any],
    batches: Iterable[Sequence[LabeledImage]],
    *,
    class_names: Sequence[str],
    device: torch.device,
    inference: Inference,
    about: Mapping[str, Any],
    models: Sequence[str] | None = None,
    on_prediction: Callable[[str, Tensor], None] | None = None,
) -> Evaluation:
    """Compare the predictions of ``models`` (default: ``model_names(networks)``) with the labels, at the labels' size.

    ``batches`` are this process's share of the images; the counts of all processes are added.
    on_prediction: is given each id with the main model's (h,w) uint8 prediction (see ``Evaluation.main``). The
    networks' training mode is left as it was.
    """
    wanted = frozenset(models or model_names(networks))
    confusion = {name: ConfusionMatrix(len(class_names)) for name in model_names(networks) if name in wanted}
    assert wanted == set(confusion), f"{wanted} are not all among {model_names(networks)}"
    evaluation = Evaluation(confusion, class_names, dict(about))
    modes = {name: network.training for name, network in networks.items()}
    count = 0
    for network in networks.values():
        network.eval()
    for batch in batches:
        for images, labels, ids in _same_sizes(batch, device):
            size = (labels.shape[-2], labels.shape[-1])
            predictions = classify_all(networks, images, size, inference=inference, wanted=wanted)
            for name, prediction in predictions.items():
                confusion[name].update(prediction, labels)
            count += len(ids)
            if on_prediction is not None:
                for identifier, label_map in zip(ids, predictions[evaluation.main].cpu(), strict=True):
                    on_prediction(identifier, label_map)
    for name, network in networks.items():
        network.train(modes[name])
    for one in confusion.values():
        one.matrix = total(one.matrix)
    return replace(evaluation, about={**about, "images": int(total(torch.tensor(count)))})


def refuse_other_images(folder: Path, split_hash: str, root: Path) -> None:
    """UserError if a folder holds an evaluation on other images than those of the hash in the dataset's ``root``.

    A root that is gone has moved.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        there, then = result["split hash"], Path(result.get("root", root))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # none, or half of one
    where = f"{folder} holds the result on other images"
    if there != split_hash:
        raise UserError(f"{where} (split hash {there}, now {split_hash}); give --output a folder")
    if then.exists() and then.resolve() != root.resolve():
        raise UserError(f"{where}, those in {then}; give --output a folder")


def choose_models(networks: Mapping[str, Any], wanted: Sequence[str] | None) -> list[str]:
    """``wanted``, or all; UserError for a name that is none of ``model_names``."""
    known = model_names(networks)
    if unknown := [name for name in wanted or [] if name not in known]:
        raise UserError(f"this checkpoint holds no model {', '.join(unknown)}; it has: {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]


def choose_model(networks: Mapping[str, Any], wanted: str | None) -> str:
    """``wanted``, or the ensemble, or the first where there is none; UserError for a name that is none of them."""
    known = model_names(networks)
    return choose_models(networks, [wanted or (ENSEMBLE if ENSEMBLE in known else known[0])])[0]


def model_names(networks: Mapping[str, Any]) -> list[str]:
    """The networks, and the ensemble where there are two students."""
    students = [name for name in networks if name.startswith("student")]
    return [*networks, *([ENSEMBLE] if len(students) > 1 else [])]


def _number(value: float | Tensor) -> float | None:
    """JSON knows no NaN."""
    return None if value != value else float(value)


def _same_sizes(batch: Sequence[LabeledImage], device: torch.device) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Neighbours of the same sizes together: images (B,3,H,W) float in [0,1], labels (B,h,w), ids."""
    for (_, label_size), group in groupby(batch, key=lambda item: (item.image.shape, item.label.shape)):
        waiting = list(group)
        at_once = max(1, PIXELS_AT_ONCE // label_size.numel())
        while waiting:
            items, waiting = waiting[:at_once], waiting[at_once:]
            images = torch.stack([item.image for item in items]).to(device).float().div_(255)
            yield images, torch.stack([item.label for item in items]).to(device), [item.id for item in items]
