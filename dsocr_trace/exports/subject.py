"""What an analytic report is about: model, workload and device."""

# Types stand here at run time too: the schema and the readers are made from them.

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

RepetitionKind: TypeAlias = Literal["none", "for", "parfor"]


@attrs.frozen(kw_only=True)
class ModelReport:
    """Which model, and how it runs.

    Attributes
    ----------
    family
        Model family; other where no known family has this architecture.
    architecture
        Class of the root module.
    variant
        Built-in size, or the checkpoint's directory.
    dtype
        Of weights and activations.
    attention
        How the decoder attends: sdpa, eager or flash_attention_2.
    attention_flops
        What counts as arithmetic of fused attention: full, executed or counter.
    parameter_count
        Elements of all parameters.
    weight_bytes
        Their bytes, as the model holds them.
    """

    family: str
    architecture: str
    variant: str
    dtype: str
    attention: str
    attention_flops: str
    parameter_count: int
    weight_bytes: int


@attrs.frozen(kw_only=True)
class ViewReport:
    """Square images that go through the vision encoders as one batch; parfor: they do not depend on each other."""

    kind: str
    count: int
    size_px: int
    repetition: RepetitionKind


@attrs.frozen(kw_only=True)
class PageReport:
    """One page that the costs include.

    Attributes
    ----------
    crop_grid
        Columns and rows of tiles, null without tiles.
    seq_len
        Positions of the prompt.
    new_tokens
        Tokens generated.
    """

    name: str
    page_width: int
    page_height: int
    crop_grid: tuple[int, int] | None
    image_tokens: int
    seq_len: int
    new_tokens: int
    views: tuple[ViewReport, ...]


@attrs.frozen(kw_only=True)
class WorkloadReport:
    """The workload profile that was asked for, with what follows from it.

    Attributes
    ----------
    tile_grid
        Tiles that the profile asks for; null to let the crop rule decide.
    variant
        Built-in model of the profile.
    crop_grid
        Columns and rows of tiles of the profile's page, null without tiles.
    image_tokens, seq_len
        Positions of the prompt that hold image features, and all of them.
    pages
        What the costs are sums over: one page, or every page of a run.
    """

    id: str
    page_width: int
    page_height: int
    text_tokens: int
    max_new_tokens: int
    crop_mode: bool
    base_size: int
    image_size: int
    batch_size: int
    no_repeat_ngram_size: int
    tile_grid: tuple[int, int] | None
    variant: str
    crop_grid: tuple[int, int] | None
    image_tokens: int
    seq_len: int
    pages: tuple[PageReport, ...]


@attrs.frozen(kw_only=True)
class PeakReport:
    """One figure of the device's entry: FLOP/s or bytes/s, as its name says; the dtype where it belongs to one."""

    name: str
    dtype: str | None
    value: float
    source: str | None


@attrs.frozen(kw_only=True)
class HardwareReport:
    """Device that times are predicted for.

    Attributes
    ----------
    name
        Its entry.
    device
        Its own name, where it was calibrated; else that of the entry.
    provenance
        Where the entry has its figures from: datasheet or estimated.
    source
        What the times are from: calibrated, or the entry with default efficiencies.
    measured_at
        When it was calibrated, in ISO 8601; null without a calibration.
    peaks
        Figures of the entry, on which datasheet_ns rests.
    """

    name: str
    device: str
    provenance: str
    source: Literal["calibrated", "datasheet", "estimated"]
    measured_at: str | None
    peaks: tuple[PeakReport, ...]
