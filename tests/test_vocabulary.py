"""The rooms share no code for these words, so a test holds them together."""

from __future__ import annotations

from analytic.layers.base import OPERATOR_CATEGORIES
from analytic.model import ATTENTIONS
from analytic.model import STAGES as PREDICTED_STAGES
from hooks.categories import CATEGORIES
from hooks.tables import STAGES
from stage_runners.deepseek_ocr import ATTENTION_IMPLEMENTATIONS


def test_measured_and_predicted_work_have_the_same_categories():
    assert set(OPERATOR_CATEGORIES) == set(CATEGORIES)


def test_every_predicted_stage_is_a_measured_one():
    assert set(PREDICTED_STAGES) < set(STAGES)


def test_every_attention_can_be_run_and_predicted():
    assert set(ATTENTIONS) == set(ATTENTION_IMPLEMENTATIONS)
