#!/usr/bin/env bash
# Gathers evidence that dsocr-trace works on this machine's GPU. Run from the root of the repository.
# Variables and checks: docs/gpu-evidence.md.
set -uo pipefail

OUT=${OUT:-./gpu-evidence}
DEVICE=${DEVICE:-cuda:0}
WORKLOAD=${WORKLOAD:-dsocr-standard-v1}
PYTHON=${PYTHON:-python3}
# The small model's runs stay small.
if [[ $WORKLOAD == dsocr-smoke-v1 ]]; then A4_WORKLOAD=${A4_WORKLOAD:-dsocr-smoke-v1}; fi
A4_WORKLOAD=${A4_WORKLOAD:-dsocr-a4-v1}

if [[ ! -f tests/gpu/check_run.py ]]; then
    echo "acceptance.sh: run it from the root of the repository: bash tests/gpu/acceptance.sh" >&2
    exit 2
fi
mkdir -p "$OUT/standard"
rm -f "$OUT"/log.txt "$OUT"/summaries.jsonl "$OUT"/standard/*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
touch "$OUT/summaries.jsonl"
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
from importlib import metadata

import torch

print("python", platform.python_version())
for name in ("torch", "transformers", "nvtx", "numpy", "pandas", "pyarrow", "safetensors"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "MISSING")
print("torch built for CUDA", torch.version.cuda, "sees", torch.cuda.device_count(), "GPU(s)")
PYTHON
}

# trace NAME WORKLOAD [OPTION]...: one run, its summary, its checks.
trace() {
    local name=$1 workload=$2
    shift 2
    echo
    echo "== $name: $workload on $DEVICE $*"
    if ! "$PYTHON" -m dsocr_trace run --workload "$workload" --device "$DEVICE" --output "$work" --run-id "$name" \
        --json "$@" > "$work/$name.json"; then
        echo "FAIL $name: the run ended with an error"
        failed=1
        return
    fi
    cat "$work/$name.json" >> "$OUT/summaries.jsonl"
    "$PYTHON" tests/gpu/check_run.py "$work/$name" || failed=1
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
describe || failed=1
trace standard "$WORKLOAD"
if [[ -d $work/standard ]]; then
    cp "$work"/standard/{run.json,report.md,attribution.parquet,operators.parquet,pages.parquet} "$OUT/standard/"
    "$PYTHON" tests/gpu/check_run.py "$work/standard" --aggregate "$OUT/standard/kernels_by_name.parquet" || failed=1
fi
trace eager "$WORKLOAD" --attention eager --max-new-tokens 32
trace a4 "$A4_WORKLOAD" --max-new-tokens 32

echo
if ((failed)); then echo "RESULT: FAIL"; else echo "RESULT: PASS"; fi
exec 1>&3 2>&4
wait "$tee_pid"
echo "evidence: $OUT"
exit "$failed"
