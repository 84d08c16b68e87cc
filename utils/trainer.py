"""The loop: batches in, steps, logs, validations, checkpoints. It knows nothing of the method it trains."""

import itertools
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from utils.batch import Batch
from utils.checkpoint import BEST, older_checkpoints, older_name, save_checkpoint
from utils.config import Config, dump_config
from utils.distributed import ALONE, World, average_, parallel
from utils.errors import (
    CheckpointError,
    LoaderError,
    NonFiniteError,
    StorageError,
    UserError,
    loader_errors,
    memory_errors,
)
from utils.evaluate import Evaluation
from utils.guard import Guard
from utils.logger import COSTS, RunLogger
from utils.randomness import keyed_seed
from utils.run import Run
from utils.schedule import poly_lr
from utils.speed import arrange, autocast, keep_freed_memory, loss_scaler, peak_memory

Losses = dict[tuple[str, int], Tensor]
SIGNAL_EVERY = 4  # steps until one of several processes, told to stop, is heard: torchrun kills after 30 seconds


class Trainer:
    """Trains a method to the last step of its configuration.

    method: a module with training_step, total_loss, after_step and log_values (see model/cross_teacher.py).
    loader: (stream name, first step) -> batches; the streams are "labeled" and "unlabeled".
    evaluate: (step, through what to take its batches) -> Evaluation. picture: (path, step) -> writes some, named after
    it, and tells which; called at the end and, with ``images_folder`` or TensorBoard, at every validation. facts: which
    images are labeled and unlabeled; part of every checkpoint, and must be the same on resume.
    """

    def __init__(
        self,
        method: Any,
        optimizer: Optimizer,
        loader: Callable[[str, int], Iterable[Batch]],
        run: Run,
        *,
        config: Config,
        evaluate: Callable[[int, Callable[[Iterable[Any]], Iterable[Any]]], Evaluation],
        picture: Callable[[Path, int], Sequence[Path]],
        facts: Mapping[str, str | int],
        images_folder: Path | None = None,
        here: World = ALONE,
    ) -> None:
        arrange(method, config)
        if run.device.type == "cpu":
            keep_freed_memory()
        # A first update that is left out would leave torch's own without any value.
        if isinstance(optimizer, torch.optim.SGD) and config.training.momentum:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.here, self.wrapped = here, parallel(method, config, run.device)
        self.method, self.optimizer, self.loader, self.run, self.config = method, optimizer, loader, run, config
        self.evaluate, self.picture, self.images_folder = evaluate, picture, images_folder
        if images_folder is None and config.utils.tensorboard:
            self.images_folder = run.folder / "images"
        self.facts = dict(facts)
        self.step, self.best = 0, {"mean_iou": -1.0, "step": -1}  # step: number of steps done
        self.phase: Literal["between", "forward", "update"] = "between"  # of a step; in an update nothing can be saved
        self.must_validate = False  # between a step after which a validation is due, and its end
        self.step_on_disk, self.bad_files = run.step_on_disk, set[str]()
        self.scaler = loss_scaler(config, run.device)
        self.guard = Guard(method.step_buffers(), run.device)
        self.reads_every_step = run.device.type == "cpu"  # its host waits for every operation anyway
        if run.checkpoint is not None:
            self._restore(run.checkpoint)

    def fit(self) -> Evaluation | None:
        """Train to the end and return the last evaluation; None if a signal stopped the run before, its state saved."""
        total = self.config.training.num_iterations
        logger = RunLogger(
            self.run.folder,
            first_step=self.step,
            must_validate=self.must_validate,
            total_steps=total,
            tensorboard=self.config.utils.tensorboard,
            silent=not self.here.is_first,
        )
        streams = ("labeled", "unlabeled") if self.config.training.unlabeled.train_unlabeled else ("labeled",)
        loaders = [iter(self.loader(stream, self.step)) for stream in streams]
        self.method.train()
        try:
            with self.run.stoppable(), loader_errors(), memory_errors():
                evaluation = self._validate(logger) if self.must_validate else None
                parts = zip(*loaders, strict=True)
                asked = time.perf_counter()
                while step := list(itertools.islice(parts, self.config.training.accumulation)):
                    logger.waited(time.perf_counter() - asked)
                    with _in_one_piece():
                        self._train_one(logger, step)
                        self.must_validate = self._is_due("val_per_iter")
                    evaluation = self._validate(logger) if self.must_validate else evaluation
                    if self._is_due("save_checkpoint_every") or self.stop_signal:
                        with logger.aside(), _in_one_piece():
                            self.save_last()
                    if self.stop_signal:
                        how = f"continue with --resume {self.run.resume}"
                        logger.message(f"stopped by signal {self.stop_signal} after step {self.step}; {how}")
                        return None
                    asked = time.perf_counter()
            if evaluation is None:  # a finished run was resumed
                evaluation = self.evaluate(self.step, iter)
            self._write_results(evaluation)
            return evaluation
        except (UserError, OSError) as error:  # a damaged image, no memory: what was learned so far is kept
            if self.phase == "forward":
                self.guard.rewind()
            # A full disk may be the cache's, not the run's.
            if self.step and self.phase != "update" and not isinstance(error, NonFiniteError):
                with suppress(StorageError) if isinstance(error, OSError | StorageError) else nullcontext():
                    self._save_after_failure()
            raise
        finally:
            logger.close()
            for loader in loaders:
                getattr(loader, "close", lambda: None)()  # ends its processes now

    def _save_after_failure(self) -> None:
        try:
            with loader_errors():
                self.save_last(together=False)
        except LoaderError:  # torch may tell the same death twice
            self.save_last(together=False)

    def save_last(self, *, together: bool = True) -> None:
        """Write checkpoint.pth; the one before keeps its step in its name, and ``utils.keep_checkpoints`` are left.

        together: all processes are here.
        """
        self._stop_if_not_finite(together=together)
        path, keep = self.run.folder / "checkpoint.pth", self.config.utils.keep_checkpoints
        is_older = self.step_on_disk is not None and self.step_on_disk < self.step
        self.save(path, keep_old_as=older_name(path, self.step_on_disk or 0) if is_older and keep > 1 else None)
        self.step_on_disk = self.step
        for old in older_checkpoints(path)[keep - 1 :] if self.here.is_first else ():
            old.unlink(missing_ok=True)

    @property
    def stop_signal(self) -> int | None:
        """The signal that ends the run after this step; of several processes, one that all of them know of."""
        return self.run.stop_signal if self.here.size == 1 else self.guard.agreed_signal

    def save(self, path: Path, *, keep_old_as: Path | None = None) -> None:
        """Everything that the run needs to go on; of several processes the first one writes it."""
        if not self.here.is_first:
            return
        state = {
            "step": self.step,
            "best": self.best,
            "config": json.dumps(dump_config(self.config)),
            "facts": self.facts,
            "origin": self.run.origin,
            "bad_files": sorted(self.bad_files),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "must_validate": self.must_validate,
            "threads": torch.get_num_threads(),
            "parts": self.here.size * self.config.training.accumulation,
        }
        save_checkpoint(path, state, keep_old_as=keep_old_as)

    def _train_one(self, logger: RunLogger, parts: Sequence[tuple[Batch, ...]]) -> None:
        """One step from this process's parts of the batch. What is not finite changes nothing, see utils/guard.py."""
        step = self.step
        self._set_learning_rate(step)
        self.guard.watch()
        self._count_bad_files(logger, [batch for part in parts for batch in part])
        self.phase = "forward"
        self.optimizer.zero_grad(set_to_none=True)
        seen, means = [], dict[tuple[str, int], Tensor]()
        self.method.recording = self._is_due("log_per_iter", after=step + 1)
        for index, part in enumerate(parts):
            place = self.here.rank * len(parts) + index
            torch.manual_seed(keyed_seed(self.config.seed, "step", step, *((place,) if place else ())))  # dropout
            labeled, *unlabeled = (batch.to(self.run.device) for batch in part)
            is_last = index == len(parts) - 1  # the gradients of all parts travel together
            with nullcontext() if is_last or self.here.size == 1 else self.wrapped.no_sync():  # type: ignore[operator]
                with autocast(self.config, self.run.device):
                    losses = self.wrapped(labeled, unlabeled[0] if unlabeled else None, step=step, part=place)
                if self.method.recording and is_last:
                    self.method.observe(losses)
                self.scaler.scale(self.method.total_loss(losses, step=step) / len(parts)).backward()
            seen.append(labeled)
            for key, loss in losses.items():
                means[key] = means.get(key, 0.0) + loss.detach() / len(parts)
        self._judge(means, [name for part in parts for batch in part for name in batch.ids])
        self.phase = "update"
        self.optimizer.step()  # unless judged otherwise
        with autocast(self.config, self.run.device):
            self.method.after_step(*seen, step=step, frozen=None if self.reads_every_step else self.guard.broken)
        self.step += 1
        self.phase = "between"
        logger.advance()
        reads = any(self._is_due(key) for key in ("log_per_iter", "val_per_iter", "save_checkpoint_every"))
        if reads or (self.here.size > 1 and self.step % SIGNAL_EVERY == 0):
            self._stop_if_not_finite()
        if self._is_due("log_per_iter"):
            self._log(logger, means)

    def _validate(self, logger: RunLogger) -> Evaluation:
        with logger.aside():
            evaluation = self.evaluate(self.step, lambda batches: self._saved_if_told_to_stop(logger, batches))
            with _in_one_piece():
                self._keep_best(logger, evaluation)
            if self.images_folder is not None:
                logger.pictures(self.step, self.picture(self.images_folder / f"step_{self.step:06d}.png", self.step))
        return evaluation

    def _saved_if_told_to_stop(self, logger: RunLogger, batches: Iterable[Any]) -> Iterator[Any]:
        """A validation's batches; whoever stops the run may not wait for the end of them."""
        for batch in batches:
            yield batch
            if self.run.stop_signal and self.step_on_disk != self.step:
                with _in_one_piece():
                    self.save_last(together=False)
                logger.message(f"told to stop: step {self.step} is saved, its validation is finished first")

    def _keep_best(self, logger: RunLogger, evaluation: Evaluation) -> None:
        """Log a validation; best_model.pth if none was better."""
        self.must_validate = False
        logger.scalars(self.step, evaluation.scalars())
        score = evaluation.mean_iou()
        logger.message(
            f"step {self.step}: validation mIoU of the ensemble {100 * score:.2f} %, "
            f"best so far {100 * max(score, self.best['mean_iou']):.2f} %"
        )
        if score > self.best["mean_iou"]:
            before, self.best = self.best, {"mean_iou": score, "step": self.step}
            if self.config.utils.save_best_model:
                try:
                    self.save(self.run.folder / BEST)
                except StorageError:  # what is saved from now on must not name a best model that is not there
                    self.best, self.must_validate = before, True
                    raise

    def _write_results(self, evaluation: Evaluation) -> None:
        if self.here.is_first:
            evaluation.write(self.run.folder, best=self.best)
        self.picture(self.run.folder / "picture.png", self.step)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.run.folder}: the checkpoint does not fit this model: {str(error)[:300]}"
            ) from None
        if state["facts"] != self.facts:
            raise CheckpointError(f"{self.run.folder}: trained with other images ({state['facts']}, now {self.facts})")
        self.bad_files = set(state["bad_files"])
        self.step, self.best = state["step"], state["best"]
        self.must_validate = state["must_validate"]
        now = {"threads": torch.get_num_threads(), "parts": self.here.size * self.config.training.accumulation}
        changed = [f"{key} {state[key]}, now {value}" for key, value in now.items() if state[key] != value]
        if changed:
            warnings.warn(
                f"resumed with other {'; '.join(changed)}: the same images in the same order, but not the same bits",
                stacklevel=2,
            )

    def _count_bad_files(self, logger: RunLogger, batches: Sequence[Batch]) -> None:
        """Say each damaged file once; UserError when there are too many."""
        new = {message for batch in batches for message in batch.bad} - self.bad_files
        self.bad_files |= new
        for message in sorted(new):
            logger.message(f"skipped, another image in its place: {message}", of_all=True)
        limit = self.config.training.data.bad_sample_limit
        if len(self.bad_files) > limit:
            raise UserError(
                f"{len(self.bad_files)} damaged training files, more than training.data.bad_sample_limit {limit}; "
                "python3 prepare_data.py check names all of them"
            )

    def _is_due(self, key: str, *, after: int | None = None) -> bool:
        """after: so many steps, by default those that are done."""
        step = self.step if after is None else after
        return step % getattr(self.config.utils, key) == 0 or step == self.config.training.num_iterations

    def _set_learning_rate(self, step: int) -> None:
        training = self.config.training
        power = training.lr_schedule_power if training.lr_schedule == "Poly" else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = poly_lr(group["base_lr"], step, training.num_iterations, power)

    def _log(self, logger: RunLogger, losses: Losses) -> None:
        mean = torch.stack(list(losses.values())).double()
        average_([mean])
        values = {f"{term}/{own}": value for (term, own), value in zip(losses, mean.tolist(), strict=True)}
        groups = [group for group in self.optimizer.param_groups if group["name"] in ("backbone_0", "head_0")]
        rates = {f"learning_rate/{group['name'][:-2]}": group["lr"] for group in groups}
        streams = 2 if self.config.training.unlabeled.train_unlabeled else 1
        seconds, waited = logger.seconds_per_step()
        speed = streams * self.config.training.batch_size / seconds
        costs = dict(zip(COSTS, (speed, seconds, waited, peak_memory(self.run.device)), strict=True))
        logger.scalars(self.step, values | rates | self.method.log_values(self.step) | costs)
        terms = dict.fromkeys(term for term, _ in losses)
        means = (f"{term} {sum(values[f'{term}/{own}'] for own in (0, 1)) / 2:.3f}" for term in terms)
        logger.progress(", ".join((*means, f"{speed:.1f} images/s")))

    def _judge(self, losses: Losses, ids: list[str]) -> None:
        """Forbid the coming update where a loss or gradient is not finite; stop now if this host knows already."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.optimizer.found_inf = self.guard.judge(  # type: ignore[attr-defined]
            losses, gradients, step=self.step, ids=ids, signal=self.run.stop_signal or 0,
            scaled=self.scaler.is_enabled(),
        )  # fmt: skip
        if self.scaler.is_enabled():
            scale = [self.scaler._scale, self.scaler._growth_tracker]
            before = [tensor.clone() for tensor in scale if tensor is not None]
            self.scaler.update()
            for tensor, was in zip((self.scaler._scale, self.scaler._growth_tracker), before, strict=True):
                assert tensor is not None
                tensor.copy_(torch.where(self.guard.broken, was, tensor))
        if self.reads_every_step:
            self._stop_if_not_finite()

    def _stop_if_not_finite(self, *, together: bool = True) -> None:
        """NonFiniteError if a step was bad; all processes stop, in the state before that step."""
        failure = self.guard.read(together=together)
        if failure is None and self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise NonFiniteError('training.precision "fp16" cannot hold the gradients, however scaled; use "bf16"')
        if failure is None:
            return
        self.step = failure.step
        kept = "a dry run keeps nothing"
        if self.run.scratch is None:
            before = self.run.folder / "before_failure.pth"
            self.save(before)
            kept = f"the state before this step: {before}"
        raise NonFiniteError(
            f"{failure.what} at step {self.step}; weights not updated; {kept}. The usual cure is to start anew with a "
            "smaller training.learning_rate; pretrained may name that file, to start from its students"
        )


@contextmanager
def _in_one_piece() -> Iterator[None]:
    """torch raises from its handler of SIGCHLD, wherever the loop is, when a loading process dies: not in here."""
    noted: list[tuple[Any, ...]] = []
    previous = signal.signal(signal.SIGCHLD, lambda *args: noted.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)
    if noted and callable(previous):
        previous(*noted[-1])


def learning_rate(config: Config) -> float:
    """The base rate at step 0, in proportion to the batch where the configuration says so."""
    training = config.training
    if training.learning_rate_batch_size is None:
        return training.learning_rate
    return training.learning_rate * training.batch_size / training.learning_rate_batch_size


def build_optimizer(networks: Iterable[Any], config: Config) -> Optimizer:
    """SGD or AdamW over two parts of each network: backbone and head, each parameter once.

    With ``decay_norm_and_bias: false`` parameters of one dimension form groups of their own without weight decay.
    """
    training = config.training
    multipliers = {"backbone": training.backbone_lr_multiplier, "head": training.head_lr_multiplier}
    groups = []
    for index, network in enumerate(networks):
        for part, module in (("backbone", network.backbone), ("head", network.head)):
            parameters = list(module.parameters())
            base = learning_rate(config) * multipliers[part]
            free = [] if training.decay_norm_and_bias else [p for p in parameters if p.ndim <= 1]
            kept = [p for p in parameters if training.decay_norm_and_bias or p.ndim > 1]
            groups.append({"params": kept, "base_lr": base, "lr": base, "name": f"{part}_{index}"})
            if free:
                groups.append(
                    {"params": free, "base_lr": base, "lr": base, "name": f"{part}_free_{index}", "weight_decay": 0.0}
                )
    # fused: what the guard needs to forbid an update.
    if training.optimizer == "AdamW":
        betas = (training.momentum, 0.999)
        return torch.optim.AdamW(groups, betas=betas, weight_decay=training.weight_decay, fused=True)
    return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay, fused=True)
