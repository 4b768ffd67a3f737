"""The hardware table: its figures, their evidence, and what a bad file is told."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from analytic.errors import InputError
from analytic.hardware import Figure, Hardware, cpu_hardware, hardware_names, load_hardware

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = (
    (Path(__file__).resolve().parents[2] / "docs" / "cost-model.md").read_text(encoding="utf-8").split("## Hardware")[1]
)
EXAMPLES = dict(re.findall(r"```toml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
GPU, CPU = EXAMPLES["my-gpu.toml"], EXAMPLES["my-server.toml"]

#: What the public datasheets say: dense bf16 and fp32 in TFLOP/s, bandwidth in GB/s, memory in GB.
KNOWN = {
    "rtx-3090": (71.2, 35.6, 936, 24),
    "rtx-4090": (165.2, 82.6, 1008, 24),
    "rtx-5090": (209.5, 104.8, 1792, 32),
    "a100-40gb": (312, 19.5, 1555, 40),
    "a100-80gb-sxm": (312, 19.5, 2039, 80),
    "a100-80gb-pcie": (312, 19.5, 1935, 80),
    "h100-sxm": (989.4, 66.9, 3350, 80),
    "h100-pcie": (756, 51.2, 2000, 80),
    "h200": (989.4, 66.9, 4800, 141),
    "b200": (2250, 75, 7700, 180),
    "l4": (121, 30.3, 300, 24),
    "l40s": (366.5, 91.6, 864, 48),
}
CPUS = ("cpu-generic", "epyc-9654", "xeon-8480plus")


def text_of(name: str) -> str:
    return (resources.files("analytic") / "data" / "hardware" / f"{name}.toml").read_text("utf-8")


def figures_of(hardware: Hardware) -> Iterator[Figure]:
    yield from hardware.tensor_flops_per_s.values()
    yield from hardware.vector_flops_per_s.values()
    single = (hardware.memory_bytes_per_s, hardware.memory_bytes, hardware.l2_bytes)
    yield from (figure for figure in (*single, hardware.multiprocessors, hardware.clock_hz) if figure)


def summary(hardware: Hardware) -> tuple[float, float, float, float]:
    return (
        hardware.tensor_peak("bfloat16") / 1e12,
        hardware.vector_peak("float32") / 1e12,
        hardware.memory_bytes_per_s.value / 1e9,
        hardware.memory_bytes.value / 1e9,
    )


def refusal(path: Path, text: str) -> str:
    """The one line that a user's file with this text is answered with."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_hardware(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((f"hardware file {path}: ", f"hardware file {path} is not valid TOML: "))
    assert message.endswith("; correct it or choose another with --hardware")
    return message


