"""The accuracy a user is willing to give up."""

from __future__ import annotations

from dataclasses import dataclass

from hpddrnet_trt.accuracy.judge import Accuracy
from hpddrnet_trt.core.errors import UsageError


@dataclass(frozen=True)
class Budget:
    """Limits on a candidate beside the FP32 reference; None is no limit.

    ``max_miou_drop``: percentage points of masked mIoU, the mIoU of the classes in the masks.
    ``min_agreement``: share of pixels with the reference's label, 0..1.

    Raises :class:`UsageError` for limits that make no sense or none at all.
    """

    max_miou_drop: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_miou_drop is None and self.min_agreement is None:
            raise UsageError("a budget needs a limit: the mIoU that may be lost, the smallest agreement, or both")
        if self.max_miou_drop is not None and not 0 <= self.max_miou_drop <= 100:
            raise UsageError(
                f"the mIoU that may be lost is in percentage points between 0 and 100, got {self.max_miou_drop}"
            )
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise UsageError(f"the smallest agreement is a fraction between 0 and 1, got {self.min_agreement}")

    def kept_by(self, found: Accuracy) -> bool:
        return not self.breaches(found)

    def breaches(self, found: Accuracy) -> list[str]:
        """What is over the limits, for people; empty where the budget holds. A NaN never holds."""
        wrong = []
        if self.max_miou_drop is not None and not found.drop <= self.max_miou_drop:
            wrong.append(f"masked mIoU falls by {found.drop:.2f} points, {self.max_miou_drop:g} are allowed")
        if self.min_agreement is not None and not found.agreement >= self.min_agreement:
            wrong.append(
                f"labels are equal on {100 * found.agreement:.2f} % of the pixels, "
                f"{100 * self.min_agreement:g} % are needed"
            )
        return wrong

    def __str__(self) -> str:
        limits = []
        if self.max_miou_drop is not None:
            limits.append(f"at most {self.max_miou_drop:g} points of masked mIoU lost")
        if self.min_agreement is not None:
            limits.append(f"labels equal on at least {100 * self.min_agreement:g} % of the pixels")
        return " and ".join(limits)
