from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hooks.attribution import attribute_to_ranges
from hooks.errors import TraceError
from hooks.readers.ncu import read_ncu
from hooks.recording import RANGES
from hooks.tables import EVENTS

SHARED = Path(__file__).resolve().parents[4] / "shared"
NVTX = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
IDENTITY = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Device", "CC"]
DURATION = "gpu__time_duration.sum"
DRAM = "dram__bytes.sum"
BUSY = "sm__throughput.avg.pct_of_peak_sustained_elapsed"


def text_of(rows):
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows(rows)
    return buffer.getvalue()


def identity(launch, *, process=4711, name="gemm", device=0):
    return [launch, process, "python3.12", "workstation", name, 1, 7, device, "12.0"]


def raw_page(units, *values, nvtx=None, metrics=(DURATION, DRAM, BUSY)):
    """Raw page: a column for each metric, a row of units, a row for each launch."""
    names = [*IDENTITY, *([NVTX] if nvtx else []), *metrics]
    rows = [names, ["" for _ in names[: -len(metrics)]] + list(units)]
    rows += [
        [*identity(launch, name=f"kernel {launch}"), *([nvtx[launch]] if nvtx else []), *row]
        for launch, row in enumerate(values)
    ]
    return text_of(rows)


def details_page(*metrics):
    """Details page: a row for each metric, and rows of rules, which hold none; short where there is no rule."""
    names = [*IDENTITY, "Section Name", "Metric Name", "Metric Unit", "Metric Value", "Rule Name", "Rule Description"]
    rows = [[*identity(launch), section, *metric, ""] for launch, section, *metric in metrics]
    rule = [*identity(metrics[-1][0]), "SpeedOfLight", "", "", "", "Bottleneck", "This kernel,\nwhich is short"]
    return text_of([names, *rows, rule])


def entry(name, domain="<default domain>"):
    return f'"{domain}:{name}:none:none:none:none:none:none"'


