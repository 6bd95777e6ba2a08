"""The schedule: the learning rate of an epoch, from the length of the whole run (Meddahi 2024, VI.A)."""

from __future__ import annotations

POLY_EXPONENT = 0.9


def poly_lr(lr: float, epoch: int, epochs: int) -> float:
    """Learning rate of an epoch: lr (1 - epoch / epochs)^0.9 (Meddahi 2024, VI.A).

    A run that is extended goes on with that of its new length: at the end of the old one the rate jumps from 0 to
    lr (1 - old / new)^0.9.
    """
    return float(lr * (1 - epoch / epochs) ** POLY_EXPONENT)
