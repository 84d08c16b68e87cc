"""What a step tells about itself: right by hand, and without any influence on what is learned."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import DatasetFiles, training_loader
from model.cross_teacher import StrongView
from model.memory_bank import MemoryBank
from model.network import NetworkOutput
from model.observe import StepRecord, describe, describe_banks
from tests.conftest import tiny_values
from tests.test_cross_teacher import build, full_banks
from tests.test_trainer import build as build_trainer
from tests.test_trainer import state_of
from utils.config import Config, check_config


@pytest.fixture
def config(demo: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(**changes: Any) -> Config:
        lists = {"labeled": "splits/labeled.txt", "unlabeled": "splits/unlabeled.txt", "num_classes": 7}
        utils = {"checkpoint_dir": str(tmp_path / "runs"), "log_per_iter": 2, "val_per_iter": 4}
        options = {"training__contrastive__contrast_start": 1, "utils": utils | {"tensorboard": False}}
        return check_config(tiny_values(dataset={"root": str(demo), **lists}, **(options | changes)), source="test")

    return make


def logs(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_hidden_labels_are_logged_and_change_not_a_bit_of_what_is_learned(config):
    states, lines = [], []
    for hidden in (True, False):
        changes = {"training__data__hidden_labels": hidden, "utils__log_per_iter": 1 if hidden else 4}
        trainer = build_trainer(config(**changes), name=f"hidden_{hidden}")
        trainer.fit()
        states.append(state_of(trainer))
        lines.append(logs(trainer.run.folder))
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert all(0 <= line["pseudo_label/accuracy/0"] <= 1 for line in lines[0] if "supervised/0" in line)
    assert not any("pseudo_label/accuracy/0" in line for line in lines[1])
    assert all("pseudo_label/confidence/1" in line for line in lines[1] if "supervised/0" in line)


def test_the_unlabeled_stream_hides_its_labels_from_training_and_does_without(config, demo: Path, tmp_path: Path):
    batch = next(iter(training_loader(DatasetFiles(config()), "unlabeled", start_step=0)))
    assert (batch.labels == 255).all()
    assert batch.hidden is not None
    assert (batch.hidden != 255).any()
    without = next(iter(training_loader(DatasetFiles(config(training__data__hidden_labels=False)), "unlabeled",
                                        start_step=0)))  # fmt: skip
    assert without.hidden is None
    assert torch.equal(batch.images, without.images)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in demo.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "SegmentationClassAug").unlink()
    (copy / "SegmentationClassAug").mkdir()
    bare = next(iter(training_loader(DatasetFiles(config(data_root=str(copy))), "unlabeled", start_step=0)))
    assert (bare.hidden == 255).all()
    (copy / "SegmentationClassAug" / f"{bare.ids[0]}.png").write_bytes(b"no picture")
    bad = next(iter(training_loader(DatasetFiles(config(data_root=str(copy))), "unlabeled", start_step=0)))
    assert (bad.hidden == 255).all()


def view_of(pseudo_label: torch.Tensor, confidence: float, source: torch.Tensor) -> StrongView:
    images, valid = torch.zeros(1, 3, 2, 2), torch.tensor([[[True, True], [True, False]]])
    return StrongView(images, torch.empty(0), torch.full((1, 2, 2), confidence), pseudo_label, source, valid)


def says(labels: list[int]) -> torch.Tensor:
    """(1,3,2,2) logits of these classes."""
    return torch.nn.functional.one_hot(torch.tensor(labels).view(1, 2, 2), 3).permute(0, 3, 1, 2).float() * 5


def test_shares_are_those_counted_by_hand(tiny_config, batches):
    method = build(tiny_config())
    source = torch.arange(4).view(1, 2, 2)
    # Student 0 learns 0 1 2 -, student 1 learns 0 0 2 -; the last pixel is padding.
    targets = [says([0, 1, 2, 2]).softmax(dim=1), says([0, 0, 2, 1]).softmax(dim=1)]
    views = [
        view_of(one.argmax(dim=1), confidence, source) for one, confidence in zip(targets, (0.98, 0.5), strict=True)
    ]
    mixed = [NetworkOutput(says([0, 1, 1, 0]), torch.zeros(1, 32, 2, 2)),
             NetworkOutput(says([0, 2, 1, 0]), torch.zeros(1, 32, 2, 2))]  # fmt: skip
    unlabeled = batches(1)[1]._replace(
        images=torch.zeros(1, 3, 2, 2), valid=views[0].valid, hidden=torch.tensor([[[0, 2], [2, 0]]])
    )
    record = StepRecord(unlabeled, unlabeled, targets, views, mixed, mixed)
    said = {key: round(value.item(), 4) for key, value in describe(method, record, {}).items()}
    found = {key: value for key, value in said.items() if "_of_class/" not in key}
    zero, one, two = method.config.data.class_names
    shares = [[said[f"pseudo_label/share_of_class/{own}/{name}"] for name in (zero, one, two)] for own in (0, 1)]
    assert shares == [[0.3333, 0.3333, 0.3333], [0.6667, 0, 0.3333]]
    for own in (0, 1):
        recall = {name: said[f"pseudo_label/recall_of_class/{own}/{name}"] for name in (zero, one, two)}
        assert math.isnan(recall.pop(one)), "no known pixel has this class: left out of the log"
        assert recall == {zero: 1, two: 0.5}
    assert found == {
        "pseudo_label/confidence/0": 0.98,
        "pseudo_label/confidence/1": 0.5,
        "pseudo_label/kept/0": 1,
        "pseudo_label/kept/1": 0,
        "pseudo_label/accuracy/0": round(2 / 3, 4),  # 0 and 2 are right, 1 should be 2
        "pseudo_label/accuracy/1": round(2 / 3, 4),
        "pseudo_label/accuracy_of_kept/0": round(2 / 3, 4),  # each is 98.7 % sure
        "pseudo_label/accuracy_of_kept/1": round(2 / 3, 4),
        "pseudo_label/mean_iou/0": 0.5,  # 1, 0 and 1/2
        "pseudo_label/mean_iou/1": 0.5,  # 1/2 and 1/2; nobody says class 1
        "agreement/students": round(2 / 3, 4),
        "agreement/teachers": round(2 / 3, 4),
        "agreement/student_and_its_target/0": round(2 / 3, 4),
        "agreement/student_and_its_target/1": round(1 / 3, 4),
        "agreement/student_and_target_of_peer/0": round(1 / 3, 4),
        "agreement/student_and_target_of_peer/1": round(1 / 3, 4),
    }


def test_gradient_norms_and_anchors_are_those_of_the_terms(tiny_config, batches):
    confidence = {"training__contrastive__confidence": 0.34, "training__contrastive__contrast_start": 0}
    method = full_banks(build(tiny_config(**confidence, training__unlabeled__consistency_weight=2)))
    method.recording = True
    labeled, unlabeled = batches()
    losses = method.training_step(labeled, unlabeled, step=0)
    record = method.record
    assert record is not None
    found = describe(method, record, losses)
    for (term, own), loss in losses.items():
        outputs = [*record.on_labeled[own], *record.on_view[own]]
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        norm = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5 * method.loss_weights[term]
        assert found[f"gradient_norm/{term}/{own}"].item() == pytest.approx(norm, rel=1e-4)
    for term in ("high_level", "low_level"):
        each = [value for key, value in found.items() if key.startswith(f"anchors_of_class/{term}/0/")]
        assert len(each) == 3
        assert sum(each) == found[f"anchors/{term}/0"]
    assert found["anchors/high_level/0"] > 0
    method.observe(losses)
    method.total_loss(losses, step=0).backward()  # the graph is still there
    assert method.record is None, "nothing of the step is kept in memory"
    assert method.log_values(1).keys() >= {"agreement/students", "bank_fill/0", "anchors/high_level/1"}


def test_a_bank_knows_how_old_its_entries_are():
    bank = MemoryBank(2, size=3, dim=4)
    for step, class_id in ((5, 0), (7, 0), (8, 0), (9, 0), (9, 1)):
        probabilities = torch.zeros(1, 2, 1, 1)
        probabilities[:, class_id] = 0.99
        offer = bank.candidates(torch.randn(1, 4, 1, 1), probabilities, torch.full((1, 1, 1), class_id), 1)
        bank.take([offer], 1, step=step)
    assert bank.born.tolist() == [[7, 8, 9], [9, 0, 0]]
    assert bank.age(10).tolist() == [2, 1]


def test_a_bank_without_entries_has_no_age(tiny_config):
    method = build(tiny_config())
    assert describe_banks(method, 3)["bank_age_of_class/0/class 1"].isnan()
    assert "bank_age_of_class/0/class 1" not in method.log_values(3)
    assert method.log_values(3)["bank_fill_of_class/1/class 2"] == 0


def test_tensorboard_shows_curves_and_one_labelled_picture_per_student(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = build_trainer(config(utils__tensorboard=True))
    trainer.fit()
    events = EventAccumulator(str(trainer.run.folder), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"picture/student_0", "picture/student_1"}
    assert [one.step for one in events.Images("picture/student_1")] == [4, 8]
    wanted = {"gradient_norm/low_level/1", "pseudo_label/mean_iou/0", "agreement/teachers", "memory_gib", "data_wait"}
    wanted |= {"bank_age_of_class/0/class 0", "anchors_of_class/high_level/1/class 2", "val_iou/teacher_1/class 0"}
    assert wanted <= set(events.Tags()["scalars"])
    files = sorted(path.name for path in (trainer.run.folder / "images").iterdir())
    assert files == [f"step_00000{step}_student_{own}.png" for step in (4, 8) for own in (0, 1)]


@pytest.mark.parametrize("own", [0, 1])
def test_a_preview_changes_nothing_and_shows_the_mix(tiny_config, batches, own: int):
    method = build(tiny_config())
    before = {name: value.clone() for name, value in method.state_dict().items()}
    unlabeled = batches(3)[1]
    shown = method.preview(unlabeled, own=own, step=4)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert shown["mix mask"].dtype == torch.bool
    assert shown["confidence"].dtype == torch.float32
    targets = [method.predict_target(one, 1 - one, unlabeled.images) for one in (0, 1)]
    view = method.strong_view(own, unlabeled, targets, step=4)
    own_pixels = view.source // (40 * 48) == torch.arange(3).view(3, 1, 1)
    assert torch.equal(shown["mix mask"], own_pixels)
    assert np.isin(np.unique(shown["what to learn"].numpy()), [0, 1, 2, 255]).all()
