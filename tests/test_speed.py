"""Faster arithmetic trains the same method: near the same losses, in the same types outside the networks."""

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model import CrossTeacher
from model.resnet import BasicBlock, _first_and_again
from tests.test_cross_teacher import build, full_banks
from utils.config import Config
from utils.inference import Inference, classify_all, predict_all
from utils.speed import arrange, autocast
from utils.trainer import build_optimizer

CPU = torch.device("cpu")


@pytest.fixture
def losses(
    tiny_config: Callable[..., Config], batches: Any
) -> Callable[..., tuple[dict[Any, torch.Tensor], CrossTeacher]]:
    """All losses of a first step with the gradients taken, and the method after it."""

    def compute(network: str = "DeepLab", **training: Any) -> tuple[dict[Any, torch.Tensor], CrossTeacher]:
        changes = {key if key == "backbone" else f"training__{key}": value for key, value in training.items()}
        config = tiny_config(model=network, training__contrastive__contrast_start=0,
                             training__contrastive__direction="none", **changes)  # fmt: skip
        method = full_banks(build(config))
        arrange(method, config)
        labeled, unlabeled = batches()
        with autocast(config, CPU):
            found = method.training_step(labeled, unlabeled, step=0)
        method.total_loss(found, step=0).backward()
        with autocast(config, CPU):
            method.after_step(labeled, step=0)
        return found, method

    return compute


@pytest.mark.parametrize("network", ["DeepLab", "DeepLabv3+"])
@pytest.mark.parametrize("training", [{"channels_last": True}, {"precision": "bf16", "channels_last": True}])
def test_losses_are_near_those_of_float32_and_are_float32_themselves(losses: Any, network: str, training: dict):
    plain, _ = losses(network)
    fast, method = losses(network, **training)
    assert plain.keys() == fast.keys()
    tolerance = 0.1 if "precision" in training else 1e-4
    for key, loss in fast.items():
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert loss.item() == pytest.approx(plain[key].item(), abs=tolerance), key
    assert all(parameter.dtype == torch.float32 for parameter in method.parameters())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.students.parameters())
    assert all(bank.entries.dtype == torch.float32 for bank in method.banks)


def test_bf16_really_computes_in_bfloat16(losses: Any):
    plain, _ = losses()
    fast, _ = losses(precision="bf16")
    assert any(fast[key].item() != plain[key].item() for key in plain)


def test_weights_in_channels_last_order_have_the_same_values_and_names(losses: Any):
    _, plain = losses()
    _, fast = losses(channels_last=True)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    weight = fast.students[0].backbone.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight, plain.students[0].backbone.layer1[0].conv1.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["DeepLab", "DeepLabv3+"])
def test_recomputed_activations_give_the_same_bits_and_batchnorm_sees_a_batch_once(losses: Any, network: str):
    plain, kept = losses(network)
    again, recomputed = losses(network, checkpoint_activations=True)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    for one, other in zip(kept.students.parameters(), recomputed.students.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    expected = kept.state_dict()
    assert [key for key, value in recomputed.state_dict().items() if not torch.equal(value, expected[key])] == []
    assert recomputed.students[0].backbone.bn1.num_batches_tracked == 2, "labeled and unlabeled"


def test_recomputation_leaves_the_statistics_of_a_synchronized_batchnorm_alone():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(BasicBlock(4, 4, stride=1, dilation=1)).train()
    _, again = _first_and_again(block)
    with again:
        assert block.bn1.num_batches_tracked is not None, "it refuses to work without"
        block.bn1.num_batches_tracked.add_(1)
    assert block.bn1.num_batches_tracked == 0
    assert block.bn1.momentum == 0.1


def test_recomputed_activations_are_not_kept_for_the_backward_pass(losses: Any):
    kept = []
    for training in ({}, {"checkpoint_activations": True}):
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            losses(backbone="resnet34", **training)
        kept.append(saved)
    assert kept[1] < 0.6 * kept[0]


def test_evaluation_is_in_full_float32_also_of_a_run_that_trains_in_tf32(tiny_config: Any):
    seen = []

    class Network(nn.Module):
        normalization = nn.Identity()

        def forward(self, images: torch.Tensor) -> Any:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return SimpleNamespace(logits=images)

    config = tiny_config(training__precision="tf32")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        arrange(build(config), config)
        trains = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        for ask in (predict_all, classify_all):
            for how in (Inference(), Inference(flip=True)):
                ask({"one": Network()}, torch.rand(1, 3, 40, 40), (40, 40), inference=how, wanted=frozenset(["one"]))
        assert trains == ("high", True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == trains
        assert seen == [("highest", False)] * 6
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_learning_rate_grows_with_the_batch_where_it_says_for_which_batch_it_is(tiny_config: Any):
    networks = build(tiny_config()).students
    for batch, reference, expected in ((4, None, 0.01), (4, 2, 0.02), (3, 12, 0.0025)):
        config = tiny_config(training__batch_size=batch, training__learning_rate_batch_size=reference,
                             training__head_lr_multiplier=10)  # fmt: skip
        rates = {group["name"]: group["base_lr"] for group in build_optimizer(networks, config).param_groups}
        assert rates["backbone_0"] == pytest.approx(expected)
        assert rates["head_1"] == pytest.approx(10 * expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_process_that_keeps_freed_memory_does_not_fetch_it_again():
    code = """
import resource, sys, torch
from utils.speed import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    fetched = {}
    for what in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent.parent, timeout=120)  # fmt: skip
        fetched[what] = int(done.stdout)
    assert fetched["keep"] < fetched["give back"] / 10, fetched
