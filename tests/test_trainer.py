"""The loop: resume gives the same bits, results are complete, and it stops when something is wrong."""

import json
import os
import platform
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from data import DatasetFiles, evaluation_loader, preview_batch, training_loader
from model import CrossTeacher, build_network, build_networks
from tests.conftest import tiny_values
from utils.checkpoint import load_checkpoint
from utils.config import Config, check_config
from utils.errors import CheckpointError, NonFiniteError, UserError
from utils.evaluate import evaluate
from utils.inference import Inference
from utils.logger import COSTS, RunLogger
from utils.run import STOP_SIGNALS, Run, newest_folder, origin_of, processor_name, start_run
from utils.trainer import Trainer, build_optimizer
from utils.visualize import save_pictures

CPU = torch.device("cpu")


@pytest.fixture
def config(demo: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(**changes: Any) -> Config:
        dataset = {
            "root": str(demo),
            "labeled": "splits/labeled.txt",
            "unlabeled": "splits/unlabeled.txt",
            "num_classes": 7,
        }
        options = {
            "training__contrastive__contrast_start": 3,
            "utils": {
                "checkpoint_dir": str(tmp_path / "runs"),
                "log_per_iter": 1,
                "val_per_iter": 4,
                "tensorboard": False,
            },
        }
        return check_config(tiny_values(dataset=dataset, **(options | changes)), source="test")

    return make


def build(config: Config, *, name: str = "test", resume: str | None = None) -> Trainer:
    """What the scripts wire."""
    files = DatasetFiles(config)
    students = build_networks(config)
    run = start_run(config, name=name, resume=resume, device="cpu")
    shares = files.class_shares() if config.training.needs_class_shares else None
    method = CrossTeacher(students, config, labeled_samples=len(files.ids("labeled")), class_shares=shares)

    def picture(path: Path, step: int) -> list[Path]:
        batch = preview_batch(files).to(CPU)
        previews = [method.preview(batch, own=own, step=step) for own in (0, 1)]
        return save_pictures(path, previews, truth=batch.labels, title="test", config=config)

    return Trainer(
        method,
        build_optimizer(students, config),
        lambda stream, start: training_loader(files, stream, start_step=start),
        run,
        config=config,
        evaluate=lambda step, through: evaluate(
            method.models(),
            through(evaluation_loader(files, "val", protocol="original")),
            class_names=files.block.class_names,
            device=CPU,
            inference=Inference(),
            about=files.about("val") | {"step": step},
        ),
        picture=picture,
        facts=files.about_labeled() | files.about_unlabeled(),
    )


def stop_after(trainer: Trainer, step: int) -> None:
    """Train until ``step`` is done, as if a signal had come during it."""
    train_one = trainer._train_one

    def train_and_stop(*args: Any) -> None:
        train_one(*args)
        if trainer.step == step:
            signal.raise_signal(signal.SIGTERM)

    trainer._train_one = train_and_stop  # type: ignore[method-assign]
    assert trainer.fit() is None
    assert trainer.run.stop_signal == signal.SIGTERM


def fill_banks(trainer: Trainer, *, but_class: int) -> Trainer:
    """Full for all classes but one that is not seen so far: contrast may start, and that class is seen later."""
    generator = torch.Generator().manual_seed(0)
    for bank in trainer.method.banks:
        bank.entries.copy_(torch.randn(bank.entries.shape, generator=generator))
        for buffer, value in ((bank.counts, bank.entries.shape[1]), (bank.seen, True)):
            buffer.fill_(value)
            buffer[but_class] = 0
    return trainer


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    memory = trainer.optimizer.state_dict()["state"]
    return trainer.method.state_dict() | {f"{kind} {k}": v[kind] for k, v in memory.items() for kind in v}


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    """The lines of its log, without what a clock measured."""
    lines = (trainer.run.folder / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in COSTS} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("start", [3, None])  # None: after one pass over the six labeled images, the banks being full
@pytest.mark.parametrize(("network", "optimizer"), [("DeepLab", "SGD"), ("DeepLabv3+", "AdamW")])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(config, network: str, optimizer: str, start: int | None):
    contrast = {"training__contrastive__contrast_start": start, "training__contrastive__memory_size": 2}
    adjust = optimizer == "AdamW"
    given = config(model=network, training__optimizer=optimizer, training__unlabeled__adjust_logits=adjust, **contrast)
    with_loaders = given.model_copy(update={"training": given.training.model_copy(update={"num_workers": 2})})
    whole = fill_banks(build(given, name="whole"), but_class=6)
    evaluation = whole.fit()
    assert evaluation is not None
    log = logged(whole)
    assert [line["step"] for line in log if "high_level/0" in line] == [4, 5, 6, 7, 8], "contrast started in between"
    for stop in (2, 4, 6):
        name = f"stopped_{stop}"
        first = fill_banks(build(given, name=name), but_class=6)
        stop_after(first, stop)
        # Other loading processes, the same bits.
        second = build(with_loaders if stop == 4 else given, name=name, resume="auto")
        assert second.step == stop
        assert second.run.folder == first.run.folder
        again = second.fit()
        one, other = state_of(whole), state_of(second)
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == [], stop
        assert again is not None
        assert evaluation.as_dict() == again.as_dict()
        assert whole.best == second.best
        assert logged(second) == log


def test_a_finished_run_holds_everything_it_promises(config):
    trainer = build(config(utils__tensorboard=True))
    trainer.fit()
    names = {path.name for path in trainer.run.folder.iterdir()}
    assert {
        "config.json",
        "log.jsonl",
        "checkpoint.pth",
        "best_model.pth",
        "result.json",
        "result.txt",
        "picture_student_0.png",
        "picture_student_1.png",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    result = json.loads((trainer.run.folder / "result.json").read_text())
    assert set(result["models"]) == {"student_0", "student_1", "teacher_0", "teacher_1", "ensemble"}
    assert {"split hash", "step", "best"} <= set(result)
    steps = [json.loads(line)["step"] for line in (trainer.run.folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]  # validations at 4 and 8
    check_config(json.loads((trainer.run.folder / "config.json").read_text()), source="config.json")


def test_tensorboard_holds_a_curve_for_each_term_and_peer_without_steps_done_twice(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = build(config(utils__tensorboard=True))
    stop_after(first, 5)
    build(config(utils__tensorboard=True), resume="auto").fit()
    events = EventAccumulator(str(first.run.folder)).Reload()
    tags = set(events.Tags()["scalars"])
    terms = ("supervised", "cross_teacher", "high_level", "low_level", "bank_fill")
    assert {f"{term}/{own}" for term in terms for own in (0, 1)} <= tags
    assert {"val/ensemble", "val/teacher_1", "learning_rate/head"} <= tags
    assert [event.step for event in events.Scalars("supervised/0")] == list(range(1, 9))


def test_another_configuration_is_refused_with_the_keys_that_differ_and_a_free_one_is_not(config):
    stop_after(build(config()), 2)
    with pytest.raises(CheckpointError) as error:
        build(config(training__learning_rate=0.5, model="DeepLabv3+"), resume="auto")
    assert "training.learning_rate: 0.01 there, 0.5 here" in str(error.value)
    assert "model: DeepLab there, DeepLabv3+ here" in str(error.value)
    assert build(config(training__num_workers=1), resume="auto").step == 2
    parts = config(training__accumulation=2, training__unlabeled={"mix_mask": None})
    with pytest.raises(CheckpointError) as error:
        build(parts, resume="auto")
    assert "mix_mask" in str(error.value)
    assert "accumulation" not in str(error.value), "the parts of a step may change, as the number of processes"


def test_auto_takes_the_newest_of_this_name_only_and_starts_fresh_without_one(config, tmp_path: Path):
    assert newest_folder(config(), "test") is None
    folders = [tmp_path / "runs" / f"01-01_00-00-{name}" for name in ("test", "test~2", "test-2", "other")]
    for second, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "checkpoint.pth").touch()
        os.utime(folder / "checkpoint.pth", (second, second))
    assert newest_folder(config(), "test") == folders[1]


def test_a_name_used_twice_in_a_minute_gets_a_folder_of_its_own(config):
    folders = {start_run(config(), name="x", resume=None, device="cpu").folder for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../b", "", ".hidden", "a b"])
def test_a_name_that_is_no_file_name_is_refused(config, name: str):
    with pytest.raises(UserError, match="--name"):
        start_run(config(), name=name, resume=None, device="cpu")


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_term_peer_step_and_images(config, monkeypatch):
    trainer = build(config())
    before = {
        name: value.clone()
        for name, value in trainer.method.students.state_dict().items()
        if value.is_floating_point() and "running" not in name
    }
    step = trainer.method.training_step

    def broken(*args: Any, **kwargs: Any) -> dict:
        losses = step(*args, **kwargs)
        return losses | {("supervised", 1): losses["supervised", 1] * float("nan")}

    monkeypatch.setattr(trainer.method, "training_step", broken)
    with pytest.raises(
        NonFiniteError, match=r"supervised of student 1 is nan \(images labeled_.*at step 0; weights not updated"
    ):
        trainer.fit()
    after = trainer.method.students.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_gradient_that_is_not_finite_stops_before_the_update(config):
    trainer = build(config())
    weight = trainer.method.students[0].head.classifier.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * float("inf"))
    message = r"a gradient is not finite, though every loss is \(images labeled_.*at step 0"
    with pytest.raises(NonFiniteError, match=message):
        trainer.fit()
    assert torch.equal(weight, before)


def test_a_damaged_image_ends_the_run_with_what_was_learned_saved(config, demo: Path, tmp_path: Path):
    given = config(data_root=str(shutil.copytree(demo, tmp_path / "copy")))
    trainer = build(given)
    ids = [name for batch in training_loader(DatasetFiles(given), "unlabeled", start_step=0) for name in batch.ids]
    late = next(name for name in ids[4:] if name not in ids[:4])  # first read at step 2 or later
    path = tmp_path / f"copy/JPEGImages/{late}.jpg"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=rf"{late}\.jpg"):
        trainer.fit()
    assert load_checkpoint(trainer.run.folder / "checkpoint.pth")["step"] == trainer.step >= 2


@pytest.mark.parametrize("split", ["labeled", "unlabeled"])
def test_other_images_are_refused_on_resume(config, demo: Path, tmp_path: Path, split: str):
    root = shutil.copytree(demo, tmp_path / "copy")
    stop_after(first := build(config(data_root=str(root))), 2)
    listed = root / "splits" / f"{split}.txt"
    ids = listed.read_text().split()
    listed.write_text("\n".join(reversed(ids)))
    again = build(config(data_root=str(root)), resume="auto")
    assert again.step == 2, "the same images"
    now, before = ([batch.ids for batch in trainer.loader(split, 2)] for trainer in (again, first))
    assert now == before, "and in the same order"
    moved = shutil.copy(listed, tmp_path / "moved.txt")
    elsewhere = config(data_root=str(root), **{f"dataset__{split}": str(moved)})
    assert build(elsewhere, resume="auto").step == 2, "the same list in another place"
    listed.write_text("\n".join(ids[1:]))
    with pytest.raises(CheckpointError, match=f"trained with other images .*{split} hash"):
        build(config(data_root=str(root)), resume="auto")


def test_a_result_names_every_version_of_the_code_that_trained_it(config, monkeypatch: pytest.MonkeyPatch):
    def begin(commit: str, before: dict[str, str] | None = None) -> dict[str, str]:
        monkeypatch.setattr("utils.run.code_version", lambda: commit)
        return origin_of(CPU, before)

    one = begin("aaa")
    assert one["commit"] == begin("aaa", one)["commit"] == "aaa"
    two = begin("bbb", one)
    assert two["commit"] == begin("bbb", two)["commit"] == "aaa, then bbb"
    begin("aaa")
    stop_after(build(config()), 2)
    begin("bbb")
    with pytest.warns(UserWarning, match="resumed with other code: results will name aaa, then bbb"):
        second = build(config(), resume="auto")
    assert second.run.origin == two


def test_a_cpu_is_named_with_what_tells_it_from_others_of_its_name(tmp_path: Path):
    cpuinfo, cpu = tmp_path / "cpuinfo", torch.device("cpu")
    one = "processor\t: {}\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
    cpuinfo.write_text(one.format(0, 17) + "\n" + one.format(1, 1))
    assert processor_name(cpu, cpuinfo) == "AMD EPYC CPU (family 25 model 17)"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert processor_name(cpu, cpuinfo) == processor_name(cpu, tmp_path / "nowhere") == f"{platform.machine()} CPU"


def test_what_a_resume_does_is_said(config, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="utils.run")
    first = build(config(), resume="auto")
    assert re.fullmatch("no checkpoint of the name test in .*runs: a new run", caplog.messages[-1])
    stop_after(first, 2)
    build(config(), resume="auto")
    assert caplog.messages[-1] == f"continues {first.run.folder}/checkpoint.pth, step 2"


def test_a_picture_that_cannot_be_written_costs_nothing_of_what_was_learned(config):
    trainer = build(config(utils__save_checkpoint_every=1000, utils__tensorboard=True))
    trainer.picture = Mock(side_effect=OSError(2, "No such file or directory", "/gone/step_000004_student_0.png"))
    with pytest.raises(OSError, match="No such file"):
        trainer.fit()
    saved = load_checkpoint(trainer.run.folder / "checkpoint.pth")
    assert (saved["step"], saved["must_validate"]) == (trainer.step, False)
    assert trainer.step < 8


def test_a_log_that_cannot_be_shortened_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))
    (tmp_path / "log.jsonl").write_text(lines + '{"st')
    how = {"total_steps": 4, "tensorboard": False}
    with monkeypatch.context() as full:
        full.setattr(Path, "replace", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            RunLogger(tmp_path, first_step=2, **how)
    assert (tmp_path / "log.jsonl").read_text() == lines + '{"st'
    RunLogger(tmp_path, first_step=2, **how).close()
    assert (tmp_path / "log.jsonl").read_text() == "".join(lines.splitlines(keepends=True)[:2])


def test_what_will_be_validated_again_is_not_logged_twice(tmp_path: Path):
    lines = ['{"step": 4, "supervised/0": 1.0}\n', '{"step": 4, "val/ensemble": 0.5}\n']
    for again, kept in ((False, lines), (True, lines[:1])):
        (tmp_path / "log.jsonl").write_text("".join(lines))
        RunLogger(tmp_path, first_step=4, total_steps=8, tensorboard=False, must_validate=again).close()
        assert (tmp_path / "log.jsonl").read_text() == "".join(kept)


def test_a_validation_that_was_logged_just_before_a_kill_is_one_point_of_a_curve_and_so_is_its_step(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    how = {"total_steps": 8, "tensorboard": True}
    killed = RunLogger(tmp_path, first_step=0, **how)
    killed.scalars(3, {"supervised/0": 2.0})
    killed.scalars(4, {"supervised/0": 1.0})
    killed.scalars(4, {"val/ensemble": 0.5})
    killed.close()
    again = RunLogger(tmp_path, first_step=4, must_validate=True, **how)
    again.scalars(4, {"val/ensemble": 0.5})
    again.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert curves == {"supervised/0": [(3, 2.0), (4, 1.0)], "val/ensemble": [(4, 0.5)]}


def test_resuming_a_finished_run_evaluates_and_logs_nothing_twice(config):
    first = build(config())
    first.fit()
    log = (first.run.folder / "log.jsonl").read_text()
    assert build(config(), resume="auto").fit() is not None
    assert (first.run.folder / "log.jsonl").read_text() == log


def test_each_parameter_is_in_one_group_with_its_rate_and_decay(config):
    settings = {"learning_rate": 0.1, "head_lr_multiplier": 10.0, "backbone_lr_multiplier": 3.0}
    for free in (False, True):
        values = {f"training__{key}": value for key, value in settings.items()}
        given = config(training__decay_norm_and_bias=not free, **values)
        networks = build_networks(given)
        optimizer = build_optimizer(networks, given)
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(listed) == len({id(p) for p in listed}) == sum(len(list(n.parameters())) for n in networks)
        for group in optimizer.param_groups:
            assert group["base_lr"] == pytest.approx(0.3 if "backbone" in group["name"] else 1.0)
            decays = {p.ndim > 1 or not free for p in group["params"]}
            assert decays == {group["weight_decay"] > 0}


def test_adamw_s_first_update_is_the_rate_in_the_gradient_s_direction_and_decay_beside_it(config):
    settings = {"optimizer": "AdamW", "learning_rate": 0.01, "head_lr_multiplier": 2.0, "weight_decay": 0.5}
    given = config(**{f"training__{key}": value for key, value in settings.items()}, training__momentum=0.8)
    networks = build_networks(given)
    optimizer = build_optimizer(networks, given)
    before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.999)
        for p in group["params"]:
            p.grad = torch.full_like(p, -3.0)
    optimizer.step()
    for group, was in zip(optimizer.param_groups, before, strict=True):
        rate = 0.02 if "head" in group["name"] else 0.01
        for p, old in zip(group["params"], was, strict=True):
            torch.testing.assert_close(p.detach(), old - rate * 0.5 * old + rate)


def test_the_learning_rate_falls_by_the_schedule_or_not_at_all(config):
    trainer = build(config())
    trainer._set_learning_rate(4)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**0.9)
    trainer = build(config(training__lr_schedule=None))
    trainer._set_learning_rate(4)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


