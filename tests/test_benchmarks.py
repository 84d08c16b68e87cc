"""The benchmarks run from the command line, and their tables and files agree. No clock is tested."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ceiling import RightlyTaught
from benchmarks.measure import Column, _cell, in_turn, median_ratio, peak_memory
from benchmarks.photographs import write_dataset
from benchmarks.pull import Anchors, pull
from data.demo import make_demo_dataset
from model import CrossTeacher, build_networks
from model.memory_bank import MemoryBank
from tests.conftest import tiny_records
from utils.checkpoint import save_checkpoint
from utils.config import dump_config
from utils.errors import UserError

CPU = torch.device("cpu")
PROJECT = Path(__file__).parent.parent


def run(name: str, folder: Path, *options: str) -> tuple[list[str], dict[str, Any]]:
    """The lines that a benchmark printed, and the content of its JSON file."""
    file = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--threads", "1", "--json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads(file.read_text())


def check_common(lines: list[str], content: dict[str, Any], *, rounds: int, head: str) -> list[str]:
    """The table's rows, after what every benchmark tells of its machine."""
    machine = content["machine"]
    assert lines[1] == f"{machine['where']}, 1 threads, torch {torch.__version__}, commit {machine['commit']}"
    assert lines[2] == f"medians of {rounds} rounds in turn"
    assert lines[3].split()[0] == head
    rows = lines[4 : 4 + len(content["rows"])]
    key = {"scaling": "kind"}.get(head, head)
    assert [row.split()[0] for row in rows] == [row[key] for row in content["rows"]]
    return rows


@pytest.mark.slow
def test_contrast_compares_both_forms_and_leaves_the_direct_one_out_where_told(tmp_path: Path):
    options = ("--anchors", "40", "90", "--direct-up-to", "40", "--classes", "3", "--entries", "8", "--channels", "16")
    lines, content = run("contrast", tmp_path, *options, "--rounds", "2", "--device", "cpu")
    table = check_common(lines, content, rounds=2, head="term")
    assert [(row["term"], row["anchors"]) for row in content["rows"]] == [
        (term, anchors) for term in ("high_level", "low_level") for anchors in (40, 90)
    ]
    for row, shown in zip(content["rows"], table, strict=True):
        assert row["gradient_bytes"] == row["anchors"] * 16 * 4
        assert row["ours_bytes"] > row["gradient_bytes"], "the gradient is part of the peak"
        assert row["ours_seconds"] > 0
        is_direct = row["anchors"] <= 40
        assert (row["direct_bytes"] is not None) == (row["speed"] is not None) == is_direct
        assert shown.split().count("-") == (0 if is_direct else 3)
        assert not is_direct or row["direct_bytes"] > row["anchors"] * 3 * 8 * 4, "at least the matrix"
    assert [one["term"] for one in content["checks"]] == ["high_level", "low_level"]
    assert all(max(one["value_difference"], one["gradient_difference"]) < 1e-4 for one in content["checks"])
    assert sum("in the gradient, relative" in line for line in lines) == 2


@pytest.mark.slow
def test_data_reads_both_datasets_with_every_cache_and_compares_with_a_step(tmp_path: Path):
    options = ("--images", "2", "--batch", "2", "--size", "80,100", "--crop", "65,65", "--workers", "0", "1")
    lines, content = run("data", tmp_path, *options, "--rounds", "1", "--step-seconds", "0.5")
    check_common(lines, content, rounds=1, head="dataset")
    assert {(row["dataset"], row["cache"], row["workers"]) for row in content["rows"]} == {
        (dataset, cache, workers)
        for dataset in ("voc", "cityscapes")
        for cache in ("none", "cold", "warm")
        for workers in (0, 1)
    }
    assert content["images_per_second_needed"] == 8
    for row in content["rows"]:
        assert row["file_bytes"] > 500
        assert row["per_core"] == pytest.approx(row["images_per_second"])  # one core each
        assert row["cores_needed"] == pytest.approx(8 / row["per_core"])
    assert lines[-1].startswith("a step of 0.5 s needs 8.0 images/s")


def test_data_refuses_images_that_fill_no_batch():
    command = [sys.executable, "-m", "benchmarks.data", "--images", "7", "--batch", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=600)
    assert done.returncode == 2
    assert done.stderr == "error: --images 7: expected a multiple of --batch 2; every batch is full\n"


