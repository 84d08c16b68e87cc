"""The guard: which updates it forbids, what it restores, what it tells, and that nobody has to wait for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import CrossTeacher, build_networks
from tests.test_cross_teacher import build, full_banks
from tests.test_trainer import state_of
from utils.batch import Batch
from utils.config import Config
from utils.errors import NonFiniteError
from utils.guard import Guard
from utils.logger import RunLogger
from utils.run import Run
from utils.trainer import Trainer, build_optimizer

CPU = torch.device("cpu")
FINE, NAN, INF = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def judged(guard: Guard, loss: Tensor, gradient: Tensor, *, step: int, scaled: bool = False) -> float:
    guard.watch()
    guard.buffers[0].add_(1 if loss.isfinite() else loss)  # as BatchNorm, which has seen the batch
    guard.buffers[1].add_(1)
    losses = {("supervised", 0): FINE, ("low_level", 1): loss}
    return guard.judge(losses, [gradient], step=step, ids=["a", "b"], signal=0, scaled=scaled).item()


@pytest.fixture
def guard() -> Guard:
    return Guard([torch.zeros(3), torch.tensor(0), torch.zeros(2, 2)], CPU)


def test_after_a_bad_step_every_update_is_forbidden_and_the_buffers_stay_as_before_it(guard: Guard):
    assert [judged(guard, FINE, FINE, step=step) for step in (0, 1)] == [0, 0]
    assert [judged(guard, loss, FINE, step=2 + i) for i, loss in enumerate((NAN, FINE, INF))] == [1, 1, 1]
    assert guard.buffers[0].tolist() == [2, 2, 2]
    assert guard.buffers[1].item() == 2
    failure = guard.read()
    assert failure is not None
    assert failure.step == 2, "the first one"
    assert failure.what == "low_level of student 1 is nan (images a, b)"
    assert guard.broken


def test_an_infinite_gradient_is_bad_too_unless_the_loss_was_scaled(guard: Guard):
    assert judged(guard, FINE, INF, step=0, scaled=True) == 1, "this update is left out"
    assert judged(guard, FINE, FINE, step=1, scaled=True) == 0, "the next one is not"
    assert guard.read() is None
    assert judged(guard, FINE, INF, step=2) == 1
    failure = guard.read()
    assert failure is not None
    assert failure.what == "a gradient is not finite, though every loss is (images a, b)"


def test_nothing_is_told_twice(guard: Guard):
    assert guard.read() is None
    judged(guard, FINE, FINE, step=0)
    assert guard.read() is None
    assert guard._unread == []


def trainer(config: Config, folder: Path, *, waits: bool) -> Trainer:
    method = full_banks(build(config))
    made = Trainer(
        method, build_optimizer(method.students, config), lambda stream, start: [], Run(folder, CPU), config=config,
        evaluate=lambda step, through: None, picture=lambda path, step: None, facts={},  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    made.reads_every_step = waits
    return made


class Waits(TorchDispatchMode):
    """Counts the operations for whose result a host has to wait, those on what it drew itself left out."""

    WAITING = ("_local_scalar_dense", "nonzero.default", "masked_select", "is_nonzero", "equal.default", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.drawn: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else []
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if (name.startswith(self.WAITING) or by_mask) and not self.is_drawn(args[0]):
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("generator") is not None:
            self.drawn.append(result)
        return result

    def __enter__(self) -> "Waits":
        self.patches = pytest.MonkeyPatch()
        for name in ("tolist", "cpu", "numpy"):  # on a CPU these are no operations
            self.patches.setattr(Tensor, name, self.noting(name, getattr(Tensor, name)))
        return super().__enter__()  # type: ignore[no-any-return]

    def noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def note(tensor: Tensor, *args: Any) -> Any:
            self.found += [] if self.is_drawn(tensor) else [name]
            return method(tensor, *args)

        return note

    def __exit__(self, *error: Any) -> None:
        self.patches.undo()
        super().__exit__(*error)

    def is_drawn(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == one.untyped_storage()._cdata for one in self.drawn)


@pytest.fixture
def steps(tiny_config: Callable[..., Config], batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(trainer, do): a trainer that behaves as on a GPU, or waits, and what does one step of it."""

    def make(*, waits: bool, **changes: Any) -> tuple[Trainer, Callable[[], None]]:
        monkeypatch.setattr("utils.contrast._host_may_wait", lambda device: waits)
        contrast = {"training__contrastive__contrast_start": 0, "training__contrastive__confidence": 0.34}
        config = tiny_config(training__num_iterations=100, utils__log_per_iter=4, **contrast, **changes)
        folder = tmp_path / f"run_{waits}_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        made = trainer(config, folder, waits=waits)
        logger = RunLogger(folder, first_step=0, total_steps=100, tensorboard=False, silent=True)

        def do() -> None:
            parts = [Batch(one.images.mul(255).byte(), *one[1:]) for one in batches(seed=made.step)]
            made._train_one(logger, [tuple(parts)])

        return made, do

    return make


