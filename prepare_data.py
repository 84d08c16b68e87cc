"""Fetch, describe, split and check datasets: python3 prepare_data.py --help."""

import argparse
import json
import re
import shlex
import tempfile
from pathlib import Path

from utils.cli import data_overrides, prepare_parser
from utils.config import check_config, load_config, override_config
from utils.errors import UserError, run_script

PROJECT = Path(__file__).resolve().parent


def make(args: argparse.Namespace) -> int:
    """The commands demo, voc, camvid and cityscapes."""
    if args.command == "demo":
        from data.demo import make_demo_dataset

        print(f"demo dataset: {make_demo_dataset(args.root, seed=args.seed)}")
    elif args.command == "voc":
        from data.voc import prepare_voc

        print(prepare_voc(args.root))
    elif args.command == "camvid":
        from data.camvid import prepare_camvid

        lists = ["dataset.train=ImageSets/Segmentation/train.txt", "dataset.labeled=null", "dataset.unlabeled=null"]
        root = f"data_root={json.dumps(str(args.root))}"
        config = load_config(PROJECT / "configs/configCamVid.json", overrides=[*lists, root])
        print("\n".join(prepare_camvid(args.source, config)))
    else:
        from data.cityscapes import prepare_cityscapes

        print(prepare_cityscapes(args.root, half=args.half))
    return 0


def init(args: argparse.Namespace) -> int:
    from data.describe import describe

    derived = re.sub(r"[^\w.+-]+", "_", args.root.resolve().name, flags=re.ASCII).lstrip("_.+-")
    name = args.name or derived or "custom"
    output = args.output or PROJECT / "configs" / f"{name}.json"
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise UserError(
            f"--name {name!r}: expected letters, digits and . _ + - only, one of the first two in front, because it "
            "becomes file names"
        )
    if args.pretrained not in (None, "none", "imagenet", "coco") and not Path(args.pretrained).is_file():
        raise UserError(f"--pretrained {args.pretrained}: no such file; or one of none, imagenet, coco")
    found = describe(args.root, name=name, lists=PROJECT / "splits" / name, labeled=args.labeled, val=args.val)
    values = found.values | {key: getattr(args, key) for key in ("backbone", "pretrained") if getattr(args, key)}
    config = check_config(values, source=str(args.root))
    text = json.dumps(values, indent=2) + "\n"
    if output.exists() and output.read_text(encoding="utf-8") != text:
        raise UserError(f"{output}: is there already, and differs; remove it, or choose another --output or --name")
    output.parent.mkdir(parents=True, exist_ok=True)
    found.write_lists()
    output.write_text(text, encoding="utf-8")
    script = {"DeepLab": "cross_teacher_contr.py", "DeepLabv3+": "'cross_teacher_deeplabv3+.py'"}[config.model]
    shown = shlex.quote(str(output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output))
    print("\n".join([*found.notes, f"configuration       {shown}", ""]))
    print(f"check the data      python3 prepare_data.py check {shown}")
    print(f"how long it takes   python3 {script} --config {shown} --name {name} --dry-run")
    print(f"train               python3 {script} --config {shown} --name {name}")
    return 0


def check(args: argparse.Namespace) -> int:
    from data.check import check_dataset
    from data.describe import describe

    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as lists:
        if args.source.is_dir():
            found = describe(args.source, name=args.source.resolve().name, lists=Path(lists))
            found.write_lists()
            print("\n".join([*found.notes, ""]))
            config = override_config(found.values, data_overrides(args), source=str(args.source))
        else:
            config = load_config(args.source, overrides=data_overrides(args))
        report = check_dataset(config)
    print(report.as_text())
    if args.json:
        args.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    return UserError.exit_status if report.errors else 0


def split(args: argparse.Namespace) -> int:
    from data import DatasetFiles
    from data.write_splits import draw_splits, take_names

    files = DatasetFiles(load_config(args.config, overrides=data_overrides(args)))
    output = args.output or PROJECT / "splits" / files.block.name
    if args.kind == "draw":
        lines = draw_splits(files, amounts=args.labeled, seeds=args.seeds, cover=args.cover, output=output)
        folder = output / args.labeled[0].replace("/", "_") / f"seed{args.seeds[0]}"
    else:
        folder = args.output or output / args.file.stem
        lines = take_names(files, args.file, count=args.count, output=folder)
    shown = folder.relative_to(PROJECT) if folder.is_relative_to(PROJECT) else folder.resolve()
    settings = [f"dataset.{name}={shown / name}.txt" for name in ("labeled", "unlabeled")]
    settings += ["training.data.labeled_samples=null"] * (files.config.training.data.labeled_samples is not None)
    print("\n".join(lines))
    print(f"use it              {' '.join(f'--set {shlex.quote(setting)}' for setting in settings)}")
    return 0


def main() -> int:
    args = prepare_parser().parse_args()
    return {"init": init, "check": check, "split": split}.get(args.command, make)(args)


if __name__ == "__main__":
    run_script(main)
