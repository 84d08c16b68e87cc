"""Cross Teacher Training (Xiao et al., Neurocomputing 2022): the paper.

Two students learn, each from the other one's teacher. ``CrossTeacher.training_step`` is one step in the paper's order;
the loop around it (utils/trainer.py) knows nothing of the method.

Shapes: B batch, C classes, D feature channels, H x W image, h x w feature grid. The peers are 0 and 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.memory_bank import Candidates, MemoryBank
from model.network import NetworkOutput, SegmentationNetwork
from model.observe import StepRecord, describe, describe_banks, describe_shares
from model.pseudo_label_shares import PseudoLabelShares
from model.teacher import EmaTeacher, predict_frozen, predict_probabilities, upsample
from utils.augment import draw_flips, horizontal_flip, strong_augment
from utils.batch import Batch
from utils.config import Config
from utils.contrast import high_level_contrast, low_level_contrast
from utils.distributed import average_, gather
from utils.losses import (
    confident_share,
    cross_entropy,
    logit_shift,
    mean_squared_error,
    pixel_weight,
    weighted_cross_entropy,
)
from utils.mixing import draw_mix_masks, mix
from utils.randomness import keyed_seed

PEERS = ((0, 1), (1, 0))  # (own, peer)
Losses = dict[tuple[str, int], Tensor]  # (term, own) -> () float32


class StrongView(NamedTuple):
    """What a student sees of the unlabeled batch, and what its cross teacher says of it.

    images: (B,3,H,W) RGB in [0,1], mixed and augmented
    probabilities: (B,C,H,W) of the teacher, mixed like the images; confidence (B,H,W) and pseudo_label (B,H,W) int64
        are their maximum and its class
    source: (B,H,W) int64, which pixel of the unlabeled batch is shown here
    valid: (B,H,W) bool, False on padding (all True with ``mask_padding: false``)
    """

    images: Tensor
    probabilities: Tensor
    confidence: Tensor
    pseudo_label: Tensor
    source: Tensor
    valid: Tensor


class CrossTeacher(nn.Module):
    """Two students, two teachers, two memory banks; ``state_dict`` is all that the method remembers.

    networks: two networks that start from different weights. labeled_samples: number of labeled images.
    class_shares: (C,) of the labeled pixels, which ``logit_adjustment`` and ``adjust_logits`` need in training.
    """

    # Each a ModuleList, named here by what it holds.
    students: Sequence[SegmentationNetwork]
    teachers: Sequence[EmaTeacher]
    banks: Sequence[MemoryBank]
    banks_were_ready: Tensor
    logit_shift: Tensor | None
    pseudo_label_shares: PseudoLabelShares | None
    record: StepRecord | None
    observed: dict[str, Tensor]

    def __init__(
        self,
        networks: Sequence[SegmentationNetwork],
        config: Config,
        *,
        labeled_samples: int,
        class_shares: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.config, self.labeled_samples = config, labeled_samples
        self.unlabeled, self.contrastive = config.training.unlabeled, config.training.contrastive
        self.students = nn.ModuleList(networks)  # type: ignore[assignment]
        decay, norm = self.unlabeled.ema_decay, self.unlabeled.teacher_norm
        self.teachers = nn.ModuleList(EmaTeacher(net, decay, norm) for net in networks)  # type: ignore[assignment]
        size, dim = self.contrastive.memory_size, config.feature_channels
        self.banks = nn.ModuleList(MemoryBank(config.num_classes, size, dim) for _ in networks)  # type: ignore[assignment]
        self.loss_weights = {
            "supervised": 1.0,
            "cross_teacher": self.unlabeled.consistency_weight,
            "high_level": self.contrastive.high_weight,
            "low_level": self.contrastive.low_weight,
        }
        # Stays True, also when a class is first seen later; a buffer, so that a resumed run knows it too.
        self.register_buffer("banks_were_ready", torch.tensor(False))
        shift = None if class_shares is None else logit_shift(class_shares, config.training.logit_adjustment)
        self.register_buffer("logit_shift", shift, persistent=False)
        start = torch.zeros(config.num_classes) if class_shares is None else torch.as_tensor(class_shares).float()
        self.pseudo_label_shares = PseudoLabelShares(start, decay) if self.unlabeled.adjusts else None
        self.recording, self.record, self.observed = False, None, {}  # see ``observe``
        self.contrast_started = False  # banks_were_ready on the host, once True: no more waiting for the device

    # ------------------------------------------------------------------------------------------------ one step

    def forward(self, labeled: Batch, unlabeled: Batch | None, *, step: int, part: int = 0) -> Losses:
        """``training_step``; the way in for torch's DistributedDataParallel."""
        return self.training_step(labeled, unlabeled, step=step, part=part)

    def training_step(self, labeled: Batch, unlabeled: Batch | None, *, step: int, part: int = 0) -> Losses:
        """One step of the paper -> the losses of ``active_terms(step)`` for both peers, summed by ``total_loss``.

        unlabeled: None only where ``supervised`` is the one active term.
        part: which part of the global batch this is, where it is shared among processes or accumulated.
        """
        terms = self.active_terms(step)
        losses: Losses = {}
        on_labeled = [student(student.normalization(labeled.images)) for student in self.students]
        labels, ignore = labeled.labels, self.config.ignore_label
        for own, _ in PEERS:
            logits = upsample(on_labeled[own].logits, labels)
            losses["supervised", own] = cross_entropy(logits, labels, ignore, self.logit_shift)
        if terms == ["supervised"] or unlabeled is None:
            return losses

        # The cross in cross teacher: what student `own` is to learn comes from the teacher of its peer.
        targets = [self.predict_target(own, peer, unlabeled.images) for own, peer in PEERS]  # (B,C,H,W), no gradient
        views = [self.strong_view(own, unlabeled, targets, step=step, part=part) for own, _ in PEERS]
        on_view = [
            student(student.normalization(view.images)) for student, view in zip(self.students, views, strict=True)
        ]
        for own, peer in PEERS:
            if "cross_teacher" in terms:
                losses["cross_teacher", own] = self.consistency(own, on_view[own], views[own], step=step)
            if "high_level" in terms:
                draws = self.draws("high_level", own, step=step, part=part)
                losses["high_level", own] = self.high_level(
                    own, labeled, on_labeled[own], views[own], on_view[own], draws
                )
            if "low_level" in terms:
                draws = self.draws("low_level", own, step=step, part=part)
                losses["low_level", own] = self.low_level(views[own], views[peer], on_view[own], on_view[peer], draws)
        self.record = StepRecord(labeled, unlabeled, targets, views, on_labeled, on_view) if self.recording else None
        return losses

    def total_loss(self, losses: Losses, *, step: int) -> Tensor:
        """The weighted sum over terms and peers; a term that is missing or not expected at this step is our mistake."""
        assert self.logit_shift is not None or not self.config.training.needs_class_shares, "it needs class_shares"
        expected = {(term, own) for term in self.active_terms(step) for own, _ in PEERS}
        assert set(losses) == expected, f"losses {sorted(losses)}, expected {sorted(expected)}"
        return torch.stack([self.loss_weights[term] * loss for (term, _), loss in losses.items()]).sum()

    @torch.no_grad()
    def after_step(self, *labeled: Batch, step: int, frozen: Tensor | None = None) -> None:
        """Teachers follow their students; each teacher fills its bank from the labeled images, those of all processes.

        labeled: the step's labeled batches here, several where batches are accumulated. frozen: () bool on the device,
        True where nothing may change, because a loss was not finite.
        """
        max_new = max(2 * self.contrastive.memory_size // self.labeled_samples, self.config.training.batch_size)
        average_([buffer for student in self.students for buffer in student.buffers()], frozen=frozen)
        if self.pseudo_label_shares is not None:
            self.pseudo_label_shares.follow(frozen=frozen)
        for student, teacher, bank in zip(self.students, self.teachers, self.banks, strict=True):
            teacher.update(student, step, frozen=frozen)
            if self.uses_banks:
                parts = [gather(self.offer(teacher, bank, batch, max_new)) for batch in labeled]  # of all processes
                offers = [Candidates(*offer) for process in zip(*parts, strict=True) for offer in process]
                bank.take(offers, max_new, step=step, frozen=frozen)

    def offer(self, teacher: EmaTeacher, bank: MemoryBank, labeled: Batch, max_new: int) -> Candidates:
        """The features of a labeled batch that a teacher is sure of, and right about."""
        output = predict_frozen(teacher.network, labeled.images, norm=teacher.norm)
        truth, probabilities = shrink(labeled.labels, output.logits), output.logits.float().softmax(dim=1)
        return bank.candidates(output.features, probabilities, truth, max_new, self.contrastive.memory_confidence)

    # ------------------------------------------------------------------------------------------------ its parts

    def active_terms(self, step: int) -> list[str]:
        """The terms that are trained at a step. A term of weight 0 is not computed."""
        terms = ["supervised"]
        if self.unlabeled.train_unlabeled and step >= self.unlabeled.start_iteration:
            terms += ["cross_teacher"]
            if self.uses_banks and self.contrast_has_started(step):
                terms += ["high_level", "low_level"]
        return [term for term in terms if self.loss_weights[term] > 0]

    @property
    def uses_banks(self) -> bool:
        weights = self.contrastive.high_weight + self.contrastive.low_weight
        return self.unlabeled.train_unlabeled and weights > 0

    def contrast_has_started(self, step: int) -> bool:
        """At ``contrast_start``; else when both banks are full for every class seen, after one pass over the images."""
        if self.contrastive.contrast_start is not None:
            return step >= self.contrastive.contrast_start
        if self.contrast_started:
            return True
        if not self.banks_were_ready and step * self.config.training.batch_size >= self.labeled_samples:
            self.banks_were_ready.fill_(all(bool(bank.is_ready()) for bank in self.banks))
        self.contrast_started = bool(self.banks_were_ready)
        return self.contrast_started

    def predict_target(self, own: int, peer: int, images: Tensor) -> Tensor:
        """(B,C,H,W) probabilities that student ``own`` learns from: the cross in cross teacher, or an ablation."""
        if self.unlabeled.teacher == "peer":
            return predict_probabilities(self.students[peer], images, norm=self.unlabeled.teacher_norm)
        return self.teachers[peer if self.unlabeled.teacher == "cross" else own].predict(images)

    def strong_view(
        self, own: int, unlabeled: Batch, targets: Sequence[Tensor], *, step: int, part: int = 0
    ) -> StrongView:
        """Mix, flip, jitter and blur the unlabeled batch for student ``own``; targets: (B,C,H,W) of both students."""
        options = self.unlabeled
        drawn_for = 0 if options.strong_view == "shared" else own  # the same key draws the same view
        generator = self.draws("strong view", drawn_for, step=step, part=part)
        valid = unlabeled.valid if options.mask_padding else torch.ones_like(unlabeled.valid)
        # Not argmax, which is many times slower on a CPU.
        predicted = targets[drawn_for].max(dim=1).indices.where(valid, self.config.ignore_label)
        mask = draw_mix_masks(options.mix_mask, predicted, generator, ignore_label=self.config.ignore_label)
        source = torch.arange(valid.numel(), device=valid.device).view_as(valid)

        fields = [mix(field, mask) for field in (unlabeled.images, targets[own], source, valid)]
        if options.flip:
            flips = draw_flips(len(valid), generator)
            fields = [horizontal_flip(field, flips) for field in fields]
        images, probabilities, source, valid = fields
        strength = options.jitter_strength
        images = strong_augment(
            images, generator, color_jitter=options.color_jitter, blur=options.blur, jitter_strength=strength
        )
        confidence, pseudo_label = probabilities.max(dim=1)
        return StrongView(images, probabilities, confidence, pseudo_label, source, valid)

    def consistency(self, own: int, on_view: NetworkOutput, view: StrongView, *, step: int) -> Tensor:
        """The cross-teacher term L_ct of one student: its prediction on the strong view against the pseudo-label."""
        options, logits = self.unlabeled, upsample(on_view.logits, view.images)
        if options.consistency_loss == "MSE":
            share = confident_share(view.confidence, view.valid, options.confidence_threshold)
            return share * mean_squared_error(logits, view.probabilities, valid=view.valid)
        weight = pixel_weight(
            options.pixel_weight, view.confidence, step=step, valid=view.valid, threshold=options.confidence_threshold
        )
        shift = None
        if self.pseudo_label_shares is not None:
            assert self.logit_shift is not None
            shift = self.logit_shift + self.pseudo_label_shares.shift(own)
            self.pseudo_label_shares.count(own, view.pseudo_label, weight)
        return weighted_cross_entropy(logits, view.pseudo_label, weight, self.config.ignore_label, shift)

    def high_level(
        self,
        own: int,
        labeled: Batch,
        on_labeled: NetworkOutput,
        view: StrongView,
        on_view: NetworkOutput,
        draws: torch.Generator | None = None,
    ) -> Tensor:
        """L_hc: a student's reliable features, labeled and unlabeled, against its own memory bank."""
        options, bank = self.contrastive, self.banks[own]
        labels, mask = self.reliable_pixels(labeled, on_labeled, view, on_view)
        return high_level_contrast(
            torch.cat((on_labeled.features, on_view.features)),
            labels,
            mask,
            bank.entries,
            temperature=options.high_temperature,
            negatives=options.negatives,
            counts=bank.counts,
            max_anchors=options.max_anchors,
            generator=draws,
        )

    def reliable_pixels(
        self, labeled: Batch, on_labeled: NetworkOutput, view: StrongView, on_view: NetworkOutput
    ) -> tuple[Tensor, Tensor]:
        """(2B,h,w) int64 classes and bool anchors of L_hc: labeled pixels, then surely pseudo-labeled ones."""
        reliable = view.valid & (view.confidence >= self.contrastive.confidence)
        labels = torch.cat((shrink(labeled.labels, on_labeled.features), shrink(view.pseudo_label, on_view.features)))
        known = torch.cat((labeled.labels != self.config.ignore_label, reliable))
        return labels, shrink(known, on_labeled.features)

    def low_level(
        self,
        view: StrongView,
        peer_view: StrongView,
        on_view: NetworkOutput,
        on_peer_view: NetworkOutput,
        draws: torch.Generator | None = None,
    ) -> Tensor:
        """L_lc: a student's unreliable features follow the surer peer student's features of the same pixel."""
        options = self.contrastive
        peer_class, mask = self.unreliable_pixels(view, peer_view, on_view, on_peer_view)
        return low_level_contrast(
            on_view.features,
            on_peer_view.features.detach(),
            peer_class,
            mask,
            [bank.entries for bank in self.banks],
            temperature=options.low_temperature,
            negatives=options.negatives,
            counts=[bank.counts for bank in self.banks],
            max_anchors=options.max_anchors,
            generator=draws,
        )

    def unreliable_pixels(
        self, view: StrongView, peer_view: StrongView, on_view: NetworkOutput, on_peer_view: NetworkOutput
    ) -> tuple[Tensor, Tensor]:
        """(B,h,w) int64 classes by the peer student and bool anchors of L_lc: the same pixel, of which it is surer."""
        options = self.contrastive
        confidence, _ = on_view.logits.detach().float().softmax(dim=1).max(dim=1)  # (B,h,w)
        peer_confidence, peer_class = on_peer_view.logits.detach().float().softmax(dim=1).max(dim=1)
        unreliable = view.valid & (view.confidence < options.confidence) & (view.source == peer_view.source)
        mask = shrink(unreliable, on_view.features)
        if options.direction == "confidence":
            mask = mask & (peer_confidence > confidence) & (peer_confidence >= options.confidence)
        return peer_class, mask

    def draws(self, what: str, own: int, *, step: int, part: int) -> torch.Generator:
        """Where the random numbers of one purpose in one step come from: the same after a resume, on any device."""
        key = (self.config.seed, what, own, step, *((part,) if part else ()))  # part 0: as of a whole batch
        return torch.Generator().manual_seed(keyed_seed(*key))

    # ------------------------------------------------------------------------------------------------ its surroundings

    def models(self) -> dict[str, SegmentationNetwork]:
        """The four networks by name, for evaluation; the ensemble is the mean of the students' probabilities."""
        students = {f"student_{own}": student for own, student in enumerate(self.students)}
        return students | {f"teacher_{own}": teacher.network for own, teacher in enumerate(self.teachers)}

    def observe(self, losses: Losses) -> None:
        """Describe the last step, which was taken while ``recording``, before its backward pass."""
        self.observed, self.record = describe(self, self.record, losses), None

    def step_buffers(self) -> list[Tensor]:
        """What a forward pass changes, which a step that is not taken puts back."""
        counts = [] if self.pseudo_label_shares is None else [self.pseudo_label_shares.counted]
        return [*(buffer for student in self.students for buffer in student.buffers()), self.banks_were_ready, *counts]

    def log_values(self, step: int) -> dict[str, float]:
        """What was observed, and the banks now; tags as in TensorBoard. Values that do not exist are left out."""
        values = self.observed | describe_shares(self) | (describe_banks(self, step) if self.uses_banks else {})
        self.observed = {}
        if not values:
            return {}
        numbers = torch.stack([value.detach().double().to(self.banks_were_ready.device) for value in values.values()])
        return {tag: value for tag, value in zip(values, numbers.tolist(), strict=True) if value == value}  # not NaN

    @torch.no_grad()
    def preview(self, batch: Batch, *, own: int, step: int) -> dict[str, Tensor]:
        """What student ``own`` would learn from a batch now, and what it predicts there. Changes nothing.

        Returns title -> (B,3,H,W) float RGB, (B,H,W) int64 class ids, bool masks or float32 in [0,1].
        """
        targets = [self.predict_target(one, other, batch.images) for one, other in PEERS]
        view = self.strong_view(own, batch, targets, step=step)
        prediction = predict_probabilities(self.students[own], view.images, norm="running").argmax(dim=1)
        pixels = view.valid[0].numel()
        # Where a pixel of its own image is shown.
        kept = view.source // pixels == torch.arange(len(view.source), device=view.source.device).view(-1, 1, 1)
        return {
            "weak view": batch.images,
            "pseudo-label": targets[own].argmax(dim=1).where(batch.valid, self.config.ignore_label),
            "mix mask": kept,
            "strong view": view.images,
            "what to learn": view.pseudo_label.where(view.valid, self.config.ignore_label),
            "confidence": view.confidence,
            "prediction": prediction.where(view.valid, self.config.ignore_label),
        }


def shrink(values: Tensor, like: Tensor) -> Tensor:
    """(B,H,W) of any dtype -> (B,h,w) of another tensor's last two sizes, by torch's nearest neighbour."""
    small = F.interpolate(values[:, None].double(), size=like.shape[-2:], mode="nearest")
    return small[:, 0].to(values.dtype)
