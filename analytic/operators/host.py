"""What keeps the host busy and the device idle: operators without a kernel, loops, and reading a result back.

Only the read-back moves bytes. The others cost nothing on the device; the time model charges the host for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from analytic.cost import ZERO, Cost
from analytic.operators.base import Operator

if TYPE_CHECKING:
    from analytic.cost import Dtype, Size


@Operator
def view() -> Cost:
    """One dispatched operator that starts no kernel: a transpose, a slice, a ``view``, or an ``empty`` tensor.

    Views that another operator's own call makes, such as the transposed weight of ``linear``, belong to that operator.
    The layers note as many as PyTorch dispatches in the built-in model.
    """
    return ZERO


@Operator
def host_loop(turns: Size) -> Cost:
    """Turns of a Python loop. What a turn finds to do is noted as operators of its own.

    Parameters
    ----------
    turns
        Times that the loop goes round.
    """
    del turns
    return ZERO


@Operator
def to_host(elements: Size, dtype: Dtype) -> Cost:
    """Copy to the host, which waits for it: ``item``, ``tolist``. It has no gradient.

    Bytes: `elements` read. What the host writes is not in the device's memory.

    Parameters
    ----------
    elements
        Elements copied.
    dtype
        Their type.
    """
    return Cost(read=dtype.traffic(elements))
