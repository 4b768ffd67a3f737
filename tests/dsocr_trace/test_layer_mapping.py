"""Live modules and the layers that stand for them: snapshots, and what happens to those that none stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from analytic.config import variant_config, variant_names
from analytic.families.deepseek_ocr import DeepseekOcr
from dsocr_trace.runs import pipeline
from dsocr_trace.runs.gap import PREDICTED_PARTS
from dsocr_trace.runs.ledger import attribution_table
from dsocr_trace.runs.store import load
from dsocr_trace.verification import live_layers
from dsocr_trace.verification import verify as verify_module
from dsocr_trace.verification.live_layers import ClassShape, differences, live_classes, live_model, read_snapshot
from stage_runners.loading import load_model
from stage_runners.reference_flops import sketch_model

SHARED = Path(__file__).parents[2].parent / "shared"
TINY = "deepseek-ocr-v1-tiny"
LAYER = "model.layers.1"


class Adapter(nn.Module):
    """Something that no formula is for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, width))

    def forward(self, x):
        return x + x @ self.scale


def adapted(model: nn.Module, path: str = LAYER) -> nn.Module:
    """The model with an adapter behind one decoder layer, inside of it."""
    layer = model.get_submodule(path)
    kind = type(layer)

    def forward(self, *arguments):
        return self.adapter(kind.forward(self, *arguments))

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    like = next(layer.parameters())
    layer.adapter = Adapter(like.shape[-1]).to(like.device, like.dtype)
    return model


@pytest.mark.parametrize("variant", variant_names())
def test_the_snapshot_is_that_of_the_live_model(variant):
    found = live_model("builtin", variant=variant)
    assert found.variant == variant
    assert read_snapshot(variant) == found.shapes()
    assert list(read_snapshot(variant)) == list(found.shapes())
    assert found.differences() == []
    assert all("other" not in row.layers for row in found.classes)


def test_every_class_of_the_recorded_model_is_known():
    path = SHARED / "reference" / "torchinfo-unique-layers.json"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    recorded = {layer["class_name"] for layer in json.loads(path.read_text())["layers"]}
    assert len(recorded) == 29
    assert recorded <= set(DeepseekOcr.layers)


def test_what_is_new_gone_and_changed_is_one_line_each():
    before = {"A": ClassShape(2, 10, {"B": 2}), "B": ClassShape(2, 0, {}), "D": ClassShape(1, 1, {})}
    now = {"A": ClassShape(3, 10, {"C": 3}), "C": ClassShape(3, 7, {}), "D": ClassShape(1, 1, {})}
    assert differences(before, now) == [
        "changed: A: instances 2 -> 3, B children 2 -> 0, C children 0 -> 3",
        "gone: B: 2 instances, 0 parameters",
        "new: C: 3 instances, 7 parameters",
    ]
    assert differences(before, before) == []


def test_the_live_model_is_listed_beside_its_layers(invoke):
    result = invoke("list", "layers", "--model", "builtin", "--variant", TINY)
    assert result.exit_code == 0
    assert "DenseMlp, RoutedExpert" in result.stdout
    assert f"differences from the snapshot of {TINY}: none" in result.stdout
    assert "other" not in result.stdout


def test_a_class_of_its_own_is_other_and_a_difference(invoke, monkeypatch):
    sketch = live_layers.sketch_model
    monkeypatch.setattr(live_layers, "sketch_model", lambda *given, **options: adapted(sketch(*given, **options)))
    result = invoke("list", "layers", "--model", "builtin", "--variant", TINY)
    assert result.exit_code == 3
    width = variant_config(TINY).decoder.hidden_size
    assert f"new: Adapter: 1 instances, {width**2:,} parameters" in result.stdout
    assert "changed: DeepseekV2DecoderLayer: Adapter children 0 -> 1" in result.stdout
    rows = {row.module_class: row for row in live_model("builtin", variant=TINY).classes}
    assert rows["Adapter"].layers == {"other": width**2}
    assert "other" not in rows["DeepseekV2DecoderLayer"].layers


def test_a_known_class_in_an_unexpected_place_is_other_too():
    model = sketch_model("builtin", variant=TINY, attention="sdpa")
    model.model.extra = nn.Linear(2, 3, device="meta")
    rows = {row.module_class: row for row in live_classes(model, DeepseekOcr(), variant_config(TINY))}
    assert rows["Linear"].layers["other"] == 9
    assert rows["Linear"].layers["Linear"] == rows["Linear"].shape.parameters - 9