@pytest.mark.slow
def test_evaluation_tells_the_overhead_of_generated_images_and_of_a_configurations_own(tmp_path: Path):
    options = ("--images", "2", "--rounds", "1", "--device", "cpu")
    lines, content = run("evaluation", tmp_path, *options, "--size", "40,48", "--workers", "0", "1", "--profile")
    check_common(lines, content, rounds=1, head="network")
    assert [row["workers"] for row in content["rows"]] == [0, 1]
    for row in content["rows"]:
        assert row["overhead"] == pytest.approx(row["whole"] / row["forward"] - 1)
        assert row["images_per_second"] == pytest.approx(2 / row["whole"])
    assert content["label_size"] == [40, 48]
    assert content["models"] == ["student_0", "student_1", "teacher_0", "teacher_1", "ensemble"]
    assert any("convolution" in line for line in lines)

    values = {
        "model": "DeepLab", "backbone": "resnet18", "backbone_width": 8, "feature_channels": 32, "pretrained": "none",
        "dataset": {"root": "elsewhere", "train": "all.txt", "num_classes": 3, "images": "images/{id}.png",
                    "labels": "labels/{id}.png", "val": "all.txt"},
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    write_dataset(tmp_path / "data", images=3, size=(36, 44), classes=3, kind="png", grain=1)
    options = (*options, "--config", str(config), "--data-root", str(tmp_path / "data"))
    lines, content = run("evaluation", tmp_path, *options, "--set", "dataset.resize=40,48")
    assert [row["network"] for row in content["rows"]] == ["DeepLab"]
    assert content["images"] == 2, "fewer than the split holds"
    assert content["label_size"] == [36, 44], "labels count at their own size"


@pytest.mark.parametrize("kind", ["truth", "right"])
def test_ceiling_teaches_no_pixel_wrongly(tiny_config, batches, kind: str):
    config = tiny_config(training__unlabeled__mix_mask="class")
    method = RightlyTaught(build_networks(config), config, labeled_samples=4, kind=kind)
    _, unlabeled = batches(3)
    hidden = torch.randint(3, unlabeled.labels.shape, generator=torch.Generator().manual_seed(2))
    hidden[0, :5] = config.ignore_label
    corrected = method.correct(unlabeled._replace(hidden=hidden))
    targets = [method.predict_target(own, peer, unlabeled.images) for own, peer in ((0, 1), (1, 0))]
    view = method.strong_view(0, corrected, targets, step=0)
    assert torch.equal(view.pseudo_label[view.valid], hidden.flatten()[view.source][view.valid])
    wrong = sum(teacher.predict(unlabeled.images).argmax(dim=1) != hidden for teacher in method.teachers)
    known = unlabeled.valid & (hidden != config.ignore_label)
    assert torch.equal(corrected.valid, known if kind == "truth" else known & (wrong == 0))
    assert 0 < int(corrected.valid.sum()) < hidden.numel()
    again = method.predict_target(0, 1, unlabeled.images)
    assert torch.equal(again, method.teachers[1].predict(unlabeled.images)), "other images have the teacher's word"


def test_ceiling_leaves_steps_without_pseudo_labels_alone(tiny_config, batches):
    config = tiny_config(training__unlabeled__start_iteration=1)
    method = RightlyTaught(build_networks(config), config, labeled_samples=4, kind="truth")
    assert set(method.training_step(*batches(), step=0)) == {("supervised", 0), ("supervised", 1)}
    with pytest.raises(UserError, match="no label maps"):
        method.training_step(*batches(), step=1)


@pytest.mark.slow
def test_ceiling_says_what_it_taught_and_no_other_command_continues_it(tmp_path: Path):
    make_demo_dataset(tmp_path / "data", labeled=8, unlabeled=2, val=1)
    options = ["--config", "configs/configDemo.json", "--name", "one", "--data-root", str(tmp_path / "data")]
    for value in ("batch_size=2", "num_iterations=2", "unlabeled.start_iteration=0", "num_workers=0"):
        options += ["--set", f"training.{value}"]
    options += ["--set", f"utils.checkpoint_dir={tmp_path}", "--resume", "auto", "--set"]

    def train(*command: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=PROJECT, timeout=600, env=environment
        )

    def only_file(name: str) -> Path:
        (path,) = tmp_path.glob(f"*-one/{name}")
        return path

    done = train("-m", "benchmarks.ceiling", "--pseudo-labels", "truth", *options, "utils.log_per_iter=1")
    assert done.returncode == 0, done.stderr
    assert json.loads(only_file("result.json").read_text())["pseudo_labels"] == "truth"
    lines = [json.loads(line) for line in only_file("log.jsonl").read_text().splitlines()]
    assert [line["pseudo_label/accuracy/0"] for line in lines if "pseudo_label/accuracy/0" in line] == [1.0, 1.0]
    refused = train("cross_teacher_contr.py", *options, "utils.log_per_iter=1")
    assert refused.returncode == 2
    assert "'pseudo_labels': 'truth'" in refused.stderr


def test_pull_is_the_share_of_the_greatest_force():
    # One anchor of class 0, similarity 1 to its positive and 0 to each of two negatives, temperature 0.5.
    bank = MemoryBank(2, 2, 2)
    bank.entries[0, 0], bank.entries[1] = torch.tensor([3.0, 0.0]), torch.tensor([[0.0, 0.5], [0.0, 2.0]])
    bank.counts[:] = torch.tensor([1, 2])
    features = torch.tensor([5.0, 0.0]).view(1, 2, 1, 1)
    one, is_anchor = torch.zeros(1, 1, 1, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.bool)
    for peer_features in (None, features):
        anchors = Anchors([bank], temperature=0.5)
        anchors.add(features, one, is_anchor, peer_features=peer_features)
        assert (anchors.mean("attracts"), anchors.mean("repels")) == (1, 0)
        assert anchors.mean("sum") == pytest.approx(2 / (2 + math.exp(2)))
        assert anchors.mean("mean") == pytest.approx(1 / (1 + math.exp(2)))
    anchors.add(features, one, ~is_anchor)
    assert anchors.mean("attracts") == 1, "what is no anchor does not count"


def test_pull_fills_empty_banks_and_tells_of_both_terms(tiny_config, tmp_path: Path):
    root = make_demo_dataset(tmp_path / "data", size=(48, 48), labeled=6, unlabeled=4, val=2)
    lists = {split: f"splits/{split}.txt" for split in ("labeled", "unlabeled")} | {
        "val": "ImageSets/Segmentation/val.txt"
    }
    dataset = {"root": str(root), "num_classes": 7, **lists}
    config = tiny_config(dataset=dataset, training__contrastive__direction="none")
    method = CrossTeacher(build_networks(config), config, labeled_samples=4)
    text = json.dumps(dump_config(config))
    save_checkpoint(tmp_path / "checkpoint.pth", tiny_records(method=method.state_dict(), config=text))
    table = pull(tmp_path, batches=2)
    assert table == pull(tmp_path, batches=2)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "_level" in line]
    assert [row[0] for row in rows] == ["high_level", "low_level"]
    for _, attracts, repels, with_sum, with_mean in rows:
        assert -1 <= float(attracts) <= 1
        assert -1 <= float(repels) <= 1
        assert 0 < float(with_mean) < float(with_sum) <= 1
    with pytest.raises(UserError, match="at least 1"):
        pull(tmp_path, batches=0)
    without = dump_config(tiny_config(training__unlabeled__train_unlabeled=False))
    save_checkpoint(tmp_path / "checkpoint.pth", tiny_records(config=json.dumps(without)))
    with pytest.raises(UserError, match="without unlabeled images"):
        pull(tmp_path, batches=1)


