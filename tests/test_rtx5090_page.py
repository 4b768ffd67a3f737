"""The page on the RTX 5090: its predictions are the time model's, its measurements those of the source.

The source's files lie in ``shared/`` beside the checkout, where there is one: facts of the public repository
CodeGandee/llm-perf-opt (MIT licence). Without them the predictions and the errors are checked all the same.
"""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path

import pandas as pd
import pytest

import dsocr_trace
from analytic.timing.datasheet import HOST_COSTS, MEMORY_EFFICIENCY, TENSOR_EFFICIENCY
from hooks.categories import kernel_family

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "rtx-5090.md").read_text(encoding="utf-8")
SOURCE = ROOT.parent / "shared" / "reference" / "rtx5090"

PAGES, FORWARDS = 20, 64
SAM, CLIP, PROJECTOR = "model.sam_model", "model.vision_model", "model.projector"
#: The first of the 64 experts of the first layer that has any; all get equal shares.
EXPERT = "model.layers.1.mlp.experts.0.up_proj"
PREFILL, DECODE = ("vision", "prefill"), ("decode",)
#: What tells rows of a prediction apart.
PLACE = ["stage", "path", "name", "category"]
#: Kernel families to the operator category of a prediction that holds the same work.
FAMILIES = {
    ("GEMM", "GEMV"): "linear",
    ("convolution",): "conv",
    ("memory-efficient attention", "flash attention"): "attention",
    ("sort/top-k", "gather/scatter"): "routing",
}
REST = "all others"


