"""What must not break: kills, full disks, rubbish in files, dead processes, and configurations nobody thought of."""

import math
import pickle
import random
import re
import runpy
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DatasetFiles, training_loader
from tests import faults
from tests.faults import SAVE_EVERY, Fault, Training, differences, ended, learned, results_differ, write_config
from tests.test_trainer import build, stop_after
from utils.batch import Batch
from utils.checkpoint import BEST, load_checkpoint, older_checkpoints
from utils.config import Config, load_config
from utils.errors import CheckpointError, NonFiniteError, OutOfMemory, StorageError, UserError, run_script
from utils.run import STOP_SIGNALS
from utils.trainer import Trainer


@pytest.fixture
def config(demo: Path, tmp_path: Path) -> Callable[..., Config]:
    return lambda **changes: load_config(write_config(tmp_path, demo, **changes))


@pytest.fixture(scope="module")
def undisturbed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    training = Training(folder, "--config", write_config(folder, demo), "--name", "whole")
    assert training.wait() == 0, training.errors
    return faults.run_folder(folder)


def spoil(path: Path) -> None:
    """One bit in the midst of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------ older checkpoints


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_checkpoints_that_nobody_asked_to_keep_do_not_fill_the_disk(config, keep: int):
    trainer = build(config(utils__keep_checkpoints=keep))
    trainer.fit()
    last = trainer.run.folder / "checkpoint.pth"
    steps = [load_checkpoint(path)["step"] for path in (last, *older_checkpoints(last))]
    assert steps == [8, 6, 4][:keep]
    assert len(list(trainer.run.folder.glob("checkpoint*"))) == keep


def test_a_damaged_newest_checkpoint_costs_one_interval_and_one_warning_not_the_run(config, undisturbed: Path):
    first = build(config())
    stop_after(first, 6)
    last = first.run.folder / "checkpoint.pth"
    spoil(last)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        second = build(config(), resume="auto")
    messages = [str(one.message) for one in seen if issubclass(one.category, UserWarning)]
    assert len(messages) == 1
    assert re.search(r"checkpoint\.pth: .*Continuing from .*checkpoint_0000004\.pth of step 4", messages[0])
    assert (second.step, second.run.folder) == (4, first.run.folder)
    second.fit()
    assert results_differ(second.run.folder, undisturbed) == []
    assert [load_checkpoint(path)["step"] for path in older_checkpoints(last)] == [6], "the damaged one is not kept"


def test_a_checkpoint_named_by_path_is_never_replaced_by_another_one_in_silence(config):
    trainer = build(config(utils__keep_checkpoints=3))
    trainer.fit()
    last = trainer.run.folder / "checkpoint.pth"
    spoil(last)
    for named in (last, trainer.run.folder):
        with pytest.raises(CheckpointError, match=r"checkpoint\.pth: record .* is damaged; use another"):
            build(config(utils__keep_checkpoints=3), resume=str(named))
    for older in (*older_checkpoints(last), last.with_name(BEST)):
        spoil(older)
    with pytest.raises(CheckpointError) as error:
        build(config(utils__keep_checkpoints=3), resume="auto")
    for name in ("checkpoint.pth", "checkpoint_0000006.pth", "checkpoint_0000004.pth", "start anew"):
        assert name in str(error.value), "each damaged file is named"


@pytest.mark.parametrize("how", ["auto", "folder"])
@pytest.mark.parametrize("is_alone", [True, False])
def test_a_run_goes_on_from_its_best_model_where_nothing_later_is_there(
    config, undisturbed: Path, how: str, is_alone: bool
):
    first = build(config(utils__keep_checkpoints=3))
    stop_after(first, 6)
    folder = first.run.folder
    step = load_checkpoint(folder / BEST)["step"]
    earlier = folder / "checkpoint_0000002.pth"
    for path in folder.glob("checkpoint*.pth"):
        if is_alone or path != earlier:
            path.unlink()
    if not is_alone:
        earlier.rename(folder / "checkpoint.pth")  # as if killed before the next one was written
        assert step > 2
    second = build(config(utils__keep_checkpoints=3), resume="auto" if how == "auto" else str(folder))
    assert (second.step, second.run.folder) == (step, folder)
    second.fit()
    assert results_differ(second.run.folder, undisturbed) == []


def test_going_back_to_an_earlier_step_never_overwrites_what_was_learned_after_it(config, tmp_path: Path):
    given = config(utils__keep_checkpoints=3)
    first = build(given)
    first.fit()
    folder = first.run.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    earlier = older_checkpoints(folder / "checkpoint.pth")[1]
    with pytest.raises(CheckpointError, match=r"checkpoint_0000004\.pth: step 4, but checkpoint\.pth .* has step 8"):
        build(given, resume=str(earlier))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    own = tmp_path / "back to 4"
    own.mkdir()
    copy = Path(shutil.copy(earlier, own))
    second = build(given, resume=str(copy))
    assert (second.step, second.run.folder) == (4, own)
    assert load_config(own / "config.json").training == given.training, "the copy is a run like others"
    assert second.run.resume == f"'{own}'", "which auto would not find"
    second.fit()
    assert differences(learned(own / "checkpoint.pth"), learned(folder / "checkpoint.pth")) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory_costs_nothing_of_what_was_learned(config, error: Exception):
    given = config(utils__save_checkpoint_every=1000)
    trainer = build(given)
    total_loss = trainer.method.total_loss

    def fail_at_5(*args: Any, step: int) -> torch.Tensor:
        if step == 5:
            raise error
        return total_loss(*args, step=step)

    trainer.method.total_loss = fail_at_5
    with pytest.raises(OutOfMemory, match=r"out of memory: .*training\.accumulation"):
        trainer.fit()
    assert load_checkpoint(trainer.run.folder / "checkpoint.pth")["step"] == 5
    again = build(given, resume="auto")
    again.fit()
    expected = build(given, name="expected")
    expected.fit()
    paths = [one.run.folder / "checkpoint.pth" for one in (again, expected)]
    assert differences(*map(learned, paths)) == [], "the step that failed left no trace"


def test_memory_that_does_not_suffice_ends_in_one_message(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as status:
        run_script(lambda: int(torch.empty(2**50).sum()))
    assert status.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"error: out of memory: .*can't allocate memory.*training\.precision", line)


def test_a_checkpoint_never_names_a_best_model_for_which_there_was_no_room(config):
    trainer = build(config())
    save = trainer.save

    def save_if_there_is_room(path: Path, **options: Any) -> None:
        if path.name == BEST:
            raise StorageError(f"{path}: no room")
        save(path, **options)

    trainer.save = save_if_there_is_room
    with pytest.raises(StorageError, match="no room"):
        trainer.fit()
    saved = load_checkpoint(trainer.run.folder / "checkpoint.pth")
    assert (saved["step"], saved["best"]["step"], saved["must_validate"]) == (4, -1, True)
    again = build(config(), resume="auto")
    again.fit()
    assert load_checkpoint(again.run.folder / BEST)["best"] == again.best


def test_an_update_without_memory_is_not_saved(config):
    trainer = build(config(utils__save_checkpoint_every=1000))
    after_step = trainer.method.after_step
    trainer.method.after_step = Mock(
        side_effect=[None, None, None, RuntimeError("DefaultCPUAllocator: can't allocate memory")], wraps=after_step
    )
    with pytest.raises(OutOfMemory, match="can't allocate memory"):
        trainer.fit()
    assert not (trainer.run.folder / "checkpoint.pth").exists(), "students moved on, teachers did not"


def test_files_of_others_beside_a_checkpoint_are_left_alone(config):
    trainer = build(config())
    stop_after(trainer, 2)
    (theirs := trainer.run.folder / "thesis.tmp").touch()
    (folder := trainer.run.folder / "folder.tmp").mkdir()
    (ours := trainer.run.folder / "checkpoint.pth.tmp").touch()
    assert build(config(), resume=str(trainer.run.folder)).step == 2
    assert (theirs.exists(), folder.exists(), ours.exists()) == (True, True, False)


# ------------------------------------------------------------------------------------------------ spoiled files


def test_a_spoiled_checkpoint_is_refused_whatever_was_spoiled(tmp_path: Path):
    refused, same, wrong = faults.fuzz(tmp_path, 1000, seed=0)
    assert wrong == []
    assert (refused, same) == (1000, 0)


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.slow
@pytest.mark.parametrize(("place", "nth"), [("half written", 1), *((place, 3) for place in faults.WRITING)])
def test_a_kill_while_a_checkpoint_is_written_costs_no_more_than_one_interval(
    demo: Path, tmp_path: Path, undisturbed: Path, place: str, nth: int
):
    fault = Fault(place, nth, faults.kill)
    survived = faults.kill_and_resume(tmp_path, write_config(tmp_path, demo), [fault])
    assert survived.kills == 1
    assert results_differ(survived.folder, undisturbed) == []
    assert survived.lost <= SAVE_EVERY


# ------------------------------------------------------------------------------------------------ full disk


@pytest.mark.slow
def test_a_full_disk_does_not_take_the_older_checkpoint_with_it(demo: Path, tmp_path: Path, undisturbed: Path):
    arguments = ("--config", write_config(tmp_path, demo), "--name", "full")
    with ended(Training(tmp_path, *arguments, faults=(Fault("step", 5, faults.limit_files, (50_000,)),))) as training:
        assert training.wait() == 3, training.errors
    folder = faults.run_folder(tmp_path)
    last = folder / "checkpoint.pth"
    message = rf"error: {re.escape(str(last))}: cannot write .* it needs [\d.]+ MiB, [\d,.]+ MiB are free"
    assert re.search(message, training.errors)
    assert training.errors.count("error: ") == 1
    assert "Traceback" not in training.errors
    assert load_checkpoint(last)["step"] == 4
    assert list(folder.glob("*.tmp")) == []
    with ended(Training(tmp_path, *arguments, "--resume", "auto")) as again:
        assert again.wait() == 0, again.errors
    assert results_differ(folder, undisturbed) == []


@pytest.mark.slow
def test_a_full_disk_that_stops_the_log_is_said_too(demo: Path, tmp_path: Path):
    config = write_config(tmp_path, demo, training__num_workers=1)
    fault = Fault("step", 5, faults.limit_files, (1_200,))  # the log has more than this by then
    with ended(Training(tmp_path, "--config", config, "--name", "full", faults=(fault,))) as training:
        assert training.wait() == 3, training.errors
        assert training.left_over() == []
    assert "error: " in training.errors
    assert "check this path and the disk" in training.errors
    assert "Traceback" not in training.errors
    assert load_checkpoint(faults.run_folder(tmp_path) / "checkpoint.pth")["step"] == 4


# ------------------------------------------------------------------------------------------------ not finite


@pytest.mark.slow
def test_a_learning_rate_that_explodes_ends_in_status_4_with_the_term_step_and_images(demo: Path, tmp_path: Path):
    config = write_config(tmp_path, demo, training__learning_rate=1e20)
    with ended(Training(tmp_path, "--config", config, "--name", "steep")) as training:
        assert training.wait() == 4, training.errors
    assert training.errors.count("error: ") == 1
    assert "Traceback" not in training.errors
    term = r"error: supervised of student 0 is (nan|inf)"
    assert re.search(rf"{term}.* \(images labeled_\d+, .*unlabeled_\d+\) at step 1; weights", training.errors)
    assert "before_failure.pth" in training.errors
    assert load_checkpoint(faults.run_folder(tmp_path) / "before_failure.pth")["step"] == 1


@pytest.mark.parametrize("late", [False, True])  # as on a GPU, where the host asks for verdicts now and then only
def test_the_state_before_a_failure_is_exactly_that_of_a_run_stopped_there(config, late: bool):
    def explode_in_step_4(name: str) -> Trainer:
        trainer = build(config(utils__log_per_iter=100 if late else 1), name=name)
        trainer.reads_every_step = not late
        set_rate = trainer._set_learning_rate

        def set_or_explode(step: int) -> None:
            set_rate(step)
            for group in trainer.optimizer.param_groups if step == 4 else []:
                group["lr"] = 1e20

        trainer._set_learning_rate = set_or_explode  # type: ignore[method-assign]
        return trainer

    stopped, failed = explode_in_step_4("stopped"), explode_in_step_4("failed")
    stop_after(stopped, 5)
    with pytest.raises(NonFiniteError, match="at step 5; weights not updated"):
        failed.fit()
    assert failed.step == 5
    folder = failed.run.folder
    before, expected = learned(folder / "before_failure.pth"), learned(stopped.run.folder / "checkpoint.pth")
    for state in (before, expected):
        del state["optimizer"]["param_groups"]  # the rate there is set anew in every step
    assert any("running_mean" in name for name in before["method"])
    assert differences(before, expected) == []
    assert load_checkpoint(folder / "checkpoint.pth")["step"] == 4, "the checkpoint to resume from is left alone"
    assert [load_checkpoint(path)["step"] for path in older_checkpoints(folder / "checkpoint.pth")] == [2]


# ------------------------------------------------------------------------------------------------ bad configurations

NAMES = {"root": "data", "labeled": "splits/labeled.txt", "unlabeled": "splits/unlabeled.txt", "num_classes": 7}


def with_dataset(**changes: Any) -> dict[str, Any]:
    return {"dataset": NAMES | changes}


def with_text(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


# changes of keys, or of the file's text; and arguments behind it
BAD_CONFIGS: dict[str, tuple[Any, list[str]]] = {
    "unknown key at the top": ({"sead": 1}, []),
    "unknown key three blocks down": ({"training__unlabeled__emadecay": 0.9}, []),
    "key of another block": ({"batch_size": 2}, []),
    "a block that is a number": ({"training": 3}, []),
    "a block that is a list": ({"utils": []}, []),
    "a block that is null": ({"training__data": None}, []),
    "a float for a count": ({"training__num_iterations": 8.5}, []),
    "text for truth": ({"training__data__flip": "no"}, []),
    "a list for a number": ({"training__learning_rate": [0.1]}, []),
    "a rate of zero": ({"training__learning_rate": 0.0}, []),
    "a probability of two": ({"training__unlabeled__ema_decay": 2.0}, []),
    "a temperature of zero": ({"training__contrastive__low_temperature": 0}, []),
    "a range of three numbers": ({"training__data__scale_range": [0.5, 1.0, 1.5]}, []),
    "a size in words": ({"training__data__input_size": "large"}, []),
    "a size of one side": ({"training__data__input_size": "40,"}, []),
    "a size below what the networks take": ({"training__data__input_size": "16,16"}, []),
    "a size as a list": ({"training__data__input_size": [40, 48]}, []),
    "a negative number of workers": ({"training__num_workers": -1}, []),
    "unknown backbone": ({"backbone": "resnet19"}, []),
    "unknown network": ({"model": "UNet"}, []),
    "channels that no head can split": ({"feature_channels": 40}, []),
    "contrast before the unlabeled terms": (
        {"training__unlabeled__start_iteration": 4, "training__contrastive__contrast_start": 1},
        [],
    ),
    "a protocol that the dataset has no size for": ({"utils__val_protocol": "release"}, []),
    "an ignored class": ({"ignore_label": 6}, []),
    "a seed below zero": ({"seed": -5}, []),
    "no dataset": ({"dataset": None}, []),
    "a dataset that nobody knows": ({"dataset": "pascal"}, []),
    "a dataset without classes": (with_dataset(num_classes=None), []),
    "a dataset of no classes": (with_dataset(num_classes=0), []),
    "more names than classes": (with_dataset(names=["a"] * 9), []),
    "a palette of two colors for seven classes": (with_dataset(palette=[[0, 0, 0], [1, 1, 1]]), []),
    "a color of two numbers": (with_dataset(num_classes=1, palette=[[0, 0]]), []),
    "images without an id": (with_dataset(images="JPEGImages/a.jpg"), []),
    "labels that leave the folder": (with_dataset(labels="../{id}.png"), []),
    "a root that is not there": (with_dataset(root="nowhere"), []),
    "a root that is a file": (with_dataset(root="config.json"), []),
    "a root with a null byte": (with_dataset(root="da\0ta"), []),
    "a list with a null byte": (with_dataset(labeled="a\0b"), []),
    "a pattern that leaves the folder": (with_dataset(labeled=None, unlabeled=None, train="../../*"), []),
    "a pattern from the root of the disk": (
        with_dataset(labeled=None, unlabeled=None, train="/etc/*", images="{id}.jpg", labels="{id}.png"),
        [],
    ),
    "a pattern that is none": (with_dataset(labeled=None, unlabeled=None, train="**a*"), []),
    "NaN in the file": (with_text('"learning_rate": 0.01', '"learning_rate": NaN'), []),
    "infinity in the file": (with_text('"learning_rate": 0.01', '"learning_rate": 1e999'), []),
    "a key twice": (with_text('"seed": 1', '"seed": 1, "seed": 2'), []),
    "a key twice in a block": (with_text('"batch_size": 2', '"batch_size": 2, "batch_size": 3'), []),
    "a number of 5000 digits": (with_text('"seed": 1', '"seed": 1' + "0" * 5000), []),
    "cut off": (lambda text: text[: len(text) // 2], []),
    "a comma too many": (lambda text: text[:-1] + ",}", []),
    "empty": (lambda text: "", []),
    "a list": (lambda text: f"[{text}]", []),
    "text": (lambda text: '"configs/configVOC.json"', []),
    "YAML": (lambda text: "seed: 1\ntraining:\n  batch_size: 2\n", []),
    "brackets without end": (lambda text: "[" * 100_000, []),
    "blocks nested 300 deep": (with_text('"seed": 1', '"seed": ' + '{"a": ' * 300 + "1" + "}" * 300), []),
    "blocks nested 900 deep": (with_text('"seed": 1', '"seed": ' + '{"a": ' * 900 + "1" + "}" * 900), []),
    "half a character": (with_text('"pretrained": "none"', '"pretrained": "\\ud800"'), []),
    "a file that is not there": ({}, ["--config", "other.json"]),
    "a folder for a file": ({}, ["--config", "data"]),
    "an image for a file": ({}, ["--config", "data/JPEGImages/val_0000.jpg"]),
    "--set without a value": ({}, ["--set", "seed"]),
    "--set without a key": ({}, ["--set", "=3"]),
    "--set of nothing": ({}, ["--set", ""]),
    "--set of an unknown key": ({}, ["--set", "training.batchsize=3"]),
    "--set below a value": ({}, ["--set", "seed.deep=3"]),
    "--set of a whole block": ({}, ["--set", "training=3"]),
    "--set with a dot too many": ({}, ["--set", "training..batch_size=3"]),
    "--set to NaN": ({}, ["--set", "training.momentum=NaN"]),
    "--set to NaN in a block": ({}, ["--set", 'training={"momentum": NaN}']),
    "--set to infinity": ({}, ["--set", "training.learning_rate=1e999"]),
    "--set to 5000 digits": ({}, ["--set", "seed=1" + "0" * 5000]),
    "--set to brackets without end": ({}, ["--set", "seed=" + "[" * 100_000]),
    "--set of a known dataset's unknown key": ({"dataset": "pascal_voc"}, ["--set", "dataset.rood=x"]),
    "a name that leaves the folder": ({}, ["--name", "../x"]),
    "a name longer than file systems take": ({}, ["--name", "x" * 300]),
    "an option that is none": ({}, ["--sett", "seed=1", "--foo"]),
    "a run folder below a file": ({"utils__checkpoint_dir": "config.json"}, []),
    "a run folder with a null byte": ({"utils__checkpoint_dir": "a\0b"}, []),
    "a checkpoint that is a configuration": ({}, ["--resume", "config.json"]),
    "a checkpoint folder without one": ({}, ["--resume", "data"]),
    "pictures below a file": ({}, ["--save-images", "config.json/pictures"]),
}
BAD_CONFIGS |= {  # a dry run says it too
    f"{case}, dry": (BAD_CONFIGS[case][0], [*BAD_CONFIGS[case][1], "--dry-run"])
    for case in (
        "a run folder below a file",
        "a checkpoint that is a configuration",
        "a checkpoint folder without one",
        "pictures below a file",
    )
}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch, capfd) -> Callable[..., str]:
    """Run the script in ``tmp_path``; its one message, after a check that it was refused and nothing was written."""

    def check(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the script has its own
        monkeypatch.setattr(sys, "argv", ["script", "--config", "config.json", "--name", "bad", *arguments])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(faults.SCRIPT), run_name="__main__")
        message = capfd.readouterr().err
        assert ending.value.code == 2, message
        assert message.count("error: ") == 1, message
        assert "Traceback" not in message
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
        return message

    return check


@pytest.fixture
def data(demo: Path, tmp_path: Path) -> Path:
    """A dataset to spoil."""
    return shutil.copytree(demo, tmp_path / "data")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_configuration_never_ends_in_a_traceback_or_a_half_made_run(
    data: Path, tmp_path: Path, refused: Callable[..., str], case: str
):
    changes, arguments = BAD_CONFIGS[case]
    path = write_config(tmp_path, Path("data"), **(changes if isinstance(changes, dict) else {}))
    if not isinstance(changes, dict):
        before = path.read_text()
        path.write_text(changes(before))
        assert path.read_text() != before
    message = refused(*arguments)
    assert len(message) < 3000, "a message that can be read"


# ------------------------------------------------------------------------------------------------ bad datasets


def first(data: Path, split: str) -> str:
    return (data / f"splits/{split}.txt").read_text().split()[0]


def label_of(data: Path, split: str = "labeled") -> Path:
    name = first(data, split) if split != "val" else "val_0000"
    return data / f"SegmentationClassAug/{name}.png"


def image_of(data: Path, split: str = "labeled") -> Path:
    return data / f"JPEGImages/{first(data, split)}.jpg"


def write_labels(data: Path, array: np.ndarray, *, all_of: str | None = None) -> None:
    paths = sorted((data / "SegmentationClassAug").glob(f"{all_of}_*")) if all_of else [label_of(data)]
    for path in paths:
        Image.fromarray(array).save(path)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def write_split(data: Path, name: str, content: bytes) -> None:
    (data / "splits/custom").mkdir()
    (data / f"splits/custom/{name}").write_bytes(content)


def bomb(path: Path, kind: str) -> None:
    Image.new("1", (20_000, 20_000)).save(path, kind)


class Payload:
    """A pickle that makes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


