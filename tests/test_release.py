"""Checkpoints and configurations of the authors' release, as its users have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model import build_network, build_students, load_trained
from model.network import SegmentationNetwork
from model.pretrained import load_pretrained, load_release_weights
from tests.conftest import tiny_records, tiny_values
from tests.test_networks import golden_weights
from tests.test_scripts import run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import check_config, for_network, load_config
from utils.errors import CheckpointError

SHARED = Path(__file__).parent.parent.parent / "shared"
VOC = SHARED / "voc_samples"
CASES = {"DeepLab": "deeplabv2", "DeepLabv3+": "deeplabv3plus"}
# Every key that the release's two files have; values differ between them where given as a pair.
RELEASE = {
    "dataset": ("pascal_voc", "cityscapes"),
    "ignore_label": (255, 250),
    "model": "DeepLab",
    "pretrained": "coco",
    "seed": 1,
    "training": {
        "batch_size": (10, 2),
        "data": {"crop": True, "input_size": ("321,321", "256,512"), "labeled_samples": (212, 372),
                 "scale": (True, False), "split_id_list": (1, 0)},
        "learning_rate": 0.00025,
        "lr_schedule": "Poly",
        "lr_schedule_power": 0.9,
        "momentum": 0.9,
        "num_iterations": (160000, 16000),
        "num_workers": 4,
        "optimizer": "SGD",
        "unlabeled": {"blur": True, "color_jitter": True, "consistency_loss": "CE", "consistency_weight": 1,
                      "flip": False, "pixel_weight": "threshold_uniform", "mix_mask": ("None", "class"),
                      "train_unlabeled": True},
        "use_sync_batchnorm": True,
        "warmup_iters": 100000,
        "weight_decay": 0.0005,
    },
    "utils": {"checkpoint_dir": "../saved/DeepLabv2", "log_per_iter": (200, 100), "save_best_model": (False, True),
              "save_checkpoint_every": (160000, 500000), "tensorboard": True, "val_per_iter": 5000},
}  # fmt: skip


def release_values(dataset: str) -> dict[str, Any]:
    """The release's JSON file for a dataset."""
    which = ("pascal_voc", "cityscapes").index(dataset)

    def pick(block: Any) -> Any:
        if isinstance(block, dict):
            return {key: pick(value) for key, value in block.items()}
        return block[which] if isinstance(block, tuple) else block

    values = pick(RELEASE)
    if dataset == "pascal_voc":
        del values["training"]["warmup_iters"]
    return values


def release_checkpoint(name: str = "DeepLab", dataset: str = "pascal_voc", **changes: Any) -> dict[str, Any]:
    weights = golden_weights(CASES[name], 1)
    return {
        "iteration": 160000,
        "optimizer": {"state": {}, "param_groups": []},
        "config": release_values(dataset),
        "model": weights,
        "ema_model": {key: value * 0.5 if value.is_floating_point() else value for key, value in weights.items()},
        **changes,
    }


