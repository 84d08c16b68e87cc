"""What a step tells about itself: whether pseudo-labels are right, who agrees with whom, which term pulls how hard.

Computed where a step is logged, from what that step computed anyway; nothing here changes what is learned. For several
processes it describes the first one's images.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.network import NetworkOutput
from model.teacher import upsample
from utils.batch import Batch
from utils.losses import confident_share
from utils.metrics import ConfusionMatrix

if TYPE_CHECKING:
    from model.cross_teacher import CrossTeacher, StrongView

Values = dict[str, Tensor]  # tag -> () tensor


class StepRecord(NamedTuple):
    """What a step with unlabeled images computed, both peers' in pairs; targets: (B,C,H,W) that student 0, 1 learns."""

    labeled: Batch
    unlabeled: Batch
    targets: Sequence[Tensor]
    views: "Sequence[StrongView]"
    on_labeled: Sequence[NetworkOutput]
    on_view: Sequence[NetworkOutput]


def describe(method: "CrossTeacher", record: StepRecord | None, losses: Mapping[tuple[str, int], Tensor]) -> Values:
    """All that is known of a step before its backward pass; record: None where it saw labeled images only."""
    values: Values = {}
    if record is None:
        return values
    for (term, own), loss in losses.items():
        if loss.requires_grad:
            outputs = [*record.on_labeled[own], *record.on_view[own]]
            values[f"gradient_norm/{term}/{own}"] = _gradient_norm(method.loss_weights[term] * loss, outputs)
    with torch.no_grad():
        values |= _pseudo_labels(method, record) | _agreement(record)
        if any(term.endswith("_level") for term, _ in losses):
            values |= _anchors(method, record)
    return values


def describe_banks(method: "CrossTeacher", step: int) -> Values:
    """Share of each class's slots that is filled, for each bank, and how many steps ago they were on average."""
    values: Values = {}
    names = method.config.data.class_names
    for own, bank in enumerate(method.banks):
        values[f"bank_fill/{own}"] = bank.fill()
        fill, age = bank.counts / bank.entries.shape[1], bank.age(step)
        for index, name in enumerate(names):
            values[f"bank_fill_of_class/{own}/{name}"] = fill[index]
            values[f"bank_age_of_class/{own}/{name}"] = age[index]
    return values


def describe_shares(method: "CrossTeacher") -> Values:
    """The class shares of the pseudo-labels as ``adjust_logits`` takes them: moving averages, weighted, mixed."""
    if method.pseudo_label_shares is None:
        return {}
    return {
        f"pseudo_label/average_share_of_class/{own}/{name}": share
        for own, shares in enumerate(method.pseudo_label_shares.average)
        for name, share in zip(method.config.data.class_names, shares, strict=True)
    }


def _gradient_norm(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Length of a weighted term's gradient in the logits and features of one student, labeled and unlabeled.

    Where the logits are made of these features (DeepLabv3+), what reaches them through the logits counts too.
    """
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    return torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients if gradient is not None])


def _pseudo_labels(method: "CrossTeacher", record: StepRecord) -> Values:
    """Confidence, classes, and against the hidden labels, where there are any, how right the pseudo-labels are."""
    values: Values = {}
    threshold = method.unlabeled.confidence_threshold
    hidden, names = record.unlabeled.hidden, method.config.data.class_names
    for own, (target, view) in enumerate(zip(record.targets, record.views, strict=True)):
        values[f"pseudo_label/confidence/{own}"] = _mean(view.confidence, view.valid)
        values[f"pseudo_label/kept/{own}"] = confident_share(view.confidence, view.valid, threshold)
        confidence, label = target.max(dim=1)
        counts = torch.bincount(label[record.unlabeled.valid], minlength=len(names))
        for name, share in zip(names, counts / counts.sum(), strict=True):
            values[f"pseudo_label/share_of_class/{own}/{name}"] = share
        if hidden is None:
            continue
        known = (hidden != method.config.ignore_label) & record.unlabeled.valid
        right, kept = label == hidden, known & (confidence >= threshold)
        confusion = ConfusionMatrix(method.config.num_classes)
        confusion.update(label, hidden.where(known, method.config.ignore_label))
        values[f"pseudo_label/accuracy/{own}"] = _mean(right, known)
        values[f"pseudo_label/accuracy_of_kept/{own}"] = _mean(right, kept)
        values[f"pseudo_label/mean_iou/{own}"] = torch.as_tensor(confusion.mean_iou())
        for name, recall in zip(names, confusion.matrix.diag() / confusion.matrix.sum(dim=1), strict=True):
            values[f"pseudo_label/recall_of_class/{own}/{name}"] = recall
    return values


def _agreement(record: StepRecord) -> Values:
    """Share of pixels on which two of the four networks name the same class: high values mean that they are coupled.

    Students are compared on the pixels that both strong views show at the same place, a student with the pseudo-labels
    on its own strong view: those it learns, and those its peer learns, which in the paper its own teacher gives.
    """
    predicted = [
        upsample(output.logits.detach(), view.images).argmax(dim=1)
        for output, view in zip(record.on_view, record.views, strict=True)
    ]
    taught = [target.argmax(dim=1) for target in record.targets]  # by the teacher of the peer, unless ablated
    first, second = record.views
    both = first.valid & second.valid & (first.source == second.source)
    values = {
        "agreement/students": _mean(predicted[0] == predicted[1], both),
        "agreement/teachers": _mean(taught[0] == taught[1], record.unlabeled.valid),
    }
    for own, view in enumerate(record.views):
        other = taught[1 - own].flatten()[view.source]
        values[f"agreement/student_and_its_target/{own}"] = _mean(predicted[own] == view.pseudo_label, view.valid)
        values[f"agreement/student_and_target_of_peer/{own}"] = _mean(predicted[own] == other, view.valid)
    return values


def _anchors(method: "CrossTeacher", record: StepRecord) -> Values:
    """How many pixels of the feature grid may be anchors of each term, before ``max_anchors`` are drawn of them."""
    values: Values = {}
    class_ids = torch.arange(method.config.num_classes, device=record.labeled.labels.device)
    for own, peer in ((0, 1), (1, 0)):
        views, outputs = record.views, record.on_view
        found = {
            "high_level": method.reliable_pixels(record.labeled, record.on_labeled[own], views[own], outputs[own]),
            "low_level": method.unreliable_pixels(views[own], views[peer], outputs[own], outputs[peer]),
        }
        labels, mask = found["high_level"]
        has_entries = (method.banks[own].counts > 0)[labels.clamp(0, method.config.num_classes - 1)]
        found["high_level"] = labels, mask & has_entries  # a class without entries has no positives
        for term, (labels, mask) in found.items():
            counts = ((labels[..., None] == class_ids) & mask[..., None]).flatten(0, -2).sum(dim=0)
            values[f"anchors/{term}/{own}"] = counts.sum()
            for name, count in zip(method.config.data.class_names, counts, strict=True):
                values[f"anchors_of_class/{term}/{own}/{name}"] = count
    return values


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """() float32 mean over the pixels where ``where`` is True; NaN if there are none."""
    return values[where].float().mean()