DRAWN = with_dataset(labeled=None, unlabeled=None, train="ImageSets/Segmentation/train.txt")
SPLIT_3 = DRAWN | {"training__data__split_id_list": 3, "training__data__labeled_samples": 4}
EDITED = "# labeled images, hash 0123456789ab\nlabeled_0000\nlabeled_0001\n"
# what is done to the folder, changes of the configuration, what the message names
BAD_DATA: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no list": (lambda d: (d / "splits/labeled.txt").unlink(), {}, "labeled.txt"),
    "no list of validation images": (lambda d: (d / "ImageSets/Segmentation/val.txt").unlink(), {}, "val.txt"),
    "an empty list": (lambda d: (d / "splits/unlabeled.txt").write_text("\n# none\n\n"), {}, "unlabeled.txt is empty"),
    "an id twice": (lambda d: (d / "splits/labeled.txt").write_text("labeled_0000\n" * 2), {}, "twice"),
    "labeled images that are unlabeled too": (
        lambda d: shutil.copy(d / "splits/labeled.txt", d / "splits/unlabeled.txt"),
        {},
        "in the labeled and the unlabeled list",
    ),
    "an id that leaves the folder": (
        lambda d: (d / "splits/labeled.txt").write_text("../JPEGImages/labeled_0000"),
        {},
        "leaves the dataset's folder",
    ),
    "an id from the root of the disk": (
        lambda d: (d / "splits/unlabeled.txt").write_text("/etc/passwd"),
        {},
        "leaves the dataset's folder",
    ),
    "a list changed since its hash": (lambda d: (d / "splits/labeled.txt").write_text(EDITED), {}, "0123456789ab"),
    "an image for a list": (lambda d: shutil.copy(image_of(d), d / "splits/labeled.txt"), {}, "cannot read"),
    "a folder for a list": (lambda d: None, {"dataset__labeled": "splits"}, "splits: cannot read"),
    "no image": (lambda d: image_of(d).unlink(), {}, "labeled_0000.jpg"),
    "no unlabeled image": (lambda d: image_of(d, "unlabeled").unlink(), {}, "unlabeled_0000.jpg"),
    "no label": (lambda d: label_of(d).unlink(), {}, "labeled_0000.png"),
    "a folder for an image": (lambda d: (image_of(d).unlink(), image_of(d).mkdir()), {}, "labeled_0000.jpg"),
    "a label of another size": (lambda d: write_labels(d, np.zeros((48, 47), np.uint8)), {}, "label map of 47 x 48"),
    "a label in colors": (lambda d: write_labels(d, np.zeros((48, 48, 3), np.uint8)), {}, "mode RGB"),
    "a label of 16 bits": (lambda d: write_labels(d, np.zeros((48, 48), np.uint16)), {}, "mode I;16"),
    "a label as JPEG": (
        lambda d: Image.new("L", (48, 48)).save(label_of(d), "JPEG"),
        {},
        "labeled_0000.png: not a readable PNG",
    ),
    "a label id that is no class": (lambda d: write_labels(d, np.full((48, 48), 7, np.uint8)), {}, "out of range: 7"),
    "a validation label id that is no class": (
        lambda d: Image.fromarray(np.full((48, 48), 99, np.uint8)).save(label_of(d, "val")),
        {},
        "val_0000.png: label ids out of range: 99",
    ),
    "masks of 0 and 255": (
        lambda d: write_labels(d, np.eye(48, dtype=np.uint8) * 255, all_of="labeled"),
        {},
        "Masks of 0 and 255?",
    ),
    "nothing labeled": (
        lambda d: write_labels(d, np.full((48, 48), 255, np.uint8), all_of="labeled"),
        {},
        "nothing but ignore_label",
    ),
    "an empty image file": (lambda d: image_of(d).write_bytes(b""), {}, "labeled_0000.jpg: not a readable"),
    "an empty label file": (lambda d: label_of(d).write_bytes(b""), {}, "labeled_0000.png: not a readable"),
    "half a label file": (lambda d: cut(label_of(d), 0.6), {}, "labeled_0000.png: not a readable"),
    "a label file without its end": (lambda d: cut(label_of(d, "val"), 0.9), {}, "val_0000.png: damaged"),
    "a bomb for a label": (lambda d: bomb(label_of(d), "PNG"), {}, "labeled_0000.png: "),
    "a bomb for an image": (lambda d: bomb(image_of(d), "PNG"), {}, "labeled_0000.jpg: "),
    "more labeled images than there are": (
        lambda d: None,
        DRAWN | {"training__data__labeled_samples": 13},
        "labeled_samples is 13",
    ),
    "all images labeled": (lambda d: None, DRAWN | {"training__data__labeled_samples": 12}, "all 12 training images"),
    "a list that says another number": (
        lambda d: None,
        {"training__data__labeled_samples": 5},
        "labeled_samples is 5, but dataset.labeled splits/labeled.txt has 6 ids",
    ),
    "a split of other images": (lambda d: write_split(d, "split_3.txt", b"nobody\n"), SPLIT_3, "1 ids that are not"),
    "a split that is no pickle": (lambda d: write_split(d, "split_3.pkl", b"\x80\x04garbage"), SPLIT_3, "split_3.pkl"),
    "a split of other indices": (
        lambda d: write_split(d, "split_3.pkl", pickle.dumps(list(range(5)))),
        SPLIT_3,
        "no permutation of the 12",
    ),
    "a split that runs code": (
        lambda d: write_split(d, "split_3.pkl", pickle.dumps(Payload())),
        SPLIT_3,
        "not allowed in a list of indices",
    ),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", BAD_DATA)
