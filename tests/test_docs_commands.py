"""What the documentation tells users to type is typed here, in the page's order, and answers what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner
from PIL import Image

from dsocr_trace.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = "reference-standard-cpu"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELLIPSIS = "…"

#: Words of commands that are not run here, but only checked for their options, and why.
NOT_RUN = {
    "cuda": "needs a GPU",
    "path/to": "needs a checkpoint, a calibration or a backtest",
    "--stage 2": "needs Nsight Systems",
    ".nsys-rep": "needs a recording of Nsight Systems",
    ".sqlite": "needs a recording of Nsight Systems",
    "trace.json.gz": "needs a recording",
    "--refresh": "changes the source",
    "calibrate": "takes minutes",
    "backtest": "takes minutes",
    "dsocr-trace verify all": "takes minutes",
    "dsocr-trace verify vision": "takes minutes",
    "list layers --model builtin": "takes minutes",
}
#: Runs are made with the small model and few tokens.
QUICK = ["--variant", "deepseek-ocr-v1-tiny", "--max-new-tokens", "4"]
#: Commands whose answer is not the same twice.
MEASURING = ("run", "attribute", "compare", "doctor", "report")
#: Pages whose Python is run by tests of their own, or is an excerpt of a file that is tested.
OTHER_PYTHON = ("adding-a-model.md", "comparing.md", "external-traces.md")


@attrs.frozen
class Block:
    """Something to type, and what the page shows below it."""

    language: str
    typed: str
    shown: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    previous_end, text = -1, page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        language, body = match.groups()
        if language == "console":
            for command in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                typed, _, shown = command.partition("\n")
                found.append(Block(language, typed, shown))
        elif language == "python":
            found.append(Block(language, body, ""))
        elif found and found[-1].language == "python" and not text[previous_end : match.start()].strip():
            found[-1] = attrs.evolve(found[-1], shown=body)
        previous_end = match.end()
    return found


def words(typed: str) -> list[str] | None:
    """Arguments of dsocr-trace; None for another program."""
    program, _, rest = typed.partition(" ")
    if Path(program).name != "dsocr-trace":
        return None
    arguments = shlex.split(rest, comments=True)
    return arguments[: next((at for at, word in enumerate(arguments) if word in ("|", ">")), None)]


def assert_shown(shown: str, said: str) -> None:
    """Every line that the page shows was said, in that order; lines may be left out between them."""
    lines = iter([" ".join(line.split()) for line in said.splitlines()])
    for line in shown.splitlines():
        wanted = " ".join(line.split())
        if wanted not in ("", ELLIPSIS):
            assert wanted in lines, f"not said: {line}"


def expected_codes(arguments: list[str], shown: str) -> set[int]:
    if shown.startswith("dsocr-trace: "):
        return {2}
    return {0, 3} if "--fail-over" in arguments else {0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of the small model."""
    root = tmp_path_factory.mktemp("finished")
    arguments = ["run", "--workload", "dsocr-smoke-v1", "--run-id", "small", "--output", str(root), "--quiet"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return root / "small"


@pytest.fixture
def workplace(request, tmp_path, monkeypatch, finished):
    """A working directory with the files and runs that the page names and does not make itself."""
    monkeypatch.chdir(tmp_path)
    text = request.param.read_text(encoding="utf-8")
    made = set(re.findall(r"--run-id ([\w-]+)|--output results/([\w-]+)", text))
    made_names = {name for pair in made for name in pair if name}
    for name in set(re.findall(r"results/([\w-]+)", text)) - made_names - {REFERENCE}:
        if not name.startswith("sweep-"):
            shutil.copytree(finished, tmp_path / "results" / name)
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "results" / REFERENCE).symlink_to(ROOT / "results" / REFERENCE)
    page = Image.effect_noise((640, 800), 60).convert("RGB")
    page.save("page.png")
    page.save("scan.pdf", resolution=200)
    for toml in re.findall(r"^```toml\n(# (\S+\.toml)\n.*?)^```$", text, re.MULTILINE | re.DOTALL):
        Path(toml[1]).write_text(toml[0], encoding="utf-8")
    return request.param


def run_command(block: Block) -> None:
    arguments = words(block.typed)
    if arguments is None:
        return
    if arguments == ["verify"] or any(word in block.typed for word in NOT_RUN):
        command = cli.commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])
        return
    if arguments[0] == "run":
        arguments += QUICK
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code in expected_codes(arguments, block.shown), f"{block.typed}\n{result.output}"
    if arguments[0] not in MEASURING or result.exit_code == 2:
        assert_shown(block.shown, result.output)


@pytest.mark.parametrize("workplace", PAGES, ids=lambda page: str(page.relative_to(ROOT)), indirect=True)
def test_what_the_page_says_to_type_works(workplace):
    namespace: dict = {"__name__": "__page__"}
    for block in blocks(workplace):
        if block.language == "console":
            run_command(block)
        elif workplace.name not in OTHER_PYTHON:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(block.typed, str(workplace), "exec"), namespace)  # noqa: S102
            assert_shown(block.shown, said.getvalue())


def test_every_reason_not_to_run_a_command_is_needed():
    typed = [block.typed for page in PAGES for block in blocks(page) if block.language == "console"]
    assert [word for word in NOT_RUN if not any(word in command for command in typed)] == []


def test_a_wrong_output_is_found():
    assert_shown("a  1\n…\nc", "a 1\nb\nc")
    with pytest.raises(AssertionError, match="not said: c"):
        assert_shown("b\nc", "c\nb\n")
