"""Time and memory of both contrastive terms against the number of anchors: python3 -m benchmarks.contrast --help.

"ours" is utils.contrast, which works through the anchors in chunks; "direct" is the formula written down with one
similarity matrix of all anchors and entries, which autograd keeps. Forward and backward pass together. Memory is the
peak of what both passes allocate: without features, labels and banks, with the gradient of the features, which any
form needs and whose size is told. First both forms are compared, value and gradient.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Column, Row, add_device, in_turn, median_ratio, parser, peak_memory, report, start
from utils.contrast import high_level_contrast, low_level_contrast
from utils.errors import UserError, run_script

TOLERANCE = 1e-4
CHUNKS = 3  # in which the comparison computes our form
TERMS = ("high_level", "low_level")
FORMS = ("ours", "direct")
MIB = 2**-20
COLUMNS = (
    Column("term", "term"),
    Column("anchors", "anchors"),
    Column("ours_seconds", "ours s", ".3f"),
    Column("direct_seconds", "direct s", ".3f"),
    Column("speed", "direct / ours", ".2f"),
    Column("ours_bytes", "ours MiB", ".1f", MIB),
    Column("direct_bytes", "direct MiB", ".1f", MIB),
    Column("gradient_bytes", "of it gradient MiB", ".1f", MIB),
)


class Inputs(NamedTuple):
    """features and peer (1,D,1,N), the former with a gradient; labels (1,1,N); banks: two of (C,K,D)."""

    features: Tensor
    peer: Tensor
    labels: Tensor
    banks: list[Tensor]


def main() -> int:
    args = parse_args()
    device = start(args)
    checks = [check(args, term, device) for term in TERMS]
    rows, works = [], dict[tuple[str, int, str], Callable[[], object]]()
    for term in TERMS:
        for anchors in args.anchors:
            inputs = make_inputs(args, anchors, device)
            for form in forms_for(args, anchors):
                works[term, anchors, form] = both_passes(args, term, form, inputs)
    # Measured first: every work is then warm.
    memory = {key: peak_memory(work, device) for key, work in works.items()}
    seconds = in_turn(works, rounds=args.rounds, device=device)
    for term in TERMS:
        rows += [make_row(args, term, anchors, seconds, memory) for anchors in args.anchors]
    report(
        args,
        f"contrastive terms forward and backward: {args.classes} classes x {args.entries} entries x {args.channels} "
        f"channels, {args.temperature} temperature, the entries of two banks for low_level",
        COLUMNS,
        rows,
        device=device,
        notes=[
            f"{one['term']}: at {one['anchors']} anchors in {CHUNKS} chunks the forms differ by "
            f"{one['value_difference']:.1e} in the value and {one['gradient_difference']:.1e} in the gradient, relative"
            for one in checks
        ],
        checks=checks,
    )
    return 0


def parse_args() -> argparse.Namespace:
    made = parser(__doc__, rounds=3)
    add = made.add_argument
    add("--anchors", nargs="+", type=int, default=[2048, 8192, 33620], metavar="N",
        help="a row for each; default 2048 8192 33620, the last of them 20 images of 41 x 41 features")  # fmt: skip
    add("--direct-up-to", type=int, default=8192, metavar="N",
        help="the direct form needs several GB for many anchors; default: not above 8192")  # fmt: skip
    add("--classes", type=int, default=21)
    add("--entries", type=int, default=256, help="of each class in a bank; default 256")
    add("--channels", type=int, default=256)
    add("--temperature", type=float, default=0.1)
    add_device(made)
    return made.parse_args()


def forms_for(args: argparse.Namespace, anchors: int) -> tuple[str, ...]:
    return FORMS if anchors <= args.direct_up_to else FORMS[:1]


def make_inputs(args: argparse.Namespace, anchors: int, device: torch.device) -> Inputs:
    """Features near a direction of their class, as trained ones are; the same whatever the device."""
    generator = torch.Generator().manual_seed(0)

    def near(labels: Tensor) -> Tensor:
        return centres[labels] + torch.randn(len(labels), args.channels, generator=generator)

    centres = torch.randn(args.classes, args.channels, generator=generator)
    labels = torch.randint(0, args.classes, (anchors,), generator=generator)
    of_entries = torch.arange(args.classes).repeat_interleave(args.entries)
    features, peer = (near(labels).T[None, :, None].contiguous().to(device) for _ in range(2))
    banks = [near(of_entries).view(args.classes, args.entries, args.channels).to(device) for _ in range(2)]
    return Inputs(features.requires_grad_(), peer, labels[None, None].to(device), banks)


def loss_of(args: argparse.Namespace, term: str, form: str, inputs: Inputs, *, chunk_size: int | None = None) -> Tensor:
    features, peer, labels, banks = inputs
    if form == "direct":
        function = direct_high_level if term == "high_level" else direct_low_level
        return function(inputs, args.temperature)
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    options = {"temperature": args.temperature, "chunk_size": chunk_size}
    if term == "high_level":
        return high_level_contrast(features, labels, everywhere, banks[0], **options)
    return low_level_contrast(features, peer, labels, everywhere, banks, **options)


def both_passes(args: argparse.Namespace, term: str, form: str, inputs: Inputs) -> Callable[[], object]:
    def work() -> None:
        torch.autograd.grad(loss_of(args, term, form, inputs), inputs.features)

    return work


def direct_high_level(inputs: Inputs, temperature: float) -> Tensor:
    """L_hc with one matrix of all anchors (N) and entries (C K)."""
    entries = inputs.banks[0]
    _, labels, similarity = _direct_similarity(inputs, entries, temperature)
    is_own = _is_own(labels, entries)
    positives = similarity.unflatten(1, entries.shape[:2])[torch.arange(len(labels)), labels]  # (N, K)
    negatives = similarity.masked_fill(is_own, -torch.inf).logsumexp(dim=1, keepdim=True)  # (N, 1)
    return _mean_over_classes((torch.logaddexp(positives, negatives) - positives).mean(dim=1), labels, len(entries))


def direct_low_level(inputs: Inputs, temperature: float) -> Tensor:
    """L_lc with one matrix of all anchors (N) and the entries of both banks (2 C K)."""
    entries = torch.cat(inputs.banks, dim=1)
    anchors, labels, similarity = _direct_similarity(inputs, entries, temperature)
    negatives = similarity.masked_fill(_is_own(labels, entries), -torch.inf).logsumexp(dim=1)
    positive = (anchors * F.normalize(_as_rows(inputs.peer), dim=1)).sum(dim=1) / temperature
    return _mean_over_classes(torch.logaddexp(positive, negatives) - positive, labels, len(entries))


def _direct_similarity(inputs: Inputs, entries: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit anchors (N,D), their labels (N,), cosine similarities / temperature (N, C K)."""
    anchors = F.normalize(_as_rows(inputs.features), dim=1)
    return anchors, inputs.labels.flatten(), anchors @ F.normalize(entries.flatten(0, 1), dim=1).T / temperature


