"""A checkpoint with code of its own, through the command line, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources

import pytest
import torch
from safetensors.torch import save_file

from dsocr_trace.runs.store import load

CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

class OwnConfig(PretrainedConfig):
    model_type = "dsocr_trace_own"

class Mixer(torch.nn.Module):
    def forward(self, x, cache):
        keys, _ = cache.update(x[:, None], x[:, None], 0)
        return x + keys.mean(dim=2)

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(2020, 8)
        self.mixer = Mixer()
        self.head = torch.nn.Linear(8, 2020, bias=False)
        self.post_init()

    def forward(self, input_ids, past_key_values=None, use_cache=None, **images):
        print("noise on standard output")
        logits = self.head(self.mixer(self.embed(input_ids), past_key_values))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
"""


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "own"
    directory.mkdir()
    raw = resources.files("analytic") / "data" / "variants" / "deepseek-ocr-v1-tiny.json"
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = json.loads(raw.read_text()) | {"auto_map": auto_map, "model_type": "dsocr_trace_own"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_own.py").write_text(CODE)
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(2020, 8, generator=generator) for name in ("embed.weight", "head.weight")}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def run(checkpoint, tmp_path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "dsocr_trace", "run", "--workload", "dsocr-smoke-v1", "--device", "cpu", "--json",
        "--model", str(checkpoint), "--trust-remote-code", "--output", str(tmp_path / "results"), "--run-id", "own",
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603


def test_its_own_modules_are_traced_and_nothing_is_predicted(checkpoint, tmp_path):
    done = run(checkpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    finished = load(tmp_path / "results" / "own")
    assert finished.modules.module_path.tolist() == ["", "embed", "mixer", "head"]
    assert finished.manifest["remote_code"]
    assert "nothing is predicted" in finished.manifest["notes"][0]
    rows = finished.attribution.set_index(["stage", "module_path"])
    assert rows.loc[("decode", "mixer"), "calls"] == 7
    assert rows.loc[("decode", "mixer"), "measured_self_ns"] > 0
    assert rows.predicted_self_ns.isna().all()
    assert summary["stages"]["decode"]["predicted_ns"] is None
    gap = finished.gap.set_index("module_path").loc["mixer"]
    assert gap.predicted_device_ns.isna().all()
    assert (gap.wall_self_ns > 0).all()


def test_code_that_fails_is_one_line(checkpoint, tmp_path):
    (checkpoint / "modeling_own.py").write_text(CODE.replace("x + keys.mean(dim=2)", "x.cuda()"))
    done = run(checkpoint, tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "dsocr-trace: the checkpoint's own code failed on cpu: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "results").iterdir()) == []
