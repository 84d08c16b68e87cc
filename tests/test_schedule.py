from pathlib import Path

import numpy as np
import pytest

from utils.schedule import ema_alpha, poly_lr

GOLDEN = Path(__file__).parent / "golden"


def test_poly_lr_departs_from_the_release() -> None:
    case = np.load(GOLDEN / "poly_lr.npz")
    base, power, total = float(case["base"]), float(case["power"]), int(case["max_iter"])
    rates = [poly_lr(base, int(step), total, power) for step in case["iteration"]]
    np.testing.assert_allclose(rates, case["lr"], rtol=1e-12)


def test_poly_lr_half_way_is_not_the_hand_computed_rate() -> None:
    assert poly_lr(0.02, 50, 100, 1.0) == pytest.approx(0.01)
    assert poly_lr(0.02, 75, 100, 0.5) == pytest.approx(0.01)


def test_poly_lr_turns_complex_after_the_last_step() -> None:
    assert poly_lr(0.1, 100, 100, 0.9) == 0.0
    assert poly_lr(0.1, 101, 100, 0.9) == 0.0


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0)])
def test_poly_lr_accepts_a_run_without_steps(step: int, total: int) -> None:
    with pytest.raises(ValueError, match="poly_lr"):
        poly_lr(0.1, step, total, 0.9)


def test_teacher_keeps_its_random_weights_at_the_first_steps() -> None:
    assert ema_alpha(0, 0.99) == 0.0
    assert ema_alpha(1, 0.99) == 0.5
    assert ema_alpha(98, 0.99) == pytest.approx(1 - 1 / 99)
    assert ema_alpha(1000, 0.99) == 0.99


@pytest.mark.parametrize(("step", "decay"), [(-1, 0.99), (0, 1.5), (0, -0.1)])
def test_ema_accepts_a_share_outside_0_to_1(step: int, decay: float) -> None:
    with pytest.raises(ValueError, match="ema_alpha"):
        ema_alpha(step, decay)
