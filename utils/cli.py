"""The command lines; importing this needs nothing but the standard library, so that --help is quick."""

import argparse
import json
from pathlib import Path

from utils.errors import UserError


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description)


def training_parser(network: str) -> argparse.ArgumentParser:
    """The command line of the two training scripts."""
    parser = _parser(f"Cross Teacher Training with {network}: train, validate, and write a run folder.")
    add = parser.add_argument
    add("-c", "--config", type=Path, required=True, help="JSON file, for example configs/configVOC.json")
    add("-n", "--name", required=True, help="name of the run; its folder is <checkpoint_dir>/<MM-DD_HH-MM>-<name>")
    add(
        "-r",
        "--resume",
        metavar="PATH|auto",
        type=_given,
        help="continue from this checkpoint (or run folder), in its folder; auto: from this name's newest, if any",
    )
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a dotted key of the JSON file; may be repeated",
    )
    add("--data-root", metavar="DIR", type=_given, help="folder of the dataset, instead of the config's")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto: cuda where there is one")
    add("--gpus", type=int, default=1, metavar="N", help="number of GPUs; this version trains on one, the default")
    add(
        "--save-images",
        type=Path,
        metavar="DIR",
        help="also write a picture of targets and predictions at every validation",
    )
    return parser


def evaluation_parser() -> argparse.ArgumentParser:
    """The command line of evaluateSSL.py."""
    parser = _parser("Evaluate the students, the teachers and the ensemble of a checkpoint.")
    add = parser.add_argument
    add(
        "-m",
        "--model-path",
        type=Path,
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint, or run folder (its best_model.pth, else checkpoint.pth)",
    )
    add(
        "--gpu",
        type=int,
        metavar="I",
        help="number of the GPU, -1: the CPU; default: the first GPU, or the CPU where there is none",
    )
    add(
        "--protocol",
        choices=("release", "original"),
        default="original",
        help="release: the released code's padded or resized images; original (default): labels at full size",
    )
    add(
        "--split",
        choices=("val", "test", "labeled", "unlabeled"),
        default="val",
        help="list of images, default val; unlabeled needs label files",
    )
    add("--save-output-images", action="store_true", help="also write the ensemble's predictions as palette PNGs")
    add("--data-root", metavar="DIR", type=_given, help="folder of the dataset, instead of the checkpoint's")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key, for example dataset.test=test.txt",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="where results go; default: evaluation-<split>-<protocol> beside the checkpoint",
    )
    return parser


def training_overrides(args: argparse.Namespace) -> list[str]:
    """The training command's share of the configuration, as ``KEY=VALUE``."""
    if args.gpus != 1:
        raise UserError(f"--gpus {args.gpus}: this version trains on one GPU; leave --gpus out")
    return data_overrides(args)


def data_overrides(args: argparse.Namespace) -> list[str]:
    """``--set`` and ``--data-root`` as ``KEY=VALUE``."""
    return [*args.set, *([f"data_root={json.dumps(args.data_root)}"] if args.data_root else [])]


def _given(text: str) -> str:
    """An option's value that must not be empty, as it is when a shell variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text