@pytest.fixture
def file(tmp_path):
    def write(text, name="result.csv"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


@pytest.mark.parametrize("kernel", ["kernel_0001", "kernel_0003"])
@pytest.mark.parametrize("page", ["details", "metrics"])
def test_real_files_say_what_their_summary_says(kernel, page):
    path = SHARED / "data" / "traces" / "ncu" / f"{kernel}.{page}.csv"
    summary = SHARED / "reference" / "rtx5090" / "ncu_top20_metrics_summary.csv"
    if not path.exists() or not summary.exists():
        pytest.skip("the files of the RTX 5090 are not on this machine")
    with summary.open() as stream:
        row = next(row for row in csv.DictReader(stream) if row["kernel_id"].startswith(kernel))
    recording = read_ncu(path)
    (event,) = recording.events.to_pylist()
    assert event["name"] == row["kernel_name"]
    assert event["duration_ns"] == round(float(row["duration_us"]) * 1000)
    assert event["device"] == f"cuda:{row['device']}"
    assert str(event["process"]) == row["process_id"]
    counters = {name: column[0].as_py() for name, column in recording.counters.items()}
    assert counters[BUSY] == float(row["sm_throughput_pct"])
    assert counters["dram__throughput.avg.pct_of_peak_sustained_elapsed"] == float(row["dram_throughput_pct"])
    if page == "details":
        bandwidth = counters["Memory Workload Analysis: Memory Throughput"]
        assert bandwidth == pytest.approx(float(row["memory_throughput_gbs"]) * 1e9, rel=1e-12)
        assert counters["GPU Speed Of Light Throughput: Memory Throughput"] == float(row["mem_throughput_pct"])
        assert counters["Occupancy: Achieved Occupancy"] == float(row["achieved_occupancy_pct"])


def test_a_real_file_keeps_neither_host_nor_program():
    path = SHARED / "data" / "traces" / "ncu" / "kernel_0001.details.csv"
    if not path.exists():
        pytest.skip("the files of the RTX 5090 are not on this machine")
    recording = read_ncu(path)
    kept = repr([recording.events.to_pylist(), recording.counters, recording.notes])
    assert "python3.12" not in kept
    assert "127.0.0.1" not in kept


@pytest.mark.parametrize(
    ("unit", "value", "duration_ns"),
    [
        ("ns", "6750", 6750),
        ("nsecond", "6,750", 6750),
        ("us", "6.75", 6750),
        ("usecond", "6.75", 6750),
        ("ms", "1,234.5", 1_234_500_000),
        ("msecond", "0.002", 2000),
        ("second", "1.5", 1_500_000_000),
        ("s", "2", 2_000_000_000),
    ],
)
def test_durations_in_every_unit(file, unit, value, duration_ns):
    recording = read_ncu(file(raw_page([unit, "byte", "%"], [value, "1.5", "50"])))
    assert recording.events["duration_ns"].to_pylist() == [duration_ns]
    assert recording.counters[DURATION].to_pylist() == [duration_ns]


def test_counters_are_in_base_units(file):
    units = {
        "ns": ("5", 5),
        "Kbyte": ("2.3", 2300),
        "Gbyte/s": ("143.20", 143.2e9),
        "Gbyte/second": ("1.5", 1.5e9),
        "Ghz": ("1.99", 1.99e9),
        "cycle/nsecond": ("1.99", 1.99e9),
        "Kbyte/block": ("16.896", 16896),
        "%": ("19.66", 19.66),
        "register/thread": ("48", 48),
        "": ("1,275,068,416", 1_275_068_416),
    }
    metrics = [DURATION, *(f"metric__{number}.sum" for number in range(len(units) - 1))]
    path = file(raw_page(list(units), [value for value, _ in units.values()], metrics=metrics))
    found = [column.to_pylist() for column in read_ncu(path).counters.values()]
    assert found == [[pytest.approx(expected, rel=1e-15)] for _, expected in units.values()]


def test_raw_page_has_one_event_for_each_launch(file):
    text = raw_page(["us", "Mbyte", "%"], ["6.75", "2.33", "9.15"], ["23.42", "n/a", "nan"], ["1", "0", ""])
    recording = read_ncu(file(text))
    assert recording.events.schema.equals(EVENTS)
    assert recording.ranges.schema.equals(RANGES)
    assert recording.events["name"].to_pylist() == ["kernel 0", "kernel 1", "kernel 2"]
    assert recording.events["duration_ns"].to_pylist() == [6750, 23420, 1000]
    assert recording.counters[DRAM].to_pylist() == [2_330_000, None, 0]
    assert recording.counters[BUSY].to_pylist() == [9.15, None, None]
    starts = recording.events["start_ns"].to_pylist()
    assert starts == sorted(set(starts))


def test_details_page_names_titles_by_their_section(file):
    light, memory = "GPU Speed Of Light Throughput", "Memory Workload Analysis"
    text = details_page(
        (0, light, "Memory Throughput", "%", "19.66"),
        (0, light, "Duration", "us", "6.75"),
        (0, memory, "Memory Throughput", "Gbyte/s", "345.14"),
        (0, "Launch Statistics", "Function Cache Configuration", "", "CachePreferNone"),
        (1, light, "Duration", "us", "5"),
        (1, "Command line profiler metrics", DRAM, "Kbyte", "3"),
    )
    recording = read_ncu(file(text))
    assert recording.events["duration_ns"].to_pylist() == [6750, 5000]
    assert {name: column.to_pylist() for name, column in recording.counters.items()} == {
        f"{light}: Memory Throughput": [19.66, None],
        f"{light}: Duration": [6750, 5000],
        f"{memory}: Memory Throughput": [345.14e9, None],
        DRAM: [None, 3000],
    }


def test_lines_of_ncu_and_of_the_program_are_skipped(file):
    text = raw_page(["us", "byte", "%"], ["6.75", "1", "2"], ["5.25", "1", "2"])
    lines = text.splitlines(keepends=True)
    around = [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)\n",
        "step 1, loss 0.3\n",
        "==WARNING== Note: Running with uncontrolled GPU frequencies.\n",
        *lines[:3],
        "==PROF== Disconnected from process 4711\n",
        "\n",
        "step 2, loss 0.2\n",
        *lines[3:],
        "done\n",
    ]
    assert read_ncu(file("".join(around))).events.equals(read_ncu(file(text, "plain.csv")).events)