def test_a_bad_dataset_is_found_before_anything_is_trained_or_written(
    data: Path, tmp_path: Path, refused: Callable[..., str], case: str
):
    spoil_data, changes, named = BAD_DATA[case]
    spoil_data(data)
    write_config(tmp_path, Path("data"), **changes)
    assert named in refused()
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------ damaged samples


@pytest.fixture
def damaged(data: Path) -> list[str]:
    """Three damaged images in ``data``."""
    names = ["labeled_0001", "labeled_0004", "unlabeled_0002"]
    for name in names:
        cut(data / f"JPEGImages/{name}.jpg", 0.6)
    return names


def test_a_substitute_does_not_depend_on_who_loads_it_or_on_where_a_run_was_resumed(config, data: Path, damaged):
    def read(workers: int, start: int) -> list[Batch]:
        given = config(data_root=str(data), training__data__bad_sample="skip", training__num_workers=workers)
        return [
            batch
            for stream in ("labeled", "unlabeled")
            for batch in list(training_loader(DatasetFiles(given), stream, start_step=start))
        ]

    whole, parallel, later = read(0, 0), read(2, 0), read(0, 3)
    for one, other in ((whole, parallel), (whole[3:8] + whole[11:16], later)):
        for mine, theirs in zip(one, other, strict=True):
            assert (mine.ids, mine.bad) == (theirs.ids, theirs.bad)
            assert torch.equal(mine.images, theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
    assert not {name for batch in whole for name in batch.ids} & set(damaged)
    assert all(any(name in message for batch in whole for message in batch.bad) for name in damaged)


def test_a_skipped_file_is_told_once_not_at_every_pass(config, data: Path, damaged, capfd):
    assert build(config(data_root=str(data), training__data__bad_sample="skip")).fit() is not None
    told = [line for line in capfd.readouterr().err.splitlines() if "skipped, another image in its place: " in line]
    assert sorted(re.findall(r"(\w+)\.jpg: damaged", " ".join(told))) == sorted(damaged)


def test_a_full_disk_is_not_taken_for_damaged_images(config, data: Path, damaged, tmp_path: Path):
    (tmp_path / "cache").touch()  # no folder can be made there
    cache = {"training__data__cache": "disk", "training__data__cache_dir": str(tmp_path / "cache")}
    given = config(data_root=str(data), training__data__bad_sample="skip", **cache)
    for stream in ("labeled", "unlabeled"):
        with pytest.raises(StorageError, match="cannot write the cache"):
            list(training_loader(DatasetFiles(given), stream, start_step=0))


def test_a_full_cache_costs_nothing_of_what_was_learned(config, monkeypatch: pytest.MonkeyPatch):
    trainer = build(config())
    train_one = trainer._train_one

    def third_fails(*args: Any) -> None:
        if trainer.step == 3:
            raise StorageError("cannot write the cache")
        train_one(*args)

    monkeypatch.setattr(trainer, "_train_one", third_fails)
    with pytest.raises(StorageError, match="cache"):
        trainer.fit()
    assert load_checkpoint(trainer.run.folder / "checkpoint.pth")["step"] == 3


def test_more_damaged_files_than_allowed_stop_the_run_and_any_one_does_by_default(config, data: Path, damaged):
    limited = {"training__data__bad_sample": "skip", "training__data__bad_sample_limit": 1}
    for changes, message in (
        (limited, r"[23] damaged .*_limit 1; .* check names all"),
        ({}, r"\.jpg: damaged"),
    ):
        trainer = build(config(data_root=str(data), utils__val_per_iter=8, **changes))
        with pytest.raises(UserError, match=message) as error:
            trainer.fit()
        assert error.value.exit_status == 2
        saved = trainer.run.folder / "checkpoint.pth"
        assert (load_checkpoint(saved)["step"] if saved.exists() else 0) == trainer.step


# ------------------------------------------------------------------------------------------------ two at once


@pytest.mark.slow
def test_two_processes_never_write_to_one_run_and_a_dead_one_s_loaders_do_not_lock_it(
    demo: Path, tmp_path: Path, undisturbed: Path
):
    config = write_config(tmp_path, demo, training__num_workers=1)
    arguments = ("--config", config, "--name", "shared", "--resume", "auto")
    pause = Fault("step", 4, faults.send_to_group, (signal.SIGSTOP,))  # it and its loaders stand still
    with ended(Training(tmp_path, *arguments, faults=(pause,))) as first:
        first.wait_until(first.is_frozen)
        folder = faults.run_folder(tmp_path)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with ended(Training(tmp_path, *arguments)) as second:
            assert second.wait() == 2
        assert f"error: {folder}: another process is training in this folder" in second.errors
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        first.kill()
        assert first.left_over() != []
        with ended(Training(tmp_path, *arguments)) as third:
            assert third.wait() == 0, third.errors
    assert results_differ(folder, undisturbed) == []


# ------------------------------------------------------------------------------------------------ loading processes


def check_that_it_stopped_and_resumes(training: Training, folder: Path, config: Path, undisturbed: Path) -> None:
    """Status 3, one message, what was learned saved, nobody left; and the rest is as if nothing had happened."""
    assert training.wait() == 3, training.errors
    assert training.errors.count("error: ") == 1
    assert "Traceback" not in training.errors
    assert training.left_over() == []
    with ended(Training(folder, "--config", config, "--name", "loaders", "--resume", "auto")) as again:
        assert again.wait() == 0, again.errors
        assert training.steps[-1] - (again.steps[0] - 1) <= SAVE_EVERY
    assert results_differ(faults.run_folder(folder), undisturbed) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("training sample", 9, faults.kill),
        Fault("validation sample", 2, faults.kill),
        Fault("update", 6, faults.kill_a_loader),
        Fault("opened", 3, faults.kill_a_loader),
    ],
    ids=["while it loads", "in a validation", "in the midst of an update", "while a checkpoint is written"],
)
def test_a_dead_loading_process_is_named_and_costs_at_most_one_interval(
    demo: Path, tmp_path: Path, undisturbed: Path, fault: Fault
):
    config = write_config(tmp_path, demo, training__num_workers=1)
    with ended(Training(tmp_path, "--config", config, "--name", "loaders", faults=(fault,))) as training:
        check_that_it_stopped_and_resumes(training, tmp_path, config, undisturbed)
    assert re.search(r"error: .*DataLoader worker \(pid\D+\d+\) ", training.errors)
    assert "fewer training.num_workers" in training.errors


