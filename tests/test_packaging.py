"""pyproject.toml, pixi.toml, constraints.txt and the Makefile say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIXI = tomllib.loads((ROOT / "pixi.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()

RUNTIME = PYPROJECT["project"]["dependencies"]
GROUPS = PYPROJECT["dependency-groups"]
DIRECT = [*RUNTIME, *GROUPS["dev"], *GROUPS["docs"]]

PINS = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
}


def pixi_packages(table: dict[str, Any]) -> dict[str, str]:
    """Name and version specifier of the PyPI dependencies of a manifest or feature."""
    specs = table.get("pypi-dependencies", {})
    return {name: spec if isinstance(spec, str) else spec.get("version", "*") for name, spec in specs.items()}


def environment(name: str) -> dict[str, str]:
    features = [PIXI["feature"][feature] for feature in PIXI["environments"][name]]
    return {key: spec for table in (PIXI, *features) for key, spec in pixi_packages(table).items()}


def recipe(target: str) -> tuple[list[str], list[str]]:
    """Prerequisite targets and commands of a Makefile target, without the path of the environment."""
    match = re.search(rf"^{target}: (?P<needs>[^#\n]*)(##.*)?\n(?P<commands>(\t.*\n)*)", MAKEFILE, re.MULTILINE)
    assert match, target
    commands = match["commands"].replace("$(BIN)/", "").replace("$(WORKLOAD)", variable("WORKLOAD"))
    needs = [need for need in match["needs"].split() if not need.startswith("$")]
    return needs, [command.strip() for command in commands.splitlines()]


def variable(name: str) -> str:
    match = re.search(rf"^{name} \?= (.*)$", MAKEFILE, re.MULTILINE)
    assert match, name
    return match[1]


@pytest.mark.parametrize("name", ["run", "test", "lint", "docs", "nsys"])
def test_a_pixi_task_runs_what_the_make_target_runs(name: str) -> None:
    task = PIXI["tasks"][name]
    task = {"cmd": task, "depends-on": []} if isinstance(task, str) else task
    assert (task["depends-on"], task["cmd"].split(" && ")) == recipe(name)


def test_every_make_target_but_housekeeping_is_a_pixi_task() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) - {"clean", "help"} == set(PIXI["tasks"])
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \w", MAKEFILE, re.MULTILINE), f"make help does not explain {target}"


@pytest.mark.parametrize("name", ["default", "rtx5090"])
def test_a_pixi_environment_holds_every_dependency(name: str) -> None:
    packages = environment(name)
    for requirement in map(Requirement, DIRECT):
        if requirement.name == "torch" and name != "default":
            assert packages["torch"] == ">=2.7"
        else:
            assert packages[requirement.name] == (str(requirement.specifier) or "*")
    assert ("flash-attn" in packages) == (name == "rtx5090")


def test_the_flash_feature_is_the_flash_extra() -> None:
    (extra,) = map(Requirement, PYPROJECT["project"]["optional-dependencies"]["flash"])
    assert pixi_packages(PIXI["feature"]["flash"]) == {extra.name: str(extra.specifier)}


def test_gpu_environments_take_cuda_builds() -> None:
    cuda = PIXI["feature"]["cuda"]
    assert Version(cuda["system-requirements"]["cuda"]) >= Version("12.8")
    assert cuda["pypi-dependencies"]["torch"]["index"].endswith("/cu128")


def test_pixi_and_pyproject_want_the_same_python() -> None:
    wanted = Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier
    assert Requirement(f"python{PIXI['dependencies']['python']}").specifier == wanted


@pytest.mark.parametrize("text", DIRECT)
def test_constraints_pin_every_direct_dependency(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_constraints_are_exact_and_name_no_local_or_cuda_build() -> None:
    assert all(not Version(version).local for version in PINS.values())
    assert not [name for name in PINS if name.startswith(("nvidia-cu", "nvidia-nccl", "triton", "cuda-"))]


def test_make_installs_the_pinned_torch() -> None:
    assert variable("TORCH") == f"torch=={PINS['torch']}"


def test_continuous_integration_is_make_test() -> None:
    script = ROOT / ".ci" / "run"
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1] == "set -euo pipefail"
    assert lines[-1] == "make test"
    assert script.stat().st_mode & 0o111
