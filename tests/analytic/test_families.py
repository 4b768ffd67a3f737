"""Model families of other packages: found, refused in one line, and the example's formulas against torch's count."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from click.testing import CliRunner

import dsocr_trace
from analytic.errors import DsocrTraceError, InputError
from analytic.families.base import OTHER
from analytic.families.deepseek_ocr import DeepseekOcr
from analytic.families.registry import ENTRY_POINTS, families, read_checkpoint
from analytic.layers.base import Policy
from analytic.model import Model, Work, operations
from analytic.workload import Workload, load_workload
from dsocr_trace.cli import cli

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "llama_family"

#: Six text tokens and the smallest image: a text model sees a prompt of 10 positions.
PROMPT = Workload("prompt", 64, 64, 6, 1, crop_mode=False, base_size=64, image_size=64)
LENGTHS = (11, 12, 64, 1000)


@pytest.fixture
def announce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a package as far as Python sees it: its metadata, and its module if it has one."""

    def install(package: str, entry_points: dict[str, str], code: str | None = None) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"[{ENTRY_POINTS}]", *(f"{name} = {value}" for name, value in entry_points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        if code is not None:
            (folder / f"{package}.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, package, raising=False)

    return install


@pytest.fixture
def llama(announce: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, announced by the entry points of its own pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    announce("dsocr_trace_llama", project["entry-points"][ENTRY_POINTS])
    monkeypatch.syspath_prepend(EXAMPLE)


def checkpoint(directory: Path, **changes: Any) -> Path:
    """A directory with the configuration of a small Llama; None leaves a field out."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | changes
    fields = {name: value for name, value in raw.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_our_own_family_is_announced_like_any_other() -> None:
    assert type(families()["deepseek-ocr"]) is DeepseekOcr


@pytest.mark.usefixtures("llama")
def test_an_installed_family_is_found_and_chosen_by_the_configuration(tmp_path: Path) -> None:
    assert {"deepseek-ocr", "llama"} <= set(families())
    family, config = read_checkpoint(checkpoint(tmp_path, num_key_value_heads=None))
    assert family.name == "llama"
    assert config.torch_dtype == "bfloat16"
    assert config.num_key_value_heads == config.num_attention_heads


def test_without_the_package_the_known_architectures_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has the architecture LlamaForCausalLM, .* known ones are .*DeepseekOCR"):
        read_checkpoint(checkpoint(tmp_path))
    for wrong in ("LlamaForCausalLM", [], [None], 3):
        with pytest.raises(InputError, match="for which there are no formulas"):
            read_checkpoint(checkpoint(tmp_path, architectures=wrong))


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None, it must be a positive whole number"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_key_value_heads": 4}, "6 heads do not share 4 key-value heads"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', there are formulas for silu only"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_checkpoint(checkpoint(tmp_path, **changes))


CONFIGURATIONS = {
    "one head of keys each": {},
    "shared keys": {"num_key_value_heads": 2},
    "one head of keys for all": {"num_key_value_heads": 1, "head_dim": 16},
    "tied embeddings": {"tie_word_embeddings": True, "num_key_value_heads": 3},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.usefixtures("llama")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_module_of_the_example_is_what_torch_counts(
    tmp_path: Path, changes: dict[str, Any], attention: str, batch_size: int
) -> None:
    """FLOPs, calls, classes and parameters of every module, in a prefill and at several cached lengths."""
    directory = checkpoint(tmp_path, **changes)
    workload = attrs.evolve(PROMPT, batch_size=batch_size)
    model, counted, modules = count(directory, attention, workload)
    work = operations(model, workload, policy=Policy(attention=attention), kv_lengths=LENGTHS)
    predicted: Counter[tuple[str, str]] = Counter()
    for operation in work.operations:
        predicted[operation.stage, operation.module_path] += operation.cost.tensor_flops
    assert +predicted == +counted.flops
    assert {stage for stage, _ in +predicted} == {"prefill", "decode"}
    assert work.calls == counted.calls
    assert own_parameters(work) == modules
    assert OTHER not in model.family.mapped(model.config, {path: name for path, name, _ in modules}).values()


def count(directory: Path, attention: str, workload: Workload) -> tuple[Model, Any, list[tuple[str, str, int]]]:
    """The family's model, what torch counts in the live one, and its modules with class and parameters."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    reference = pytest.importorskip("stage_runners.reference_flops")
    from transformers import DynamicCache  # noqa: PLC0415

    from hooks.modules import modules_table  # noqa: PLC0415  needs torch

    model = Model(*read_checkpoint(directory))
    live = reference.sketch_model(str(directory), variant="", attention=attention)
    config, batch, dtype = live.config, workload.batch_size, torch.bfloat16
    shape = (batch, config.num_key_value_heads, config.head_dim)

    def arguments(positions: int, cache: DynamicCache) -> dict[str, Any]:
        ids = torch.empty(batch, positions, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "past_key_values": cache}

    def forwards() -> Any:
        yield arguments(workload.seq_len, DynamicCache())
        for length in LENGTHS:
            yield arguments(1, reference.filled_cache(config.num_hidden_layers, shape, length - 1, dtype))

    counted = reference.count_forwards(live, forwards())
    rows = modules_table(list(live.named_modules())).to_pylist()
    return model, counted, [(row["module_path"], row["module_class"], row["parameter_count"]) for row in rows]


def own_parameters(work: Work) -> list[tuple[str, str, int]]:
    return [(node.module_path, node.module_class, node.parameter_count) for node in work.tree]


@pytest.mark.usefixtures("llama")
def test_a_class_name_means_what_its_family_says(tmp_path: Path) -> None:
    """Both families have a LlamaAttention; each stands for it by its own layer."""
    family, config = read_checkpoint(checkpoint(tmp_path))
    path = "model.layers.0.self_attn"
    assert family.mapped(config, {path: "LlamaAttention"}) == {path: "LlamaAttention"}
    assert [kind.__name__ for kind in DeepseekOcr.layers["LlamaAttention"]] == ["DecoderAttention"]


@pytest.mark.usefixtures("llama")
def test_unknown_classes_and_unexpected_places_are_other(tmp_path: Path) -> None:
    family, config = read_checkpoint(checkpoint(tmp_path))
    live = {"": "LlamaForCausalLM", "model.norm": "OwnNorm", "model.adapter": "Linear", "lm_head": "Embedding"}
    expected = {"": "LlamaForCausalLM", "model.norm": OTHER, "model.adapter": OTHER, "lm_head": OTHER}
    assert family.mapped(config, live) == expected


@pytest.mark.usefixtures("llama")
def test_a_text_model_is_predicted_from_its_configuration_alone(tmp_path: Path) -> None:
    """Every linear layer and the attention, over a prompt of the workload's length, in closed form."""
    checkpoint(tmp_path, num_key_value_heads=2)
    found = dsocr_trace.predict("dsocr-smoke-v1", "h200", model=str(tmp_path))
    stages = found.stages.set_index("stage")
    workload = load_workload("dsocr-smoke-v1")
    length, layers, width, hidden, vocabulary, heads, head_dim, kv_width = workload.seq_len, 3, 48, 80, 96, 6, 8, 16
    weights = layers * (2 * width * width + 2 * width * kv_width + 3 * width * hidden) + vocabulary * width
    assert stages.loc["prefill", "tensor_flops"] == 2 * length * weights + 4 * layers * heads * head_dim * length**2
    assert stages.loc["prefill", "kv_cache_bytes"] == 2 * layers * kv_width * length * 2
    assert stages.loc["vision", ["calls", "tensor_flops", "bytes_read", "predicted_ns"]].eq(0).all()
    assert stages.loc["decode", "calls"] == (workload.max_new_tokens - 1) * (layers * 13 + 6)
    assert found.summary()["model"] == str(tmp_path)


@pytest.mark.usefixtures("llama")
def test_on_the_command_line(tmp_path: Path) -> None:
    checkpoint(tmp_path)

    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(cli, [*arguments, "--model", str(tmp_path)], catch_exceptions=False)

    wanted = ("predict", "--workload", "dsocr-smoke-v1", "--hardware", "h200")
    assert json.loads(invoke(*wanted, "--json").stdout)["stages"]["decode"]["tensor_flops"] > 0
    assert "prefill" in invoke(*wanted).stdout
    both = invoke(*wanted, "--variant", "deepseek-ocr-v1-tiny")
    assert both.exit_code == 2
    assert "give one of them" in both.stderr
    long = invoke("predict", "--workload", "dsocr-standard-v1", "--hardware", "h200", "--set", "seq_len=2000")
    assert "the model has 2048" in long.stderr
    listed = invoke("list", "layers")
    assert listed.exit_code == 0
    assert "LlamaRotary" in listed.stdout
    assert "no snapshot of this model family" in listed.stdout


def test_a_configuration_of_the_built_in_size_is_predicted_as_the_built_in_model(tmp_path: Path) -> None:
    raw = resources.files("analytic") / "data" / "variants" / "deepseek-ocr-v1-tiny.json"
    (tmp_path / "config.json").write_text(raw.read_text())
    built_in, given = (
        dsocr_trace.predict("dsocr-smoke-v1", "h200", model=model).summary() for model in ("builtin", str(tmp_path))
    )
    assert given == built_in | {"model": str(tmp_path)}


COPY = "from analytic.families.deepseek_ocr import DeepseekOcr\nclass Family(DeepseekOcr):\n    name = {name!r}\n"
BASE = "from analytic.families.base import ModelFamily\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "package broken announces the model family 'mine', which cannot be loaded: ModuleNotFoundError"),
        ("import nowhere_at_all", "which cannot be loaded: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise OSError('two\\nlines')", "cannot be loaded: OSError: two lines; repair or uninstall the package"),
        ("Family = 3", "package broken announces broken:Family as a model family, it must be a subclass"),
        ("class Family: pass", "it must be a subclass of ModelFamily"),
        (f"{BASE}class Family(ModelFamily): pass", "cannot be loaded: TypeError: Can't instantiate abstract class"),
        (
            f"{BASE}class Family(ModelFamily):\n    read_config = build = prefill = decode = None",
            "the model family broken:Family of package broken does not say its name",
        ),
        (COPY.format(name="deepseek-ocr"), "two packages announce the model family 'deepseek-ocr'"),
    ],
    ids=[
        "no module", "fails to import", "raises", "no class", "no family", "abstract", "nameless", "duplicate name",
    ],
)  # fmt: skip
def test_a_bad_package_is_one_line(announce: Callable[..., None], code: str | None, message: str) -> None:
    announce("broken", {"mine": "broken:Family"}, code)
    with pytest.raises(DsocrTraceError) as caught:
        families()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_families_for_one_architecture_are_refused(announce: Callable[..., None], tmp_path: Path) -> None:
    announce("second", {"mine": "second:Family"}, COPY.format(name="mine"))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["DeepseekOCRForCausalLM"]}))
    with pytest.raises(DsocrTraceError, match=r"which the model families '.*' and '.*' claim; uninstall"):
        read_checkpoint(tmp_path)


@pytest.mark.usefixtures("llama")
def test_a_layer_that_the_table_forgets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config = read_checkpoint(checkpoint(tmp_path))
    table = {name: kinds for name, kinds in family.layers.items() if name != "LlamaMLP"}
    monkeypatch.setattr(type(family), "layers", table)
    with pytest.raises(DsocrTraceError, match=r"the layer GatedMlp of the model family llama; add it to Llama\.layers"):
        family.tree(config)


def test_excerpts_in_the_documentation_are_from_the_example() -> None:
    source = {path.suffix: path.read_text() for path in EXAMPLE.iterdir() if path.is_file()}
    page = (ROOT / "docs" / "adding-a-model.md").read_text()
    blocks = re.findall(r"^```(python|toml)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for language, block in blocks:
        assert block in source[{"python": ".py", "toml": ".toml"}[language]], block