def test_evaluation_leaves_training_mode_and_weights_alone_and_its_ensemble_is_the_students_mean(config):
    given = config()
    files = DatasetFiles(given)
    method = CrossTeacher(
        [build_network("DeepLab", 7, "resnet18", width=8, feature_channels=32) for _ in (0, 1)],
        given,
        labeled_samples=6,
    )
    method.train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    seen: dict[str, torch.Tensor] = {}
    evaluation = evaluate(
        method.models(),
        evaluation_loader(files, "val", protocol="original"),
        class_names=files.block.class_names,
        device=CPU,
        inference=Inference(),
        about={},
        on_prediction=seen.__setitem__,
    )
    assert all(module.training for module in method.students.modules())
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert evaluation.about["images"] == 3
    (items,) = evaluation_loader(files, "val", protocol="original")
    method.eval()
    with torch.no_grad():
        image = items[0].image[None].float() / 255
        logits = [student(student.normalization(image)).logits for student in method.students]
        large = [
            torch.nn.functional.interpolate(one, size=(48, 48), mode="bilinear", align_corners=True) for one in logits
        ]
        expected = sum(one.softmax(dim=1) for one in large).argmax(dim=1)[0]
    assert (seen[items[0].id] == expected).float().mean() > 0.999  # ties may fall either way


def test_run_keeps_its_signal_handlers_to_itself(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path, CPU)
    with run.stoppable():
        signal.raise_signal(signal.SIGTERM)
        assert run.stop_signal == signal.SIGTERM
        assert all(signal.getsignal(n) == signal.SIG_DFL for n in STOP_SIGNALS), (
            "any second one ends the process at once"
        )
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_was_started_with_nohup_stays_when_its_terminal_goes(tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = Run(tmp_path, CPU)
        with run.stoppable():
            signal.raise_signal(signal.SIGHUP)
            assert run.stop_signal is None
            signal.raise_signal(signal.SIGTERM)
            assert (run.stop_signal, signal.getsignal(signal.SIGHUP)) == (signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
