import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import golden
from utils.contrast import high_level_contrast, low_level_contrast

KINDS = ["high_level", "low_level"]


def random_case(
    seed: int = 0, *, classes: int = 4, entries: int = 5, batch: int = 2, side: int = 4
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grid = (batch, side, side)
    return {
        "features": torch.randn(batch, 8, side, side, generator=generator),
        "peer_features": torch.randn(batch, 8, side, side, generator=generator),
        "labels": torch.randint(0, classes, grid, generator=generator),
        "mask": torch.rand(grid, generator=generator) < 0.7,
        "bank": torch.randn(classes, entries, 8, generator=generator),
    }


def contrast(kind: str, case: dict[str, Tensor], *, autocast: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in the features; `autocast` covers the loss only, as in a training step."""
    features = case["features"].clone().requires_grad_()
    options = {"temperature": 0.1, **options}
    shared = (case["labels"], case["mask"], options.pop("bank", case["bank"]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if kind == "high_level":
            loss = high_level_contrast(features, *shared, **options)
        else:
            loss = low_level_contrast(features, case["peer_features"], *shared, **options)
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def formula(
    kind: str, case: dict[str, Tensor], temperature: float, counts: list[int], negatives: str = "sum"
) -> tuple[Tensor, Tensor]:
    """The paper's formula word by word, in float64, with loops and plain exponentials."""
    features = case["features"].double().requires_grad_()
    bank = [entries[:count].double() for entries, count in zip(case["bank"], counts, strict=True)]

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(torch.cosine_similarity(x, y, dim=-1) / temperature)

    per_class: dict[int, list[Tensor]] = {}
    for b, row, column in case["mask"].nonzero().tolist():
        c, x = int(case["labels"][b, row, column]), features[b, :, row, column]
        if not 0 <= c < len(bank) or (kind == "high_level" and counts[c] == 0):
            continue
        others = torch.cat([similarity(x, bank[k]) for k in range(len(bank)) if k != c])
        negative = others.sum() if negatives == "sum" else others.mean()
        if kind == "high_level":
            positive = similarity(x, bank[c])
        else:
            positive = similarity(x, case["peer_features"][b, :, row, column].double())
        per_class.setdefault(c, []).append(-(positive / (positive + negative)).log().mean())
    loss = torch.stack([torch.stack(losses).mean() for losses in per_class.values()]).mean()
    (gradient,) = torch.autograd.grad(loss, features)
    return loss.detach(), gradient


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(actual[0].double(), expected[0].double(), rtol=1e-5, atol=0)
    scale = float(expected[1].abs().max())
    torch.testing.assert_close(actual[1].double(), expected[1].double(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_contrast_departs_from_the_release(kind: str, number: int) -> None:
    case = golden(f"{kind}_{number}")
    result = contrast(kind, case, temperature=float(case["temperature"]))
    assert_same(result, (case["loss"], case["grad"]))


@pytest.mark.parametrize("kind", KINDS)
def test_contrast_is_not_the_hand_computed_value(kind: str) -> None:
    # Pixel 0, class 0: similarity 1 to its positive and 0 to the one negative. Pixel 1, class 1: 0 and 1.
    case = {
        "features": torch.tensor([[2.0, 5.0], [0.0, 0.0]]).view(1, 2, 1, 2),
        "peer_features": torch.tensor([[3.0, 0.0], [0.0, 4.0]]).view(1, 2, 1, 2),
        "labels": torch.tensor([[[0, 1]]]),
        "mask": torch.ones(1, 1, 2, dtype=torch.bool),
        "bank": torch.tensor([[[7.0, 0.0]], [[0.0, 0.5]]]),
    }
    loss, _ = contrast(kind, case, temperature=0.5)
    assert float(loss) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [5, 1, 0, 3]])
@pytest.mark.parametrize("negatives", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_or_counts_change_the_formula(kind: str, negatives: str, counts: list[int], chunk_size: int) -> None:
    case = random_case()
    case["labels"][0, 0, :2] = torch.tensor([255, -1])  # not anchors, whatever the mask says
    case["mask"][0, 0, :2] = True
    result = contrast(kind, case, counts=torch.tensor(counts), chunk_size=chunk_size, negatives=negatives)
    assert_same(result, formula(kind, case, 0.1, counts, negatives))


@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [5, 1, 0, 3]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_that_does_not_wait_for_the_number_of_anchors_gives_another_loss(
    kind: str, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.contrast._host_may_wait", lambda device: False)
    case = random_case()
    case["labels"][0, 0, :2] = torch.tensor([255, -1])
    result = contrast(kind, case, counts=torch.tensor(counts))
    assert_same(result, formula(kind, case, 0.1, counts))
    case["mask"][:] = False
    loss, gradient = contrast(kind, case)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_max_anchors_is_not_the_loss_of_the_drawn_anchors(kind: str) -> None:
    case = random_case(side=8)
    case["labels"][:] = 0
    case["labels"][0, :2, :2] = 1  # 4 pixels, 3 of them anchors
    case["mask"][:] = True
    case["mask"][0, 0, 0] = False
    draw = {"max_anchors": 10, "generator": torch.Generator().manual_seed(3)}
    loss, gradient = contrast(kind, case, **draw)
    drawn = (gradient != 0).any(dim=1)
    assert drawn.sum() == 10
    assert (drawn & case["mask"]).sum() == 10
    assert (drawn & (case["labels"] == 1)).sum() == 3  # the rare class keeps all it has
    assert_same((loss, gradient), contrast(kind, {**case, "mask": drawn}))
    again = contrast(kind, case, max_anchors=10, generator=torch.Generator().manual_seed(3))
    other = contrast(kind, case, max_anchors=10, generator=torch.Generator().manual_seed(4))
    assert again[0] == loss != other[0]
    assert_same(contrast(kind, case, max_anchors=1000), contrast(kind, case))  # more than there are pixels
    many = random_case(classes=4, side=8)
    drawn_classes = set()
    for seed in range(20):
        _, gradient = contrast(kind, many, max_anchors=1, generator=torch.Generator().manual_seed(seed))
        drawn_classes |= set(many["labels"][(gradient != 0).any(dim=1)].tolist())
    assert drawn_classes == {0, 1, 2, 3}, "fewer anchors than classes: none is preferred"
    case["mask"][1:] = False
    case["mask"][0, 3:] = False
    few = case["mask"].sum() - 1
    assert_same(contrast(kind, case, max_anchors=int(few) + 5), contrast(kind, case))  # more than there are anchors


@pytest.mark.parametrize("kind", KINDS)
def test_entries_beyond_the_count_are_used(kind: str) -> None:
    case, counts = random_case(), torch.tensor([5, 1, 0, 3])
    expected = contrast(kind, case, counts=counts)
    for c, count in enumerate(counts.tolist()):
        case["bank"][c, count:] = 1e6 * torch.randn(5 - count, 8)
    assert_same(contrast(kind, case, counts=counts), expected)


def test_second_bank_supplies_no_negatives() -> None:
    case = random_case()
    counts = [torch.tensor([5, 1, 0, 3]), torch.tensor([2, 0, 0, 6])]
    banks = [case["bank"], torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))]
    # The same entries as one bank whose filled slots come first.
    total = [int(counts[0][c] + counts[1][c]) for c in range(4)]
    joined = torch.zeros(4, 11, 8)
    for c in range(4):
        joined[c, : total[c]] = torch.cat([bank[c, : int(count[c])] for bank, count in zip(banks, counts, strict=True)])
    for kind in KINDS:
        expected = contrast(kind, case, bank=joined, counts=torch.tensor(total))
        assert_same(contrast(kind, case, bank=banks, counts=counts), expected)
    full = contrast("low_level", case, bank=torch.cat(banks, dim=1))
    assert_same(contrast("low_level", case, bank=banks), full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frequent_class_outweighs_a_rare_one(kind: str) -> None:
    case = random_case(classes=2, side=8)
    case["labels"][:] = 0
    case["labels"][0, 0, 0] = 1
    case["mask"][:] = True
    both = contrast(kind, case)[0]
    common = contrast(kind, {**case, "mask": case["labels"] == 0})[0]
    rare = contrast(kind, {**case, "mask": case["labels"] == 1})[0]
    torch.testing.assert_close(both, (common + rare) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_bank_or_the_peer(kind: str) -> None:
    case = {key: value.requires_grad_(value.is_floating_point()) for key, value in random_case().items()}
    shared = (case["labels"], case["mask"], case["bank"])
    if kind == "high_level":
        loss = high_level_contrast(case["features"], *shared, temperature=0.1)
    else:
        loss = low_level_contrast(case["features"], case["peer_features"], *shared, temperature=0.1)
    loss.backward()
    assert case["bank"].grad is None
    assert case["peer_features"].grad is None
    gradient = case["features"].grad
    assert gradient is not None
    assert torch.equal((gradient != 0).any(dim=1), case["mask"])  # anchors only


@pytest.mark.parametrize("reason", ["mask", "labels", "counts"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_without_anchors_is_nan_or_has_no_graph(kind: str, reason: str) -> None:
    case, counts = random_case(), torch.full((4,), 5)
    if reason == "mask":
        case["mask"][:] = False
    elif reason == "labels":
        case["labels"][:] = 255
    else:
        counts[:] = 0
    loss, gradient = contrast(kind, case, counts=counts)
    if kind == "low_level" and reason == "counts":
        assert loss < 1e-6  # anchors with a positive and no negative
    else:
        assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_of_negatives_depends_on_how_often_each_is_there(kind: str) -> None:
    case = random_case()
    twice = case | {"bank": case["bank"].repeat(1, 2, 1)}
    assert_same(contrast(kind, twice, negatives="mean"), contrast(kind, case, negatives="mean"))
    assert contrast(kind, twice)[0] > contrast(kind, case)[0], "a sum does"


@pytest.mark.parametrize("negatives", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_class_only_has_no_negatives_and_is_nan(kind: str, negatives: str) -> None:
    case = random_case(classes=1, batch=1)
    loss, gradient = contrast(kind, case, temperature=0.01, negatives=negatives)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1e18])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_or_extreme_features_give_nan(kind: str, temperature: float, scale: float) -> None:
    case = random_case()
    case["mask"][:] = True
    case["features"][0, :, 0, 0] *= scale
    case["peer_features"][0, :, 0, 1] *= scale
    case["bank"][1, 2] *= scale
    loss, gradient = contrast(kind, case, temperature=temperature)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if scale < 1e-10:
        assert (gradient[0, :, 0, 0] == 0).all()  # a vector without direction is left alone, not blown up


@pytest.mark.parametrize("kind", KINDS)
def test_low_temperature_overflows(kind: str) -> None:
    # Every anchor equals a negative and opposes its positive: the loss is 2 / t up to the log of the count.
    case = random_case(classes=2, entries=1)
    case["bank"] = torch.stack([torch.ones(1, 8), -torch.ones(1, 8)])
    sign = torch.where(case["labels"] == 0, 1.0, -1.0).unsqueeze(1)
    case["features"], case["peer_features"] = -sign.expand(-1, 8, -1, -1), sign.expand(-1, 8, -1, -1)
    loss, gradient = contrast(kind, case, temperature=0.01)
    assert float(loss) == pytest.approx(200, rel=1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_lowers_the_precision(kind: str) -> None:
    case = random_case()
    expected = contrast(kind, case, temperature=0.01)
    result = contrast(kind, case, temperature=0.01, autocast=True)
    assert result[0].dtype == torch.float32
    assert_same(result, expected)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.items()}
    rounded = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    torch.testing.assert_close(contrast(kind, half)[0], contrast(kind, rounded)[0], rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), length=st.floats(1e-3, 1e3))
def test_feature_length_or_entry_order_changes_the_loss(seed: int, kind: str, length: float) -> None:
    case = random_case(seed)
    expected = contrast(kind, case)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    changed = {**case, "features": case["features"] * length, "bank": case["bank"][:, order] / length}
    loss, gradient = contrast(kind, changed)
    assert float(expected[0]) >= 0
    assert_same((loss, gradient * length), expected)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_number_of_anchors(kind: str) -> None:
    case = random_case(classes=4, entries=200, batch=1, side=32)
    case["mask"][:] = True
    saved = 0

    def record(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    anchors, similarities = 32 * 32, 4 * 200
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        contrast(kind, case, chunk_size=16)
    assert largest.elements < anchors * similarities / 10  # forward and backward
    assert saved < anchors * similarities / 10  # nothing of that size is kept between them either


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_do_not_fit_are_broadcast(kind: str) -> None:
    case = random_case()
    with pytest.raises(ValueError, match="labels"):
        contrast(kind, {**case, "labels": case["labels"][:1]})
    with pytest.raises(ValueError, match="channels"):
        contrast(kind, case, bank=case["bank"][:, :, :1])
    with pytest.raises(ValueError, match="1 counts for 2 banks"):
        contrast(kind, case, bank=[case["bank"], case["bank"]], counts=torch.tensor([5, 5, 5, 5]))
    with pytest.raises(ValueError, match="same"):
        low_level_contrast(
            case["features"],
            case["peer_features"][:1],
            case["labels"],
            case["mask"],
            case["bank"],
            temperature=0.5,
        )
