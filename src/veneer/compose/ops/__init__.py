"""The operations: one file each, found by name in this table.

A parent that does not act at a site counts as zero there and is not passed to the function.
"""

from __future__ import annotations

from veneer.compose.ops import dare, iso_c, outside, peft_linear, ties, weighted_sum
from veneer.compose.ops.base import Operation, OperationSettings, SiteContext

OPERATIONS: dict[str, Operation] = {
    module.OPERATION.name: module.OPERATION for module in (weighted_sum, ties, dare, iso_c, outside, peft_linear)
}

__all__ = ["OPERATIONS", "Operation", "OperationSettings", "SiteContext"]
