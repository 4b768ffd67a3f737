from __future__ import annotations

from analytic.config import variant_config
from analytic.model import deepseek_ocr
from analytic.operators import OPERATORS
from dsocr_trace.report.catalogue import layer_rows, operator_rows


def test_layers_of_the_published_size():
    rows = {row.module_class: row for row in layer_rows(deepseek_ocr(variant_config("deepseek-ocr-v1-base")))}
    # Every class of the published model; figures counted on its own code.
    assert len(rows) == 30
    assert sum(row.instances for row in rows.values()) == 4_083
    assert sum(row.parameters for row in rows.values()) == 3_336_106_240
    assert (rows["Linear"].instances, rows["Linear"].parameters) == (2_342, 3_158_173_952)
    assert rows["DeepseekV2MLP"].layers == ("DenseMlp", "RoutedExpert", "SharedExperts")


def test_every_operator_says_what_it_is():
    rows = dict(operator_rows())
    assert list(rows) == list(OPERATORS)
    assert all(rows.values())


def test_on_the_command_line(invoke):
    layers = invoke("list", "layers", "--variant", "deepseek-ocr-v1-tiny")
    assert "NoTPAttention" in layers.stdout
    assert "linear" in invoke("list", "operators").stdout
    assert invoke("list", "hardware").stdout.splitlines().count("rtx-5090") == 1
    wrong = invoke("list", "layers", "--variant", "huge")
    assert wrong.exit_code == 2
    assert "no variant 'huge'" in wrong.stderr
