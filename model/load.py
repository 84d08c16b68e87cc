"""The trained networks of a checkpoint, ours or the authors' release's, ready to be applied to images."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.build import build_network, build_networks
from model.cross_teacher import CrossTeacher
from model.exported import Exported, OnnxNetwork, load_onnx
from model.network import SegmentationNetwork
from model.pretrained import RELEASE_NORMALIZATIONS, load_release_weights
from utils.checkpoint import check_format, is_release, read_file
from utils.config import Config, DatasetConfig, override_config
from utils.errors import CheckpointError, UserError


class Trained(NamedTuple):
    """networks: by name: student_0, teacher_1, ...; of a release's checkpoint student and teacher.

    about: which training made them, for results: its images, step and seed, and commit, torch and machine if they are
        known.
    """

    networks: dict[str, SegmentationNetwork]
    config: Config
    about: dict[str, Any]


def load_trained(path: Path, *, overrides: Sequence[str] = ()) -> Trained:
    """The networks of a checkpoint with its configuration, changed by ``KEY=VALUE`` overrides.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or not a checkpoint that this code knows, or its weights
            are not finite.
        UserError: an override is wrong.
    """
    state = read_file(path)
    try:
        trained = (_load_release if is_release(state) else _load_ours)(state, path, overrides)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no checkpoint, or a damaged one ({type(error).__name__}: {error})") from None
    for name, network in trained.networks.items():
        if not all(torch.isfinite(one).all() for one in network.state_dict().values()):
            raise CheckpointError(f"{path}: weights of {name} are not finite; take a checkpoint of before")
    return trained


def _load_ours(state: dict[str, Any], path: Path, overrides: Sequence[str]) -> Trained:
    state = check_format(state, path)
    saved = json.loads(state["config"])
    about = state["facts"] | {"step": state["step"], "seed": saved["seed"]} | state["origin"]
    config = override_config(saved, overrides, source=str(path))
    method = CrossTeacher(build_networks(config), config, labeled_samples=1)
    try:
        method.load_state_dict(state["method"])
    except (RuntimeError, KeyError) as error:
        why = f"its configuration with {', '.join(overrides)}" if overrides else "its own configuration"
        raise CheckpointError(f"{path}: does not fit the model of {why}: {str(error)[:300]}") from None
    return Trained(method.models(), config, about)


def load_for_prediction(
    path: Path,
) -> tuple[dict[str, SegmentationNetwork] | dict[str, OnnxNetwork], DatasetConfig | Exported]:
    """The networks of a checkpoint or of an .onnx file that export.py wrote, and what their classes are.

    Raises:
        UserError: see ``load_trained`` and ``load_onnx``.
    """
    if path.suffix.lower() == ".onnx":
        network = load_onnx(path)
        return {network.about.model: network}, network.about
    if path.suffix.lower() == ".pt2":
        raise UserError(f"{path}: predict.py runs checkpoints and .onnx files; torch.export.load reads this one")
    networks, config, _ = load_trained(path)
    return networks, config.data


def _load_release(state: dict[str, Any], path: Path, overrides: Sequence[str]) -> Trained:
    """One student, and its teacher where it was trained with unlabeled images: all that the release writes."""
    saved, weights = state["config"], {"student": state["model"]}
    if isinstance(state.get("ema_model"), dict):
        weights["teacher"] = state["ema_model"]
    if not isinstance(saved, dict) or saved.get("dataset") not in RELEASE_NORMALIZATIONS:
        known = " or ".join(RELEASE_NORMALIZATIONS)
        raise CheckpointError(f"{path}: looks like a release's checkpoint, but its config names no dataset {known}")
    # The release's DeepLabv3+ script leaves "DeepLab" in its config; the parameters know better.
    name = "DeepLab" if any("layer5." in key for key in state["model"]) else "DeepLabv3+"
    kept = {key: saved[key] for key in ("dataset", "seed", "ignore_label") if key in saved}
    data = saved.get("training", {}).get("data", {})
    crop = {key: data[key] for key in ("input_size",) if key in data}
    values = {"model": name, "pretrained": "none", **kept, "training": {"data": crop}}
    dataset = saved["dataset"]
    config = override_config(values, overrides, source=str(path))
    networks = {}
    for role, tensors in weights.items():
        networks[role] = build_network(name, config.num_classes)
        try:
            load_release_weights(networks[role], tensors, dataset=dataset)
        except ValueError as error:
            raise CheckpointError(f"{path}: {role}: {error}") from None
    about = {"labeled": data.get("labeled_samples"), "step": state["iteration"], "seed": saved.get("seed")}
    return Trained(networks, config, about)
