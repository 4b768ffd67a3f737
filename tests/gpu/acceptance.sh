#!/usr/bin/env bash
# Gathers evidence that dsocr-trace works on this machine's GPU. Run from the root of the repository.
# Variables, checks and what must be installed: docs/gpu-evidence.md.
set -uo pipefail

OUT=${OUT:-./gpu-evidence}
DEVICE=${DEVICE:-cuda:0}
WORKLOAD=${WORKLOAD:-dsocr-standard-v1}
PYTHON=${PYTHON:-python3}
PART=${PART:-all}
STEP_LIMIT=${STEP_LIMIT:-300}
variant=deepseek-ocr-v1-base
# The small model's runs stay small.
if [[ $WORKLOAD == dsocr-smoke-v1 ]]; then
    A4_WORKLOAD=${A4_WORKLOAD:-dsocr-smoke-v1}
    variant=deepseek-ocr-v1-tiny
fi
A4_WORKLOAD=${A4_WORKLOAD:-dsocr-a4-v1}

if [[ ! -f tests/gpu/check_run.py ]]; then
    echo "acceptance.sh: run it from the root of the repository: bash tests/gpu/acceptance.sh" >&2
    exit 2
fi
if [[ ! $PART =~ ^(1|2|3|all)$ ]]; then
    echo "acceptance.sh: PART is 1, 2, 3 or all, not $PART" >&2
    exit 2
fi
mkdir -p "$OUT"
rm -rf "$OUT"/log.txt "$OUT"/summaries.jsonl "$OUT"/standard "$OUT"/calibration.parquet "$OUT"/calibrated "$OUT"/backtest
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
touch "$OUT/summaries.jsonl"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Everything below goes to the log and to the terminal. The log is closed before the script ends.
exec 3>&1 4>&2 > >(tee "$OUT/log.txt") 2>&1
tee_pid=$!

describe() {
    date -u +%FT%TZ
    if command -v nvidia-smi > /dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,persistence_mode --format=csv,noheader
    else
        echo "nvidia-smi: not here"
    fi
    "$PYTHON" - << 'PYTHON'
import platform
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

print("python", platform.python_version())
missing = []
for wanted in tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]:
    name = re.match(r"[\w-]+", wanted)[0]
    try:
        print(f"{name} {metadata.version(name)} (wanted: {wanted})")
    except metadata.PackageNotFoundError:
        missing.append(wanted)
if missing:
    print("MISSING, unpack their wheels into a folder on PYTHONPATH:", *missing)
    sys.exit(1)
import torch

print("torch built for CUDA", torch.version.cuda, "sees", torch.cuda.device_count(), "GPU(s)")
PYTHON
}

dsocr() { timeout "$STEP_LIMIT" "$PYTHON" -m dsocr_trace "$@"; }

# keep NAME: one line of summaries.jsonl from what the step NAME printed.
keep() { printf '{"%s": %s}\n' "$1" "$(cat "$work/$1.json")" >> "$OUT/summaries.jsonl"; }

# step NAME COMMAND [ARGUMENT]...: a command of dsocr-trace that prints JSON or nothing.
step() {
    local name=$1 start=$SECONDS
    shift
    echo
    echo "== $name: $*"
    if dsocr "$@" > "$work/$name.json"; then
        echo "PASS $name: $((SECONDS - start)) s"
        if [[ -s $work/$name.json ]]; then keep "$name"; fi
    else
        echo "FAIL $name: it ended with an error"
        failed=1
        return 1
    fi
}

# expect NAME EXPRESSION: the expression holds, of d, what the step NAME printed. Its last value is the figure.
expect() {
    "$PYTHON" - "$work/$1.json" "$1" "$2" << 'PYTHON' || failed=1
import json
import sys

path, name, expression = sys.argv[1:]
holds, *figure = eval(expression, {"d": json.load(open(path))})
print("PASS" if holds else "FAIL", f"{name}:", *figure)
sys.exit(not holds)
PYTHON
}

