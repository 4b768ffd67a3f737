"""What torch itself counts: FLOPs of every module call, on the meta device, which computes shapes and no values.

`torch.utils.flop_counter.FlopCounterMode` alone assigns operators to modules by hooks, and misses a module whose
``forward`` is called directly. So the tracer delimits the calls, and its clock is the counter's running total: what a
call "lasts" is what was counted in it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from unittest import mock

import attrs
import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from analytic.config import read_config_json
from analytic.errors import InputError
from hooks.errors import TraceError
from hooks.tracer import PositionStages, Tracer
from stage_runners.deepseek_ocr import DeepseekOCRForCausalLM
from stage_runners.loading import BUILTIN, default_dtype, model_config
from stage_runners.stage1 import VISION_SUBTREES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from analytic.config import DecoderConfig
    from analytic.workload import Workload

#: Tokens per (forward, expert), for each mixture-of-experts layer.
ExpertCounts: TypeAlias = "Mapping[int, npt.NDArray[np.int64]]"

META: Final = torch.device("meta")
#: Implementations that run on the meta device; a flash kernel has no shape function there.
REFERENCE_ATTENTIONS: Final = ("sdpa", "eager")


@attrs.frozen
class CountedFlops:
    """What ran in each module's own forward, by stage and module path.

    Attributes
    ----------
    flops
        FLOPs that the counter saw, those of the modules called by it not included.
    calls
        Forward calls; modules that are never called are absent.
    """

    flops: Counter[tuple[str, str]]
    calls: Counter[tuple[str, str]]


def sketch_model(source: str, *, variant: str, attention: str, trust_remote_code: bool = False) -> nn.Module:
    """Build a model on the meta device: all of its code and shapes, none of its memory. No weights are read.

    Parameters
    ----------
    source
        ``"builtin"``, or a checkpoint directory: of DeepSeek-OCR, or of an architecture that transformers itself has.
    variant
        Which built-in variant; only with ``"builtin"``.
    attention
        One of `REFERENCE_ATTENTIONS`.
    trust_remote_code
        Build the checkpoint's own classes instead of the built-in ones.

    Raises
    ------
    InputError
        If the source has no usable configuration, its code cannot be built, or the attention does not run there.
    """
    if attention not in REFERENCE_ATTENTIONS:
        choices = ", ".join(REFERENCE_ATTENTIONS)
        raise InputError(f"attention {attention!r} has no reference; choose one of {choices} with --attention")
    published = None if source == BUILTIN or trust_remote_code else _published_class(Path(source))
    if published is not None:
        return _sketch_published(published, Path(source), attention)
    config = model_config(source, variant=variant)
    dtype = default_dtype(config)
    if trust_remote_code:
        return _sketch_remote_code(Path(source), dtype, attention)
    with META:
        model = DeepseekOCRForCausalLM(config, attention=attention)
    # Buffers are made on the CPU.
    return model.to(META, dtype).eval()


def _published_class(directory: Path) -> Any:
    """The class of transformers that a checkpoint names; None if it has none of that name."""
    architectures = read_config_json(directory).get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _sketch_published(published: Any, directory: Path, attention: str) -> nn.Module:
    try:
        config = published.config_class.from_pretrained(directory, local_files_only=True)
        with META:
            model: nn.Module = published._from_config(config, attn_implementation=attention)  # noqa: SLF001  as Auto does
    except Exception as error:  # what transformers raises on an odd configuration is not known
        raise InputError(
            f"{directory}/config.json does not make a {published.__name__} of transformers {transformers.__version__}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; give another checkpoint with --model DIR"
        ) from error
    return model.to(META).eval()


def _sketch_remote_code(directory: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    try:
        with contextlib.redirect_stdout(sys.stderr), sketched_values(iter(())), META:
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True, local_files_only=True)
            build: Callable[..., nn.Module] = transformers.AutoModel.from_config
            model = build(config, trust_remote_code=True, attn_implementation=attention)
    except Exception as error:  # what somebody else's code raises is not known
        line = " ".join(str(error).split())
        raise InputError(
            f"the code of checkpoint {directory} cannot be built on the meta device with transformers "
            f"{transformers.__version__} and --attention {attention}: {type(error).__name__}: {line}; choose another "
            "--attention, or leave --trust-remote-code out to verify the built-in classes"
        ) from error
    return model.to(META, dtype).eval()


def count_flops(
    model: nn.Module,
    config: DecoderConfig,
    workload: Workload,
    *,
    prefill: ExpertCounts,
    decode: ExpertCounts,
    kv_lengths: Sequence[int] = (),
) -> CountedFlops:
    """Count one prefill with its images, and a decode forward for each cached length.

    Parameters
    ----------
    model
        On the meta device, from `sketch_model`.
    config
        Its decoder.
    workload
        Views, prompt and batch size.
    prefill, decode
        Tokens per expert of the prefill (one row), and of each decode forward (a row each).
    kv_lengths
        Cached positions after each decode forward.

    Raises
    ------
    TraceError
        If something was counted outside of any module.
    """
    tokens = [prefill[layer][0] for layer in sorted(prefill)]
    tokens += [decode[layer][step] for step in range(len(kv_lengths)) for layer in sorted(decode)]
    dtype = next(model.parameters()).dtype
    arguments = _arguments(workload, dtype)
    step = arguments | {"input_ids": arguments["input_ids"][:, :1]}
    shape = (workload.batch_size, config.kv_heads, config.head_dim)
    return count_forwards(
        model,
        itertools.chain(
            [arguments | {"past_key_values": DynamicCache()}],
            (
                step | {"past_key_values": filled_cache(config.layers, shape, length - 1, dtype)}
                for length in kv_lengths
            ),
        ),
        expert_counts=(row.tolist() for row in tokens),
    )


def count_forwards(
    model: nn.Module, forwards: Iterable[Mapping[str, Any]], *, expert_counts: Iterable[list[int]] = ()
) -> CountedFlops:
    """Count forwards of any causal language model: prefills and decode steps, as their number of positions says.

    Parameters
    ----------
    model
        On the meta device, from `sketch_model`.
    forwards
        Arguments of each forward, made when it is its turn; ``use_cache`` is added.
    expert_counts
        Tokens of each expert, in the order in which the mixture-of-experts layers run.

    Raises
    ------
    TraceError
        If something was counted outside of any module.
    """
    counter = FlopCounterMode(display=False)
    paths = {path for path, _ in model.named_modules()}
    tracer = Tracer(
        model,
        detector=PositionStages(),
        stage_of_subtree={path: "vision" for path in VISION_SUBTREES if path in paths},
        clock=counter.get_total_flops,
    )
    # Standard output is for the result, whatever the model's code prints.
    quiet = contextlib.redirect_stdout(sys.stderr)
    with torch.no_grad(), quiet, sketched_values(iter(expert_counts)), counter, tracer:
        for arguments in forwards:
            model(**arguments, use_cache=True)
    return _own(tracer, counter.get_total_flops())


def _own(tracer: Tracer, everything: int) -> CountedFlops:
    """From the FLOPs between a call's ends to those of its own forward."""
    calls = tracer.calls()
    inclusive = calls["end_ns"].to_numpy() - calls["start_ns"].to_numpy()
    parent = calls["parent_call_id"].fill_null(-1).to_numpy()
    own = inclusive.copy()
    np.subtract.at(own, parent[parent >= 0], inclusive[parent >= 0])
    if int(own.sum()) != everything:
        raise TraceError(f"{everything - int(own.sum()):,} of {everything:,} FLOPs were counted outside of any module")
    stages, paths = (map(sys.intern, calls[name].to_pylist()) for name in ("stage", "module_path"))
    keys = list(zip(stages, paths, strict=True))
    flops: Counter[tuple[str, str]] = Counter()
    for key, count in zip(keys, own.tolist(), strict=True):
        flops[key] += count
    return CountedFlops(flops, Counter(keys))


