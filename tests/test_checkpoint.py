"""Checkpoints: never half written, never half trusted."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_records
from utils.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from utils.errors import CheckpointError, StorageError

STATE = tiny_records(method={"weight": torch.arange(1000.0)})


def test_what_was_saved_comes_back(tmp_path: Path):
    save_checkpoint(tmp_path / "a.pth", STATE)
    state = load_checkpoint(tmp_path / "a.pth")
    assert state["step"] == 3
    assert torch.equal(state["method"]["weight"], STATE["method"]["weight"])
    assert os.listdir(tmp_path) == ["a.pth"], "nothing temporary is left"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path / "a.pth", STATE)

    def full(state: object, file: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    what = r"a\.pth: cannot write this checkpoint .*No space .* needs [\d.]+ MiB, [\d,.]+ MiB are free"
    with pytest.raises(StorageError, match=what):
        save_checkpoint(tmp_path / "a.pth", {"step": 4})
    assert os.listdir(tmp_path) == ["a.pth"]
    assert load_checkpoint(tmp_path / "a.pth")["step"] == 3


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_a_malicious_file_is_refused_and_nothing_is_executed(tmp_path: Path):
    marker = tmp_path / "executed"
    torch.save({"format": "cross-teacher-training", "version": 1, "x": Payload(marker)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()


def test_other_files_are_named_for_what_they_are_not(tmp_path: Path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    torch.save({"format": "cross-teacher-training", "version": 99}, tmp_path / "future.pth")
    then = {"format": "cross-teacher-training", "version": 2, "origin": {"commit": "0123456789ab"}}
    torch.save(then, tmp_path / "past.pth")
    save_checkpoint(tmp_path / "part.pth", {"step": 3, "method": {}, "optimizer": {}})
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    for name, message in (
        ("other.pth", "not a checkpoint of this project"),
        ("future.pth", "format version 99"),
        ("past.pth", "format version 2, .* at commit 0123456789ab reads it"),
        ("bomb.pth", "compressed"),
        ("part.pth", "without best, config, facts"),
        ("absent.pth", "no such checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)


def test_a_run_folder_stands_for_its_best_checkpoint_else_its_last(tmp_path: Path):
    with pytest.raises(CheckpointError, match="neither"):
        resolve_checkpoint(tmp_path)
    for name in ("checkpoint.pth", "best_model.pth"):
        (tmp_path / name).touch()
        assert resolve_checkpoint(tmp_path) == tmp_path / name
    assert resolve_checkpoint(tmp_path / "checkpoint.pth") == tmp_path / "checkpoint.pth"


def test_a_loading_process_that_dies_meanwhile_is_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def interrupted(state: object, file: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
