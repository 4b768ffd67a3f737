"""Getting a model: the built-in one with seeded weights or a checkpoint's, or a checkpoint's own code."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from analytic.config import DEFAULT_VARIANT, ModelConfig, checkpoint_config, variant_config
from analytic.errors import DsocrTraceError, InputError
from stage_runners.deepseek_ocr import ATTENTION_IMPLEMENTATIONS, DeepseekOCRForCausalLM
from stage_runners.devices import resolve_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

BUILTIN: Final = "builtin"

_WHOLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
#: Standard deviation of the seeded weights, as in the configuration of the published language model.
_WEIGHT_STD: Final = 0.02
#: A prime near 2^24: repeats of the pool never line up with a weight's rows.
_POOL_SIZE: Final = 16_777_213


def model_config(source: str, *, variant: str = DEFAULT_VARIANT) -> ModelConfig:
    """Dimensions of what `load_model` would load.

    Raises
    ------
    InputError
        If the variant is unknown or the directory holds no usable configuration.
    """
    return variant_config(variant) if source == BUILTIN else checkpoint_config(Path(source))


def default_dtype(config: ModelConfig) -> torch.dtype:
    """The type that the configuration names, for weights and activations.

    Raises
    ------
    InputError
        If it is neither bfloat16 nor float32.
    """
    if config.torch_dtype not in ("bfloat16", "float32"):
        raise InputError(f"config.json names the type {config.torch_dtype}; choose bf16 or fp32 with --dtype")
    found: torch.dtype = getattr(torch, config.torch_dtype)
    return found


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, counted on the model itself without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DeepseekOCRForCausalLM(config).parameters())


def load_model(
    source: str,
    *,
    variant: str = DEFAULT_VARIANT,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a DeepSeek-OCR model, ready for inference.

    Parameters
    ----------
    source
        ``"builtin"`` for the built-in classes with seeded random weights, or a checkpoint directory.
    variant
        Which built-in variant; only with ``"builtin"``.
    dtype
        Type of weights and activations, also as ``bf16`` or ``fp32``; by default the one that the configuration names.
    device
        Where the model will live.
    attention
        How the decoder attends: ``sdpa``, ``eager`` or ``flash_attention_2``.
    seed
        Seed of the random weights; only with ``"builtin"``.
    trust_remote_code
        Run the modelling code that lies in the checkpoint directory instead of the built-in classes. That code can
        do whatever your account can do: only for checkpoints that you trust.

    Raises
    ------
    InputError
        If the source, its files, names or shapes, or the attention implementation cannot be used.
    """
    config = model_config(source, variant=variant)
    check_loadable(source, variant=None, attention=attention, trust_remote_code=trust_remote_code)
    if isinstance(dtype, str):
        dtype = resolve_dtype(dtype)
    dtype = dtype or default_dtype(config)
    device = torch.device(device)
    if trust_remote_code:
        return _load_remote_code(Path(source), dtype, device, attention)
    # Shapes and names are compared before memory is taken.
    shards = None if source == BUILTIN else _CheckpointFiles(Path(source))
    with torch.device("meta"):
        model = DeepseekOCRForCausalLM(config, attention=attention)
    if shards is not None:
        shards.check(model)
    _allocate(model, dtype, device)
    if shards is None:
        _fill_seeded(model, seed)
    else:
        shards.copy_into(model)
    return model.eval()


def default_attention(*, trust_remote_code: bool) -> str:
    """How the decoder attends unless told otherwise; the published code has no sdpa."""
    return "eager" if trust_remote_code else "sdpa"


def check_loadable(source: str, *, variant: str | None, attention: str, trust_remote_code: bool) -> None:
    """Refuse what `load_model` could not do here, without reading weights.

    Raises
    ------
    InputError
        If the attention implementation is unknown or not installed, a variant is asked of a checkpoint, or the built-in
        model is asked for other code.
    """
    if variant is not None and source != BUILTIN:
        raise InputError("--variant names a built-in model, --model a checkpoint directory; give one of them")
    if trust_remote_code and source == BUILTIN:
        raise InputError("--trust-remote-code needs a checkpoint with code of its own; give it with --model DIR")
    if attention not in ATTENTION_IMPLEMENTATIONS:
        choices = ", ".join(ATTENTION_IMPLEMENTATIONS)
        raise InputError(f"no attention implementation {attention!r}; choose one of {choices} with --attention")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "flash_attention_2 needs the package flash-attn, which is not installed; "
            "install it with pip install 'dsocr-trace[flash]', or use --attention sdpa"
        )


