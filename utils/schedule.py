"""Schedules: plain functions of the step, so that resuming a run needs no scheduler state."""


def poly_lr(base: float, step: int, total: int, power: float) -> float:
    """Polynomial decay of the learning rate: `base * (1 - step / total) ** power`.

    Args:
        base: learning rate at step 0.
        step: steps already taken, 0 for the first; at and after `total` the rate is 0.
        total: number of steps of the whole run, at least 1.
        power: 0.9 in the paper; 1 is linear.

    Returns:
        The learning rate of this step, between 0 and `base`.

    Raises:
        ValueError: `total` is not positive or `step` is negative.
    """
    if total < 1 or step < 0:
        raise ValueError(f"poly_lr: step {step} of {total}; expected step >= 0 and total >= 1")
    # Clamped: a fractional power of a negative number would be complex.
    return float(base * max(0.0, 1.0 - step / total) ** power)


def ema_alpha(step: int, decay: float) -> float:
    """Share of the old teacher kept at this step: `min(1 - 1 / (step + 1), decay)` (paper: teacher update).

    Args:
        step: steps already taken; at step 0 the share is 0, so the teacher becomes its student.
        decay: upper limit of the share, reached after about `1 / (1 - decay)` steps.

    Returns:
        alpha of `teacher = alpha * teacher + (1 - alpha) * student`, between 0 and `decay`.

    Raises:
        ValueError: `step` is negative, or `decay` lies outside [0, 1].
    """
    if step < 0 or not 0.0 <= decay <= 1.0:
        raise ValueError(f"ema_alpha: step {step}, decay {decay}; expected step >= 0 and 0 <= decay <= 1")
    return min(1.0 - 1.0 / (step + 1), decay)
