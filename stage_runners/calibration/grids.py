"""Which sizes of each operator are measured: grids of the device, which know no workload.

Sizes grow by factors of 4 from where a call costs its launch alone to where the device is saturated, and by factors of
2 where a curve bends. What a device cannot do in reasonable time is left out when it is measured, so that the same
grids serve a laptop and a large GPU.
"""

from __future__ import annotations

from itertools import product
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

#: Arguments of an operator's formula, by parameter.
Arguments: TypeAlias = "dict[str, Any]"


@attrs.frozen
class Point:
    """One operator at one size.

    Attributes
    ----------
    operator
        Its name.
    dtype
        Name of the dtype of the model that runs it.
    arguments
        What its formula is given, by parameter; dtypes by their names.
    """

    operator: str
    dtype: str
    arguments: Mapping[str, int | str | bool] = attrs.field(hash=False)

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that are numbers."""
        return {name: value for name, value in self.arguments.items() if type(value) is int}

    @property
    def options(self) -> dict[str, Any]:
        """The other arguments."""
        return {name: value for name, value in self.arguments.items() if type(value) is not int}

    @property
    def large(self) -> bool:
        """Whether it may take long: operators that models run at such sizes, where no curve leads."""
        return self.operator in _LARGE and _LARGE[self.operator](self.arguments)

    def exceeds(self, other: Point) -> bool:
        """Whether it is the same operator and no size is smaller."""
        same = (self.operator, self.options) == (other.operator, other.options)
        return same and all(size >= other.sizes[name] for name, size in self.sizes.items())


def grid(dtype: str) -> tuple[Point, ...]:
    """Every point for a model of that dtype, small ones first."""
    points = []
    for operator, make in _GRIDS.items():
        own = [Point(operator, dtype, arguments) for arguments in make(dtype)]
        own.sort(key=lambda point: sum(point.sizes.values()))
        # All operators alike: where time is short, each lacks its largest points.
        points += [(place / len(own), point) for place, point in enumerate(own)]
    return tuple(point for _, point in sorted(points, key=itemgetter(0)))


def _powers(low: int, high: int, step: int = 2) -> list[int]:
    """2**low, 2**(low + step), ... up to 2**high."""
    return [1 << exponent for exponent in range(low, high + 1, step)]


def _each(**axes: Iterable[Any]) -> list[Arguments]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


_FP32: Final = "float32"
_INT64: Final = "int64"
#: Rows that a token's choices, its vector or its positions make.
_ROWS: Final = (1, 16, 64, 256, 1024, 4096)
_WIDTH: Final = 1280
_CHOICES: Final = 6
#: Rows of products: those of a decode step, of an expert's share of a prompt, and of whole prompts.
_TOKENS: Final = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1024, 4096)
#: Rows of products with a vocabulary.
_FEWER_TOKENS: Final = (1, 4, 16, 128, 512, 1024)
#: Elements, from where only the launch counts to beyond every cache.
_ELEMENTS: Final = (*_powers(8, 18), *_powers(20, 27, 1), 1 << 28)
_FEWER: Final = tuple(_powers(8, 28, 4))


#: A vocabulary.
_VERY_WIDE: Final = 131_072


def _linear(dtype: str) -> list[Arguments]:
    sides = [*product((256, 1024, 4096), repeat=2), (512, 2048), (2048, 512), (2048, 2048), (8192, 8192)]
    plain = [
        {"rows": rows, "in_features": a, "out_features": b, "dtype": dtype, "bias": False}
        for a, b in (*sides, (1024, _VERY_WIDE))
        for rows in (_FEWER_TOKENS if b == _VERY_WIDE else _TOKENS)
    ]
    biased = [
        {"rows": rows, "in_features": a, "out_features": b, "dtype": dtype, "bias": True}
        for rows, (a, b) in product((1, 16, *_powers(6, 12)), [(1024, 1024), (1024, 4096), (4096, 1024)])
    ]
    return plain + biased


def _bmm(dtype: str) -> list[Arguments]:
    batched = _each(batch=(8, 64), rows=(64, 512, 4096), inner=(64,), columns=(16, 64), dtype=(dtype,))
    wide = _each(batch=(8,), rows=(64, 512), inner=(256,), columns=(256,), dtype=(dtype,))
    single = _each(batch=(1,), rows=_powers(0, 12), inner=(512, 2048), columns=(64,), dtype=(_FP32,))
    return batched + wide + single


def _conv2d(dtype: str) -> list[Arguments]:
    patches = [
        _convolution(images, 3, channels, 16, side, 16)
        for images, channels, side in product((1, 4), (256, 1024), (224, 640, 1024))
    ]
    pointwise = [
        _convolution(images, channels, 256, 1, side, 1)
        for images, channels, side in product((1, 4), (256, 1024), (16, 64))
    ]
    spatial = [
        _convolution(images, channels, channels * stride, 3, side, stride)
        for images, channels, side, stride in product((1, 4), (256, 512), (16, 32, 64), (1, 2))
    ]
    return [point | {"dtype": dtype, "bias": point["kernel"] == 16} for point in patches + pointwise + spatial]


def _convolution(images: int, in_channels: int, out_channels: int, kernel: int, side: int, stride: int) -> Arguments:  # noqa: PLR0917
    return {
        "images": images,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel": kernel,
        "in_side": side,
        "out_side": side // stride,
    }


def _attention(dtype: str, *, heads: Iterable[int], head_dims: Iterable[int], **more: Any) -> list[Arguments]:
    """One query, as in a decode step; and as many queries as keys."""
    heads, head_dims = tuple(heads), tuple(head_dims)
    step = _each(heads=heads, queries=(1,), keys=_powers(6, 14), head_dim=head_dims)
    whole = [
        point | {"queries": point["keys"]} for point in _each(heads=heads, keys=_powers(4, 12), head_dim=head_dims)
    ]
    return [point | {"dtype": dtype} | more for point in step + whole]


def _sdpa(dtype: str) -> list[Arguments]:
    points = _attention(dtype, heads=(8, 32, 128), head_dims=(64, 128), counted="rectangle")
    causal = [
        point | {"counted": "triangle"}
        for point in points
        if point["queries"] == point["keys"] and point["heads"] < 128
    ]
    return points + causal


def _sdpa_with_bias(dtype: str) -> list[Arguments]:
    points = _each(heads=(4, 16, 128, 512), keys=_powers(4, 12), head_dim=(64,))
    return [point | {"queries": point["keys"], "dtype": dtype} for point in points]


def _causal_mask(dtype: str) -> list[Arguments]:
    points = _each(heads=(8, 32), keys=_powers(4, 12))
    return [point | {"queries": point["keys"], "dtype": dtype} for point in points]


def _elementwise(dtype: str) -> list[Arguments]:
    plain = {"flops": 1, "shared": 0, "weights": 0}
    two = [plain | point for point in _each(elements=_ELEMENTS, dtype=(dtype,), operands=(2,))]
    one = [plain | point for point in _each(elements=_FEWER, dtype=(dtype, _FP32, _INT64), operands=(1,))]
    broadcast = [plain | point | {"shared": 128} for point in _each(elements=_FEWER, dtype=(dtype,), operands=(1,))]
    maps = [
        plain | {"elements": count * side**2, "dtype": kind, "operands": 0, "shared": 2 * count * side}
        for side, count, kind in (
            (16, 1, _INT64),
            (64, 1, _INT64),
            (16, 64, dtype),
            (16, 2048, dtype),
            (16, 32_768, dtype),
            # From 32 on a loop is vectorised.
            (32, 16, dtype),
            (32, 1024, dtype),
            (32, 16_384, dtype),
            (32, 131_072, dtype),
            (64, 256, dtype),
            (64, 4096, dtype),
            (64, 32_768, dtype),
        )
    ]
    permuted = [point | {"permuted": True} for point in two if 1 << 12 <= point["elements"] <= 1 << 24]
    # A model in fp32 has some of these twice.
    return [
        {"permuted": False} | dict(point)
        for point in dict.fromkeys(tuple(p.items()) for p in two + one + broadcast + maps + permuted)
    ]


def _reduction(dtype: str) -> list[Arguments]:
    images = _each(elements=_powers(14, 26, 4), results=(2,), dtype=(dtype,))
    counts = [{"elements": 64 * rows, "results": 64, "dtype": _INT64} for rows in _ROWS]
    choices = [{"elements": _CHOICES * _WIDTH * r, "results": _WIDTH * r, "dtype": _FP32} for r in _ROWS]
    return images + counts + choices


def _by_elements(dtype: str) -> list[Arguments]:
    return _each(elements=_ELEMENTS, dtype=(dtype,))


def _layer_norm(dtype: str) -> list[Arguments]:
    return [
        point | {"permuted": permuted}
        for permuted, rows in ((False, _powers(0, 16)), (True, _powers(6, 16)))
        for point in _each(rows=rows, width=(1024,), dtype=(dtype,))
    ]


def _moved(dtype: str) -> list[Arguments]:
    return _each(elements=_ELEMENTS, dtype=(dtype,), weights=(0,))


def _rows(width: int) -> Callable[[str], list[Arguments]]:
    return lambda dtype: _each(rows=_powers(0, 16), width=(width,), dtype=(dtype,))


def _picked(**more: Any) -> Callable[[str], list[Arguments]]:
    return lambda dtype: [point | more for point in _each(rows=_powers(0, 16), width=(64, _WIDTH), dtype=(dtype,))]


def _fp32_rows(**more: Any) -> Callable[[str], list[Arguments]]:
    return lambda _: _each(rows=_powers(0, 14), width=(64,), **{name: (value,) for name, value in more.items()})


def _cast(dtype: str) -> list[Arguments]:
    if dtype == _FP32:
        return []
    pairs = ((dtype, _FP32), (_FP32, dtype), (_INT64, _FP32))
    return [
        {"elements": size, "source": source, "target": target, "weights": 0}
        for size, (source, target) in product(_ELEMENTS, pairs)
        if source != _INT64 or size < 1 << 20
    ]


def _fill(dtype: str) -> list[Arguments]:
    return _each(elements=_ELEMENTS, dtype=dict.fromkeys((dtype, _INT64)))


def _kv_cache_append(dtype: str) -> list[Arguments]:
    one = 2 * _WIDTH
    step = [{"cached": one * length, "added": one} for length in _powers(4, 14)]
    prompt = [{"cached": one * length, "added": one * length} for length in _powers(4, 14, 4)]
    return [point | {"dtype": dtype} for point in step + prompt]


def _interpolate(_: str) -> list[Arguments]:
    bicubic = [(channels * side**2, channels * (side * 5 // 8) ** 2) for channels, side in _MAPS]
    linear = [(64 * (2 * side - 1), 64 * (2 * side * 5 // 8 - 1)) for _, side in _MAPS]
    return [
        {"source_elements": source, "target_elements": target, "taps": taps, "dtype": _FP32}
        for taps, sizes in ((16, bicubic), (2, linear))
        for source, target in dict.fromkeys(sizes)
    ]


#: Channels and side of maps that are resized.
_MAPS: Final = ((64, 16), (1024, 16), (256, 32), (768, 64), (1024, 128))

#: The points of each operator, by its name.
_GRIDS: Final[Mapping[str, Callable[[str], list[Arguments]]]] = {
    "linear": _linear,
    "bmm": _bmm,
    "conv2d": _conv2d,
    "embedding": _rows(_WIDTH),
    "sdpa": _sdpa,
    "sdpa_with_bias": _sdpa_with_bias,
    "attention_eager": lambda dtype: _attention(dtype, heads=(8,), head_dims=(128,)),
    "causal_mask": _causal_mask,
    "rope_tables": lambda dtype: _each(positions=_powers(0, 14), half_dim=(64,), dtype=(dtype,)),
    "rope_apply": lambda dtype: [
        {"pairs": 64 * 8 * length, "table_pairs": 64 * length, "dtype": dtype} for length in _powers(0, 14)
    ],
    "rms_norm": _rows(_WIDTH),
    "layer_norm": _layer_norm,
    "layer_norm_2d": lambda dtype: _each(pixels=_powers(6, 16), channels=(256,), dtype=(dtype,)),
    "gelu": _by_elements,
    "silu": _by_elements,
    "quick_gelu": _by_elements,
    "softmax": _fp32_rows(source=_FP32, target=_FP32),
    "elementwise": _elementwise,
    "reduction": _reduction,
    "interpolate": _interpolate,
    "topk": _fp32_rows(k=_CHOICES, dtype=_FP32),
    "sort": lambda _: _each(elements=[_CHOICES * rows for rows in _ROWS]),
    "gather": _picked(weights=0),
    "scatter": lambda _: _each(rows=[_CHOICES * rows for rows in _ROWS], width=(1,), dtype=(_INT64,)),
    "index_put": lambda dtype: [point | {"accumulate": False} for point in _rows(_WIDTH)(dtype)],
    "masked_scatter": lambda dtype: [
        {"positions": rows + 16, "selected": rows, "width": _WIDTH, "dtype": dtype} for rows in _powers(6, 14)
    ],
    "kv_cache_append": _kv_cache_append,
    "cat": _moved,
    "copy": _moved,
    "cast": _cast,
    "fill": _fill,
    "pad": lambda dtype: [
        {"source_elements": 3 * size, "target_elements": 4 * size, "dtype": dtype} for size in _powers(8, 26)
    ],
}


def _elements(*sizes: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda point: point["elements"] in sizes


def _scores(*sizes: tuple[int, int]) -> Callable[[Mapping[str, Any]], bool]:
    return lambda point: point["queries"] > 1 and (point["heads"], point["keys"]) in sizes


#: Which points may take long: some hundred MB, as vision encoders make of a page, and the scores of a vocabulary.
_LARGE: Final[Mapping[str, Callable[[Mapping[str, Any]], bool]]] = {
    "linear": lambda point: (
        (point["out_features"] == _VERY_WIDE and point["rows"] >= 128) or (point["bias"] and point["rows"] == 4096)
    ),
    "sdpa": _scores((8, 4096), (32, 2048)),
    "sdpa_with_bias": _scores((4, 4096), (16, 4096)),
    "attention_eager": _scores((8, 2048), (8, 4096)),
    "causal_mask": _scores((8, 2048), (8, 4096)),
    "elementwise": _elements(1 << 26, 1 << 27),
    "gelu": _elements(1 << 26),
    "cat": _elements(1 << 26),
    "copy": _elements(1 << 26),
    "cast": _elements(1 << 26),
}