@pytest.mark.parametrize("group", [".", " ", "\u202f", "'"])
def test_decimal_comma(file, group):
    values = ["6,75", f"1{group}234{group}567", "19,66"]
    recording = read_ncu(file(raw_page(["us", "byte", "%"], values, ["1,234", "1", "2"])))
    assert recording.events["duration_ns"].to_pylist() == [6750, 1234]
    assert recording.counters[DRAM].to_pylist() == [1_234_567, 1]


def test_decimal_comma_is_seen_behind_spaces(file):
    assert read_ncu(file(raw_page(["us"], ["1\u202f234,5"], metrics=(DURATION,)))).events[
        "duration_ns"
    ].to_pylist() == [1_234_500]


def test_a_mixture_of_decimal_marks_is_refused(file):
    with pytest.raises(TraceError, match="decimal point and with decimal comma"):
        read_ncu(file(raw_page(["us", "byte", "%"], ["6,75", "1", "2.5"])))


@given(st.integers(0, 10**15), st.integers(0, 99))
@example(999, 0)
@example(1000, 10)
@settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_grouped_number_is_read_back(file, whole, hundredths):
    value = f"{whole:,}.{hundredths:02}"
    for text in (value, value.translate({ord(","): ".", ord("."): ","})):
        recording = read_ncu(file(raw_page(["us", "byte", "%"], ["1", text, text])))
        assert recording.counters[DRAM].to_pylist() == [float(f"{whole}.{hundredths:02}")]


def test_a_launch_without_duration_is_kept_and_named(file):
    recording = read_ncu(file(raw_page(["us", "byte", "%"], ["6.75", "1", "2"], ["n/a", "3", "4"], ["-1", "5", "6"])))
    assert recording.events["duration_ns"].to_pylist() == [6750, 0, 0]
    assert recording.untimed.to_pylist() == [1, 2]


def test_nvtx_ranges_hold_the_launches_made_in_them(file):
    decode, attention = entry("decode"), entry("layers.0.attn:qkv", "dsocr")
    cells = [
        f"42  {decode}  {attention} ",
        f"42  {decode}  {attention} ",
        f"42  {decode} ",
        "",
        f"42  {decode}  {attention} ",
        f"43  {attention} ",
    ]
    recording = read_ncu(file(raw_page(["us", "byte", "%"], *[["1", "1", "1.5"]] * len(cells), nvtx=cells)))
    assert recording.ranges.schema.equals(RANGES)
    keys = ("name", "domain", "style", "process", "thread")
    assert [tuple(row[key] for key in keys) for row in recording.ranges.to_pylist()] == [
        ("decode", None, "push_pop", 4711, 42),
        ("layers.0.attn:qkv", "dsocr", "push_pop", 4711, 42),
        ("layers.0.attn:qkv", "dsocr", "push_pop", 4711, 42),
        ("layers.0.attn:qkv", "dsocr", "push_pop", 4711, 43),
    ]
    attributed = attribute_to_ranges(recording)
    inner = "layers.0.attn:qkv"
    assert attributed["range_name"].to_pylist() == [inner, inner, "decode", None, inner, inner]


def test_without_nvtx_nothing_is_attributed_and_the_way_is_told(file):
    recording = read_ncu(file(raw_page(["us", "byte", "%"], ["1", "1", "1.5"])))
    assert recording.events["launch_ns"].null_count == 1
    assert recording.ranges.num_rows == 0
    assert any("--nvtx" in note for note in recording.notes)


