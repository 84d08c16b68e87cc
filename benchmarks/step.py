"""Time whole training steps of several settings side by side: python3 -m benchmarks.step --help.

A step is all that the trainer does with one batch: both contrastive terms are active and the banks are full; images
are random and already in memory. "networks" is the networks' own work in such a step: the students' passes forward
and backward, the teachers' forward. "of a matrix product" compares the step's floating point operations per second
with those of one large matrix product in the same precision. Memory is the most that tensors of a step need at once,
weights, optimizer and banks included. The settings take turns, round by round.

Under torchrun the processes share each batch, as in training; benchmarks/scaling.py compares their numbers.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Column, Row, add_device, in_turn, median_ratio, parser, peak_memory, report, start
from model import CrossTeacher, build_networks
from model.teacher import predict_frozen
from utils.batch import Batch
from utils.config import Config, check_config, parse_size
from utils.distributed import World, part_size, process_group
from utils.errors import run_script
from utils.logger import RunLogger
from utils.run import Run, choose_device
from utils.speed import PRECISIONS, autocast, set_float32
from utils.trainer import Trainer, build_optimizer

SETTINGS: dict[str, dict[str, object]] = {
    "fp32": {},
    "tf32": {"precision": "tf32"},
    "fp32 channels-last": {"channels_last": True},
    "fp32 recomputed": {"checkpoint_activations": True},
    "bf16": {"precision": "bf16"},
    "bf16 channels-last": {"precision": "bf16", "channels_last": True},
    "bf16 channels-last recomputed": {"precision": "bf16", "channels_last": True, "checkpoint_activations": True},
    "bf16 channels-last compiled": {"precision": "bf16", "channels_last": True, "compile": True},
    "fp16 channels-last": {"precision": "fp16", "channels_last": True},
}
COLUMNS = (
    Column("setting", "setting"),
    Column("seconds", "s/step", ".3f"),
    Column("images_per_second", "images/s", ".2f"),
    Column("speed", "x first", ".2f"),
    Column("beside_networks", "beside the networks %", ".1f", 100),
    Column("teraflops", "TFLOP/s", ".2f"),
    Column("of_product", "of a matrix product %", ".0f", 100),
    Column("gib", "GiB", ".2f"),
)
LARGE = {"cuda": 8192, "cpu": 2048}  # sides of the matrices


def main() -> int:
    args = parse_args()
    start(args)
    with tempfile.TemporaryDirectory() as folder, process_group(args.device, timeout=600) as here:
        device = choose_device(args.device, here)
        benches = {
            name: Bench(args, SETTINGS[name], device, Path(folder) / f"{here.rank}_{index}", here)
            for index, name in enumerate(args.settings)
        }
        works = {(name, what): getattr(bench, what) for name, bench in benches.items() for what in Bench.MEASURED}
        for work in works.values():  # not measured: first steps allocate and compile
            work()
        seconds = in_turn(works, rounds=args.rounds, device=device)
        flops, gib = {}, {}
        for name, bench in benches.items():
            gib[name] = None if args.no_memory else bench.held() + peak_memory(bench.step, device) / 2**30
            with FlopCounterMode(display=False) as counter:
                bench.step()
            flops[name] = counter.get_total_flops()
        if here.is_first:
            title = f"{args.model} {args.backbone}, {args.size}, batch {args.batch}+{args.batch}"
            title += f", {here.size} processes" if here.size > 1 else ""
            rows = table(args, seconds, flops, gib, 2 * LARGE[device.type] ** 3)
            report(args, title, COLUMNS, rows, device=device, processes=here.size)
    return 0


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, rounds=5)
    add = made.add_argument
    add("--model", choices=("DeepLab", "DeepLabv3+"), default="DeepLab")
    add("--backbone", default="resnet101")
    add("--size", default="321,321", help='"h,w" of the crops, default 321,321')
    add("--batch", type=int, default=10,
        help="labeled images a step over all processes, and as many unlabeled ones; default 10")  # fmt: skip
    add("--classes", type=int, default=21)
    add("--settings", nargs="+", choices=SETTINGS, default=["fp32", "bf16 channels-last"], metavar="SETTING",
        help=f"the first is the baseline; any of: {', '.join(SETTINGS)}")  # fmt: skip
    add("--no-memory", action="store_true", help="leave out the memory: on a CPU it takes a long step to find")
    add_device(made)
    return made.parse_args()


def table(
    args: argparse.Namespace,
    seconds: dict[tuple[str, str], list[float]],
    flops: dict[str, int],
    gib: dict[str, float | None],
    product_flops: int,
) -> list[Row]:
    rows, first = [], seconds[args.settings[0], "step"]
    for name in args.settings:
        steps = seconds[name, "step"]
        step, product = statistics.median(steps), statistics.median(seconds[name, "product"])
        speed, beside = flops[name] / step, 1 - median_ratio(seconds[name, "networks"], steps)
        # Ratios of neighbours in time, because a shared machine's speed changes from minute to minute.
        row = {"setting": name, "seconds": step, "images_per_second": 2 * args.batch / step,
               "speed": median_ratio(first, steps), "beside_networks": beside,
               "teraflops": speed / 1e12, "of_product": speed * product / product_flops, "gib": gib[name]}  # fmt: skip
        rows.append(row)
    return rows


class Bench:
    """A trainer of one setting, and the networks' share of its work."""

    MEASURED = ("step", "networks", "product")

    def __init__(
        self, args: argparse.Namespace, setting: dict[str, object], device: torch.device, folder: Path, here: World
    ) -> None:
        folder.mkdir()
        self.config, self.device = make_config(args, setting), device
        self.method = CrossTeacher(build_networks(self.config), self.config, labeled_samples=args.batch).to(device)
        for bank in self.method.banks:
            bank.pretend_full()
        self.trainer = Trainer(
            self.method,
            build_optimizer(self.method.students, self.config),
            lambda stream, start: [],
            Run(folder, device),
            config=self.config,
            evaluate=lambda step, through: None,  # type: ignore[arg-type, return-value]
            picture=lambda path, step: [],
            facts={},
            here=here,
        )
        self.logger = RunLogger(folder, first_step=0, total_steps=10**6, tensorboard=False, silent=True)
        self.batches = make_batches(args, self.config, part_size(self.config, here))
        side = LARGE[device.type]
        dtype = PRECISIONS.get(self.config.training.precision, torch.float32)
        self.factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]

    def step(self) -> None:
        set_float32(self.config)  # of the whole process: the bench before may have set it otherwise
        self.trainer._train_one(self.logger, [self.batches])

    def networks(self) -> None:
        """The passes of a step alone, in its order; their loss is a mean, so that both outputs receive gradients."""
        set_float32(self.config)
        labeled, unlabeled = (batch.to(self.device).images for batch in self.batches)
        self.method.zero_grad()
        with autocast(self.config, self.device):
            seen = [student(student.normalization(labeled)) for student in self.method.students]
            for teacher in self.method.teachers:
                predict_frozen(teacher.network, unlabeled, norm=teacher.norm)
            seen += [student(student.normalization(unlabeled)) for student in self.method.students]
            torch.stack([part.float().mean() for output in seen for part in output]).sum().backward()
            for teacher in self.method.teachers:
                predict_frozen(teacher.network, labeled, norm=teacher.norm)

    def product(self) -> None:
        set_float32(self.config)
        self.factors[0] @ self.factors[1]

    def held(self) -> float:
        """GiB that the method and its optimizer hold between two steps."""
        tensors = [*self.method.parameters(), *self.method.buffers()]
        tensors += [value for state in self.trainer.optimizer.state.values() for value in state.values()
                    if isinstance(value, torch.Tensor)]  # fmt: skip
        return sum(tensor.nbytes for tensor in tensors) / 2**30


def make_config(args: argparse.Namespace, setting: dict[str, object]) -> Config:
    dataset = {"root": "nowhere", "labeled": "a", "unlabeled": "b", "num_classes": args.classes}
    # Labeled pixels are anchors of one term, unlabeled ones of the other: random networks are sure of nothing.
    contrastive = {"contrast_start": 0, "direction": "none"}
    training = {"batch_size": args.batch, "data": {"input_size": args.size}, "contrastive": contrastive, **setting}
    values = {
        "model": args.model, "backbone": args.backbone, "pretrained": "none", "dataset": dataset,
        "training": training,
    }  # fmt: skip
    return check_config(values, source="benchmark")


def make_batches(args: argparse.Namespace, config: Config, batch: int) -> tuple[Batch, Batch]:
    height, width = parse_size(args.size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * batch, 3, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, args.classes, (batch, height // 16 + 1, width // 16 + 1), generator=generator)
    labels = labels.byte().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width].contiguous()
    valid, names = torch.ones(batch, height, width, dtype=torch.bool), [str(i) for i in range(batch)]
    return (
        Batch(images[:batch], labels, valid, names),
        Batch(images[batch:], torch.full_like(labels, config.ignore_label), valid, names),
    )


if __name__ == "__main__":
    run_script(main)