def _as_rows(features: Tensor) -> Tensor:
    return features.movedim(1, -1).flatten(0, 2)


def _is_own(labels: Tensor, entries: Tensor) -> Tensor:
    """(N, C K) bool: the entry is of the anchor's class."""
    classes = torch.arange(len(entries), device=labels.device).repeat_interleave(entries.shape[1])
    return labels[:, None] == classes


def _mean_over_classes(losses: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean over the classes that have anchors of the means over their anchors."""
    return torch.stack([losses[labels == index].mean() for index in range(classes) if (labels == index).any()]).mean()


def check(args: argparse.Namespace, term: str, device: torch.device) -> Row:
    """Value and gradient of both forms at the fewest anchors; UserError where they differ."""
    anchors = min(args.anchors)
    inputs = make_inputs(args, anchors, device)
    losses = [loss_of(args, term, form, inputs, chunk_size=-(-anchors // CHUNKS)) for form in FORMS]
    values = [loss.item() for loss in losses]
    ours, direct = (torch.autograd.grad(loss, inputs.features)[0] for loss in losses)
    value = abs(values[0] - values[1]) / abs(values[1])
    gradient = float((ours - direct).norm() / direct.norm())
    if max(value, gradient) > TOLERANCE:
        raise UserError(
            f"{term}: the chunked and the direct form differ by {value:.1e} in the value and {gradient:.1e} in the "
            f"gradient, relative; expected at most {TOLERANCE:g}. One of them is wrong"
        )
    return {"term": term, "anchors": anchors, "value_difference": value, "gradient_difference": gradient}


def make_row(
    args: argparse.Namespace,
    term: str,
    anchors: int,
    seconds: dict[tuple[str, int, str], list[float]],
    memory: dict[tuple[str, int, str], int],
) -> Row:
    ours, direct = ((term, anchors, form) for form in FORMS)
    return {
        "term": term,
        "anchors": anchors,
        "ours_seconds": statistics.median(seconds[ours]),
        "direct_seconds": statistics.median(seconds[direct]) if direct in seconds else None,
        "speed": median_ratio(seconds[direct], seconds[ours]) if direct in seconds else None,
        "ours_bytes": memory[ours],
        "direct_bytes": memory.get(direct),
        "gradient_bytes": 4 * anchors * args.channels,
    }


if __name__ == "__main__":
    run_script(main)