@pytest.mark.parametrize(
    "changes",
    [{}, {"training__contrastive__max_anchors": 20}, {"training__precision": "fp16"}, {"training__optimizer": "AdamW"}],
)
def test_a_gpus_host_waits_when_it_logs_and_at_no_other_step(steps: Any, changes: dict[str, Any]):
    made, do = steps(waits=False, **changes)
    counts = []
    for _ in range(8):
        with Waits() as waits:
            do()
        counts.append(len(waits.found))
        assert made.step % 4 == 0 or waits.found == []
    assert counts[3] > 0, "the counter sees what it should"
    assert counts[7] > 0


def test_the_counter_of_waits_finds_those_of_a_host_that_asks_every_step(steps: Any):
    _, do = steps(waits=True)
    with Waits() as waits:
        do()
    assert {"tolist", "nonzero.default"} <= set(waits.found)


def test_a_gpu_that_does_not_wait_learns_the_same(steps: Any):
    states = []
    for waits in (True, False):
        made, do = steps(waits=waits)
        for _ in range(4):
            do()
        states.append(state_of(made))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_fp16_halves_its_scale_instead_of_stopping_and_skips_that_update(steps: Any, optimizer: str):
    made, do = steps(waits=True, training__precision="fp16", training__optimizer=optimizer)
    made.scaler._init_scale = 2.0**126  # overflows every gradient
    before = [p.detach().clone() for p in made.method.students.parameters()]
    do()
    assert made.step == 1
    assert made.scaler.get_scale() == 2.0**125
    assert all(torch.equal(p, was) for p, was in zip(made.method.students.parameters(), before, strict=True))
    assert made.optimizer.state
    assert all((tensor == 0).all() for memory in made.optimizer.state.values() for tensor in memory.values())
    made.scaler.update(16.0)
    do()
    assert any(not torch.equal(p, was) for p, was in zip(made.method.students.parameters(), before, strict=True))


def test_a_failed_step_leaves_fp16_s_scale_alone_too(steps: Any):
    made, do = steps(waits=True, training__precision="fp16")
    made.scaler._init_scale = 64.0
    loss_of = made.method.total_loss
    made.method.total_loss = lambda losses, step: loss_of(losses, step=step) * float("nan")
    consistency = made.method.consistency
    made.method.consistency = lambda *args, **more: consistency(*args, **more) * float("nan")
    with pytest.raises(NonFiniteError, match="cross_teacher of student 0 is nan"):
        do()
    assert made.scaler.get_scale() == 64


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_failed_step_leaves_adamw_and_the_shares_of_pseudo_labels_alone_until_it_is_noticed(
    steps: Any, monkeypatch: pytest.MonkeyPatch, precision: str
):
    shares = np.array([0.7, 0.2, 0.1])
    monkeypatch.setattr(
        f"{__name__}.build",
        lambda config: CrossTeacher(build_networks(config), config, labeled_samples=4, class_shares=shares).train(),
    )
    changes = {"optimizer": "AdamW", "unlabeled__adjust_logits": True, "unlabeled__pixel_weight": "power"}
    changes |= {"precision": precision, "logit_adjustment": 0.5}
    made, do = steps(waits=False, **{f"training__{key}": value for key, value in changes.items()})
    made.scaler._init_scale = 16.0
    do()
    before = {name: value.clone() for name, value in state_of(made).items()}
    assert any(name.startswith("exp_avg") for name in before)
    assert "pseudo_label_shares.average" in before
    predict_target = made.method.predict_target
    made.method.predict_target = lambda *args: predict_target(*args) * float("nan")  # so the weights are nan too
    do()
    made.method.predict_target = predict_target
    do()
    assert [name for name, value in state_of(made).items() if not torch.equal(value, before[name])] == []


def test_fp16_that_no_scale_helps_stops_with_the_cure(steps: Any):
    made, do = steps(waits=True, training__precision="fp16")
    made.scaler._init_scale = 1.0
    for parameter in made.method.students[0].parameters():
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match='use "bf16"'):
        do()


def test_a_resumed_fp16_run_goes_on_with_its_scale(steps: Any, tiny_config: Any):
    made, do = steps(waits=True, training__precision="fp16")
    made.scaler._init_scale = 32.0
    do()
    made.save_last()
    run = Run(made.run.folder, CPU, lock=False)
    from utils.checkpoint import load_checkpoint

    run.checkpoint = load_checkpoint(made.run.folder / "checkpoint.pth")
    method = CrossTeacher(build_networks(made.config), made.config, labeled_samples=4)
    again = Trainer(
        method, build_optimizer(method.students, made.config), lambda stream, start: [], run, config=made.config,
        evaluate=lambda step, through: None, picture=lambda path, step: None, facts={},  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    assert again.scaler.get_scale() == made.scaler.get_scale() == 32