def table(heading: str) -> dict[str, list[str]]:
    """First cell to the other cells of each row of the table below a heading."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert section, f"no section {heading}"
    lines = [line for line in section[1].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {first: rest for first, *rest in rows}


def column(heading: str, number: int) -> dict[str, str]:
    return {label: cells[number] for label, cells in table(heading).items()}


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


# ---- what the model says


@pytest.fixture(scope="module")
def forecasts(tmp_path_factory):
    """What the page's own workload gives for each tile grid."""
    (text,) = re.findall(r"^```toml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    path = tmp_path_factory.mktemp("workload") / "omnidocbench.toml"
    path.write_text(text, encoding="utf-8")
    settings = {"attention": "flash_attention_2"}
    return {
        grid: dsocr_trace.predict(str(path), "rtx-5090", settings=settings | {"crop_grid": grid})
        for grid in ("none", "2x3", "3x3")
    }


def spent(forecast) -> pd.DataFrame:
    """One row for each operator, call of a module and choice of tokens."""
    prediction, floor_ns = forecast.prediction, forecast.device.host.kernel_floor_ns
    rows = [(*_place(done.operation), done.times, done.operation.cost.tensor_flops) for done in prediction.operations]
    rows += [(*key, "", REST, part.times, 0) for key, part in prediction.module_calls.items()]
    rows += [(stage, "(sampling)", "", REST, part.times, 0) for stage, part in prediction.sampling.items()]
    return pd.DataFrame(
        {
            **dict(zip(PLACE, place, strict=True)),
            "device_ns": times.predicted_device_ns,
            "host_ns": times.predicted_host_ns,
            "datasheet_ns": times.datasheet_ns,
            "launches": times.floor_ns / floor_ns,
            "tensor_flops": flops,
        }
        for *place, times, flops in rows
    )


def _place(operation):
    return operation.stage, operation.module_path, operation.name, operation.operator_category


@pytest.fixture(scope="module")
def predicted(forecasts):
    return {grid: spent(forecast) for grid, forecast in forecasts.items()}


@pytest.fixture(scope="module")
def page(predicted):
    return predicted["2x3"]


@pytest.fixture(scope="module")
def tiles(predicted):
    """Vision of the six tiles alone: what it has more than that of a page that is not cut."""
    both, whole = (predicted[grid][predicted[grid]["stage"] == "vision"].set_index(PLACE) for grid in ("2x3", "none"))
    return both.sub(whole, fill_value=0).reset_index()


def of(rows: pd.DataFrame, stages=(), *, path: str = "", category: str = "") -> pd.Series:
    """Sums over the rows of some stages, of a module and those below it, of a group of categories."""
    if stages:
        rows = rows[rows["stage"].isin(stages)]
    if path:
        rows = rows[(rows["path"] + ".").str.startswith(f"{path}.")]
    if category:
        known = rows["category"].where(rows["category"].isin(FAMILIES.values()), REST)
        rows = rows[known == category]
    return rows.sum(numeric_only=True)


def one(rows: pd.DataFrame, stage: str, path: str, name: str) -> pd.Series:
    """One launch of one operator."""
    (row,) = (
        row for _, row in rows[(rows["stage"] == stage) & (rows["path"] == path)].iterrows() if row["name"] == name
    )
    return row[["device_ns", "tensor_flops"]] / row["launches"]


# ---- what was measured


@pytest.fixture(scope="module")
def kernels():
    """Nsight Systems' sums of each recording."""
    if not SOURCE.exists():
        pytest.skip(f"the source's files are not in {SOURCE}")
    found = {path.stem.removeprefix("kern_sum_"): pd.read_csv(path) for path in SOURCE.glob("kern_sum_*.csv")}
    return {name: rows.assign(family=rows["Name"].map(kernel_family)) for name, rows in found.items()}


@pytest.fixture(scope="module")
def counters(kernels):
    """Nsight Compute's figures."""
    assert kernels
    return pd.read_csv(SOURCE / "ncu_top20_metrics_summary.csv")


def total(rows: pd.DataFrame) -> pd.Series:
    return pd.Series({"device_ns": rows["Total Time (ns)"].sum(), "launches": rows["Instances"].sum()})


def group(rows: pd.DataFrame, families) -> pd.Series:
    """Sums over kernel families, or over all that have no row of their own."""
    known = [family for row in FAMILIES for family in row]
    return total(rows[rows["family"].isin(families) if families else ~rows["family"].isin(known)])


def named(rows: pd.DataFrame, pattern: str) -> pd.Series:
    """The one kernel with a name like that."""
    (row,) = (
        row for _, row in rows[rows.filter(regex="(?i)^(kernel_)?name$").iloc[:, 0].str.contains(pattern)].iterrows()
    )
    return row


def others(cell: str) -> float:
    """Mean of the other pages, if the first alone differs from them, of ``mean (std)`` over all."""
    mean, std = re.match(r"([\d.]+) \(([\d.]+)\)", cell).groups()
    return float(mean) - float(std) / math.sqrt(PAGES - 1)


def wall(number: int) -> float:
    """In ms, of the other pages, in the runs of which one range was recorded."""
    cells = column("Wall times", number)
    return statistics.mean(others(cell) for run, cell in cells.items() if run != "all pages")


# ---- the page


def test_the_page_is_the_one_that_was_measured(forecasts, kernels, counters):
    workload = forecasts["2x3"].scenario.workload
    # SAM has 12 layers, and sees every page twice: in tiles, and as a whole.
    assert named(kernels["prefill"], "fmha")["Instances"] == 2 * 12
    assert named(kernels["all-stage"], "fmha")["Instances"] == 2 * 12 * PAGES
    # Only a view of less than 1024 px has its position tables resampled: the call that was recorded has them all.
    assert named(kernels["sam"], "upsample_linear1d")["Instances"] == 8
    assert named(kernels["prefill"], "upsample_linear1d")["Instances"] == 8
    # 40 x 40 patches of a tile in windows of 14 x 14, and 12 heads.
    windows = math.ceil(40 / 14) ** 2 * math.prod(workload.grid)
    assert named(counters, "fmha")["grid_size"] == f"(4, 12, {windows})" == "(4, 12, 54)"
    # A product of two numbers for each of 1280 features of each position, 512 of them in a block.
    blocks = named(counters, r"elementwise_kernel<128, 4, .*BinaryFunctor<BFloat16, BFloat16, BFloat16, Mul")[
        "grid_size"
    ]
    assert blocks == "(2283, 1, 1)"
    assert [n for n in range(500, 1500) if math.ceil(n * 1280 / 512) == 2283] == [workload.seq_len] == [913]
    # The pages are alike: the largest product of SAM takes the same time in each.
    product = named(kernels["all-stage"], "128x256_32x3")
    assert product["Instances"] == 12 * PAGES
    assert product["Max (ns)"] < 1.02 * product["Min (ns)"]


def test_result(forecasts, predicted):
    for number, grid in ((1, "none"), (2, "2x3"), (3, "3x3")):
        walls = {row.stage: row.predicted_wall_ns for row in forecasts[grid].stage_rows}
        assert len(forecasts[grid].prediction.work.kv_lengths) == FORWARDS
        prefill, decode = (of(predicted[grid], stages) for stages in (PREFILL, DECODE))
        assert column("Result", number) == {
            "prefill: kernels, ms": f"{prefill['device_ns'] / 1e6:.1f}",
            "prefill: launches": f"{prefill['launches']:,.0f}",
            "prefill: wall, ms": f"{(walls['vision'] + walls['prefill']) / 1e6:.1f}",
            "decode forward: kernels, ms": f"{decode['device_ns'] / FORWARDS / 1e6:.2f}",
            "decode forward: launches": f"{decode['launches'] / FORWARDS:,.0f}",
            "decode forward: wall, ms": f"{walls['decode'] / FORWARDS / 1e6:.1f}",
        }


def test_result_of_the_roofline(page):
    roofline = column("Result", 0)
    assert roofline["prefill: kernels, ms"] == f"{of(page, PREFILL)['datasheet_ns'] / 1e6:.1f}"
    assert roofline["decode forward: kernels, ms"] == f"{of(page, DECODE)['datasheet_ns'] / FORWARDS / 1e6:.2f}"


def test_result_measured(kernels):
    assert named(kernels["decode"], "ArgMaxOps")["Instances"] == FORWARDS
    prefill, decode = (total(kernels[name]) for name in ("prefill", "decode"))
    assert column("Result", 4) == {
        "prefill: kernels, ms": f"{prefill['device_ns'] / 1e6:.1f}",
        "prefill: launches": f"{prefill['launches']:,}",
        "prefill: wall, ms": f"{wall(0):.1f}",
        "decode forward: kernels, ms": f"{decode['device_ns'] / FORWARDS / 1e6:.2f}",
        "decode forward: launches": f"{decode['launches'] / FORWARDS:,.0f}",
        "decode forward: wall, ms": f"{wall(3) / FORWARDS:.1f}",
    }


def test_wall_times_of_the_other_pages():
    for cells in table("Wall times").values():
        for cell in cells:
            assert cell.endswith(f" → {others(cell):.1f}"), cell


def test_wall_times_measured(kernels):
    assert kernels
    text = " ".join((SOURCE / "README.md").read_text(encoding="utf-8").split())
    told = re.search(
        r"prefill (\S+ \S+) ms, of which SAM (\S+), CLIP (\S+), .*; decode of 64 tokens (\S+ \S+) ms", text
    )
    assert told
    prefill, sam, clip, decode = (cell.partition(" → ")[0] for cell in table("Wall times")["all pages"])
    assert (prefill, sam.partition(" ")[0], clip.partition(" ")[0], decode) == told.groups()


def test_vision(page, tiles):
    clip = of(tiles, path=CLIP)
    assert of(tiles, path=CLIP, category="linear")["launches"] == 96
    host = {path: of(page, ("vision",), path=path)["host_ns"] / 1e6 for path in (SAM, CLIP)}
    assert column("Vision", 0) == {
        "SAM on the tiles: kernels, ms": f"{of(tiles, path=SAM)['device_ns'] / 1e6:.1f}",
        "SAM on the tiles: launches": f"{of(tiles, path=SAM)['launches']:.0f}",
        "CLIP on the tiles, 87 of 96 products: kernels, ms": f"{clip['device_ns'] * 87 / 96 / 1e6:.2f}",
        "CLIP on the tiles, 87 of 96 products: launches": f"{clip['launches'] * 87 / 96:.0f}",
        "projector on the tiles: kernels, µs": f"{of(tiles, path=PROJECTOR)['device_ns'] / 1e3:.0f}",
        "SAM, both calls: host, ms": f"{host[SAM]:.1f}",
        "CLIP, both calls: host, ms": f"{host[CLIP]:.1f}",
    }


def test_vision_measured(kernels):
    sam, clip, projector = (total(kernels[name]) for name in ("sam", "clip", "projector"))
    assert group(kernels["clip"], ["GEMM"])["launches"] == 87
    assert column("Vision", 1) == {
        "SAM on the tiles: kernels, ms": f"{sam['device_ns'] / 1e6:.1f}",
        "SAM on the tiles: launches": f"{sam['launches']}",
        "CLIP on the tiles, 87 of 96 products: kernels, ms": f"{clip['device_ns'] / 1e6:.2f}",
        "CLIP on the tiles, 87 of 96 products: launches": f"{clip['launches']}",
        "projector on the tiles: kernels, µs": f"{projector['device_ns'] / 1e3:.0f}",
        "SAM, both calls: host, ms": f"{wall(1):.1f}",
        "CLIP, both calls: host, ms": f"{wall(2):.1f}",
    }


def kernel_rows():
    """Stage, label, families, category, and what a number of ns and of launches is divided by."""
    for stage, unit, forwards in (("prefill", 1e6, 1), ("decode", 1e3, FORWARDS)):
        for families, category in [*FAMILIES.items(), ((), REST)]:
            if (stage, category) != ("decode", "conv"):
                yield stage, f"{stage}: {', '.join(families) or REST}", families, category, unit * forwards, forwards


def test_kernels(page):
    printed, expected = table("Kernels"), {}
    for stage, label, _, category, unit, forwards in kernel_rows():
        found = of(page, PREFILL if stage == "prefill" else DECODE, category=category)
        time = found["device_ns"] / unit
        name = category if category == REST else f"`{category}`"
        expected[label] = [
            name,
            f"{time:.2f}" if stage == "prefill" else f"{time:,.0f}",
            f"{found['launches'] / forwards:,.0f}",
        ]
    assert {label: [cells[0], cells[1], cells[4]] for label, cells in printed.items()} == expected


def test_kernels_measured(kernels):
    printed = table("Kernels")
    for stage, label, families, _, unit, forwards in kernel_rows():
        found = group(kernels[stage], families)
        time = found["device_ns"] / unit
        expected = [f"{time:.2f}" if stage == "prefill" else f"{time:,.0f}", f"{found['launches'] / forwards:,.0f}"]
        assert [printed[label][2], printed[label][5]] == expected, label


def test_causes(forecasts, page, tiles):
    peak = forecasts["2x3"].device.hardware.tensor_flops_per_s["bfloat16"].value
    floor_ns = forecasts["2x3"].device.host.kernel_floor_ns
    (wall_ns,) = (row.predicted_wall_ns for row in forecasts["2x3"].stage_rows if row.stage == "decode")
    product = one(tiles, "vision", f"{SAM}.blocks.0.mlp.lin1", "linear")
    decode = of(page, DECODE)
    small = decode - of(page, DECODE, category="linear") - of(page, DECODE, category="attention")
    copies = tiles[tiles["category"] == "copy"]
    assert column("Causes", 0) == {
        "prefill: an expert's matrix product, µs": f"{one(page, 'prefill', EXPERT, 'linear')['device_ns'] / 1e3:.1f}",
        "SAM on the tiles: attention, ms": f"{of(tiles, path=SAM, category='attention')['device_ns'] / 1e6:.1f}",
        "SAM on the tiles: a residual addition, µs": (
            f"{one(tiles, 'vision', f'{SAM}.blocks.0', 'residual_mlp')['device_ns'] / 1e3:.0f}"
        ),
        "SAM on the tiles: a product of the MLP, share of the matrix peak": percent(
            product["tensor_flops"] * 1e9 / (product["device_ns"] - floor_ns) / peak
        ),
        "SAM and CLIP on the tiles: copies and casts, launches": f"{copies['launches'].sum():.0f}",
        "decode: an expert's matrix-vector product, µs": (
            f"{one(page, 'decode', EXPERT, 'linear')['device_ns'] / 1e3:.1f}"
        ),
        "decode: output layer, µs": f"{one(page, 'decode', 'lm_head', 'linear')['device_ns'] / 1e3:.0f}",
        "decode: neither matrix product nor attention, mean of a launch, µs": (
            f"{small['device_ns'] / small['launches'] / 1e3:.1f}"
        ),
        "decode: wall time for each launch, µs": f"{wall_ns / decode['launches'] / 1e3:.1f}",
        "decode: share of the wall time without a kernel": percent(1 - decode["device_ns"] / wall_ns),
    }


def test_causes_measured(forecasts, tiles, kernels, counters):
    peak = forecasts["2x3"].device.hardware.tensor_flops_per_s["bfloat16"].value
    product = one(tiles, "vision", f"{SAM}.blocks.0.mlp.lin1", "linear")
    linear, _, attention, _ = FAMILIES
    decode, wall_ns = total(kernels["decode"]), wall(3) * 1e6
    small = decode - group(kernels["decode"], linear) - group(kernels["decode"], attention)
    addition = named(counters, r"elementwise_kernel<128, 4, .*CUDAFunctor_add<BFloat16>")
    assert addition["grid_size"] == f"({6 * 1600 * 768 // 512}, 1, 1)"
    vector, head = (named(kernels["decode"], rf"gemvx.*\(int\){kind}, \(bool\)0, cublasGemv") for kind in (7, 6))
    copies = sum(group(kernels[name], ["copy", "cat", "fill"]) for name in ("sam", "clip"))
    assert column("Causes", 1) == {
        "prefill: an expert's matrix product, µs": f"{named(kernels['prefill'], '32x32_128x2')['Avg (ns)'] / 1e3:.1f}",
        "SAM on the tiles: attention, ms": f"{group(kernels['sam'], attention)['device_ns'] / 1e6:.1f}",
        "SAM on the tiles: a residual addition, µs": f"{addition['duration_us']:.0f}",
        "SAM on the tiles: a product of the MLP, share of the matrix peak": percent(
            product["tensor_flops"] * 1e9 / named(kernels["sam"], "128x256_32x3")["Avg (ns)"] / peak
        ),
        "SAM and CLIP on the tiles: copies and casts, launches": f"{copies['launches']}",
        "decode: an expert's matrix-vector product, µs": f"{vector['Med (ns)'] / 1e3:.1f}",
        "decode: output layer, µs": f"{head['Max (ns)'] / 1e3:.0f}",
        "decode: neither matrix product nor attention, mean of a launch, µs": (
            f"{small['device_ns'] / small['launches'] / 1e3:.1f}"
        ),
        "decode: wall time for each launch, µs": f"{wall_ns / decode['launches'] / 1e3:.1f}",
        "decode: share of the wall time without a kernel": percent(1 - decode["device_ns"] / wall_ns),
    }


@pytest.mark.parametrize(
    ("heading", "model", "source", "error"), [("Result", 2, 4, 5), ("Vision", 0, 1, 2), ("Kernels", 1, 2, 3)]
)
def test_errors_follow_from_the_figures_beside_them(heading, model, source, error):
    for label, cells in table(heading).items():
        said, found = (float(cells[number].replace(",", "")) for number in (model, source))
        # With the sign that the page prints.
        assert cells[error] == f"{round(100 * (said / found - 1)):+d} %".replace("-", "\N{MINUS SIGN}"), label


def assert_told(*sentences: str) -> None:
    text = " ".join(TEXT.split())
    assert [sentence for sentence in sentences if sentence not in text] == []


def test_figures_of_the_text(forecasts, page):
    host, workload = HOST_COSTS["cuda"], forecasts["2x3"].scenario.workload
    experts = page[
        (page["stage"] == "prefill") & page["path"].str.contains(r"\.experts\.") & (page["name"] == "linear")
    ]
    rows = workload.seq_len * 6 / 64
    assert_told(
        f"{percent(TENSOR_EFFICIENCY)} of the matrix peak",
        f"{percent(MEMORY_EFFICIENCY)} of the bandwidth",
        f"{host.kernel_floor_ns / 1e3:.0f} µs for the shortest kernel",
        f"{host.operator_ns / 1e3:.0f} µs for an operator",
        f"{host.module_call_ns / 1e3:.0f} µs for the call of a module",
        f"an expert gets {rows:.0f} rows on average",
        f"there are {experts['launches'].sum():,.0f} of them",
        f"tiles give {workload.image_tokens} and leave {workload.text_tokens} for the prompt",
    )


def test_figures_of_the_text_measured(page, kernels):
    prefill, decode = kernels["prefill"], kernels["decode"]
    norms = named(prefill, "layer_norm_kernel<float, float")["Instances"]
    missing = total(prefill)["launches"] - round(of(page, PREFILL)["launches"])
    below = decode[decode["Avg (ns)"] < HOST_COSTS["cuda"].kernel_floor_ns]
    assert group(kernels["clip"], ["copy"])["launches"] // named(kernels["clip"], "layer_norm")["Instances"] == 4
    # The experts' products take longer than assumed by more than all products together.
    experts_ns = (
        3 * 64 * 11 * (named(prefill, "32x32_128x2")["Avg (ns)"] - one(page, "prefill", EXPERT, "linear")["device_ns"])
    )
    (linear, *_) = FAMILIES
    assert experts_ns > group(prefill, linear)["device_ns"] - of(page, PREFILL, category="linear")["device_ns"]
    assert_told(
        f"{norms} layer norms of vision",
        f"{4 * norms} of the {missing:,} launches",
        f"{percent(below['Instances'].sum() / decode['Instances'].sum())} of decode's launches",
        f"{named(prefill, 'fmha')['Instances']} times in its 12 layers",
        f"{named(kernels['all-stage'], 'fmha')['Instances']} times in that of {PAGES} pages",
    )
