"""What a conversion is going to do, take and leave alone, worked out before any work begins."""

from zqfp_convert.plan.memory import TOGETHER, TOKENS_AT_ONCE, WAITING, batch_bytes, spare_bytes
from zqfp_convert.plan.plan import (
    Place,
    Plan,
    PlannedLayer,
    check_fit,
    make_plan,
    positions,
    rotated,
)

__all__ = [
    "TOGETHER",
    "TOKENS_AT_ONCE",
    "WAITING",
    "Place",
    "Plan",
    "PlannedLayer",
    "batch_bytes",
    "check_fit",
    "make_plan",
    "positions",
    "rotated",
    "spare_bytes",
]
