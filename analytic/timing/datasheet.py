"""A device that nobody measured: the peaks of its datasheet, and what such peaks are usually worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from analytic.timing.calibration import Calibration, HostCosts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from analytic.hardware import Hardware

#: Share of the tensor peak that a large matrix product reaches. Libraries reach 0.7 to 0.9 (NVIDIA CUTLASS, README,
#: "Performance": share of the theoretical peak by dtype).
TENSOR_EFFICIENCY: Final = 0.8
#: Share of the memory's peak that streaming reaches: 0.7 to 0.95 on GPUs and processors (Deakin, Price, Martineau and
#: McIntosh-Smith, "Evaluating attainable memory bandwidth of parallel programming models via BabelStream", IJCSE 2018).
MEMORY_EFFICIENCY: Final = 0.85

#: What a host spends, by kind of device. A GPU's: launches of 4 to 6 us on current cards, and 5 to 25 us from Python
#: to the launch for an operator in eager mode, of which inference, without autograd, has the lower part; a kernel that
#: does nothing runs for 1 to 3 us (A. Gray, "Getting started with CUDA graphs", NVIDIA technical blog, 2019: 2.9 us,
#: and 3.8 us from one to the next). A processor's: PyTorch 2.13 on a server processor of 2022.
HOST_COSTS: Final[Mapping[str, HostCosts]] = {
    "cuda": HostCosts(
        module_call_ns=2_000,
        dispatch_ns=1_000,
        operator_ns=6_000,
        loop_turn_ns=30,
        launch_ns=5_000,
        kernel_floor_ns=2_000,
        synchronise_ns=10_000,
    ),
    "cpu": HostCosts(
        module_call_ns=1_000,
        dispatch_ns=1_000,
        operator_ns=0,
        loop_turn_ns=30,
        launch_ns=0,
        kernel_floor_ns=2_000,
        synchronise_ns=500,
    ),
}


def from_datasheet(hardware: Hardware) -> Calibration:
    """What a device should do.

    Parameters
    ----------
    hardware
        Its entry.

    Returns
    -------
    Calibration
        Without samples: the time of every operator is its roof.
    """
    return Calibration(
        device=hardware.name,
        kind=hardware.kind,
        hardware=hardware,
        samples=(),
        host=HOST_COSTS[hardware.kind],
        tensor_flops_per_s={
            dtype: TENSOR_EFFICIENCY * figure.value for dtype, figure in hardware.tensor_flops_per_s.items()
        },
        # The same whatever the size: a datasheet has one figure.
        memory_bytes_per_s={1: MEMORY_EFFICIENCY * hardware.memory_bytes_per_s.value},
        measured_at=None,
        source=hardware.provenance,
    )
