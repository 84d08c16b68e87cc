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
        choices=("release", "original", "sliding"),
        default="original",
        help="release: the released code's padded or resized images; original (default): labels at full size; "
        "sliding: at full size, from overlapping crops of the training's size",
    )
    _add_test_time(parser)
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="which: student_0 student_1 teacher_0 teacher_1 ensemble, default all; the first is the main one where "
        "there is no ensemble",
    )
    add("--workers", type=int, metavar="N", help="processes that load images; default: the configuration's")
    add(
        "--split",
        choices=("val", "test", "labeled", "unlabeled"),
        default="val",
        help="list of images, default val; unlabeled needs label files",
    )
    add("--save-output-images", action="store_true", help="also write the main model's predictions as palette PNGs")
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


def _add_test_time(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    parser.add_argument(
        "--scales",
        type=_scale,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="average over images resized by these factors, for example 0.75 1 1.25",
    )


def training_overrides(args: argparse.Namespace) -> list[str]:
    """The training command's share of the configuration, as ``KEY=VALUE``."""
    if args.gpus != 1:
        raise UserError(f"--gpus {args.gpus}: this version trains on one GPU; leave --gpus out")
    return data_overrides(args)


def data_overrides(args: argparse.Namespace) -> list[str]:
    """``--set``, ``--data-root`` and ``--workers`` as ``KEY=VALUE``."""
    root = [f"data_root={json.dumps(args.data_root)}"] if args.data_root else []
    workers = getattr(args, "workers", None)
    return [*args.set, *root, *([f"training.num_workers={workers}"] if workers is not None else [])]


def evaluation_folder(args: argparse.Namespace) -> str:
    """The name of the folder of an evaluation's results; other settings never overwrite them."""
    scales = [f"scales_{'_'.join(f'{scale:g}' for scale in args.scales)}"] if args.scales != [1.0] else []
    return "-".join(["evaluation", args.split, args.protocol, *(["flip"] if args.flip else []), *scales])


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.1 <= scale <= 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no factor from 0.1 to 4")
    return scale


def _given(text: str) -> str:
    """An option's value that must not be empty, as it is when a shell variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text