def test_a_checkpoint_is_compared_with_the_variant_of_its_size(invoke, tmp_path):
    raw = json.loads((Path(live_layers.__file__).parents[2] / f"analytic/data/variants/{TINY}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert f"snapshot of {TINY}: none" in invoke("list", "layers", "--model", tmp_path).stdout
    raw["language_config"]["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(raw))
    other_size = invoke("list", "layers", "--model", tmp_path)
    assert other_size.exit_code == 3
    assert "changed: DeepseekV2DecoderLayer: instances 12 -> 4" in other_size.stdout


def test_refresh_writes_what_the_live_model_has(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(live_layers, "_snapshot_file", lambda variant: tmp_path / f"{variant}.json")
    missing = invoke("list", "layers", "--model", "builtin", "--variant", TINY)
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert f"there is no snapshot of {TINY}; write one with" in missing.stderr
    written = invoke("list", "layers", "--model", "builtin", "--variant", TINY, "--refresh")
    assert written.exit_code == 0
    assert f"snapshot: {tmp_path / TINY}.json" in written.stdout
    assert read_snapshot(TINY) == live_model("builtin", variant=TINY).shapes()


def test_an_installation_that_cannot_be_written_is_one_line(invoke, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(live_layers, "_snapshot_file", lambda variant: tmp_path / "file" / f"{variant}.json")
    refused = invoke("list", "layers", "--model", "builtin", "--variant", TINY, "--refresh")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "cannot be written: Not a directory; leave --refresh out" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layers", "--refresh"), "give it with --model builtin"),
        (("layers", "--refresh", "--model", "/nowhere"), "give it with --model builtin"),
        (("layers", "--model", "/nowhere"), "/nowhere is not a checkpoint directory"),
        (("layers", "--model", "/nowhere", "--variant", TINY), "give one of them"),
        (("layers", "--trust-remote-code"), "--trust-remote-code needs a checkpoint"),
        (("hardware", "--model", "builtin"), "hardware are the same for every model"),
    ],
)
def test_bad_input(invoke, arguments, message):
    result = invoke("list", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.fixture(scope="module")
def unmapped_run(invoke, tmp_path_factory):
    """A run of the small model with an adapter, whose last norm has a class of its own."""
    root = tmp_path_factory.mktemp("results")

    def loaded(*given, **options):
        model = adapted(load_model(*given, **options))
        norm = model.model.norm
        norm.__class__ = type("OwnNorm", (type(norm),), {})
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_model", loaded)
        result = invoke(
            "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--output", root, "--run-id", "other",
            "--profile-steps", 2, "--max-new-tokens", 4, "--quiet",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    return load(root / "other"), result.stdout


PREDICTED = ("predicted_self_ns", "predicted_total_ns", "tensor_flops", "vector_flops", "bytes_total")


@pytest.mark.parametrize("path", [f"{LAYER}.adapter", "model.norm"])
def test_nothing_is_predicted_for_other_and_all_of_it_is_measured(unmapped_run, path):
    run, _ = unmapped_run
    rows = run.attribution.set_index(["stage", "module_path"]).xs(path, level="module_path")
    assert set(rows.index) == {"prefill", "decode"}
    assert set(rows.analytic_layer) == {"other"}
    assert (rows.calls > 0).all()
    assert (rows.measured_self_ns > 0).all()
    assert rows[list(PREDICTED)].isna().all(axis=None)
    assert rows.ratio_predicted_to_measured.isna().all()
    assert run.modules.set_index("module_path").analytic_layer[path] == "other"
    assert path not in set(run.predictions.module_path)
    categories = run.operators[run.operators.module_path == path]
    assert len(categories)
    assert categories[["predicted_ns", "flops", "bytes"]].isna().all(axis=None)
    gap = run.gap[run.gap.module_path == path]
    assert gap[[*PREDICTED_PARTS, "predicted_device_ns", "unexplained_ns"]].isna().all(axis=None)
    assert gap[["measured_ns", "wall_self_ns"]].gt(0).all(axis=None)


def test_all_others_are_predicted_as_ever(unmapped_run, finished):
    """The same figures as without the adapter, and sums that leave the unknown modules out."""
    run, plain = unmapped_run[0], finished[0]
    mine, theirs = (
        rows.set_index(["stage", "module_path"])[list(PREDICTED)].loc["prefill"]
        for rows in (run.attribution, plain.attribution)
    )
    known = mine.index.difference([f"{LAYER}.adapter", "model.norm", "unclassified"])
    same = ["tensor_flops", "vector_flops"]
    assert mine.loc[known, same].notna().all(axis=None)
    assert mine.loc[known, same].sum(axis=None) == theirs[same].drop("model.norm").sum(axis=None)
    assert mine.loc["", "predicted_total_ns"] == mine["predicted_self_ns"].sum()


def test_the_shares_of_other_are_stated(unmapped_run):
    run, printed = unmapped_run
    unmapped = run.manifest["unmapped"]
    assert {name: entry["modules"] for name, entry in unmapped.items()} == {"Adapter": 1, "OwnNorm": 1}
    parameters, times = run.modules.parameter_count, run.attribution.measured_self_ns
    for name, entry in unmapped.items():
        assert entry["parameter_share"] == parameters[run.modules.module_class == name].sum() / parameters.sum()
        assert entry["measured_share"] == times[run.attribution.module_class == name].sum() / times.sum() > 0
    note = "no formula stands for 2 modules of Adapter, OwnNorm (other): "
    assert any(line.startswith(note) for line in run.manifest["notes"])
    assert note in (run.path / "report.md").read_text()
    assert note in " ".join(printed.split())


def test_what_is_predicted_below_an_unknown_module_counts_for_those_above():
    columns = {"module_class": "Any", "weight_bytes": 0, "depth": [0, 1, 2]}
    paths = pd.DataFrame({"module_path": ["", "a", "a.x"], "parent_path": [None, "", "a"]})
    modules = paths.assign(analytic_layer=["Root", "other", "Linear"], **columns)
    calls = modules[["module_path"]].assign(stage="decode", start_ns=0, end_ns=10)
    kernels = pd.DataFrame(
        {"stage": "decode", "module_path": ["a", "a.x"], "duration_ns": [5, 7], "scaled_ns": [5.0, 7.0],
         "operator_category": ["copy", "linear"], "unclassified_reason": None}
    )  # fmt: skip
    sums = dict.fromkeys(("tensor_flops", "vector_flops", "bytes_read", "bytes_written"), 3)
    predicted = pd.DataFrame({"stage": ["decode"], "module_path": ["a.x"], "predicted_device_ns": [6], **sums})
    rows = attribution_table(modules, calls, kernels, predicted).set_index("module_path")
    assert rows.loc[["", "a", "a.x"], "measured_total_ns"].tolist() == [12, 12, 7]
    assert rows.loc[["", "a.x"], "predicted_total_ns"].tolist() == [6, 6]
    assert rows.loc[["", "a.x"], "tensor_flops"].tolist() == [0, 3]
    assert rows.loc["a", list(PREDICTED)].isna().all()


def test_a_model_whose_every_class_is_known_has_no_other(finished):
    run, _ = finished
    assert run.manifest["unmapped"] == {}
    assert "other" not in set(run.attribution.analytic_layer.dropna())


def test_verify_never_passes_what_no_formula_stands_for(invoke, monkeypatch):
    sketch = verify_module.sketch_model
    monkeypatch.setattr(verify_module, "sketch_model", lambda *given, **options: adapted(sketch(*given, **options)))
    result = invoke("verify", "vision", "--variant", TINY, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert not found["holds"]
    assert found["targets"]["vision"]["different"] == 0
    assert found["other"]["Adapter"]["flops"] > 0
    assert 0 < found["other"]["Adapter"]["share"] < 1
    assert "other: no formula stands for Adapter" in invoke("verify", "decoder", "--variant", TINY).stdout


def test_verify_takes_a_renamed_class_for_unknown(invoke, monkeypatch):
    """Its formulas do not count: a class of another name may do something else."""
    sketch = verify_module.sketch_model

    def renamed(*given, **options):
        model = sketch(*given, **options)
        attention = model.get_submodule(f"{LAYER}.self_attn")
        attention.__class__ = type("OwnAttention", (type(attention),), {})
        return model

    monkeypatch.setattr(verify_module, "sketch_model", renamed)
    result = invoke("verify", "llama", "--variant", TINY, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    rows = [row for row in found["rows"] if row["module_class"] == "OwnAttention"]
    assert rows
    assert all(row["status"] == "different" and row["analytic"] == 0 < row["reference"] for row in rows)
    assert set(found["other"]) == {"OwnAttention"}
