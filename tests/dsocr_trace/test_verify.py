"""Formulas against torch's counter: they hold, and a wrong one is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources

import attrs
import psutil
import pytest

from analytic.config import variant_config
from analytic.cost import FP32, Cost
from analytic.crops import candidate_grids
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr, operations
from analytic.operators import OPERATORS
from analytic.workload import load_workload
from dsocr_trace.verification import verify as verify_module
from dsocr_trace.verification.targets import TARGETS

TINY = "deepseek-ocr-v1-tiny"
#: Together they run every operator of the model.
COVERING = ("vision", "decoder", "llama", "core")


def operators_in(steps):
    """Names of all operators that were called, those inside others too."""
    for call in steps.calls:
        yield call.operator.name
        if call.parts is not None:
            yield from operators_in(call.parts)


def operators_of_the_model():
    model, workload = deepseek_ocr(variant_config(TINY)), load_workload("dsocr-smoke-v1")
    works = [operations(model, workload, policy=Policy(attention=name)) for name in ("sdpa", "eager")]
    runs = [steps for work in works for operation in work.operations for _, steps in operation.runs]
    return {name for steps in runs for name in operators_in(steps)}


def counts_flops(operator):
    """Whether it has tensor FLOPs at the smallest shape."""
    smallest = {"Size": 1, "Dtype": FP32}
    required = [p.annotation for p in operator.signature.parameters.values() if p.default is p.empty]
    return operator(*map(smallest.__getitem__, required)).cost.tensor_flops > 0


USED = operators_of_the_model()
COUNTED = [name for name in OPERATORS if name in USED and counts_flops(OPERATORS[name])]
UNCOUNTED = [name for name in OPERATORS if name in USED and name not in COUNTED]


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """The reference does not depend on the formulas, so each workload is counted once for all tests."""
    models, counts = {}, {}
    sketch, count = verify_module.sketch_model, verify_module.count_flops

    def sketch_once(source, **options):
        key = (source, *options.items())
        if key not in models:
            models[key] = sketch(source, **options)
        return models[key]

    def count_once(model, config, workload, **options):
        key = (id(model), workload, options["kv_lengths"])
        if key not in counts:
            counts[key] = count(model, config, workload, **options)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "sketch_model", sketch_once)
        patch.setattr(verify_module, "count_flops", count_once)
        yield


def summary(invoke, *targets, exit_code=0, options=("--variant", TINY)):
    result = invoke("verify", *targets, *options, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def test_every_target_holds(invoke):
    found = summary(invoke, "all")
    assert found["holds"]
    assert list(found["targets"]) == list(TARGETS)
    for name, target in found["targets"].items():
        assert target["equal"] > 0, name
        assert target["different"] == 0, name
    assert all(row["analytic"] == row["reference"] for row in found["rows"])
    assert found["differences"] == []


def test_without_a_target_all_are_verified(invoke):
    assert summary(invoke) == summary(invoke, "all")


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_alone(invoke, name):
    found = summary(invoke, name)
    assert list(found["targets"]) == [name]
    assert {row["target"] for row in found["rows"]} == {name}


def test_all_grids_and_stages_are_run():
    grids = {case.workload.grid for case in TARGETS["end2end"].cases}
    assert grids == {None, *candidate_grids()}
    assert {case.workload.grid for case in TARGETS["end2end-vision"].cases} == set(candidate_grids())
    assert len({length for case in TARGETS["end2end"].cases for length in case.kv_lengths}) > 15
    assert len({case.workload.base_size for case in TARGETS["end2end-vision-nocrop"].cases}) == 5
    assert {case.workload.batch_size for case in TARGETS["end2end"].cases} == {1, 2, 3}


def test_the_end_covers_every_module_that_runs(invoke):
    parts, whole = (summary(invoke, *targets)["targets"] for targets in (("vision", "decoder", "core"), ("end2end",)))
    assert all(target["equal"] for target in parts.values())
    assert whole["end2end"]["equal"] > sum(target["equal"] for target in parts.values())


def test_zero_on_both_sides_is_no_pass(invoke):
    rows = summary(invoke, "vision")["rows"]
    norms = [row for row in rows if row["module_class"] == "LayerNorm"]
    assert norms
    assert {row["status"] for row in norms} == {"no reference"}
    assert all(row["no_reference"] == row["figures"] for row in norms)


@pytest.mark.parametrize("wrong", [lambda flops: 2 * flops, lambda flops: flops + 1], ids=["doubled", "one more"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_wrong_coefficient_is_found(invoke, monkeypatch, name, wrong):
    plant(monkeypatch, name, lambda cost: attrs.evolve(cost, tensor_flops=wrong(cost.tensor_flops)))
    found = summary(invoke, *COVERING, exit_code=3)
    assert not found["holds"]
    assert found["differences"]
    assert all(figure["analytic"] > figure["reference"] for figure in found["differences"])


@pytest.mark.parametrize("name", UNCOUNTED)
def test_a_formula_without_tensor_flops_has_no_reference(invoke, monkeypatch, name):
    """The counter cannot see it: a wrong one passes, and its operators are named."""
    before = summary(invoke, *COVERING)
    used = []
    plant(monkeypatch, name, lambda cost: used.append(name) or cost * 2)
    after = summary(invoke, *COVERING)
    assert used
    assert after == before
    assert after["operators_without_reference"]


@pytest.mark.parametrize("name", UNCOUNTED)
def test_tensor_flops_where_none_are_counted_are_a_difference(invoke, monkeypatch, name):
    plant(monkeypatch, name, lambda cost: cost + Cost(tensor_flops=1))
    summary(invoke, *COVERING, exit_code=3)


def plant(monkeypatch, name, change):
    """Replace an operator's formula, wherever it is called, by one whose cost is changed."""
    formula = OPERATORS[name]._formula

    def wrong(*sizes, **options):
        found = formula(*sizes, **options)
        return change(found) if isinstance(found, Cost) else attrs.evolve(found, cost=change(found.cost))

    monkeypatch.setattr(OPERATORS[name], "_formula", wrong)
    # What was remembered of the true formula, its own or as a part of another one's, must not answer.
    for operator in OPERATORS.values():
        monkeypatch.setattr(operator, "_remembered", operator._evaluated)


