"""The dimensions of a DeepSeek-OCR model, read from the checkpoint's own ``config.json`` schema."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import attrs

from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: The variant that a run uses unless told otherwise.
DEFAULT_VARIANT = "deepseek-ocr-v1-base"

#: Sizes beyond these are slips of the pen; building such a model would not end.
_LARGEST = 10_000_000
_MOST_LAYERS = 1_000


@attrs.frozen
class ExpertSizes:
    """Mixture-of-experts layers of a decoder.

    Attributes
    ----------
    layers
        Their numbers; empty for a dense model.
    experts
        Experts that each router chooses among.
    per_token
        How many it chooses for each token.
    """

    layers: tuple[int, ...] = ()
    experts: int = 1
    per_token: int = 1


@attrs.frozen
class SamConfig:
    """SAM ViT-B image encoder. Fields with a default are constants that the schema does not express."""

    width: int
    layers: int
    heads: int
    global_attention_blocks: tuple[int, ...]
    downsample_channels: tuple[int, int]
    image_size: int
    patch_size: int = 16
    window_size: int = 14
    mlp_ratio: int = 4
    neck_channels: int = 256
    layer_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def position_grid(self) -> int:
        """Side of the learned position grid, in patches."""
        return self.image_size // self.patch_size


@attrs.frozen
class ClipConfig:
    """CLIP-L vision transformer, fed with SAM features instead of patches."""

    width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def positions(self) -> int:
        """Rows of the position table: one per patch, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@attrs.frozen
class ProjectorConfig:
    """Linear projection of joined SAM and CLIP features into the decoder's width."""

    input_dim: int
    output_dim: int


@attrs.frozen
class DecoderConfig:
    """DeepSeek-V2 style mixture-of-experts decoder with Llama attention."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    dense_intermediate_size: int
    expert_intermediate_size: int
    routed_experts: int
    shared_experts: int
    experts_per_token: int
    dense_layers: int
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose MLP is a mixture of experts."""
        return tuple(range(self.dense_layers, self.layers))

    @property
    def expert_sizes(self) -> ExpertSizes:
        """What its routers choose among."""
        return ExpertSizes(self.moe_layers, self.routed_experts, self.experts_per_token)

    @property
    def image_token_id(self) -> int:
        """Placeholder id of image positions; the model reads the mask, the id must only be in range.

        Source: 128815 in the published tokenizer; small vocabularies use their last id.
        """
        return min(128_815, self.vocab_size - 1)