def _allocate(model: DeepseekOCRForCausalLM, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter uninitialised memory in its final type and place, once."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    # Buffers are made on the CPU with their values; casting rotary frequencies along is what the published code does.
    model.to(device=device, dtype=dtype)


def _fill_seeded(model: DeepseekOCRForCausalLM, seed: int) -> None:
    """Norms become the identity, everything else is drawn from one pool of normal numbers.

    Drawing 3.3 billion numbers takes a minute; slices of a pool at random offsets take seconds. Cost does not depend
    on the values, only routing does. Tokens have embeddings of unit variance, torch's own for `torch.nn.Embedding`:
    smaller ones drown in what attention adds to all tokens alike, and then the routers send them all to the same few
    experts. The published weights call nearly every expert on a page.
    """
    first = next(model.parameters())
    generator = torch.Generator(first.device).manual_seed(seed)
    pool = torch.empty(_POOL_SIZE, dtype=torch.float32, device=first.device)
    pool = pool.normal_(std=_WEIGHT_STD, generator=generator).to(first.dtype)
    host = torch.Generator().manual_seed(seed)
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif is_norm:
                parameter.fill_(1)
            else:
                _fill_from_pool(parameter.view(-1), pool, int(torch.randint(_POOL_SIZE, (), generator=host)))
    model.model.embed_tokens.weight.div_(_WEIGHT_STD)


def _fill_from_pool(flat: torch.Tensor, pool: torch.Tensor, offset: int) -> None:
    filled = 0
    while filled < flat.numel():
        part = pool[offset : offset + flat.numel() - filled]
        flat[filled : filled + part.numel()] = part
        filled, offset = filled + part.numel(), 0


class _CheckpointFiles:
    """The safetensors files of a checkpoint directory, strict about what they hold."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shape: dict[str, tuple[int, ...]] = {}
        self.file: dict[str, Path] = {}
        for path in self._paths():
            with _opened(path) as shard:
                for key in shard.keys():  # noqa: SIM118  not a mapping
                    self.shape[key] = tuple(shard.get_slice(key).get_shape())
                    self.file[key] = path

    def _paths(self) -> list[Path]:
        """The files that transformers would read, else every safetensors file."""
        if (self.directory / _WHOLE).is_file():
            return [self.directory / _WHOLE]
        index = self.directory / _INDEX
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                names = sorted(str(name) for name in shards)
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise InputError(
                    f"{index} is not a safetensors index ({error}); download it again, "
                    "or give another checkpoint with --model DIR"
                ) from error
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise InputError(
                    f"checkpoint {self.directory} lacks {len(missing)} of its {len(names)} shards: "
                    f"{', '.join(missing)}; download it again, or give another with --model DIR"
                )
            return [self.directory / name for name in names]
        found = sorted(self.directory.glob("*.safetensors"))
        if not found:
            pickles = [path.name for suffix in ("bin", "pt", "pth") for path in self.directory.glob(f"*.{suffix}")]
            has = (
                f"it has only pickle files ({', '.join(pickles)}), which can run code when read"
                if pickles
                else ("it has none")
            )
            raise InputError(
                f"checkpoint {self.directory} must hold .safetensors files, {has}; convert it, or use --model builtin"
            )
        return found

    def check(self, model: nn.Module) -> None:
        """Raise unless names and shapes are exactly the model's; buffers are computed, so stored ones do not count."""
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, _ in model.named_buffers():
            self.shape.pop(name, None)
        for what, names in (
            ("lacks", expected.keys() - self.shape.keys()),
            ("has unknown", self.shape.keys() - expected.keys()),
        ):
            if names:
                shown, more = ", ".join(sorted(names)[:3]), ", ..." if len(names) > 3 else ""
                raise InputError(
                    f"checkpoint {self.directory} {what} {len(names)} tensors ({shown}{more}); "
                    "it does not fit its config.json; give another with --model DIR"
                )
        for name, shape in expected.items():
            if self.shape[name] != shape:
                raise InputError(
                    f"checkpoint {self.directory}: {name} has shape {list(self.shape[name])}, "
                    f"config.json makes it {list(shape)}; give a matching one with --model DIR"
                )

    @torch.no_grad()
    def copy_into(self, model: nn.Module) -> None:
        """Read every tensor into the model's memory, file by file."""
        for path in sorted(set(self.file.values())):
            with _opened(path) as shard:
                for name, parameter in model.named_parameters():
                    if self.file[name] == path:
                        parameter.copy_(shard.get_tensor(name))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """`safe_open` whose failures name the file."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error}); download it again, "
            "or give another checkpoint with --model DIR"
        ) from error


def own_code_failure(error: Exception, where: str) -> DsocrTraceError:
    """What to tell the user when a checkpoint's own code raised `error` on `where`."""
    return DsocrTraceError(
        f"the checkpoint's own code failed on {where}: {type(error).__name__}: {' '.join(str(error).split())}; "
        "--debug shows where, leaving --trust-remote-code out takes the built-in classes"
    )


def _load_remote_code(directory: Path, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "AutoModel" not in (raw.get("auto_map") or {}):
        raise InputError(
            f"checkpoint {directory} brings no code of its own (config.json has no auto_map for AutoModel); "
            "leave --trust-remote-code out to read it into the built-in classes"
        )
    # Renamed in transformers 5.
    dtype_name = "torch_dtype" if int(transformers.__version__.split(".")[0]) < 5 else "dtype"
    try:
        # Standard output is for the run's result, whatever the code prints.
        with contextlib.redirect_stdout(sys.stderr):
            model: nn.Module = transformers.AutoModel.from_pretrained(
                directory,
                trust_remote_code=True,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation=attention,
                **{dtype_name: dtype},
            )
    except Exception as error:  # what somebody else's code raises is not known
        line = " ".join(str(error).split())
        raise InputError(
            f"the code of checkpoint {directory} cannot be loaded with transformers {transformers.__version__} and "
            f"--attention {attention}: {type(error).__name__}: {line}; choose another --attention, install what it was "
            "written for (pip install 'dsocr-trace[vendor]'), or leave --trust-remote-code out"
        ) from error
    return model.to(device=device, dtype=dtype).eval()
