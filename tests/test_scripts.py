"""The commands as a user types them: real processes, right and wrong input."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import build_networks
from tests.conftest import tiny_values
from utils.config import load_config
from utils.study import cells, plan

PROJECT = Path(__file__).parent.parent
SCRIPTS = {"DeepLab": "cross_teacher_contr.py", "DeepLabv3+": "cross_teacher_deeplabv3+.py"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def run(
    script: str, *arguments: object, cwd: Path = PROJECT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / script), *map(str, arguments)]
    environment = ENVIRONMENT | (env or {})
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def write_config(folder: Path, demo: Path, **changes: Any) -> Path:
    names = json.loads((demo / "classes.json").read_text())["names"]
    values = tiny_values(
        dataset={
            "name": "demo",
            "root": str(demo),
            "labeled": "splits/labeled.txt",
            "unlabeled": "splits/unlabeled.txt",
            "names": names,
        },
        training__num_iterations=4,
        training__contrastive__contrast_start=2,
        utils={
            "checkpoint_dir": str(folder / "runs"),
            "log_per_iter": 1,
            "val_per_iter": 2,
            "save_checkpoint_every": 2,
        },
    )
    for key, value in changes.items():
        *parents, last = key.split("__")
        block = values
        for name in parents:
            block = block[name]
        block[last] = value
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("script", sorted(path.name for path in PROJECT.glob("*.py")))
def test_help_is_complete(script: str):
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    for option in {
        "cross_teacher_contr.py": [
            "--config",
            "--name",
            "--resume",
            "--set",
            "--data-root",
            "--device",
            "--gpus",
            "--save-images",
        ],
        "evaluateSSL.py": [
            "--model-path",
            "--gpu",
            "--save-output-images",
            "--protocol",
            "--split",
            "--data-root",
            "--output",
        ],
        "prepare_data.py": ["demo"],
        "ablate.py": ["--config", "--name", "--grid", "--seeds", "--set", "--jobs"],
    }.get(script, []):
        assert option in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("network", SCRIPTS)
def test_train_resume_and_evaluate_by_command(tmp_path: Path, demo: Path, network: str):
    config = write_config(tmp_path, demo)
    short = ("--config", config, "--name", "first", "--save-images", tmp_path / "pictures")
    done = run(SCRIPTS[network], *short)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    for shown in (
        "student_0",
        "teacher_1",
        "ensemble",
        "mean IoU",
        *json.loads((demo / "classes.json").read_text())["names"],
    ):
        assert shown in done.stdout
    assert f"run folder          {folder}" in done.stdout
    assert "tensorboard --logdir" in done.stdout
    assert (done.stderr.count("this script trains") == 1) == (network == "DeepLabv3+")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"step_00000{step}_student_{own}.png" for step in (2, 4) for own in (0, 1)
    }

    again = run(SCRIPTS[network], *short, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    assert again.stdout.splitlines()[3:] == done.stdout.splitlines()[3:], "the same table"

    command = next(line for line in done.stdout.splitlines() if line.startswith("write predictions")).split()[3:]
    evaluated = run(*command)
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.splitlines()[3:12] == done.stdout.splitlines()[3:12], "the printed command gives the table"
    trained = json.loads((folder / "result.json").read_text())["models"]
    output = folder / "evaluation-val-original"
    assert json.loads((output / "result.json").read_text())["models"] == trained
    images = sorted((output / "images").iterdir())
    assert len(images) == 3
    with Image.open(images[0]) as image:
        assert (image.mode, image.size) == ("P", (48, 48))
        assert image.getpalette()[3:6] == [128, 0, 0]
        assert np.asarray(image).max() < 7
    if network == "DeepLabv3+":  # the rest does not depend on it
        return
    hidden = run("evaluateSSL.py", "-m", folder, "--split", "unlabeled", "--output", tmp_path / "hidden")
    assert hidden.returncode == 0, hidden.stderr
    later = run("evaluateSSL.py", "-m", folder, "--split", "test", "--set", "dataset.test=splits/labeled.txt")
    assert later.returncode == 0, later.stderr
    said = [("test images are training images too" in one.stderr) for one in (evaluated, hidden, later)]
    assert said == [False, False, True]
    assert "split test" in next(folder.glob("evaluation-test-original-best_model-set_????????/result.txt")).read_text()
    moved = shutil.copytree(demo, tmp_path / "moved")
    other = run("evaluateSSL.py", "-m", folder / "checkpoint.pth", "--data-root", moved)
    assert other.returncode == 2
    assert f"holds the result on other images, those in {demo}" in other.stderr
    own = run("evaluateSSL.py", "-m", folder / "checkpoint.pth", "--output", folder)
    assert own.returncode == 2
    assert "is a run's folder" in own.stderr
    listed = moved / "ImageSets/Segmentation/val.txt"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
    other = run("evaluateSSL.py", "-m", folder / "checkpoint.pth", "--data-root", moved)
    assert other.returncode == 2
    assert "holds the result on other images" in other.stderr
    assert json.loads((output / "result.json").read_text())["models"] == trained
    assert "split unlabeled" in (tmp_path / "hidden" / "result.txt").read_text()


@pytest.mark.slow
def test_the_script_tells_the_method_the_class_shares_that_logit_adjustment_needs(tmp_path: Path, demo: Path):
    config, losses = write_config(tmp_path, demo, training__num_iterations=1), []
    for strength in (0, 1):
        folder = tmp_path / str(strength)
        options = ("--set", f"training.logit_adjustment={strength}", "--set", f"utils.checkpoint_dir={folder}")
        done = run(SCRIPTS["DeepLab"], "--config", config, "--name", "test", *options)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(next(folder.glob("*/log.jsonl")).read_text().splitlines()[0])["supervised/0"])
    assert losses[0] != pytest.approx(losses[1], rel=0.01)


@pytest.mark.slow
def test_a_run_on_a_json_block_with_other_folders_file_types_and_palette(tmp_path: Path, demo: Path):
    root = tmp_path / "mine"
    for folder in ("photos", "masks"):
        (root / folder).mkdir(parents=True)
    ids = (demo / "splits/labeled.txt").read_text().split()
    for name in ids:
        Image.open(demo / f"JPEGImages/{name}.jpg").save(root / f"photos/{name}_rgb.png")
        label = np.asarray(Image.open(demo / f"SegmentationClassAug/{name}.png"))
        Image.fromarray(np.where(label == 255, 0, label * 10 + 5).astype(np.uint8)).save(root / f"masks/{name}.png")
    (root / "all.txt").write_text("\n".join(ids))
    block = {
        "name": "mine", "root": str(root), "images": "photos/{id}_rgb.png", "labels": "masks/{id}.png",
        "train": "*", "val": "all.txt",
        "label_ids": [5, 15, 25, 35, 45, 55, 65], "num_classes": 7, "palette": [[index, 2, 3] for index in range(7)],
    }  # fmt: skip
    config = write_config(tmp_path, demo, dataset=block, training__data={"input_size": "40,40", "labeled_samples": 4})
    done = run(SCRIPTS["DeepLab"], "--config", config, "--name", "own")
    assert done.returncode == 0, done.stderr
    assert (
        "warning: no training.data.split_id_list: the labeled images are drawn by a seeded permutation" in done.stderr
    )
    (folder,) = (tmp_path / "runs").iterdir()
    assert run("evaluateSSL.py", "-m", folder, "--save-output-images").returncode == 0
    with Image.open(next((folder / "evaluation-val-original-best_model/images").iterdir())) as image:
        assert image.getpalette()[:6] == [0, 2, 3, 1, 2, 3]


BAD = {  # as typed; what may be wrong in a file is in test_faults.py
    "unknown key": (["--set", "training.batchsize=3"], "did you mean training.batch_size?"),
    "checkpoint that is not there": (["--resume", "gone.pth"], "gone.pth: no such checkpoint"),
    "empty option": (["--resume", ""], "is empty"),
    "several GPUs": (["--gpus", "2"], "--gpus 2: this machine has 0 CUDA devices"),
    "one GPU for two": (["--gpus", "2", "--device", "cuda:1"], "several processes need a GPU each"),
    "GPU without one": (["--device", "cuda"], "this machine has 0 CUDA devices"),
}


@pytest.mark.slow
def test_wrong_input_ends_in_one_message_and_status_2(tmp_path: Path, demo: Path):
    config = write_config(tmp_path, demo)
    for case, (arguments, message) in BAD.items():
        done = run(SCRIPTS["DeepLab"], "--config", config, "--name", "bad", *arguments)
        assert done.returncode == 2, (case, done.stderr)
        assert message in done.stderr, case
        assert "Traceback" not in done.stderr, case
        assert not (tmp_path / "runs").exists(), case


EMPTY = {
    "predict.py": ["run", "", "out"],
    "export.py": ["run", ""],
    "evaluateSSL.py": ["-m", "run", "--output", ""],
    "ablate.py": ["keep", "runs/study", "--output", ""],
    "prepare_data.py": ["split", "draw", "configs/configDemo.json", "--labeled", "1/2", "--output", ""],
}


@pytest.mark.parametrize("script", EMPTY)
def test_an_empty_path_is_not_the_current_folder(script: str):
    done = run(script, *EMPTY[script])
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(": is empty")


@pytest.mark.slow
def test_missing_weights_end_in_status_5_and_a_place_to_put_them(tmp_path: Path, demo: Path):
    done = run(SCRIPTS["DeepLab"], "--config", write_config(tmp_path, demo, pretrained="weights.pth"), "--name", "bad")
    assert done.returncode == 5
    assert "weights.pth" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_resumed_run_does_not_need_the_weights_that_it_started_from(tmp_path: Path, demo: Path):
    whole = tmp_path / "weights.pth"
    source = build_networks(load_config(write_config(tmp_path, demo)))[0]
    source.normalization.set_preset("coco")  # what is not at hand later travels in the checkpoint
    torch.save({"state_dict": source.state_dict()}, whole)
    config = write_config(tmp_path, demo, pretrained=str(whole))
    done = run(SCRIPTS["DeepLab"], "--config", config, "--name", "tuned")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    expected = json.loads((folder / "result.json").read_text())["models"]
    whole.unlink()
    (folder / "checkpoint_0000002.pth").replace(folder / "checkpoint.pth")
    again = run(SCRIPTS["DeepLab"], "--config", config, "--name", "tuned", "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "result.json").read_text())["models"] == expected


@pytest.mark.parametrize("raised", ["ValueError('x')", "KeyboardInterrupt"])
def test_ctrl_c_within_an_import_is_no_mistake_of_ours(raised: str):
    lines = f"""
        import signal
        from utils.errors import run_script
        def main():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise {raised}
        run_script(main)
    """
    code = textwrap.dedent(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.slow
def test_evaluation_refuses_what_it_cannot_mean(tmp_path: Path):
    for arguments, message in (
        (["-m", tmp_path], "neither best_model.pth"),
        (["-m", tmp_path / "x"], "no such checkpoint"),
    ):
        done = run("evaluateSSL.py", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_cells_with_decimals_and_another_network_get_their_own_folder_and_script(tmp_path: Path, demo: Path):
    config = write_config(tmp_path, demo)
    args = argparse.Namespace(config=config, set=[])
    rows = cells(["training.learning_rate=0.1,1.1", "model=DeepLab,DeepLabv3+"])
    jobs = [plan(args, row, 0, tmp_path) for row in rows]
    assert len({job.folder for job in jobs}) == 4
    assert [Path(job.command[1]).name for job in jobs] == list(SCRIPTS.values()) * 2
    assert [job.config.training.learning_rate for job in jobs] == [0.1, 0.1, 1.1, 1.1]


@pytest.mark.slow
def test_the_demo_dataset_is_made_by_command(tmp_path: Path):
    for _ in range(2):
        done = run("prepare_data.py", "demo", tmp_path / "demo")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo/classes.json").is_file()
