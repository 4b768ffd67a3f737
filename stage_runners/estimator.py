"""PyTorch's own estimate of a run time, as far as it goes: `torch.distributed._tools.RuntimeEstimator`."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Final

import attrs
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.runtime_estimator import RuntimeEstimator
from transformers import DynamicCache

if TYPE_CHECKING:
    from torch import nn

    from stage_runners.inputs import ModelInputs

#: Each operator run a few times on the GPU, or a roofline with figures that PyTorch has of the GPU.
MODES: Final = ("operator-level-benchmark", "operator-level-cost-model")


@attrs.frozen
class Estimate:
    """What the estimator says of a generation.

    Attributes
    ----------
    total_ns
        All forwards; None where it gave up.
    reason
        Why it gave up, in its own words.
    """

    total_ns: float | None
    reason: str | None = None


def estimate(model: nn.Module, inputs: ModelInputs, mode: str) -> Estimate:
    """Estimate a generation: its prefill, and its decode forwards, each as long as the first.

    Parameters
    ----------
    model
        Ready for inference on its device.
    inputs
        On the model's device, in its type.
    mode
        One of `MODES`.
    """
    kwargs, cache, found = inputs.forward_kwargs(), DynamicCache(), []
    forwards = (kwargs, kwargs | {"input_ids": inputs.input_ids[:, -1:]})
    try:
        # It prints what it returns.
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            for arguments in forwards:
                with RuntimeEstimator()(estimate_mode_type=mode) as estimator:
                    model(**arguments, past_key_values=cache, use_cache=True)
                found.append(estimator.total_runtime * 1e6)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        told = str(error).splitlines()
        return Estimate(None, f"{type(error).__name__}: {told[0]}" if told else type(error).__name__)
    prefill, step = found
    return Estimate(prefill + step * (inputs.workload.max_new_tokens - 1))
