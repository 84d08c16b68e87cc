"""Images a second of the training loader, without cache, with a cold, a warm one: python3 -m benchmarks.data --help.

The files are made on the fly: VOC's size as JPEG with crops of 321 x 321, Cityscapes' as PNG, resized to 512 x 1024,
with crops of 256 x 512. A round reads every image once, with its label map; each image is another file to the cold
cache. What starting the loading processes costs is counted, so read more images (--images) for what a long run sees.
With --workers 0 the main process loads, so one core works; with N workers N cores do, and the main process only
gathers.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2

from benchmarks.measure import Column, Row, in_turn, parser, report, start
from benchmarks.photographs import mean_bytes, write_dataset
from data import DatasetFiles, training_loader
from utils.config import check_config, parse_size
from utils.errors import UserError, run_script

CACHES = ("none", "cold", "warm")


class Kind(NamedTuple):
    """A dataset's files: size (height, width), how they are compressed, and what training makes of them."""

    size: tuple[int, int]
    suffix: str
    grain: float
    resize: str | None
    crop: str
    classes: int
    images: int


KINDS = {
    "voc": Kind((375, 500), "jpg", 11, None, "321,321", 21, 200),
    "cityscapes": Kind((1024, 2048), "png", 1.2, "512,1024", "256,512", 19, 40),
}
COLUMNS = (
    Column("dataset", "dataset"),
    Column("file_bytes", "KB/file", ".0f", 1e-3),
    Column("cache", "cache"),
    Column("workers", "workers"),
    Column("images_per_second", "images/s", ".1f"),
    Column("per_core", "images/s/core", ".1f"),
    Column("cores_needed", "cores needed", ".2f"),
)
Key = tuple[str, str, int]


def main() -> int:
    args = parse_args()
    device = start(args)
    cv2.setNumThreads(1)  # as in a loading process, so that a core is one
    with tempfile.TemporaryDirectory() as folder:
        works, sizes = dict[Key, Callable[[], None]](), dict[str, float]()
        for name in args.datasets:
            root = Path(folder) / name
            kind = KINDS[name]
            size, images = parse_size(args.size) if args.size else kind.size, args.images or kind.images
            dataset = write_dataset(
                root, images=images, size=size, classes=kind.classes, kind=kind.suffix, grain=kind.grain
            )
            sizes[name] = mean_bytes(root / "images")
            for workers in args.workers:
                for cache in args.caches:
                    works[name, cache, workers] = make_work(args, kind, cache, workers, dataset)
        for work in works.values():  # not measured: fills the warm caches, and the system's with the files
            work()
        seconds = in_turn(works, rounds=args.rounds, device=device)
    needed = 2 * args.batch / args.step_seconds if args.step_seconds else None
    rows = [make_row(args, key, times, sizes[key[0]], needed) for key, times in seconds.items()]
    want = (
        f"a step of {args.step_seconds} s needs {needed:.1f} images/s" if needed else "--step-seconds S tells the need"
    )
    report(
        args,
        f"training crops of labeled images, batches of {args.batch}",
        COLUMNS,
        rows,
        device=device,
        notes=[f"{want}: {args.batch} labeled and {args.batch} unlabeled images a step"],
        images_per_second_needed=needed,
    )
    return 0


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, rounds=3)
    add = made.add_argument
    add("--datasets", nargs="+", choices=KINDS, default=list(KINDS))
    add("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    add("--workers", nargs="+", type=int, default=[0, 1, 2], help="processes that load; default 0 1 2")
    add("--images", type=int, help="files of each dataset, read once a round; default 200 of voc, 40 of cityscapes")
    add("--batch", type=int, default=10, help="default 10")
    add("--size", metavar="H,W", help="of the files; default: the dataset's")
    add("--crop", metavar="H,W", help="default: the dataset's")
    add("--step-seconds", type=float, metavar="S",
        help="what a training step takes: how many cores must load images so that it never waits")  # fmt: skip
    args = made.parse_args()
    for count in [args.images] if args.images else [KINDS[name].images for name in args.datasets]:
        if count % args.batch:
            raise UserError(f"--images {count}: expected a multiple of --batch {args.batch}; every batch is full")
    return args


def make_work(
    args: argparse.Namespace, kind: Kind, cache: str, workers: int, dataset: dict[str, Any]
) -> Callable[[], None]:
    """Reads every image once; with a cold cache, into a new folder each time."""
    folder, uses = Path(dataset["root"]) / f"cache-{cache}-{workers}", itertools.count()
    dataset, images = dataset | {"resize": kind.resize}, args.images or kind.images

    def work() -> None:
        where = folder / str(next(uses)) if cache == "cold" else folder
        data = {"input_size": args.crop or kind.crop, "cache": "none" if cache == "none" else "disk"}
        training = {
            "batch_size": args.batch, "num_iterations": images // args.batch, "num_workers": workers,
            "data": data | {"cache_dir": str(where)},
        }  # fmt: skip
        config = check_config({"pretrained": "none", "dataset": dataset, "training": training}, source="benchmark")
        read = [name for batch in training_loader(DatasetFiles(config), "labeled", start_step=0) for name in batch.ids]
        assert len(set(read)) == images, read

    return work


def make_row(args: argparse.Namespace, key: Key, times: list[float], file_bytes: float, needed: float | None) -> Row:
    name, cache, workers = key
    speed = (args.images or KINDS[name].images) / statistics.median(times)
    per_core = speed / max(1, workers)
    return {
        "dataset": name, "file_bytes": file_bytes, "cache": cache, "workers": workers, "images_per_second": speed,
        "per_core": per_core, "cores_needed": needed / per_core if needed else None,
    }  # fmt: skip


if __name__ == "__main__":
    run_script(main)
