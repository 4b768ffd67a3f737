"""The manual scripts run, with small settings, and say what to look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent / "manual" / "deepseek_ocr"


@pytest.mark.parametrize(
    ("script", "arguments", "artifacts"),
    [
        ("performance_report", (), {"report-run.json", "report-prediction.json", "summary.json", "report.md"}),
        ("model_export", ("--workloads", "dsocr-smoke-v1"), {"dsocr-smoke-v1.json", "dsocr-smoke-v1.yaml"}),
        ("reuse_workflows", ("--workload", "dsocr-smoke-v1"), {"comparison.csv", "h200-four-pages-at-once.json"}),
        ("analytic_model", ("--targets", "core"), {"layers.md", "report.json", "verification.json"}),
    ],
)
def test_manual_scripts(tmp_path, script, arguments, artifacts):
    path = SCRIPTS / f"manual_deepseek_ocr_{script}.py"
    command = [sys.executable, str(path), "--output", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert artifacts <= {path.name for path in tmp_path.rglob("*")}
    assert str(tmp_path) in done.stdout
    assert "What to look at" in done.stdout