@attrs.frozen
class ModelConfig:
    """All dimensions of one DeepSeek-OCR model."""

    sam: SamConfig
    clip: ClipConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    torch_dtype: str

    @property
    def max_positions(self) -> int:
        """Positions that the model was made for."""
        return self.decoder.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Tokens that the decoder chooses from."""
        return self.decoder.vocab_size

    @property
    def experts(self) -> ExpertSizes:
        """Mixture-of-experts layers of the decoder."""
        return self.decoder.expert_sizes

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, origin: str = "config.json") -> ModelConfig:
        """Read the checkpoint schema.

        Parameters
        ----------
        raw
            Parsed ``config.json``; language-model sizes are taken from ``language_config``.
        origin
            Name of the file, for error messages.

        Raises
        ------
        InputError
            If a field is missing, or the sizes do not fit together.
        """
        try:
            config = cls._parse(raw)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            message = f"{origin} is not a DeepSeek-OCR configuration: {type(error).__name__}: {error}"
            raise InputError(message) from error
        config.check(origin)
        return config

    @classmethod
    def _parse(cls, raw: Mapping[str, Any]) -> ModelConfig:
        language = raw["language_config"]
        vision = raw["vision_config"]
        sam = vision["width"]["sam_vit_b"]
        clip = vision["width"]["clip-l-14-224"]
        first, second = sam["downsample_channels"]
        if language["use_mla"]:
            raise ValueError("use_mla is true, only plain multi-head attention is built in")
        return cls(
            sam=SamConfig(
                width=int(sam["width"]),
                layers=int(sam["layers"]),
                heads=int(sam["heads"]),
                global_attention_blocks=tuple(int(i) for i in sam["global_attn_indexes"]),
                downsample_channels=(int(first), int(second)),
                image_size=int(vision["image_size"]),
            ),
            clip=ClipConfig(
                width=int(clip["width"]),
                layers=int(clip["layers"]),
                heads=int(clip["heads"]),
                image_size=int(clip["image_size"]),
                patch_size=int(clip["patch_size"]),
            ),
            projector=ProjectorConfig(
                input_dim=int(raw["projector_config"]["input_dim"]),
                output_dim=int(raw["projector_config"]["n_embed"]),
            ),
            decoder=DecoderConfig(
                vocab_size=int(language["vocab_size"]),
                hidden_size=int(language["hidden_size"]),
                layers=int(language["num_hidden_layers"]),
                heads=int(language["num_attention_heads"]),
                kv_heads=int(language["num_key_value_heads"]),
                dense_intermediate_size=int(language["intermediate_size"]),
                expert_intermediate_size=int(language["moe_intermediate_size"]),
                routed_experts=int(language["n_routed_experts"]),
                shared_experts=int(language["n_shared_experts"]),
                experts_per_token=int(language["num_experts_per_tok"]),
                dense_layers=int(language["first_k_dense_replace"]),
                max_position_embeddings=int(language["max_position_embeddings"]),
                bos_token_id=int(language["bos_token_id"]),
                eos_token_id=int(language["eos_token_id"]),
            ),
            # Renamed in transformers 5.
            torch_dtype=str(raw.get("dtype", raw.get("torch_dtype", "bfloat16"))),
        )

    def check(self, origin: str) -> None:
        """Raise `InputError` unless the sizes are positive and fit together; `origin` names the file."""
        sam, clip, decoder = self.sam, self.clip, self.decoder
        sizes = {
            f"{part}.{field.name}": getattr(getattr(self, part), field.name)
            for part in ("sam", "clip", "projector", "decoder")
            for field in attrs.fields(type(getattr(self, part)))
            if not field.name.endswith("_token_id")
        }
        for name, value in sizes.items():
            if isinstance(value, int) and not (0 if name == "decoder.dense_layers" else 1) <= value <= _LARGEST:
                raise InputError(f"{origin}: {name} is {value}, it must be positive and at most {_LARGEST:,}")
            if name.endswith("layers") and value > _MOST_LAYERS:
                raise InputError(f"{origin}: {name} is {value}, the most is {_MOST_LAYERS}")
        rules = (
            (sam.width % sam.heads == 0, f"SAM width {sam.width} does not divide into {sam.heads} heads"),
            (clip.width % clip.heads == 0, f"CLIP width {clip.width} does not divide into {clip.heads} heads"),
            (
                decoder.hidden_size % decoder.heads == 0,
                f"hidden size {decoder.hidden_size} does not divide into {decoder.heads} heads",
            ),
            (
                decoder.heads % decoder.kv_heads == 0,
                f"{decoder.heads} heads do not share {decoder.kv_heads} key-value heads",
            ),
            (
                decoder.experts_per_token <= decoder.routed_experts,
                f"{decoder.experts_per_token} experts per token, but only {decoder.routed_experts} experts",
            ),
            (
                sam.downsample_channels[1] == clip.width,
                f"SAM gives {sam.downsample_channels[1]} channels, CLIP takes {clip.width}",
            ),
            (
                self.projector.input_dim == 2 * clip.width,
                f"projector input is {self.projector.input_dim}, SAM and CLIP together give {2 * clip.width}",
            ),
            (
                self.projector.output_dim == decoder.hidden_size,
                f"projector gives {self.projector.output_dim}, the decoder takes {decoder.hidden_size}",
            ),
        )
        for holds, message in rules:
            if not holds:
                raise InputError(f"{origin}: {message}")


def variant_names() -> list[str]:
    """Names of the built-in variants."""
    folder = resources.files("analytic") / "data" / "variants"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def variant_config(name: str) -> ModelConfig:
    """Dimensions of a built-in variant.

    Raises
    ------
    InputError
        If there is no such variant.
    """
    if name not in variant_names():
        raise InputError(f"no variant {name!r}; choose one of {', '.join(variant_names())} with --variant")
    text = (resources.files("analytic") / "data" / "variants" / f"{name}.json").read_text(encoding="utf-8")
    return ModelConfig.from_dict(json.loads(text), origin=f"{name}.json")


def read_config_json(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of the checkpoint in `directory`.

    Raises
    ------
    InputError
        If it is missing, or is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} is not a checkpoint directory: it has no config.json; give one with --model DIR")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    return raw


def checkpoint_config(directory: Path) -> ModelConfig:
    """Dimensions of the checkpoint in `directory`.

    Raises
    ------
    InputError
        If ``config.json`` is missing, is not JSON, or does not describe a DeepSeek-OCR model.
    """
    raw = read_config_json(directory)
    try:
        return ModelConfig.from_dict(raw, origin=str(directory / "config.json"))
    except InputError as error:
        raise InputError(f"{error}; give another checkpoint with --model DIR") from error