@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize("dataset", ["pascal_voc", "cityscapes"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_releases_json_files_are_read_unchanged(dataset: str, network: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(release_values(dataset)))
    config = for_network(load_config(tmp_path / "config.json"), network)
    assert (config.dataset, config.training.data.labeled_samples) == (dataset, 212 if dataset == "pascal_voc" else 372)
    assert config.training.contrastive.high_weight == 0.1


def test_who_is_told_what_coco_means(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(release_values("pascal_voc")))
    config = load_config(tmp_path / "config.json")
    with pytest.warns(UserWarning, match="the release gives the second one ImageNet's"):
        for_network(config, "DeepLab")
    with (
        pytest.warns(UserWarning, match='DeepLabv3\\+ has no COCO weights: "coco" means ImageNet'),
        pytest.warns(UserWarning, match='the configuration says model "DeepLab"'),
    ):
        for_network(config, "DeepLabv3+")


@pytest.mark.parametrize(
    ("name", "dataset", "bgr", "mean"),
    [
        ("DeepLab", "pascal_voc", False, 122.67891434),
        ("DeepLab", "cityscapes", True, 73.15835921),
        ("DeepLabv3+", "pascal_voc", False, 122.67891434),
    ],
)
def test_a_release_checkpoint_is_recognised_with_its_network_and_convention(
    name: str, dataset: str, bgr: bool, mean: float, tmp_path: Path
):
    state = release_checkpoint(name, dataset)
    if dataset == "cityscapes":
        for part in ("model", "ema_model"):
            state[part]["layer5.head.1.weight"] = state[part]["layer5.head.1.weight"][:19]
    torch.save(state, tmp_path / "checkpoint-iter160000.pth")
    trained = load_trained(tmp_path / "checkpoint-iter160000.pth", overrides=["data_root=elsewhere"])
    assert list(trained.networks) == ["student", "teacher"]
    assert (trained.config.model, trained.config.data.name, trained.config.data.root) == (name, dataset, "elsewhere")
    assert trained.about == {
        "labeled": state["config"]["training"]["data"]["labeled_samples"],
        "step": 160000,
        "seed": 1,
    }
    normalization = trained.networks["student"].normalization
    assert bool(normalization.bgr) == bgr
    assert normalization.scale == 255
    assert normalization.mean[0].item() == pytest.approx(mean)
    head = {"DeepLab": "layer5.head.1.weight", "DeepLabv3+": "classifier.weight"}[name]
    assert torch.equal(trained.networks["student"].head.classifier.weight, state["model"][head])
    assert torch.equal(trained.networks["teacher"].head.classifier.weight, state["ema_model"][head])


def test_files_from_before_zip_archives_are_read_and_cannot_be_resumed(tmp_path: Path):
    state = release_checkpoint()
    del state["ema_model"]
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert list(load_trained(tmp_path / "old.pth").networks) == ["student"]
    with pytest.raises(CheckpointError, match="one of the authors' release: start from it with pretrained"):
        load_checkpoint(tmp_path / "old.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"dataset": "ade20k"}}, "names no dataset pascal_voc or cityscapes"),
        ({"config": None}, "names no dataset"),
        ({"config": {"dataset": ["pascal_voc"]}}, "no checkpoint, or a damaged one"),
        ({"config": {"dataset": "pascal_voc", "training": None}}, "no checkpoint, or a damaged one"),
        (
            {"model": {"layer5.x": torch.zeros(1)}},
            r"student: these are not the release's weights .*missing: conv1\.weight",
        ),
    ],
)
def test_what_only_looks_like_a_release_checkpoint_is_refused(changes: Any, message: str, tmp_path: Path):
    torch.save(release_checkpoint(**changes), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_trained(tmp_path / "x.pth")


# ------------------------------------------------------------------------------------------------ training from them


def students(pretrained: Any, **changes: Any) -> list[SegmentationNetwork]:
    values = tiny_values(
        pretrained=pretrained, backbone="resnet101", backbone_width=64, feature_channels=256, **changes
    )
    values["dataset"]["num_classes"] = 21
    return build_students(check_config(values, source="test"))


def test_training_starts_from_a_release_checkpoint_and_the_students_start_different(tmp_path: Path, caplog: Any):
    torch.save(release_checkpoint(), tmp_path / "release.pth")
    first, second = students(str(tmp_path / "release.pth"))
    assert all(
        torch.equal(*pair) for pair in zip(first.backbone.parameters(), second.backbone.parameters(), strict=True)
    )
    assert not torch.equal(first.head.classifier.weight, second.head.classifier.weight)
    assert torch.equal(first.head.classifier.weight, golden_weights("deeplabv2", 1)["layer5.head.1.weight"])
    assert "student 1 takes the backbone alone" in caplog.text
    assert not first.normalization.bgr
    assert not second.normalization.bgr
    assert second.normalization.scale == 255


def test_a_cityscapes_checkpoint_brings_its_own_normalization(tmp_path: Path):
    torch.save(release_checkpoint(dataset="cityscapes"), tmp_path / "release.pth")
    network = build_network("DeepLab", 21)
    load_pretrained(network, tmp_path / "release.pth", peer=0)
    assert network.normalization.bgr
    assert network.normalization.mean[0].item() == pytest.approx(73.15835921)


def test_each_peer_has_weights_and_a_normalization_of_its_own(tmp_path: Path):
    """As the release: COCO weights for one student, ImageNet's for the other."""
    source = build_network("DeepLab", 2, "resnet18")
    backbone = {name: value for name, value in source.backbone.state_dict().items() if name != "stride_in_conv1"}
    torch.save(backbone, tmp_path / "imagenet.pth")
    torch.save(backbone | {"layer5.conv2d_list.0.weight": torch.zeros(2, 2)}, tmp_path / "coco.pth")
    paths = [str(tmp_path / "coco.pth"), str(tmp_path / "imagenet.pth")]
    values = tiny_values(pretrained=paths, backbone_width=64)
    networks = build_students(check_config(values, source="test"))
    assert [bool(network.normalization.bgr) for network in networks] == [True, False]
    assert [network.backbone.stride_place for network in networks] == ["conv1", "conv2"]
    photograph = torch.rand(1, 3, 40, 40)
    red, blue = photograph[0, 0], photograph[0, 2]
    coco, imagenet = (network.normalization(photograph)[0, 0] for network in networks)
    torch.testing.assert_close(coco, blue * 255 - 104.00698793)
    torch.testing.assert_close(imagenet, (red - 0.485) / 0.229)


def test_a_checkpoint_of_ours_gives_each_student_its_own_weights(tmp_path: Path):
    from model import CrossTeacher, build_networks

    config = check_config(tiny_values(), source="test")
    method = CrossTeacher(build_networks(config), config, labeled_samples=1)
    for student in method.students:
        student.normalization.set_preset("coco")
    save_checkpoint(tmp_path / "ours.pth", tiny_records(method=method.state_dict()))
    again = build_students(check_config(tiny_values(pretrained=str(tmp_path / "ours.pth"), seed=7), source="test"))
    for network, student in zip(again, method.students, strict=True):
        assert all(torch.equal(value, student.state_dict()[name]) for name, value in network.state_dict().items())


# ------------------------------------------------------------------------------------------------ by hand


def by_hand(network: SegmentationNetwork, path: Path) -> Tensor:
    """METHOD 10, protocol release, in plain float32: (C,h,w) logits at the image's size."""
    image = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    image = image[:, :, ::-1] - np.array([104.00698793, 116.66876762, 122.67891434], dtype=np.float32)  # BGR, Caffe
    height, width = image.shape[:2]
    padded = np.zeros((505, 505, 3), dtype=np.float32)
    padded[:height, :width] = image
    inputs = torch.from_numpy(padded[:, :, ::-1].transpose(2, 0, 1).copy())[None]  # RGB-ordered
    with torch.no_grad():
        logits = network(inputs).logits
    return F.interpolate(logits, (505, 505), mode="bilinear", align_corners=True)[0, :, :height, :width]


@pytest.mark.slow
@pytest.mark.skipif(not VOC.is_dir(), reason="needs the VOC images in ../shared/voc_samples")
def test_predictions_of_a_release_checkpoint_equal_a_computation_by_hand(tmp_path: Path):
    state = release_checkpoint()
    torch.save(state, tmp_path / "checkpoint-iter160000.pth")
    ids = (VOC / "ImageSets/Segmentation/val.txt").read_text().split()[:2]
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for name in ids:
        shutil.copy(VOC / f"JPEGImages/{name}.jpg", root / "JPEGImages")
        shutil.copy(VOC / f"SegmentationClass/{name}.png", root / "SegmentationClass")
    (root / "val.txt").write_text("\n".join(ids))
    done = run(
        "evaluateSSL.py", "-m", tmp_path / "checkpoint-iter160000.pth", "--protocol", "release", "--data-root", root,
        "--set", "dataset.labels=SegmentationClass/{id}.png", "--set", "dataset.val=val.txt", "--models", "student",
        "--save-output-images", "--output", tmp_path / "out", "--workers", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    network = build_network("DeepLab", 21).eval()
    load_release_weights(network, state["model"])
    for name in ids:
        logits = by_hand(network, root / f"JPEGImages/{name}.jpg")
        predicted = torch.from_numpy(np.array(Image.open(tmp_path / f"out/images/{name}.png"))).long()
        best = logits.max(dim=0).values
        lead = best - logits.gather(0, predicted[None])[0]
        ties = 1e-4 * logits.abs().max()
        assert lead.max() <= ties, "another class is chosen where it is not a tie"
        assert (predicted == logits.argmax(dim=0)).float().mean() > 0.9999
        assert len(predicted.unique()) > 1, "one class everywhere would prove little"
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["protocol"] == "release"
    assert (result["labeled"], result["step"], result["images"]) == (212, 160000, 2)


# ------------------------------------------------------------------------------------------------ by command


def made_up(dataset: str, root: Path) -> None:
    """A small tree in the dataset's own layout with as many training images as the release's file wants."""
    rng = np.random.default_rng(0)
    if dataset == "pascal_voc":
        names = [f"2007_{index:06d}" for index in range(216)]
        lists = root / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        (lists / "train_aug.txt").write_text("\n".join(names[:214]))
        (lists / "val.txt").write_text("\n".join(names[214:]))
        paths = [(root / f"JPEGImages/{n}.jpg", root / f"SegmentationClassAug/{n}.png") for n in names]
        values = np.array([0, 3, 20, 255], np.uint8)
    else:
        ids = [f"{'train' if i < 374 else 'val'}/ulm/ulm_{i:06d}_000019" for i in range(376)]
        paths = [(root / f"leftImg8bit/{i}_leftImg8bit.png", root / f"gtFine/{i}_gtFine_labelIds.png") for i in ids]
        values = np.array([0, 7, 11, 33], np.uint8)
    for image, label in paths:
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 64, 3), dtype=np.uint8)).save(image)
        Image.fromarray(values[rng.integers(0, 4, (40, 64))]).save(label)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["pascal_voc", "cityscapes"])
def test_the_releases_files_train_unchanged_with_both_scripts(dataset: str, tmp_path: Path):
    """But for what makes it small: the network, its weights, the number of steps, and where runs and data lie."""
    made_up(dataset, tmp_path / "data")
    (tmp_path / "config.json").write_text(json.dumps(release_values(dataset)))
    changes = {
        "backbone": "resnet18", "backbone_width": 8, "feature_channels": 32, "pretrained": "none",
        "training.num_iterations": 1, "training.batch_size": 2, "utils.checkpoint_dir": str(tmp_path / "runs"),
    }  # fmt: skip
    small = [f"--set={key}={value}" for key, value in changes.items()]
    for script in ("cross_teacher_contr.py", "cross_teacher_deeplabv3+.py"):
        done = run(script, "-c", tmp_path / "config.json", "-n", "moved", "--data-root", tmp_path / "data", *small)
        assert done.returncode == 0, done.stderr
        split = 1 if dataset == "pascal_voc" else 0
        drawn = f"warning: no splits/{dataset}/split_{split}.txt: the labeled images are drawn by a seeded permutation"
        assert done.stderr.count(drawn) == 1
        assert done.stderr.count("(labeled images: hash ") == 1
