"""Planning works where torch is not installed: in a virtual environment of its own, without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: What is left out, by the beginning of its name in ``site-packages``: torch, and what needs it.
LEFT_OUT = re.compile("torch|functorch|transformers|flash_attn")
STANDARD = ("--workload", "dsocr-standard-v1", "--hardware", "rtx-5090")


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with links to everything that is installed here, but for torch."""
    folder = tmp_path_factory.mktemp("no-torch") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", folder], check=True)  # noqa: S603
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in {sysconfig.get_path(name) for name in ("purelib", "platlib")}:
        for entry in Path(path).iterdir():
            if not LEFT_OUT.match(entry.name) and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    return folder


def run(environment: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment, which sees nothing of the one that runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(  # noqa: S603
        [environment / "bin" / "python", *command],
        env=kept | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_it_is_not_there(environment, name):
    done = run(environment, "-c", f"import {name}")
    assert done.returncode == 1
    assert f"No module named '{name}'" in done.stderr


def test_what_is_installed_is_there(environment):
    code = "import attrs, numpy, importlib.metadata as m; print(m.distribution('dsocr-trace').name)"
    done = run(environment, "-c", code)
    assert done.stdout.strip() == "dsocr-trace", done.stderr


PROGRAM = ("-m", "dsocr_trace")
#: Commands that plan, each with something that it says. OUTPUT stands for a folder of the test.
COMMANDS = {
    "predict": ((*PROGRAM, "predict", *STANDARD), "balanced routing"),
    "predict what-if": ((*PROGRAM, "predict", *STANDARD, "--set", "routing=worst"), "worst routing"),
    "predict export": ((*PROGRAM, "predict", *STANDARD, "--export", "OUTPUT/report.yaml"), "OUTPUT/report.yaml"),
    "explain": ((*PROGRAM, "explain", "lm_head", *STANDARD), "2*rows*in_features*out_features"),
    "sweep": ((*PROGRAM, "sweep", "decode", *STANDARD, "--output", "OUTPUT/sweep"), "OUTPUT/sweep"),
    "documentation": (("-m", "mkdocs", "build", "--strict", "--site-dir", "OUTPUT/site"), "OUTPUT/site"),
    "list workloads": ((*PROGRAM, "list", "workloads"), "dsocr-a4-v1"),
    "list variants": ((*PROGRAM, "list", "variants"), "deepseek-ocr-v1-base"),
    "list hardware": ((*PROGRAM, "list", "hardware"), "rtx-5090"),
    "list operators": ((*PROGRAM, "list", "operators"), "sdpa_with_bias"),
    "list layers": ((*PROGRAM, "list", "layers"), "DeepseekV2MoE"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_planning(environment, tmp_path, name):
    command, said = COMMANDS[name]
    *words, said = (word.replace("OUTPUT", str(tmp_path)) for word in (*command, said))
    done = run(environment, *words)
    assert done.returncode == 0, done.stderr
    assert said in " ".join(f"{done.stdout} {done.stderr}".split())


def test_the_prediction_is_that_of_a_full_environment(environment):
    command = (*PROGRAM, "predict", *STANDARD, "--json")
    without = run(environment, *command)
    assert without.returncode == 0, without.stderr
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    assert json.loads(without.stdout) == json.loads(done.stdout)
