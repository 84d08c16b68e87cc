"""How hard do the contrastive terms pull at the end of a run? python3 -m benchmarks.pull RUN_FOLDER [...]

Nothing is learned. Over some batches of the run, for student 0: how similar the anchors are to what attracts and to
what repels them, and the share of its greatest force with which each is pulled, n / (p + n) with p and n as in
docs/method.md, for the sum over the entries of other classes and for their mean. Averaged as the terms are, over each
class's anchors and then over classes.

A run without contrastive terms has empty banks: they are filled from its labeled images first, so that it shows what
the terms would do if they began there.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import DatasetFiles, training_loader
from model import CrossTeacher, build_networks
from model.memory_bank import MemoryBank
from utils.batch import Batch
from utils.checkpoint import load_checkpoint
from utils.config import Config, override_config
from utils.errors import UserError, run_script

CPU = torch.device("cpu")
MOST_ANCHORS = 4000  # of one batch, that are compared with the banks


class Finished(NamedTuple):
    """A run as its checkpoint left it, its contrastive terms switched on."""

    method: CrossTeacher
    files: DatasetFiles
    config: Config
    step: int

    def batches(self, stream: str, count: int) -> Iterator[Batch]:
        """The last ``count`` that it trained on, of "labeled" or "unlabeled" images, or all if there were fewer."""
        start = max(0, self.config.training.num_iterations - count)
        return (batch.to(CPU) for batch in training_loader(self.files, stream, start_step=start))


def load_finished(folder: Path, *, batches: int) -> Finished:
    """The last checkpoint of a run's folder; its banks are filled from so many batches if they are empty.

    Raises UserError: less than one batch, or a run without unlabeled images.
    """
    if batches < 1:
        raise UserError(f"--batches {batches}: expected at least 1")
    checkpoint = load_checkpoint(folder / "checkpoint.pth")
    values = ["pretrained=none", "training.precision=fp32"]
    values += [f"training.contrastive.{name}=1" for name in ("high_weight", "low_weight")]
    config = override_config(json.loads(checkpoint["config"]), values, source=str(folder))
    if not config.training.unlabeled.train_unlabeled:
        raise UserError(f"{folder}: trained without unlabeled images; the terms need them")
    files = DatasetFiles(config)
    shares = files.class_shares() if config.training.needs_class_shares else None
    labeled = len(files.ids("labeled"))
    method = CrossTeacher(build_networks(config), config, labeled_samples=labeled, class_shares=shares).train()
    method.load_state_dict(checkpoint["method"])
    run = Finished(method, files, config, checkpoint["step"])
    if not any(bool(bank.counts.any()) for bank in method.banks):
        most = max(1, config.training.contrastive.memory_size // 16)  # of a class from one batch
        with torch.no_grad():
            for batch in run.batches("labeled", batches):
                for teacher, bank in zip(method.teachers, method.banks, strict=True):
                    bank.take([method.offer(teacher, bank, batch, most)], most, step=run.step)
    return run


class Anchors:
    """How the anchors of a term lie among the banks' entries: means over each class's anchors, then over classes."""

    def __init__(self, banks: Sequence[MemoryBank], temperature: float) -> None:
        self.entries = torch.cat([F.normalize(bank.entries[c, :n], dim=1) for bank in banks for c, n in _counts(bank)])
        self.classes = torch.cat([torch.full((n,), c) for bank in banks for c, n in _counts(bank)])
        self.temperature = temperature
        self.found: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, features: Tensor, labels: Tensor, mask: Tensor, *, peer_features: Tensor | None = None) -> None:
        """features: (B,D,h,w). labels, mask: (B,h,w). peer_features: (B,D,h,w), the positives instead of the bank's."""
        every = 1 + int(mask.sum()) // MOST_ANCHORS
        classes = labels[mask][::every]
        anchors = F.normalize(features.permute(0, 2, 3, 1)[mask][::every], dim=1)  # (N,D)
        similarity = anchors @ self.entries.T  # (N,M)
        is_own = self.classes == classes[:, None]
        positives, is_positive = similarity, is_own
        if peer_features is not None:
            peer = F.normalize(peer_features.permute(0, 2, 3, 1)[mask][::every], dim=1)
            positives = (anchors * peer).sum(dim=1, keepdim=True)
            is_positive = torch.ones_like(positives, dtype=torch.bool)
        total = (similarity / self.temperature).masked_fill(is_own, -torch.inf).logsumexp(dim=1, keepdim=True)
        gap = total - positives / self.temperature
        self.found["classes"].append(classes)
        self.found["attracts"].append(_row_mean(positives, is_positive))
        self.found["repels"].append(_row_mean(similarity, ~is_own))
        self.found["sum"].append(_row_mean(gap.sigmoid(), is_positive))
        number = (~is_own).sum(dim=1, keepdim=True)
        self.found["mean"].append(_row_mean((gap - number.log()).sigmoid(), is_positive))

    def mean(self, name: str) -> float:
        values, classes = (torch.cat(self.found[key]) for key in (name, "classes"))
        per_class = [values[classes == one].nanmean() for one in classes.unique()]
        return float(torch.stack(per_class).nanmean()) if per_class else math.nan


def _counts(bank: MemoryBank) -> Iterator[tuple[int, int]]:
    return enumerate(bank.counts.tolist())


def _row_mean(values: Tensor, where: Tensor) -> Tensor:
    """(N,M) -> (N,), NaN where there is nothing."""
    return values.where(where, torch.nan).nanmean(dim=1)


@torch.no_grad()
def pull(folder: Path, *, batches: int) -> str:
    """A Markdown table of one run."""
    run = load_finished(folder, batches=batches)
    method, contrast = run.method, run.config.training.contrastive
    anchors = {
        "high_level": Anchors(method.banks[:1], contrast.high_temperature),
        "low_level": Anchors(method.banks, contrast.low_temperature),
    }
    streams = (run.batches(stream, batches) for stream in ("labeled", "unlabeled"))
    method.recording = True
    for step, (labeled, unlabeled) in enumerate(tqdm(zip(*streams, strict=True), total=batches), start=run.step):
        method.training_step(labeled, unlabeled, step=step)
        assert method.record is not None
        _, _, _, views, on_labeled, on_view = method.record
        where = method.reliable_pixels(labeled, on_labeled[0], views[0], on_view[0])
        anchors["high_level"].add(torch.cat((on_labeled[0].features, on_view[0].features)), *where)
        where = method.unreliable_pixels(*views, *on_view)
        anchors["low_level"].add(on_view[0].features, *where, peer_features=on_view[1].features)
    lines = [f"**{folder}**, step {run.step}, {batches} batches", ""]
    lines += ["| term | similarity to what attracts | to what repels | pull, sum | pull, mean |", "| --- " * 5 + "|"]
    for term, found in anchors.items():
        cells = [f"{found.mean(name):.2f}" for name in ("attracts", "repels", "sum", "mean")]
        lines.append(f"| {term} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="How hard the contrastive terms pull at the end of a run.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--batches", type=int, default=64, help="of each stream")
    args = parser.parse_args()
    for folder in args.folders:
        print(pull(folder, batches=args.batches), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