@pytest.mark.slow
@pytest.mark.parametrize("split", ["unlabeled", "val"])
def test_a_hanging_loading_process_ends_the_run_it_does_not_hang_too(
    data: Path, demo: Path, tmp_path: Path, undisturbed: Path, split: str
):
    changes = {"training__num_workers": 1, "training__data__timeout": 2}
    config = write_config(tmp_path, data, **changes)
    fault = Fault("step", 2, faults.hang, (str(data / "JPEGImages"), f"{split}_"))
    with ended(Training(tmp_path, "--config", config, "--name", "loaders", faults=(fault,))) as training:
        training.wait_until(lambda: "error: " in training.errors)
        training.wait()
        shutil.rmtree(data)
        shutil.copytree(demo, data)
        check_that_it_stopped_and_resumes(training, tmp_path, config, undisturbed)
    assert re.search(r"error: DataLoader timed out after 2 seconds.*raise training\.data\.timeout", training.errors)


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.slow
@pytest.mark.parametrize("to", [faults.send, faults.send_to_group])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_checkpoint_and_a_status_and_no_orphan(
    demo: Path, tmp_path: Path, number: signal.Signals, to: Callable[..., None]
):
    config = write_config(tmp_path, demo, training__num_workers=1)
    fault = Fault("step", 3, to, (number,))
    with ended(Training(tmp_path, "--config", config, "--name", "told", faults=(fault,))) as training:
        assert training.wait() == 128 + number, training.errors
        assert training.left_over() == []
    assert f"stopped by signal {int(number)} after step 3" in training.errors
    assert "Traceback" not in training.errors
    assert training.steps == [1, 2, 3], "the step in progress is finished, no other is begun"
    assert load_checkpoint(faults.run_folder(tmp_path) / "checkpoint.pth")["step"] == 3