@pytest.mark.parametrize("name", hardware_names())
def test_built_in_entries_are_complete(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert all(len(figure.source) > 10 for figure in figures_of(hardware))
    assert hardware.tensor_peak("bfloat16") > hardware.tensor_peak("float32") >= hardware.vector_peak("float32")
    assert hardware.l2_bytes is not None
    assert (hardware.kind == "cpu") == (name in CPUS)


@pytest.mark.parametrize("name", KNOWN)
def test_gpus_have_the_figures_of_their_datasheets(name: str) -> None:
    assert summary(load_hardware(name)) == pytest.approx(KNOWN[name], rel=1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_every_tensor_peak_proves_that_it_is_dense(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.multiprocessors
    assert hardware.clock_hz
    for dtype, figure in hardware.tensor_flops_per_s.items():
        assert figure.flops_per_cycle, dtype
        assert figure.sparse_value or dtype == "float32", dtype
        most = hardware.multiprocessors.value * hardware.clock_hz.value * figure.flops_per_cycle
        assert 0.9 < figure.value / most < 1.01, dtype
    assert hardware.tensor_peak("float16") == hardware.tensor_peak("bfloat16")


def test_device_names_are_those_of_one_entry_each() -> None:
    names = [device for name in hardware_names() for device in load_hardware(name).device_names]
    assert len(names) == len(set(names)) == len(KNOWN) + 1  # two forms of the A100 40 GB
    assert {"NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA L40S"} < set(names)
    assert all(name.startswith("NVIDIA ") for name in names)


def test_the_page_says_what_the_files_say() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*?) \|$", PAGE, re.MULTILINE)
    assert sorted(name for name, _ in rows) == hardware_names()
    for name, cells in rows:
        hardware = load_hardware(name)
        assert hardware.l2_bytes
        expected = [*summary(hardware), hardware.l2_bytes.value / 2**20]
        assert [float(cell) for cell in cells.split(" | ")[:5]] == pytest.approx(expected, rel=1e-3), name


def test_the_examples_of_the_page_work(tmp_path: Path) -> None:
    gpu, cpu = tmp_path / "my-gpu.toml", tmp_path / "my-server.toml"
    gpu.write_text(GPU, encoding="utf-8")
    cpu.write_text(CPU, encoding="utf-8")
    card, server = load_hardware(str(gpu)), load_hardware(str(cpu))
    assert (card.name, card.provenance, card.device_names) == ("my-gpu", "datasheet", ("NVIDIA RTX A6000",))
    assert summary(card) == pytest.approx((154.8, 38.7, 768, 48))
    assert (server.name, server.kind, server.provenance) == ("my-server", "cpu", "estimated")
    assert summary(server) == pytest.approx((16 * 3.1 * 1.024, 16 * 3.1 * 0.064, 192, 128))
    assert server.l2_bytes
    assert server.l2_bytes.value == 32 * 2**20


@pytest.mark.parametrize("keep_evidence", [True, False], ids=["beside it", "alone"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32", "fp8"])
@pytest.mark.parametrize("name", KNOWN)
def test_a_sparse_figure_in_a_dense_column_is_refused(
    name: str, dtype: str, tmp_path: Path, *, keep_evidence: bool
) -> None:
    replacement = r"\1value = \2" + (r"\nsparse_value = \2" if keep_evidence else "")
    pattern = rf"(\[tensor_flops_per_s\.{dtype}\]\n)value = .*\nsparse_value = (.*)"
    planted, count = re.subn(pattern, replacement, text_of(name))
    if not count:
        assert name.startswith("a100") or name == "rtx-3090", "only these cards have no fp8"
        return
    message = refusal(tmp_path / "mine.toml", planted)
    assert re.search(rf"tensor_flops_per_s\.{dtype}\.value is .*, it must be the dense figure", message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 768e9", "value = 768", r"memory_bytes_per_s\.value is 768, .* 1e\+09 and 1e\+15 bytes/s \(1 TB/s"),
        ("value = 768e9", "value = 7.68e5", r"memory_bytes_per_s\.value is 768000, it must be between"),
        ("value = 48e9", "value = 48", r"memory_bytes\.value is 48, .* bytes \(1 GB is 1e9\)"),
        ("value = 6291456", "value = 6144", r"l2_bytes\.value is 6144, .* bytes \(1 MiB is 1048576\)"),
        ("value = 1.8e9", "value = 1.8e6", r"clock_hz\.value is 1\.8e\+06, .* Hz \(1 GHz is 1e9\)"),
        ("value = 154.8e12", "value = 154.8", r"tensor_flops_per_s\.bfloat16\.value is .*, it must be the dense"),
        ("value = 38.7e12", "value = 38.7", r"tensor_flops_per_s\.float32\.value is 38\.7, .* FLOP/s \(1 TFLOP/s"),
        ("value = 84", "value = 84000", "multiprocessors.value is 84000, it must be between 1 and 10000"),
        ("value = 768e9", "value = 0", r"memory_bytes_per_s\.value is 0, it must be a positive number"),
        ("value = 768e9", "value = -768e9", r"value is -7\.68e\+11, it must be a positive number"),
        ("value = 768e9", "value = nan", "value is nan, it must be a positive number"),
        ("value = 768e9", "value = inf", "value is inf, it must be a positive number"),
        ("value = 768e9", "value = true", "value is True, it must be a positive number"),
        ("value = 768e9", "value = '768 GB/s'", "value is '768 GB/s', it must be a positive number"),
        (
            "value = 768e9",
            "valeu = 768e9",
            r"memory_bytes_per_s\.valeu is .*, but .* did you mean value\? It is one of",
        ),
        (
            'source = "NVIDIA RTX A6000 datasheet"',
            "",
            r"memory_bytes_per_s\.source is missing; needed are value, source",
        ),
        (
            'source = "NVIDIA RTX A6000 datasheet"',
            "source = ' '",
            "source is ' ', it must say where the figures are from",
        ),
        ("[memory_bytes_per_s]", "[memory_bandwidth]", r"memory_bandwidth is .* did you mean memory_bytes"),
        ("[memory_bytes_per_s]", "[xyz]", "xyz is .*, but no such field is known; It is one of kind, tensor"),
        ("[tensor_flops_per_s.float32]", "[tensor_flops_per_s.float16]", r"tensor_flops_per_s\.float32 is missing"),
        ("[tensor_flops_per_s.bfloat16]", "[tensor_flops_per_s.bf16]", r"bf16 is .* did you mean bfloat16\?"),
        ("[tensor_flops_per_s.float32]", "[tensor_flops_per_s.fp32]", r"fp32 is .* did you mean float32\?"),
        ("[vector_flops_per_s]", "[clock]", "clock is .* did you mean clock_hz"),
        ('kind = "cuda"', 'kind = "tpu"', "kind is 'tpu', it must be cpu or cuda"),
        ('kind = "cuda"', "", "kind is missing"),
        ('kind = "cuda"', "kind = [", "is not valid TOML: Invalid value .at line 2"),
        (
            '["NVIDIA RTX A6000"]',
            '"NVIDIA RTX A6000"',
            "device_names is 'NVIDIA RTX A6000', it must be a list of names",
        ),
        ('["NVIDIA RTX A6000"]', "[6000]", r"device_names is \[6000\], it must be a list of names"),
    ],
)
def test_a_slip_in_a_gpu_file_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert GPU.count(old) >= 1
    assert re.search(message, refusal(tmp_path / "mine.toml", GPU.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ghz = 3.1", "ghz = 3100", r"cpu\.ghz is 3100, it must be between 0\.5 and 10 GHz"),
        ("cores = 16", "cores = 0", r"cpu\.cores is 0, it must be a positive number"),
        ("cores = 16", "cores = '16'", r"cpu\.cores is '16', it must be a positive number"),
        ("cores = 16", "core = 16", r"cpu\.core is 16, but no such field is known; did you mean cores\?"),
        ("memory_gb = 128", "", r"cpu\.memory_gb is missing; needed are cores, ghz"),
        ("memory_gb = 128", "memory_gb = 128e9", r"cpu\.memory_gb is 1\.28e\+11, .* GB"),
        ("source = ", "# source = ", r"cpu\.source is missing"),
        ('"the server\'s data sheet"', '""', r"cpu\.source is '', it must say where"),
        ("[cpu]", "kind = 'cpu'\n[cpu]", "kind is 'cpu', but no such field is known; It is one of cpu"),
    ],
)
def test_a_slip_in_a_cpu_file_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in CPU
    assert re.search(message, refusal(tmp_path / "mine.toml", CPU.replace(old, new, 1)))


@pytest.mark.parametrize("text", ["", "cpu = 3", "kind = 'cuda'\ntensor_flops_per_s = 1", "\x00", "a = 1\na = 2"])
def test_what_is_no_hardware_file_at_all_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    refusal(tmp_path / "mine.toml", text)


def test_unknown_and_missing_hardware(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no hardware 'abacus'; choose one of a100-40gb, .* with --hardware"):
        load_hardware("abacus")
    with pytest.raises(InputError, match="cannot be read"):
        load_hardware(str(tmp_path / "none.toml"))


def test_processors_scale_with_their_cores() -> None:
    figures = {"ghz": 2.0, "fp32_per_cycle": 32, "bf16_per_cycle": 64, "gb_per_s_per_core": 8, "memory_gb": 4}
    one, four = (cpu_hardware("x", cores=cores, **figures) for cores in (1, 4))
    assert four.tensor_peak("float32") == 4 * one.tensor_peak("float32") == 4 * 64e9
