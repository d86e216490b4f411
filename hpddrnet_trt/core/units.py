"""Metres as the units that file formats ask for."""

from __future__ import annotations


def micrometres(metres: float) -> float:
    """``metres`` in micrometres, without the last digits' noise: 50e-9 is 0.05, not 0.049999999999999996."""
    return float(f"{metres * 1e6:.12g}")
