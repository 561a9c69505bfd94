"""What a conversion is going to do, take and leave alone, worked out before any work begins."""

from zqfp_convert.plan.memory import (
    TOGETHER,
    TOKENS_AT_ONCE,
    batch_bytes,
    blocks_waiting,
    spare_bytes,
)
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
    "Place",
    "Plan",
    "PlannedLayer",
    "batch_bytes",
    "blocks_waiting",
    "check_fit",
    "make_plan",
    "positions",
    "rotated",
    "spare_bytes",
]