def test_peak_memory_is_exact_and_knows_what_an_operation_needs_inside():
    given = torch.ones(1000, 100)

    def work() -> None:
        one = given * 2  # 400 000 bytes
        del one
        two = given + 1
        two.add_(1)
        two.exp().sum()  # as much again

    assert 800_000 <= peak_memory(work, CPU) <= 801_000
    assert peak_memory(lambda: given.add_(1), CPU) < 1000


def test_works_take_turns():
    order = []
    seconds = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, device=CPU)
    assert order == ["a", "b", "a", "b"]
    assert [len(times) for times in seconds.values()] == [2, 2]
    assert median_ratio([1, 6, 30], [1, 2, 3]) == 3


def test_a_table_shows_what_was_not_measured():
    assert _cell({"a": None}, Column("a", "A", ".1f")) == "-"
    assert _cell({"a": 2048}, Column("a", "A", ".1f", 1 / 1024)) == "2.0"


SMALL_STEP = ("--backbone", "resnet18", "--size", "65,65", "--device", "cpu")


@pytest.mark.slow
def test_step_tells_what_is_beside_the_networks_and_what_recomputation_costs_and_saves(tmp_path: Path):
    settings = ("fp32", "fp32 recomputed", "bf16 channels-last")
    lines, content = run("step", tmp_path, *SMALL_STEP, "--batch", "2", "--rounds", "1", "--settings", *settings)
    assert "DeepLab resnet18, 65,65, batch 2+2" in lines[0]
    assert [row["setting"] for row in content["rows"]] == list(settings)
    plain, recomputed, _ = content["rows"]
    assert plain["speed"] == 1
    assert all(row["images_per_second"] == pytest.approx(4 / row["seconds"]) for row in content["rows"])
    work = {row["setting"]: row["teraflops"] * row["seconds"] for row in content["rows"]}
    assert 1.1 < work["fp32 recomputed"] / work["fp32"] < 1.5, "the students' backbones are computed once more"
    assert recomputed["gib"] < plain["gib"]


@pytest.mark.slow
def test_scaling_compares_two_processes_with_one(tmp_path: Path):
    small = ("--model", "DeepLabv3+", "--backbone", "resnet18", "--size", "33,33", "--device", "cpu")
    lines, content = run("scaling", tmp_path, *small, "--batch", "2", "--rounds", "1")
    check_common(lines, content, rounds=1, head="scaling")
    rows = {row["kind"]: row for row in content["rows"]}
    assert [(row["processes"], row["batch"]) for row in rows.values()] == [(1, 2), (2, 2), (2, 4)]
    one = rows["both"]["images_per_second"]
    assert rows["both"]["efficiency"] == 1
    assert all(rows[kind]["efficiency"] == pytest.approx(rows[kind]["images_per_second"] / one / 2)
               for kind in ("strong", "weak"))  # fmt: skip
