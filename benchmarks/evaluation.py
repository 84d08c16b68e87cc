"""Time a whole evaluation beside its networks' forward passes alone: python3 -m benchmarks.evaluation --help.

The whole is what a validation does: files decoded and resized, two students and two teachers applied, their outputs
upsampled, the ensemble, every model's confusion matrix. "forward" repeats the networks' passes on random inputs of the
same shapes. overhead = whole / forward - 1, of neighbours in time. The networks have random weights. Without --config
the images are generated, 480 x 360 with 11 classes, and the backbone is resnet18.
"""

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Column, Row, add_device, in_turn, median_ratio, parser, report, start
from benchmarks.photographs import mean_bytes, write_dataset
from data import DatasetFiles, evaluation_loader
from model import build_networks
from utils.config import Config, check_config, load_config, parse_size
from utils.errors import run_script
from utils.evaluate import Evaluation, evaluate, model_names
from utils.inference import Inference, inference_for
from utils.speed import full_float32

MODELS = ("DeepLabv3+", "DeepLab")
COLUMNS = (
    Column("network", "network"),
    Column("workers", "workers"),
    Column("whole", "whole s", ".2f"),
    Column("forward", "forward s", ".2f"),
    Column("images_per_second", "images/s", ".1f"),
    Column("overhead", "overhead %", ".1f", 100),
)


def main() -> int:
    args = parse_args()
    device = start(args)
    with tempfile.TemporaryDirectory() as folder:
        config, file_size = make_config(args, Path(folder))
        benches = {(name, workers): Bench(args, config, name, workers, device)
                   for name in args.networks or [config.model] for workers in args.workers}  # fmt: skip
        for bench in benches.values():  # not measured: fills the caches of the disk and of the allocator
            bench.record()
        works = {(*key, part): getattr(bench, part) for key, bench in benches.items() for part in ("whole", "forward")}
        seconds = in_turn(works, rounds=args.rounds, device=device)
        rows = [make_row(key, seconds, bench) for key, bench in benches.items()]
        first = next(iter(benches.values()))
        size = " x ".join(str(side) for side in first.label_size)
        report(
            args,
            f"evaluation of {first.images} images with labels of {size}, {config.num_classes} classes, "
            f"{config.backbone}, {len(first.networks)} networks and the ensemble, protocol {args.protocol}",
            COLUMNS,
            rows,
            device=device,
            notes=[f"image files of {file_size / 1000:.0f} KB on average"],
            label_size=first.label_size,
            images=first.images,
            models=model_names(first.networks),
            mean_file_bytes=file_size,
        )
        if args.profile:
            print(first.profile())
    return 0


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, rounds=5)
    add = made.add_argument
    add("--networks", nargs="+", choices=MODELS, help="default: the configuration's; generated images: DeepLabv3+")
    add("--config", type=Path, metavar="FILE", help="evaluate this configuration's dataset; default: generated images")
    add("--data-root", metavar="DIR", help="the dataset's folder, for --config")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the configuration")
    add("--split", choices=("val", "test"), default="val")
    add("--size", default="360,480", help='"h,w" of generated images; default 360,480')
    add("--images", type=int, default=24, help="the first so many of the split; default 24")
    add("--protocol", choices=("original", "release", "sliding"), default="original")
    add("--workers", nargs="+", type=int, default=[0], help="processes that load images, one row for each; default 0")
    add("--profile", action="store_true", help="also list the operations of the first row's whole by their time")
    add_device(made)
    return made.parse_args()


class Bench:
    """One row: networks of random weights, and how many processes load the images."""

    def __init__(self, args: argparse.Namespace, config: Config, name: str, workers: int, device: torch.device) -> None:
        training = config.training.model_copy(update={"num_workers": workers})
        self.config = config.model_copy(update={"model": name, "training": training})
        students = [student.to(device).eval() for student in build_networks(self.config)]
        self.networks: dict[str, Any] = {f"student_{own}": student for own, student in enumerate(students)}
        self.networks |= {f"teacher_{own}": copy.deepcopy(student) for own, student in enumerate(students)}
        self.files, self.device, self.split, self.protocol = (
            DatasetFiles(self.config),
            device,
            args.split,
            args.protocol,
        )
        self.inference: Inference = inference_for(self.config, args.protocol)
        self.shapes: list[tuple[str, torch.Size]] = []
        self.inputs: dict[torch.Size, torch.Tensor] = {}
        self.images, self.label_size = 0, (0, 0)

    def record(self) -> None:
        """A whole evaluation that notes the shape of every input of every network."""
        with noted(self.networks, self.shapes):
            self.images = self.whole().about["images"]
        for shape in {shape for _, shape in self.shapes}:
            self.inputs[shape] = torch.randn(shape, device=self.device)
        label = next(iter(evaluation_loader(self.files, self.split, protocol=self.protocol, batch_size=1)))[0].label
        self.label_size = tuple(label.shape)
        self.forward()

    def whole(self) -> Evaluation:
        return evaluate(
            self.networks,
            evaluation_loader(self.files, self.split, protocol=self.protocol),
            class_names=self.files.block.class_names,
            device=self.device,
            inference=self.inference,
            about={},
        )

    @torch.no_grad()
    @full_float32()
    def forward(self) -> None:
        """The same passes in the same order, inputs ready, outputs dropped."""
        for name, shape in self.shapes:
            self.networks[name](self.inputs[shape])

    def profile(self) -> str:
        """The operations of one evaluation, by the time that they took themselves."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        with torch.profiler.profile(activities=kinds) as profile:
            self.whole()
        order = f"self_{self.device.type}_time_total"
        return str(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40))


@contextmanager
def noted(networks: dict[str, Any], shapes: list[tuple[str, torch.Size]]) -> Iterator[None]:
    """In it every pass of a network adds its name and its input's shape."""

    def note(name: str) -> Any:
        return lambda _, inputs: shapes.append((name, inputs[0].shape))

    handles = [network.register_forward_pre_hook(note(name)) for name, network in networks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def make_config(args: argparse.Namespace, folder: Path) -> tuple[Config, float]:
    """The configuration whose split holds --images images, and the mean size of their files in bytes."""
    if args.config is None:
        size = parse_size(args.size)
        dataset = write_dataset(folder / "data", images=args.images, size=size, classes=11, kind="jpg", grain=5)
        values = {"model": MODELS[0], "backbone": "resnet18", "pretrained": "none", "dataset": dataset, "training": {}}
        return check_config(values, source="benchmark"), mean_bytes(folder / "data" / "images")
    root = [f"data_root={json.dumps(args.data_root)}"] if args.data_root else []
    config = load_config(args.config, overrides=[*root, *args.set])
    files = DatasetFiles(config)
    ids = files.ids(args.split)[: args.images]
    few = folder / "few.txt"
    few.write_text("".join(f"{identifier}\n" for identifier in ids), encoding="utf-8")
    dataset = config.data.model_copy(update={args.split: str(few)})
    sizes = [files.image_path(identifier).stat().st_size for identifier in ids]
    return config.model_copy(update={"dataset": dataset}), sum(sizes) / len(sizes)


def make_row(key: tuple[str, int], seconds: dict[tuple[str, int, str], list[float]], bench: Bench) -> Row:
    whole, forward = (seconds[*key, part] for part in ("whole", "forward"))
    return {
        "network": key[0], "workers": key[1], "whole": statistics.median(whole), "forward": statistics.median(forward),
        "images_per_second": bench.images / statistics.median(whole), "overhead": median_ratio(whole, forward) - 1,
    }  # fmt: skip


if __name__ == "__main__":
    run_script(main)
