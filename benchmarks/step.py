"""Time whole training steps of several settings side by side: python3 -m benchmarks.step --help.

A step is all that the trainer does with one batch: both contrastive terms are active and the banks are full; images
are random and already in memory. "networks" is the networks' own work in such a step: the students' passes forward
and backward, the teachers' forward. The settings take turns, round by round; medians are reported.

Under torchrun the processes share each batch, as in training; benchmarks/scaling.py compares their numbers.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model import CrossTeacher, build_networks
from model.teacher import predict_frozen
from utils.batch import Batch
from utils.config import Config, check_config, parse_size
from utils.distributed import World, part_size, process_group
from utils.errors import run_script
from utils.logger import RunLogger
from utils.run import Run, choose_device, code_version
from utils.speed import autocast
from utils.trainer import Trainer, build_optimizer

SETTINGS = {
    "fp32": {},
    "tf32": {"precision": "tf32"},
    "fp32 channels-last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16 channels-last": {"precision": "bf16", "channels_last": True},
    "fp16 channels-last": {"precision": "fp16", "channels_last": True},
    "fp32 recomputed": {"checkpoint_activations": True},
    "bf16 channels-last recomputed": {"precision": "bf16", "channels_last": True, "checkpoint_activations": True},
    "bf16 channels-last compiled": {"precision": "bf16", "channels_last": True, "compile": True},
}


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder, process_group(args.device, timeout=600) as here:
        device = choose_device(args.device, here)
        benches = {
            name: Bench(args, SETTINGS[name], device, Path(folder) / str(i), here)
            for i, name in enumerate(args.settings)
        }
        for bench in benches.values():  # not measured: first steps allocate and compile
            bench.step()
            bench.networks()
        seconds: dict[str, dict[str, list[float]]] = {name: {"step": [], "networks": []} for name in benches}
        for _ in range(args.rounds):
            for name, bench in benches.items():
                seconds[name]["step"].append(timed(bench.step, device))
                seconds[name]["networks"].append(timed(bench.networks, device))
        memory = {name: bench.peak_memory() for name, bench in benches.items()} if device.type == "cuda" else {}
        if here.is_first:
            report(args, seconds, memory, here)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=("DeepLab", "DeepLabv3+"), default="DeepLab")
    add("--backbone", default="resnet101")
    add("--size", default="321,321", help='"h,w" of the crops, default 321,321')
    add("--batch", type=int, default=10,
        help="labeled images a step over all processes, and as many unlabeled ones; default 10")  # fmt: skip
    add("--classes", type=int, default=21)
    add("--settings", nargs="+", choices=SETTINGS, default=["fp32", "bf16 channels-last"], metavar="SETTING",
        help=f"the first is the baseline; any of: {', '.join(SETTINGS)}")  # fmt: skip
    add("--rounds", type=int, default=5)
    add("--threads", type=int, help="default: torch's")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser.parse_args()


class Bench:
    """A trainer of one setting, and the networks' share of its work."""

    def __init__(
        self, args: argparse.Namespace, setting: dict[str, object], device: torch.device, folder: Path, here: World
    ) -> None:
        folder.mkdir()
        self.config, self.device = make_config(args, setting), device
        self.method = CrossTeacher(build_networks(self.config), self.config, labeled_samples=args.batch).to(device)
        fill_banks(self.method)
        self.trainer = Trainer(
            self.method,
            build_optimizer(self.method.students, self.config),
            lambda stream, start: [],
            Run(folder, device),
            config=self.config,
            evaluate=lambda step: None,  # type: ignore[arg-type, return-value]
            picture=lambda path, step: None,
            facts={},
            here=here,
        )
        self.logger = RunLogger(folder, first_step=0, total_steps=10**6, tensorboard=False, silent=True)
        self.batches = make_batches(args, self.config, part_size(self.config, here))

    def step(self) -> None:
        self.trainer._train_one(self.logger, [self.batches])

    def networks(self) -> None:
        """The passes of a step alone, in its order; their loss is a mean, so that both outputs receive gradients."""
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

    def peak_memory(self) -> float:
        """GiB of one step on a GPU, beside the other settings' weights."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


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


def fill_banks(method: CrossTeacher) -> None:
    for bank in method.banks:
        bank.entries.copy_(torch.randn_like(bank.entries))
        bank.counts.fill_(bank.entries.shape[1])
        bank.seen.fill_(True)


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


def timed(work: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(
    args: argparse.Namespace, seconds: dict[str, dict[str, list[float]]], memory: dict[str, float], here: World
) -> None:
    where = torch.cuda.get_device_name() if memory else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    where += f", {here.size} processes" if here.size > 1 else ""
    print(f"{args.model} {args.backbone}, {args.size}, batch {args.batch}+{args.batch}, {where}")
    print(f"torch {torch.__version__}, commit {code_version()}, medians of {args.rounds} rounds")
    print(f"{'setting':<30}{'s/step':>9}{'images/s':>10}{'x first':>9}{'beside the networks':>21}{'GiB':>7}")
    rows, first = [], statistics.median(next(iter(seconds.values()))["step"])
    for name, times in seconds.items():
        step = statistics.median(times["step"])
        # Of neighbours in time, because a shared machine's speed changes from minute to minute.
        beside = statistics.median(1 - b / a for a, b in zip(times["step"], times["networks"], strict=True))
        row = {"setting": name, "seconds": step, "images_per_second": 2 * args.batch / step, "speed": first / step,
               "beside_networks": beside, "gib": memory.get(name)}  # fmt: skip
        rows.append(row)
        gib = f"{memory[name]:>7.1f}" if memory else f"{'-':>7}"
        print(f"{name:<30}{step:>9.3f}{2 * args.batch / step:>10.2f}{first / step:>9.2f}{100 * beside:>19.1f} %{gib}")
    if args.json:
        about = {key: value for key, value in vars(args).items() if key != "json"}
        content = {
            **about,
            "where": where,
            "processes": here.size,
            "torch": torch.__version__,
            "commit": code_version(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
