"""The method: who learns from whom, which terms are on, and that no option or degenerate input breaks a step."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import CrossTeacher, build_networks
from model.cross_teacher import shrink
from model.teacher import upsample
from utils.batch import Batch
from utils.config import Config


def build(config: Config, *, labeled_samples: int = 4) -> CrossTeacher:
    torch.manual_seed(config.seed)
    return CrossTeacher(build_networks(config), config, labeled_samples=labeled_samples).train()


def full_banks(method: CrossTeacher) -> CrossTeacher:
    generator = torch.Generator().manual_seed(7)
    for bank in method.banks:
        bank.entries.copy_(torch.randn(bank.entries.shape, generator=generator))
        bank.counts.fill_(bank.entries.shape[1])
        bank.seen.fill_(True)
    return method


@pytest.fixture
def method(tiny_config) -> CrossTeacher:
    # Just above 1/3, what an untrained network gives each class, so that some pixels are reliable and some are not.
    return full_banks(
        build(tiny_config(training__contrastive__confidence=0.34, training__contrastive__contrast_start=0))
    )


def gradients(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("term", ["supervised", "cross_teacher", "high_level", "low_level"])
def test_a_term_of_one_peer_reaches_its_own_student_only(tiny_config, batches, own: int, term: str):
    unlike = {"high_level": 0.0, "low_level": 1.0}  # all pixels reliable, or none
    method = full_banks(
        build(
            tiny_config(
                training__contrastive__confidence=unlike.get(term, 0.5),
                training__contrastive__direction="none",
                training__contrastive__contrast_start=0,
                training__unlabeled__pixel_weight=False,
            )
        )
    )
    before = [bank.entries.clone() for bank in method.banks]
    losses = method.training_step(*batches(), step=0)
    losses[term, own].backward()
    assert gradients(method.students[own]) > 0
    assert gradients(method.students[1 - own]) == 0
    assert all(gradients(teacher) == 0 for teacher in method.teachers)
    assert all(
        torch.equal(bank.entries, was) and not bank.entries.requires_grad
        for bank, was in zip(method.banks, before, strict=True)
    )


def test_the_total_is_the_weighted_sum_over_terms_and_peers(tiny_config):
    method = build(tiny_config(training__unlabeled__consistency_weight=2, training__contrastive__contrast_start=0))
    names = list(itertools.product(("supervised", "cross_teacher", "high_level", "low_level"), (0, 1)))
    losses = {name: torch.tensor(10.0**index) for index, name in enumerate(names)}
    expected = 1 + 10 + 2 * (100 + 1000) + 0.1 * (1e4 + 1e5) + 0.1 * (1e6 + 1e7)
    assert method.total_loss(losses, step=0).item() == pytest.approx(expected)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_term_that_is_computed_and_not_added_cannot_happen(method: CrossTeacher, batches, change: str):
    losses = method.training_step(*batches(), step=0)
    if change == "missing":
        del losses["low_level", 1]
    else:
        losses["new_term", 0] = torch.zeros(())
    with pytest.raises(AssertionError, match="expected"):
        method.total_loss(losses, step=0)


def test_weights_of_zero_switch_their_terms_off(tiny_config, batches):
    method = build(tiny_config(training__contrastive__high_weight=0, training__contrastive__contrast_start=0))
    assert {term for term, _ in method.training_step(*batches(), step=0)} == {
        "supervised",
        "cross_teacher",
        "low_level",
    }
    method = build(tiny_config(training__contrastive__high_weight=0, training__contrastive__low_weight=0))
    method.after_step(batches()[0], step=0)
    assert method.banks[0].counts.sum() == 0, "no bank is filled that nobody reads"


def test_the_baseline_trains_the_supervised_term_only(tiny_config, batches):
    method = build(tiny_config(training__unlabeled__train_unlabeled=False))
    labeled, _ = batches()
    losses = method.training_step(labeled, None, step=100)
    assert set(losses) == {("supervised", 0), ("supervised", 1)}
    method.total_loss(losses, step=100).backward()


def test_logit_adjustment_changes_the_supervised_term_and_nothing_that_is_saved(tiny_config, batches):
    config = tiny_config(training__logit_adjustment=0.5)
    shares = np.array([0.7, 0.2, 0.1])
    method = CrossTeacher(build_networks(config), config, labeled_samples=4, class_shares=shares).train()
    labeled, _ = batches()
    torch.manual_seed(1)  # of dropout
    seen = [student(student.normalization(labeled.images)).logits for student in method.students]
    torch.manual_seed(1)
    losses = method.training_step(labeled, None, step=0)
    for own in (0, 1):
        adjusted = upsample(seen[own], labeled.labels) + 0.5 * torch.tensor(shares).float().log().view(3, 1, 1)
        expected = F.cross_entropy(adjusted, labeled.labels, ignore_index=config.ignore_label)
        torch.testing.assert_close(losses["supervised", own], expected)
    assert set(method.state_dict()) == set(build(config).state_dict()), "checkpoints of before can be continued"


def test_the_cross_teacher_term_is_adjusted_to_the_shares_of_its_own_pseudo_labels(tiny_config, batches):
    changes = {"training__logit_adjustment": 0.5, "training__unlabeled__pixel_weight": False}
    config = tiny_config(training__unlabeled__adjust_logits=True, **changes)
    shares = torch.tensor([0.7, 0.2, 0.1])
    method = CrossTeacher(build_networks(config), config, labeled_samples=4, class_shares=shares.numpy()).train()
    labeled, unlabeled = batches()
    method.recording = True
    losses = method.training_step(labeled, unlabeled, step=0)
    counted = []
    for own in (0, 1):
        view, logits = method.record.views[own], upsample(method.record.on_view[own].logits, labeled.labels)
        logits = logits + 0.5 * shares.log().view(3, 1, 1)  # no more: so far the shares count as those of the labels
        adjusted = F.cross_entropy(logits, view.pseudo_label, reduction="none")
        torch.testing.assert_close(losses["cross_teacher", own], (adjusted * view.valid).mean())
        counted.append(torch.stack([(view.valid & (view.pseudo_label == index)).sum() for index in range(3)]).float())
    method.after_step(labeled, step=0, frozen=torch.tensor(True))
    assert torch.equal(method.pseudo_label_shares.average, shares.repeat(2, 1))
    method.training_step(labeled, unlabeled, step=0)
    method.after_step(labeled, step=0)
    expected = torch.stack([0.99 * shares + 0.01 * one / one.sum() for one in counted])
    torch.testing.assert_close(method.pseudo_label_shares.average, expected)
    assert not method.pseudo_label_shares.counted.any(), "no step counts twice"

    losses = method.training_step(labeled, unlabeled, step=1)
    for own in (0, 1):
        view, logits = method.record.views[own], upsample(method.record.on_view[own].logits, labeled.labels)
        shift = 0.5 * shares.log() + (method.pseudo_label_shares.average[own] / shares).log()
        logits = logits + shift.view(3, 1, 1)
        adjusted = F.cross_entropy(logits, view.pseudo_label, reduction="none")
        torch.testing.assert_close(losses["cross_teacher", own], (adjusted * view.valid).mean())
    assert "pseudo_label_shares.average" in method.state_dict(), "a resumed run knows them"


def test_a_step_without_pseudo_labels_leaves_their_shares_alone(tiny_config, batches):
    changes = {"adjust_logits": True, "pixel_weight": "threshold", "confidence_threshold": 1.0}
    config = tiny_config(**{f"training__unlabeled__{key}": value for key, value in changes.items()})
    shares = np.array([0.7, 0.2, 0.1])
    method = CrossTeacher(build_networks(config), config, labeled_samples=4, class_shares=shares).train()
    labeled, unlabeled = batches()
    losses = method.training_step(labeled, unlabeled, step=0)
    method.after_step(labeled, step=0)
    assert losses["cross_teacher", 0] == 0
    torch.testing.assert_close(method.pseudo_label_shares.average, torch.tensor(shares).float().repeat(2, 1))


def test_the_terms_start_when_they_should(tiny_config, batches):
    method = build(tiny_config(training__unlabeled__start_iteration=3), labeled_samples=4)
    assert method.active_terms(2) == ["supervised"]
    assert method.active_terms(3) == ["supervised", "cross_teacher"], "the banks are empty"
    full_banks(method)
    assert method.active_terms(1) == ["supervised"]
    assert method.active_terms(3) == ["supervised", "cross_teacher", "high_level", "low_level"]


def test_contrast_that_has_started_goes_on_when_a_rare_class_is_seen_later_also_in_a_resumed_run(tiny_config):
    method = full_banks(build(tiny_config(), labeled_samples=4))
    method.banks[0].seen[2] = False
    assert "high_level" in method.active_terms(5)
    method.banks[0].seen[2], method.banks[0].counts[2] = True, 0
    resumed = build(tiny_config(), labeled_samples=4)
    resumed.load_state_dict(method.state_dict())
    for one in (method, resumed):
        assert "high_level" in one.active_terms(6)


def test_contrast_waits_for_one_pass_over_the_labeled_images(tiny_config):
    method = full_banks(build(tiny_config(), labeled_samples=7))
    assert "high_level" not in method.active_terms(3)  # 3 steps of 2 are 6 images
    assert "high_level" in method.active_terms(4)


@pytest.mark.parametrize(("teacher", "giver"), [("cross", "teacher_1"), ("self", "teacher_0"), ("peer", "student_1")])
def test_student_0_learns_from_whom_the_option_names(tiny_config, batches, teacher: str, giver: str):
    method = build(tiny_config(training__unlabeled__teacher=teacher))
    with torch.no_grad():  # every network gets a classifier that says its own class
        for index, (name, network) in enumerate(method.models().items()):
            network.head.classifier.weight.zero_()
            network.head.classifier = nn.Conv2d(32, 3, 1)
            network.head.classifier.weight.zero_()
            network.head.classifier.bias.copy_(torch.tensor([9.0 * (name == giver), 1.0 + index, 0.0]))
    target = method.predict_target(0, 1, batches()[1].images)
    assert (target.argmax(dim=1) == 0).all()


def test_independent_views_differ_and_shared_ones_do_not(tiny_config, batches):
    _, unlabeled = batches(4)
    targets = [torch.rand(4, 3, 40, 48).softmax(dim=1) for _ in range(2)]
    for kind, same in (("independent", False), ("shared", True)):
        method = build(tiny_config(training__unlabeled__strong_view=kind, training__unlabeled__flip=True))
        first, second = (method.strong_view(own, unlabeled, targets, step=5) for own in (0, 1))
        assert torch.equal(first.images, second.images) == same
        assert torch.equal(first.source, second.source) == same
        assert not torch.equal(first.probabilities, second.probabilities), "each keeps its own teacher's word"


def test_source_says_where_every_pixel_of_a_view_comes_from(tiny_config, batches):
    _, unlabeled = batches(3)
    options = {"color_jitter": False, "blur": False, "flip": True, "mask_padding": True}
    method = build(tiny_config(**{f"training__unlabeled__{key}": value for key, value in options.items()}))
    targets = [torch.rand(3, 3, 40, 48).softmax(dim=1) for _ in range(2)]
    view = method.strong_view(1, unlabeled, targets, step=0)
    for seen, original in ((view.images, unlabeled.images), (view.probabilities, targets[1])):
        flat = original.movedim(1, -1).flatten(0, 2)
        assert torch.equal(seen.movedim(1, -1), flat[view.source])
    assert torch.equal(view.valid, unlabeled.valid.flatten()[view.source])


def test_low_level_compares_only_pixels_of_the_same_source_that_a_surer_peer_knows(
    method: CrossTeacher, batches, monkeypatch
):
    _, unlabeled = batches()
    seen = {}
    monkeypatch.setattr(
        "model.cross_teacher.low_level_contrast", lambda *args, **_: seen.update(mask=args[3]) or torch.zeros(())
    )
    targets = [torch.full((2, 3, 40, 48), 1 / 3) for _ in range(2)]  # the teachers are sure of nothing
    view = method.strong_view(0, unlabeled, targets, step=0)._replace(valid=torch.ones(2, 40, 48, dtype=torch.bool))
    output = method.students[0](unlabeled.images)
    logits = torch.zeros_like(output.logits)  # a grid of 6 x 7
    sure = logits.clone()
    sure[:, 1, :3] = 9.0
    shifted = view._replace(source=view.source.roll(1, dims=0))
    for peer_view, mine, peers, expected in (
        (view, logits, sure, 0.5),  # where the peer is sure
        (view, sure, logits, 0.0),  # never where the student is surer
        (view, sure, sure, 0.0),
        (shifted, logits, sure, 0.0),  # nowhere: other pixels are shown there
    ):
        method.low_level(view, peer_view, output._replace(logits=mine), output._replace(logits=peers))
        assert seen["mask"].float().mean().item() == pytest.approx(expected)


def test_padding_teaches_nothing_unless_asked_to(tiny_config, batches):
    _, unlabeled = batches()
    unlabeled = unlabeled._replace(valid=torch.zeros_like(unlabeled.valid))
    labeled, _ = batches()
    for masked in (True, False):
        config = tiny_config(training__unlabeled__mask_padding=masked, training__unlabeled__pixel_weight=False)
        loss = build(config).training_step(labeled, unlabeled, step=0)["cross_teacher", 0]
        assert (loss == 0) == masked


OPTIONS = {
    "unlabeled__mix_mask": ["class", "cut", "cow", "None", None],
    "unlabeled__pixel_weight": ["threshold_uniform", "threshold", "power", "sigmoid", False, None],
    "unlabeled__consistency_loss": ["MSE"],
    "unlabeled__teacher": ["self", "peer"],
    "unlabeled__teacher_norm": ["running"],
    "unlabeled__flip": [True],
    "contrastive__direction": ["none"],
    "backbone_lr_multiplier": [3.0],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OPTIONS.items() for value in values])
@pytest.mark.parametrize("network", ["DeepLab", "DeepLabv3+"])
def test_every_option_trains_with_finite_losses(tiny_config, batches, network: str, key: str, value: object):
    config = tiny_config(**{"model": network, "training__contrastive__contrast_start": 0, f"training__{key}": value})
    check_one_step(full_banks(build(config)), *batches())


def check_one_step(method: CrossTeacher, labeled: Batch, unlabeled: Batch) -> None:
    losses = method.training_step(labeled, unlabeled, step=0)
    total = method.total_loss(losses, step=0)
    total.backward()
    method.after_step(labeled, step=0)
    assert torch.isfinite(total)
    assert all(torch.isfinite(p.grad).all() for s in method.students for p in s.parameters() if p.grad is not None)
    assert all(torch.isfinite(value).all() for value in method.state_dict().values())


@pytest.mark.parametrize(
    "case", ["batch of one", "all ignored", "one class only", "nothing confident", "all padding", "empty banks"]
)
@pytest.mark.parametrize("network", ["DeepLab", "DeepLabv3+"])
def test_degenerate_batches_give_finite_losses(tiny_config, batches, network: str, case: str):
    confidence = 1.0 if case == "nothing confident" else 0.75
    config = tiny_config(
        model=network, training__contrastive__contrast_start=0, training__contrastive__confidence=confidence
    )
    labeled, unlabeled = batches(1 if case == "batch of one" else 2)
    if case == "all ignored":
        labeled.labels.fill_(255)
    if case == "one class only":
        labeled.labels.fill_(1)
    if case == "all padding":
        unlabeled.valid.fill_(False)
    method = build(config)
    check_one_step(method if case == "empty banks" else full_banks(method), labeled, unlabeled)


def test_students_start_different_and_teachers_like_their_own(method: CrossTeacher):
    weights = [network.backbone.conv1.weight for network in method.models().values()]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])


def test_shrinking_takes_the_pixel_that_torch_calls_nearest():
    large = torch.arange(2 * 7 * 9).view(2, 7, 9)
    like = torch.empty(1, 3, 4)
    expected = large[:, [0, 2, 4]][:, :, [0, 2, 4, 6]]
    assert torch.equal(shrink(large, like), expected)
    assert shrink(large > 3, like).dtype == torch.bool