REFUSED = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no CSV of Nsight Compute"),
        ("a,b\n1,2\n", "holds no CSV of Nsight Compute"),
        ("ID,Name\n1,2\n", "holds no CSV of Nsight Compute"),
        ("==PROF== Connected\n" + REFUSED, "NVreg_RestrictProfilingToAdminUsers=0"),
        (REFUSED + raw_page(["us", "byte", "%"], ["1", "1", "1"]), "run ncu as root"),
        (raw_page(["byte", "%"], ["1", "2.5"], metrics=(DRAM, BUSY)), "--metrics gpu__time_duration.sum"),
        (raw_page(["us", "byte", "%"]), "holds no duration"),
        (raw_page(["us", "byte", "%"], ["1", "1", "1"]) * 2, "holds several CSVs"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(file, text, message):
    with pytest.raises(TraceError, match=message) as raised:
        read_ncu(file(text))
    assert "\n" not in str(raised.value)


def test_processes_count_their_launches_each(file):
    text = raw_page(["us"], ["1"], ["2"], metrics=(DURATION,)).replace('"1","4711"', '"0","4712"')
    assert read_ncu(file(text)).events["process"].to_pylist() == [4711, 4712]


def test_a_launch_that_comes_again_is_refused(file):
    rows = list(csv.reader(io.StringIO(raw_page(["us"], ["1"], ["2"], metrics=(DURATION,)))))
    with pytest.raises(TraceError, match="launch 0 more than once"):
        read_ncu(file(text_of([*rows, rows[2]])))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        read_ncu(tmp_path / "none.csv")


def stand_in(tmp_path, code):
    """A program in ncu's place."""
    path = tmp_path / "ncu"
    path.write_text(f"#!{sys.executable}\nimport os, sys\n{code}\n")
    path.chmod(0o755)
    return path


def test_a_report_is_read_through_ncu(tmp_path, monkeypatch):
    page = tmp_path / "page.csv"
    page.write_text("==WARNING== a note\n" + raw_page(["ns", "byte", "%"], ["6750", "1", "2.5"]))
    report = tmp_path / "result.ncu-rep"
    report.write_bytes(b"NVR\0")
    code = f"assert os.environ['LC_ALL'] == 'C'\nassert {str(report)!r} in sys.argv\nprint(open({str(page)!r}).read())"
    program = stand_in(tmp_path, code)
    assert read_ncu(report, ncu=program).events["duration_ns"].to_pylist() == [6750]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert read_ncu(report).events["duration_ns"].to_pylist() == [6750]


def test_without_ncu_a_report_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TraceError, match=r"ncu --import result\.ncu-rep --csv --page raw > result\.csv"):
        read_ncu(tmp_path / "result.ncu-rep")


def test_what_ncu_cannot_read_is_told_in_its_words(tmp_path):
    program = stand_in(tmp_path, "print('==ERROR== Failed to load report file'); sys.exit(1)")
    with pytest.raises(TraceError, match=r"\(Failed to load report file\), it may be older") as raised:
        read_ncu(tmp_path / "result.ncu-rep", ncu=program)
    assert "\n" not in str(raised.value)


@given(
    nvtx=st.booleans(),
    details=st.booleans(),
    damage=st.lists(st.tuples(st.floats(0, 1), st.text(max_size=4), st.integers(0, 8)), min_size=1, max_size=5),
)
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_text(file, nvtx, details, damage):
    cells = [f"42 {entry('decode')}", f"42 {entry('decode')} {entry('attn', 'x')}"] if nvtx else None
    text = raw_page(["us", "Mbyte", "%"], ["6.75", "1,234", "2"], ["5", "n/a", "3"], nvtx=cells)
    if details:
        text = details_page((0, "Speed", DURATION, "us", "6.75"), (1, "Speed", DURATION, "ms", "1,234.5"))
    for where, inserted, removed in damage:
        at = int(where * len(text))
        text = text[:at] + inserted + text[at + removed :]
    path = file("")
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    problem = ""
    try:
        recording = read_ncu(path)
    except TraceError as error:
        problem = str(error)
    else:
        recording.events.validate(full=True)
        recording.ranges.validate(full=True)
        assert all(len(column) == recording.events.num_rows for column in recording.counters.values())
        assert all(duration >= 0 for duration in recording.events["duration_ns"].to_pylist())
    assert "\n" not in problem