# trace NAME WORKLOAD [OPTION]...: one run, its summary, its checks.
trace() {
    local name=$1 workload=$2
    shift 2
    step "$name" run --workload "$workload" --device "$DEVICE" --output "$work" --run-id "$name" --json --quiet "$@" &&
        { timeout "$STEP_LIMIT" "$PYTHON" tests/gpu/check_run.py "$work/$name" || failed=1; }
}

# script NAME [ARGUMENT]...: a script of this folder, which prints its own verdict.
script() {
    echo
    echo "== $*"
    timeout "$STEP_LIMIT" "$PYTHON" "tests/gpu/$1.py" "${@:2}" || failed=1
}

part1() {
    trace standard "$WORKLOAD"
    if [[ -d $work/standard ]]; then
        mkdir -p "$OUT/standard"
        cp "$work"/standard/{run.json,report.md,attribution.parquet,operators.parquet,pages.parquet} "$OUT/standard/"
        "$PYTHON" tests/gpu/check_run.py "$work/standard" --aggregate "$OUT/standard/kernels_by_name.parquet" || failed=1
    fi
    trace eager "$WORKLOAD" --attention eager --max-new-tokens 32
    trace a4 "$A4_WORKLOAD" --max-new-tokens 32
}

part2() {
    script second_method --device "$DEVICE" --workload "$WORKLOAD"
    trace stages "$WORKLOAD" --max-new-tokens 8 --stage all --keep-capture
    local run=$work/stages
    if [[ -f $run/stage2.nsys-rep ]]; then
        step attribute attribute "$run/stage2.nsys-rep" --run "$run" --json &&
            expect attribute '(not d["calls_beside_run"]["modules_differing"], d["events"], "events, coverage", d["coverage"])'
    else
        echo "SKIP attribute: there is no recording of Nsight Systems"
    fi
    script graphs
    if [[ -d $run ]]; then
        script counters "$run" "$work/counters.ncu-rep"
        if [[ -f $work/counters.ncu-rep ]]; then
            step joined attribute "$work/counters.ncu-rep" --run "$run" --json &&
                expect joined '(d["attributed_events"] > 0 and d["counters"], d["attributed_events"], "of", d["events"], d["counters"])'
        fi
        step report report "$run" --output "$work/report.html"
        step perfetto export "$run" --format perfetto --output "$work/trace.json.gz" && ls -l "$work"/{report.html,trace.json.gz}
    fi
}

# Everything is predicted from one calibration. The full backtest also makes one of its own before and after: too long.
part3() {
    local calibration=$OUT/calibration.parquet
    step calibrate calibrate --device "$DEVICE" --output "$calibration" --force --json || return
    script check_calibration "$calibration"
    trace calibrated "$WORKLOAD" --max-new-tokens 32 --hardware "$calibration"
    if [[ -d $work/calibrated ]]; then
        mkdir -p "$OUT/calibrated"
        cp "$work/calibrated/gap.parquet" "$OUT/calibrated/"
    fi
    STEP_LIMIT=$((STEP_LIMIT * 3 / 2)) step backtest backtest --device "$DEVICE" --variant "$variant" \
        --calibration "$calibration" --output "$work/backtest" --json &&
        expect backtest '(d["trials_run"] >= 20, d["verdict"] + ",", d["trials_accepted"], "trials accepted", d["bars"])'
    if [[ -d $work/backtest ]]; then
        mkdir -p "$OUT/backtest"
        cp "$work"/backtest/{backtest.md,trials.parquet,stages.parquet,modules.parquet} "$OUT/backtest/"
    fi
}

if describe; then
    step doctor doctor --json && expect doctor '(d["ready"], *(c["part"] + " " + c["state"] + ";" for c in d["checks"]))'
    for number in 1 2 3; do
        if [[ $PART == all || $PART == "$number" ]]; then "part$number"; fi
    done
else
    failed=1
fi

echo
if ((failed)); then echo "RESULT: FAIL"; else echo "RESULT: PASS"; fi
exec 1>&3 2>&4
wait "$tee_pid"
echo "evidence: $OUT"
exit "$failed"