def _arguments(workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a prefill without values; only tiles that are not there are real zeros, and so read as absent."""
    views = {
        view.kind: torch.empty(view.count, 3, view.size, view.size, dtype=dtype, device=META) for view in workload.views
    }
    tiles = views.get("crops", torch.zeros(1, 3, 1, 1, dtype=dtype))
    batch = workload.batch_size
    return {
        "input_ids": torch.empty(batch, workload.seq_len, dtype=torch.int64, device=META),
        "images": [(tiles, views["global"])] * batch,
        "images_seq_mask": torch.empty(batch, workload.seq_len, dtype=torch.bool, device=META),
        "images_spatial_crop": torch.tensor([workload.grid or (1, 1)] * batch),
    }


def filled_cache(layers: int, shape: tuple[int, int, int], positions: int, dtype: torch.dtype) -> DynamicCache:
    """Build a cache without values.

    Parameters
    ----------
    layers
        Layers of the decoder.
    shape
        Batch size, key-value heads and width of a head.
    positions
        Positions that it holds.
    dtype
        Type of keys and values.
    """
    cache = DynamicCache()
    batch, heads, width = shape
    block = torch.empty(batch, heads, positions, width, dtype=dtype, device=META)
    for layer in range(layers):
        cache.update(block, block, layer)
    return cache


@contextlib.contextmanager
def sketched_values(expert_counts: Iterator[list[int]]) -> Iterator[None]:
    """Answer what a forward reads back from tensors that have no values.

    A single element reads as 1: the sum of an image's pixels, which says that there is an image. A list of elements is
    the number of tokens of each expert. Moving to another device changes nothing. All of it ends with the context.

    Parameters
    ----------
    expert_counts
        Tokens of each expert, in the order in which the mixture-of-experts layers run.
    """
    autocast = torch.autocast

    def known_autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    # transformers switches autocast off by the name of the device, and there is none for meta.
    with mock.patch.object(torch, "autocast", known_autocast), _Answers(expert_counts):
        yield


class _Answers(TorchFunctionMode):
    """Takes the place of the methods that would read a value."""

    def __init__(self, expert_counts: Iterator[list[int]]) -> None:
        super().__init__()
        self._expert_counts = expert_counts
        self._answers: dict[Any, Callable[[torch.Tensor], Any]] = {
            torch.Tensor.item: lambda _: 1,
            torch.Tensor.tolist: lambda _: self._tokens_per_expert(),
            torch.Tensor.cpu: lambda _: torch.tensor(self._tokens_per_expert()),
            torch.Tensor.cuda: lambda tensor: tensor,
        }

    def _tokens_per_expert(self) -> list[int]:
        counts = next(self._expert_counts, None)
        if counts is None:
            raise TraceError("the model reads more values than those of its routers, and the meta device has none")
        return counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        answer = self._answers.get(func)
        if answer is not None and args[0].is_meta:
            return answer(args[0])
        return func(*args, **(kwargs or {}))