def test_the_model_runs_every_operator_but_the_fused_gate():
    """What it does not run, these tests cannot judge."""
    assert OPERATORS.keys() - USED == {"swiglu"}
    assert {"conv2d", "linear", "bmm", "sdpa", "sdpa_with_bias", "attention_eager", "rope_tables"} == set(COUNTED)


def test_a_missing_call_is_a_difference(invoke, monkeypatch):
    count = verify_module.count_flops

    def without_norm(*arguments, **options):
        counted = count(*arguments, **options)
        calls = type(counted.calls)({key: n for key, n in counted.calls.items() if key[1] != "model.norm"})
        return attrs.evolve(counted, calls=calls)

    monkeypatch.setattr(verify_module, "count_flops", without_norm)
    found = summary(invoke, "llama", exit_code=3)
    assert {figure["module_path"] for figure in found["differences"]} == {"model.norm"}


def test_tables_name_what_differs(invoke, monkeypatch):
    plant(monkeypatch, "bmm", lambda cost: cost * 2)
    result = invoke("verify", "vision", "--variant", TINY)
    assert result.exit_code == 3
    assert "different: vision model.sam_model.blocks.0.attn at 1024+2x3x640" in result.stdout
    assert "no reference for" in result.stdout
    assert "Attention.qkv_split" in result.stdout


def test_tables_fold_modules(invoke):
    result = invoke("verify", "decoder", "core", "--variant", TINY)
    assert result.exit_code == 0
    assert "model.layers.*.mlp.experts.*.down_proj" in result.stdout
    assert "0 different" in result.stdout
    assert result.stdout.count("Analytic FLOP") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("visoin",), "no target 'visoin'; did you mean 'vision'? choose from vision, decoder,"),
        (("core", "xyz"), "no target 'xyz'; choose from vision,"),
        (("core", "--variant", "nope"), "no variant 'nope'"),
        (("core", "--model", "/nowhere"), "/nowhere is not a checkpoint directory"),
        (("core", "--model", "/nowhere", "--variant", TINY), "give one of them"),
        (("core", "--trust-remote-code"), "--trust-remote-code needs a checkpoint"),
        (("core", "--attention", "flash_attention_2"), "'flash_attention_2' is not one of 'sdpa', 'eager'"),
    ],
)
def test_bad_input(invoke, arguments, message):
    result = invoke("verify", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_checkpoints_configuration_is_enough(invoke, tmp_path):
    raw = resources.files("analytic") / "data" / "variants" / f"{TINY}.json"
    (tmp_path / "config.json").write_text(raw.read_text())
    found = summary(invoke, "core", options=("--model", tmp_path))
    assert found["rows"] == summary(invoke, "core")["rows"]


#: Built of the built-in classes, under a name of its own.
CODE = """
from transformers import PretrainedConfig, PreTrainedModel
from analytic.config import ModelConfig
from stage_runners.deepseek_ocr import DeepseekOCRForCausalLM

class OwnConfig(PretrainedConfig):
    model_type = "dsocr_trace_own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        built = DeepseekOCRForCausalLM(ModelConfig.from_dict(config.to_dict()), attention="eager")
        self.model, self.lm_head = built.model, built.lm_head

    def forward(self, input_ids, **arguments):
        print("noise on standard output")
        return DeepseekOCRForCausalLM.forward(self, input_ids, **arguments)
"""


@pytest.fixture
def checkpoint(tmp_path):
    raw = resources.files("analytic") / "data" / "variants" / f"{TINY}.json"
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = json.loads(raw.read_text()) | {"auto_map": auto_map, "model_type": "dsocr_trace_own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        (CODE, 0, ""),
        (
            CODE.replace("LM.forward(self, input_ids", "LM.forward(self, input_ids * 0.5"),
            1,
            "own code failed on the meta",
        ),
        (CODE.replace("built.lm_head", "built.model.norm"), 2, "lacks 1 of the modules"),
        (CODE.replace("built = ", "built = nowhere"), 2, "cannot be built on the meta device"),
    ],
    ids=["equal", "fails", "other modules", "not built"],
)
def test_a_checkpoints_own_code(checkpoint, tmp_path, code, exit_code, message):
    (checkpoint / "modeling_own.py").write_text(code)
    command = [sys.executable, "-m", "dsocr_trace", "verify", "core", "--model", str(checkpoint)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603
        [*command, "--trust-remote-code", "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if exit_code == 0:
        assert json.loads(done.stdout)["targets"]["core"]["different"] == 0


@pytest.mark.full_size
@pytest.mark.timeout(900)
@pytest.mark.skipif(psutil.virtual_memory().available < 2e9, reason="counting the full model takes 0.6 GB")
def test_every_target_holds_at_full_size(invoke):
    found = summary(invoke, "all", options=())
    assert found["holds"]
    assert found["targets"]["end2end"]["equal"] > 90_000
