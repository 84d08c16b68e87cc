"""A run that writes nothing: real images through real steps and a real evaluation, to see whether and how long."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from utils.evaluate import Evaluation
from utils.logger import RunLogger, print_lines
from utils.speed import peak_memory
from utils.trainer import Trainer

MEASURED = 3  # steps of a kind; one more, before them, is not measured: it allocates, compiles, starts processes


class StepTime(NamedTuple):
    """The terms of a step, its seconds, and how many of the run's steps are like it."""

    terms: str
    seconds: float
    steps: int


def rehearse(trainer: Trainer, *, images: int, evaluate_first: Callable[[int], Evaluation]) -> int:
    """Train some steps, evaluate one image, and print what the whole run will take; 0, the exit status.

    images: of the validation. evaluate_first: (number of images) -> their evaluation. The trainer's folder must be one
    that is thrown away, and the trainer is of no use afterwards: its banks are filled with random features.
    """
    config, device = trainer.config, trainer.run.device
    total, unlabeled = config.training.num_iterations, config.training.unlabeled
    early = min(unlabeled.start_iteration, total) if unlabeled.train_unlabeled else 0
    contrast = min(config.training.contrastive.contrast_start or 0, total) if trainer.method.uses_banks else 0
    kinds: list[StepTime] = []
    starts = sorted({0, early, max(early, contrast)})
    for first, end in zip(starts, [*starts[1:], total], strict=True):
        if end > first:
            if first == starts[-1]:
                for bank in trainer.method.banks:
                    bank.pretend_full()
                trainer.method.banks_were_ready.fill_(True)
            terms = " + ".join(trainer.method.active_terms(first))
            kinds.append(StepTime(terms, _seconds(trainer, first=first), end - first))
    validation = _validation_seconds(images, evaluate_first)
    validations = -(-total // config.utils.val_per_iter)
    hours = (sum(kind.seconds * kind.steps for kind in kinds) + validations * validation) / 3600
    steps = ", ".join(f"{kind.seconds:.3g} s ({kind.terms}, {kind.steps} steps)" for kind in kinds)
    sizes = [sum(p.numel() for p in student.parameters()) / 1e6 for student in trainer.method.students]
    lines = [
        "dry run: nothing was written",
        f"parameters            {' and '.join(f'{size:.1f} million' for size in sizes)}, and as many in the teachers",
        f"a step                {steps}",
        f"a validation          {validation:.3g} s for {images} images, {validations} of them",
        f"peak memory           {peak_memory(device):.2f} GiB on {device}",
        f"estimated time        {hours:.2f} hours",
    ]
    print_lines(lines if trainer.here.is_first else [])
    return 0


def _validation_seconds(images: int, evaluate_first: Callable[[int], Evaluation]) -> float:
    """Of all images: what one costs at first, and what each further one adds."""
    one, more = 1, min(images, 1 + 4 * MEASURED)
    seconds = []
    for count in (one, one, more):  # the first is not measured
        begun = time.perf_counter()
        evaluate_first(count)
        seconds.append(time.perf_counter() - begun)
    return seconds[1] + max(0.0, seconds[2] - seconds[1]) * (images - one) / max(more - one, 1)


def _seconds(trainer: Trainer, *, first: int) -> float:
    """The median of some steps from ``first`` on, waiting for images included."""
    logger = RunLogger(
        trainer.run.folder, first_step=first, total_steps=trainer.config.training.num_iterations, tensorboard=False,
        silent=True,
    )  # fmt: skip
    streams = ("labeled", "unlabeled") if trainer.config.training.unlabeled.train_unlabeled else ("labeled",)
    loaders = [iter(trainer.loader(stream, 0)) for stream in streams]
    trainer.method.train()
    seconds, parts = [], zip(*loaders, strict=True)
    try:
        for _ in range(1 + MEASURED):
            begun = time.perf_counter()
            if not (step := list(itertools.islice(parts, trainer.config.training.accumulation))):
                break
            trainer.step = first
            trainer._train_one(logger, step)
            trainer._stop_if_not_finite()
            seconds.append(time.perf_counter() - begun)
    finally:
        logger.close()
        for loader in loaders:
            getattr(loader, "close", lambda: None)()
    return statistics.median(seconds[1:] or seconds)