@pytest.mark.slow
def test_a_signal_to_the_group_while_a_loading_process_starts_is_no_dead_worker(demo: Path, tmp_path: Path):
    changes = {"training__num_workers": 1, "training__unlabeled__train_unlabeled": False}
    config = write_config(tmp_path, demo, **changes)
    fault = Fault("worker start", 1, faults.send_to_group, (signal.SIGTERM,))
    with ended(Training(tmp_path, "--config", config, "--name", "told", faults=(fault,))) as training:
        assert training.wait() == 128 + signal.SIGTERM, training.errors
        assert training.left_over() == []


@pytest.mark.slow
@pytest.mark.parametrize(("one", "two"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGHUP")])
def test_a_second_signal_ends_a_run_at_once(demo: Path, tmp_path: Path, one: str, two: str):
    numbers = (signal.Signals[one], signal.Signals[two])
    arguments = ("--config", write_config(tmp_path, demo), "--name", "told")
    with ended(Training(tmp_path, *arguments, faults=(Fault("step", 3, faults.send, numbers),))) as training:
        assert training.wait() == -numbers[1], training.errors
    assert training.steps == [1, 2], "the step in progress is not finished"


@pytest.mark.slow
def test_a_signal_in_a_validation_saves_at_once_because_who_sent_it_may_not_wait(
    demo: Path, tmp_path: Path, undisturbed: Path
):
    config = write_config(tmp_path, demo)
    told = Fault("validation sample", 1, faults.send, (signal.SIGTERM,))
    not_waited_for = Fault("validated", 1, faults.kill)
    with ended(Training(tmp_path, "--config", config, "--name", "told", faults=(told, not_waited_for))) as training:
        assert training.wait() == -signal.SIGKILL, training.errors
    assert f"told to stop: step {training.steps[-1]} is saved, its validation is finished first" in training.errors
    saved = load_checkpoint(faults.run_folder(tmp_path) / "checkpoint.pth")
    assert (saved["step"], saved["must_validate"]) == (training.steps[-1], True)
    with ended(Training(tmp_path, "--config", config, "--name", "told", "--resume", "auto")) as again:
        assert again.wait() == 0, again.errors
    assert results_differ(faults.run_folder(tmp_path), undisturbed) == []


# ------------------------------------------------------------------------------------------------ kill, kill, kill


@pytest.mark.slow
def test_a_run_that_is_killed_four_times_ends_as_if_nothing_had_happened(demo: Path, tmp_path: Path, undisturbed: Path):
    rng = random.Random(1)
    config = write_config(tmp_path, demo, training__num_workers=1)
    survived = faults.kill_and_resume(tmp_path, config, [faults.random_kill(rng) for _ in range(4)])
    assert survived.kills >= 3
    assert survived.lost <= SAVE_EVERY
    assert results_differ(survived.folder, undisturbed) == []


# ------------------------------------------------------------------------------------------------ any configuration


@st.composite
def any_training(draw: st.DrawFn) -> dict[str, Any]:
    """Whatever validation lets through, but small; dotted keys."""

    def number(low: float, high: float) -> float:
        return draw(st.floats(low, high, allow_nan=False))

    start = draw(st.integers(0, 2))
    low = number(0.1, 2.0)
    training = {
        "batch_size": draw(st.integers(1, 3)),
        "num_iterations": 2,
        "momentum": number(0.0, 0.999),
        "learning_rate": number(1e-6, 0.05),
        "head_lr_multiplier": number(0.1, 1.0),
        "backbone_lr_multiplier": number(0.1, 1.0),
        "lr_schedule": draw(st.sampled_from(("Poly", None))),
        "lr_schedule_power": number(0.0, 3.0),
        "weight_decay": number(0.0, 0.01),
        "decay_norm_and_bias": draw(st.booleans()),
        "data": {
            "input_size": f"{draw(st.integers(33, 44))},{draw(st.integers(33, 52))}",
            "scale_range": [low, number(low, 2.5)],
            **{key: draw(st.booleans()) for key in ("scale", "crop", "flip")},
        },
        "unlabeled": {
            "train_unlabeled": draw(st.sampled_from((True, True, True, False))),
            "start_iteration": start,
            "consistency_weight": number(0.0, 10.0),
            "consistency_loss": draw(st.sampled_from(("CE", "MSE"))),
            "pixel_weight": draw(st.sampled_from(("threshold_uniform", "threshold", "power", "sigmoid", False, None))),
            "confidence_threshold": number(0.0, 1.0),
            "mix_mask": draw(st.sampled_from(("class", "cut", "cow", "None", None))),
            "strong_view": draw(st.sampled_from(("independent", "shared"))),
            "teacher": draw(st.sampled_from(("cross", "self", "peer"))),
            "teacher_norm": draw(st.sampled_from(("batch", "running"))),
            "ema_decay": number(0.0, 1.0),
            **{key: draw(st.booleans()) for key in ("flip", "color_jitter", "blur", "mask_padding")},
        },
        "contrastive": {
            "high_weight": number(0.0, 1.0),
            "low_weight": number(0.0, 1.0),
            "high_temperature": number(0.05, 5.0),
            "low_temperature": number(0.05, 5.0),
            "confidence": number(0.0, 1.0),
            "direction": draw(st.sampled_from(("confidence", "none"))),
            "contrast_start": draw(st.none() | st.integers(start, 2)),
            "memory_size": draw(st.integers(1, 300)),
            "memory_confidence": number(0.0, 1.0),
        },
    }
    return {"model": draw(st.sampled_from(("DeepLab", "DeepLabv3+"))), "training": training | {"num_workers": 0}}


@pytest.mark.slow
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes=any_training())
def test_a_valid_configuration_never_gives_a_loss_that_is_not_finite(config, changes: dict[str, Any]):
    given_config = config(**changes)
    trainer = build(given_config)
    trainer.method.train()
    streams = ("labeled", "unlabeled") if given_config.training.unlabeled.train_unlabeled else ("labeled",)
    seen: list[float] = []
    logger = Mock(seconds_per_step=lambda: (1.0, 0.0))
    total_loss = trainer.method.total_loss

    def note(losses: dict[Any, torch.Tensor], *, step: int) -> torch.Tensor:
        seen.extend(loss.item() for loss in losses.values())
        return total_loss(losses, step=step)

    trainer.method.total_loss = note
    for batches in zip(*(trainer.loader(stream, 0) for stream in streams), strict=True):
        trainer._train_one(logger, [batches])  # raises NonFiniteError
    assert trainer.step == 2
    assert seen
    assert all(math.isfinite(loss) for loss in seen)
    assert all(value.isfinite().all() for value in trainer.method.state_dict().values() if value.is_floating_point())


# ------------------------------------------------------------------------------------------------ other machines


def test_another_number_of_threads_is_said_once_and_does_not_forbid_to_go_on(config, monkeypatch):
    stop_after(build(config()), 7)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)  # more than here, but nobody has to wait for them
    with pytest.warns(UserWarning, match=r"resumed with other threads \d+, now 64: .* not the same bits") as seen:
        trainer = build(config(), resume="auto")
    assert sum("other threads" in str(one.message) for one in seen) == 1, [str(one.message) for one in seen]
    assert trainer.step == 7
    assert trainer.fit() is not None
