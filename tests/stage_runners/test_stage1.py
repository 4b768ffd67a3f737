"""The in-process runner, whole, on the tiny model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

from analytic.config import variant_config
from hooks.errors import TraceError
from hooks.tables import CALLGRAPH, CALLS, KERNELS, MODULES
from hooks.tracer import wrapped_modules
from stage_runners import stage1
from stage_runners.generate import Generation
from stage_runners.loading import load_model
from stage_runners.stage1 import SourcedInputs, Stage1Options, run_stage1, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    import pyarrow as pa

    from stage_runners.inputs import ModelInputs
    from stage_runners.measurement import Measurement

Build = "Callable[..., nn.Module]"
Inputs = "Callable[..., ModelInputs]"
DECODER = variant_config("deepseek-ocr-v1-tiny").decoder
PROFILED = 3


class Phases:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.seen.append((phase, done, total))


@attrs.frozen(eq=False)
class Run:
    """A finished run, and what went through `attribute` on the way."""

    model: nn.Module
    measurement: Measurement
    phases: Phases
    captured: list[pa.Table]

    @property
    def calls(self) -> pd.DataFrame:
        return self.measurement.calls.to_pandas()

    @property
    def kernels(self) -> pd.DataFrame:
        return self.measurement.kernels.to_pandas()


def measure(model: nn.Module, pages: Sequence[ModelInputs], **options: Any) -> Measurement:
    sourced = [SourcedInputs(f"page-{index}", f"seed {index}", page) for index, page in enumerate(pages)]
    return run_stage1(model, sourced, DECODER, Stage1Options(**options), Phases())


@pytest.fixture(scope="module")
def run(inputs_of: Inputs) -> Run:
    """Two pages, two generations each, three of seven decode steps profiled."""
    model = load_model("builtin", variant="deepseek-ocr-v1-tiny", dtype=torch.float32)
    pages = [SourcedInputs(f"page-{seed}", f"seed {seed}", inputs_of(seed=seed)) for seed in (0, 1)]
    phases, captured = Phases(), []

    def attribute(events: pa.Table, calls: pa.Table) -> pa.Table:
        captured.append(events)
        return original(events, calls)

    original = stage1.attribute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "attribute", attribute)
        measurement = run_stage1(model, pages, DECODER, Stage1Options(profiled_steps=PROFILED, repeats=2), phases)
    return Run(model, measurement, phases, captured)


# --- what a run yields ---


def test_tables_have_their_schemas(run: Run) -> None:
    tables = run.measurement
    assert tables.modules.schema == MODULES
    assert tables.calls.schema == CALLS
    assert tables.callgraph.schema == CALLGRAPH
    assert tables.kernels.schema == KERNELS
    assert tables.modules["module_path"].to_pylist() == [path for path, _ in run.model.named_modules()]
    assert tables.notes == ()
    assert tables.peak_device_bytes is None
    assert tables.device_state is None


def test_pages_are_described(run: Run, inputs_of: Inputs) -> None:
    assert [(page.name, page.source) for page in run.measurement.pages] == [("page-0", "seed 0"), ("page-1", "seed 1")]
    for seed, page in enumerate(run.measurement.pages):
        inputs = inputs_of(seed=seed)
        assert page.workload == inputs.workload
        assert not page.stopped_at_eos
        generation = Generation(run.model, inputs)
        generation.start()
        for _ in range(7):
            generation.advance()
        assert list(page.tokens) == generation.tokens


def test_which_passes_hold_which_forwards(run: Run) -> None:
    calls = run.calls
    assert set(calls["pass"]) == {"traced", "traced-2", "profiled"}
    roots = calls[calls["parent_call_id"].isna()]
    found = {key: sorted(group["step"]) for key, group in roots.groupby(["pass", "page"])}
    assert found == {
        (name, page): [0, 2, 4, 6] if name == "profiled" else list(range(8))
        for name in ("traced", "traced-2", "profiled")
        for page in (0, 1)
    }
    assert set(roots["module_path"]) == {""}


def test_the_cache_grew_by_all_positions_of_both_pages(run: Run) -> None:
    """Keys and values in fp32: eight bytes a number, for each prompt position and each of seven decode steps."""
    width = 8 * DECODER.kv_heads * DECODER.head_dim
    prompts = sum(page.workload.seq_len for page in run.measurement.pages)
    growth = run.measurement.memory.cache_growth_bytes
    assert len(growth) == 2 * DECODER.layers
    for (stage, path), size in growth.items():
        assert path.endswith(".self_attn")
        assert size == width * {"prefill": prompts, "decode": 2 * 7}[stage]
    assert run.measurement.memory.activation_peak_bytes == {}


def test_profiled_steps_are_spread(run: Run) -> None:
    for page in run.measurement.pages:
        assert page.profiled_steps == (2, 4, 6) == spread(7, PROFILED)


def test_calls_of_each_stage(run: Run) -> None:
    calls = run.calls
    vision = calls["module_path"].str.match(r"model\.(sam_model|vision_model|projector)(\.|$)")
    assert set(calls["stage"]) == {"vision", "prefill", "decode"}
    assert (vision == (calls["stage"] == "vision")).all()
    assert (calls.loc[calls["step"] == 0, "stage"] != "decode").all()
    assert (calls.loc[calls["step"] > 0, "stage"] == "decode").all()
    counts = Counter(zip(calls["pass"], calls["page"], calls["stage"], strict=True))
    # Vision: every module but the CLIP patch embedding and the module lists, for tiles and for the global view.
    modules = run.measurement.modules.to_pandas()
    modules = modules[modules["module_class"] != "ModuleList"]["module_path"]
    modules = modules[modules != "model.vision_model.embeddings.patch_embedding"]
    called = modules.str.match(r"model\.(sam_model|vision_model|projector)(\.|$)")
    for name in ("traced", "traced-2", "profiled"):
        assert counts[name, 0, "vision"] == 2 * called.sum()
    # A decode forward sends its one token to two experts of each of the two layers.
    assert counts["traced", 0, "decode"] == 7 * 71
    assert counts["profiled", 0, "decode"] == PROFILED * 71


def test_repeats_call_the_same_modules(run: Run) -> None:
    calls = run.calls[["pass", "page", "stage", "step", "module_path"]]
    first, second = (
        calls[calls["pass"] == name].drop(columns="pass").value_counts().sort_index() for name in ("traced", "traced-2")
    )
    assert first.equals(second)


def test_the_call_graph_counts_the_first_generations_only(run: Run) -> None:
    calls = run.calls
    assert sum(run.measurement.callgraph["call_count"].to_pylist()) == (calls["pass"] == "traced").sum()


def test_call_ids_are_unique_and_parents_present(run: Run) -> None:
    calls = run.calls
    assert calls["call_id"].is_unique
    assert calls["parent_call_id"].dropna().isin(calls["call_id"]).all()


def test_wall_times(run: Run) -> None:
    calls = run.calls
    for index, page in enumerate(run.measurement.pages):
        assert len(page.repeats) == 2
        for repeat, name in zip(page.repeats, ("traced", "traced-2"), strict=True):
            mine = calls[(calls["pass"] == name) & (calls["page"] == index)]
            outermost = mine[mine["module_path"].isin(stage1.VISION_SUBTREES)]
            assert len(outermost) == 6
            roots = mine[mine["parent_call_id"].isna()].sort_values("step")
            inside = (roots["end_ns"] - roots["start_ns"]).to_numpy()
            # Up to where the last view's features are there, which is just after its projection.
            assert outermost["end_ns"].max() - outermost["start_ns"].min() <= repeat.vision_ns <= inside[0]
            assert len(repeat.decode_ns) == 7
            assert (np.array(repeat.decode_ns) >= inside[1:]).all()
            assert repeat.vision_ns + repeat.prefill_ns >= inside[0]
            assert repeat.prefill_ns > 0


def test_every_step_is_paired(run: Run) -> None:
    for page in run.measurement.pages:
        assert [pair.step for pair in page.step_pairs] == [7, 6, 5, 4, 3, 2, 1]
        assert all(pair.plain_ns > 0 and pair.traced_ns > 0 for pair in page.step_pairs)


def test_progress_reaches_its_end(run: Run) -> None:
    names = list(dict.fromkeys(phase for phase, _, _ in run.phases.seen))
    assert names == [
        "warm-up: plain prefill",
        "vision and prefill",
        "decode",
        "overhead: plain and traced steps",
        "profile: vision and prefill",
        "profile: decode steps",
    ]
    assert ("decode", 7, 7) in run.phases.seen
    assert all(0 <= done <= total for _, done, total in run.phases.seen)


# --- events ---


def test_events_are_conserved(run: Run) -> None:
    kernels = run.kernels
    assert len(run.captured) == 4  # prefill and decode of two pages
    assert len(kernels) == sum(table.num_rows for table in run.captured)
    assert kernels["duration_ns"].sum() == sum(sum(table["duration_ns"].to_pylist()) for table in run.captured)
    assert kernels["event_id"].tolist() == list(range(len(kernels)))
    assert (kernels["duration_ns"] >= 0).all()
    assert set(kernels["kind"]) == {"cpu_op"}


def test_every_event_has_a_call_or_a_reason(run: Run) -> None:
    kernels = run.kernels
    assert (kernels["call_id"].isna() != kernels["unclassified_reason"].isna()).all()
    assert set(kernels["unclassified_reason"].dropna()) <= {"outside_any_module"}
    assert ((kernels["module_path"] == "unclassified") == kernels["call_id"].isna()).all()


def test_events_lie_in_their_calls(run: Run) -> None:
    kernels = run.kernels.dropna(subset="call_id")
    calls = run.calls.set_index("call_id").loc[kernels["call_id"]]
    for column in ("pass", "page", "stage", "step", "module_path"):
        assert (kernels[column].to_numpy() == calls[column].to_numpy()).all(), column
    assert (calls["pass"] == "profiled").all()
    assert (kernels["launch_ns"].to_numpy() >= calls["start_ns"].to_numpy()).all()
    assert (kernels["launch_ns"].to_numpy() <= calls["end_ns"].to_numpy()).all()


def test_every_leaf_that_was_called_has_events(run: Run) -> None:
    calls, kernels = run.calls, run.kernels
    modules = run.measurement.modules.to_pandas()
    leaves = set(modules.loc[modules["is_leaf"], "module_path"])
    called = calls[(calls["pass"] == "profiled") & calls["module_path"].isin(leaves)]
    seen = set(kernels.loc[kernels["module_path"].isin(leaves), "call_id"])
    assert seen <= set(called["call_id"])
    # The tiny model's leaves take microseconds: an event may miss its call, by no more than the clocks' residual.
    slack = 2 * run.measurement.clock.residual_ns
    for call in called[~called["call_id"].isin(seen)].itertuples():
        assert kernels["launch_ns"].between(call.start_ns - slack, call.end_ns + slack).any()


@pytest.mark.parametrize("stage", ["vision", "prefill", "decode"])
def test_coverage(run: Run, stage: str) -> None:
    """Shares of time in modules; what remains of decode is choosing the token."""
    mine = run.kernels[run.kernels["stage"] == stage]
    named = mine.loc[mine["call_id"].notna(), "duration_ns"].sum() / mine["duration_ns"].sum()
    assert named > (0.6 if stage == "decode" else 0.9)
    assert set(mine["page"]) == {0, 1}


def test_each_linear_call_ran_its_matrix_product(run: Run) -> None:
    calls, kernels = run.calls, run.kernels
    modules = run.measurement.modules.to_pandas()
    linear = set(modules.loc[modules["module_class"].isin(["Linear", "MoEGate"]), "module_path"])
    called = calls[(calls["pass"] == "profiled") & calls["module_path"].isin(linear)]
    products = kernels[kernels["name"].isin(["aten::addmm", "aten::mm"])]
    assert len(called) > 300
    assert len(products) == len(called)
    slack = 2 * run.measurement.clock.residual_ns
    launches = np.sort(products["launch_ns"].to_numpy())
    assert (called["start_ns"].to_numpy() - slack <= launches).all()
    assert (launches <= called["end_ns"].to_numpy() + slack).all()


def test_choosing_a_token_belongs_to_its_step(run: Run) -> None:
    """The argmax runs outside every module, once after each forward."""
    chosen = run.kernels[run.kernels["name"] == "aten::argmax"]
    assert set(chosen["unclassified_reason"]) == {"outside_any_module"}
    found = sorted(zip(chosen["page"], chosen["step"], chosen["stage"], strict=True))
    assert found == [(page, step, "decode" if step else "prefill") for page in (0, 1) for step in (0, 2, 4, 6)]


def test_clocks_agree(run: Run) -> None:
    clock = run.measurement.clock
    assert clock.captures == 4
    assert 0 <= clock.residual_ns < 20_000


# --- routing ---


def test_every_token_goes_to_k_experts(run: Run) -> None:
    routers = {"model.layers.1.mlp.gate", "model.layers.2.mlp.gate"}
    for page in run.measurement.pages:
        assert page.routing.prefill.keys() == page.routing.decode.keys() == routers
        for router in routers:
            prefill, decode = page.routing.prefill[router], page.routing.decode[router]
            assert prefill.shape == (8,)
            assert prefill.sum() == page.workload.seq_len * 2 == 80
            assert decode.shape == (7, 8)
            assert decode.sum(axis=1).tolist() == [2] * 7
            assert decode.max() == 1


@pytest.mark.parametrize("name", ["traced", "traced-2"])
def test_experts_with_tokens_are_the_experts_that_were_called(run: Run, name: str) -> None:
    calls = run.calls
    experts = calls["module_path"].str.extract(r"^(model\.layers\.\d+\.mlp)\.experts\.(\d+)$")
    calls = calls.assign(router=experts[0] + ".gate", expert=experts[1]).dropna(subset="expert")
    calls = calls[calls["pass"] == name]
    for index, page in enumerate(run.measurement.pages):
        mine = calls[calls["page"] == index]
        found = sorted(zip(mine["router"], mine["step"], mine["expert"].astype(int), strict=True))
        expected = [
            (router, step, int(expert))
            for router, prefill in page.routing.prefill.items()
            for step, counts in enumerate([prefill, *page.routing.decode[router]])
            for expert in np.flatnonzero(counts)
        ]
        assert found == sorted(expected)


# --- options ---


def test_one_token_has_no_decode(tiny_model: Build, inputs_of: Inputs) -> None:
    measurement = measure(tiny_model(), [inputs_of(max_new_tokens=1)])
    (page,) = measurement.pages
    assert len(page.tokens) == 1
    assert (page.profiled_steps, page.step_pairs, page.repeats[0].decode_ns) == ((), (), ())
    assert set(measurement.calls["stage"].to_pylist()) == {"vision", "prefill"}
    assert "decode" not in measurement.kernels["stage"].to_pylist()
    assert all(counts.shape == (0, 8) for counts in page.routing.decode.values())
    assert measurement.clock.captures == 1


def test_all_steps_profiled(tiny_model: Build, inputs_of: Inputs) -> None:
    measurement = measure(tiny_model(), [inputs_of(max_new_tokens=5)], profiled_steps=None)
    assert measurement.pages[0].profiled_steps == (1, 2, 3, 4)
    decode = measurement.kernels.to_pandas().query("stage == 'decode'")
    assert set(decode["step"]) == {1, 2, 3, 4}


def test_no_step_profiled(tiny_model: Build, inputs_of: Inputs) -> None:
    measurement = measure(tiny_model(), [inputs_of(max_new_tokens=5)], profiled_steps=0)
    assert measurement.pages[0].profiled_steps == ()
    assert "decode" in measurement.calls["stage"].to_pylist()
    assert "decode" not in measurement.kernels["stage"].to_pylist()


@pytest.mark.parametrize("stop", [True, False])
def test_the_end_token_stops_where_it_means_something(tiny_model: Build, inputs_of: Inputs, *, stop: bool) -> None:
    model, inputs = tiny_model(seed=1), inputs_of(no_repeat_ngram_size=1)
    generation = Generation(model, inputs)
    generation.start()
    for _ in range(7):
        generation.advance()
    assert len(set(generation.tokens)) == 8
    end = attrs.evolve(DECODER, eos_token_id=generation.tokens[3])
    page = SourcedInputs("page", "seed", inputs)
    measurement = run_stage1(model, [page], end, Stage1Options(stop_at_eos=stop, repeats=2), Phases())
    (measured,) = measurement.pages
    assert measured.stopped_at_eos is stop
    assert list(measured.tokens) == generation.tokens[: 4 if stop else 8]
    assert measured.profiled_steps == tuple(range(1, len(measured.tokens)))


def test_an_end_token_at_once(tiny_model: Build, inputs_of: Inputs) -> None:
    model, inputs = tiny_model(), inputs_of()
    end = attrs.evolve(DECODER, eos_token_id=Generation(model, inputs).start())
    page = SourcedInputs("page", "seed", inputs)
    (measured,) = run_stage1(model, [page], end, Stage1Options(stop_at_eos=True), Phases()).pages
    assert (len(measured.tokens), measured.stopped_at_eos, measured.profiled_steps) == (1, True, ())


class CpuAllocator:
    """Counts nothing, and so lets the memory pass run on a CPU."""

    def __init__(self, _: torch.device) -> None:
        self.readings = 0

    def allocated(self) -> int:
        self.readings += 1
        return self.readings

    def peak(self) -> int:
        return self.readings

    def reset_peak(self) -> None:
        pass


def test_the_memory_pass_measures_every_module_and_is_in_no_table(
    tiny_model: Build, inputs_of: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played on a CPU: prefill and the last three steps, on an allocator that takes one byte between readings."""
    asked = []
    original = Generation.rewind

    def rewind(generation: Generation, step: int) -> None:
        asked.append(step)
        original(generation, step)

    monkeypatch.setattr(stage1, "CudaAllocator", CpuAllocator)
    monkeypatch.setattr(Generation, "rewind", rewind)
    model, inputs = tiny_model(), inputs_of()
    runner = stage1._Runner(model, DECODER, Stage1Options(), Phases())
    generation = Generation(model, inputs)
    generation.start()
    while len(generation.tokens) < 8:
        generation.advance()
    tokens = tuple(generation.tokens)
    monkeypatch.setattr(runner, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 17)
    peaks = runner._activation_peaks(generation, inputs, tokens)
    assert asked == [5]
    assert generation.tokens == list(tokens)
    assert {stage for stage, _ in peaks} == {"vision", "prefill", "decode"}
    assert peaks["prefill", ""] > peaks["prefill", "model.layers.0"] > 0
    assert runner.tracer.calls().num_rows == 0
    assert wrapped_modules(model) == []
    with pytest.raises(TraceError, match=r"at step 6 while memory was measured"):
        runner._activation_peaks(generation, inputs, (*tokens[:6], -1, tokens[7]))
    assert wrapped_modules(model) == []


def test_with_nvtx_ranges(tiny_model: Build, inputs_of: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVTX_DISABLE", raising=False)
    plain, ranged = (measure(tiny_model(), [inputs_of()], nvtx=nvtx) for nvtx in (False, True))
    assert plain.pages[0].tokens == ranged.pages[0].tokens
    assert plain.calls.num_rows == ranged.calls.num_rows
    assert ranged.notes == ()


def test_what_the_model_prints_is_not_the_result(
    tiny_model: Build, inputs_of: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.lm_head = Chatty(model.lm_head)
    measure(model, [inputs_of(max_new_tokens=2)])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "BASE:" in captured.err


class Chatty(nn.Module):
    """Prints, as the published code does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("BASE:", x.shape)  # noqa: T201
        return self.inner(x)


# --- what goes wrong ---


class Nth(nn.Module):
    """A language head that does something else on one of its calls."""

    def __init__(self, inner: nn.Module, call: int, instead: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.call, self.instead, self.calls = inner, call, instead, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits = self.inner(x)
        return self.instead(logits) if self.calls == self.call else logits


#: Which forward of a run with two generations of eight tokens: plain 1, traced 2 to 9, again 10 to 17, pairs of steps
#: 7 to 1 from 18 to 31 (plain, traced; traced, plain; ...), profiled from 32.
FORWARDS = {
    1: "at step 0 without tracing",
    12: "at step 2 when repeated",
    18: "at step 7 without tracing",
    19: "at step 7 with tracing",
    20: "at step 6 with tracing",
    21: "at step 6 without tracing",
    32: "at step 0 under the profiler",
    33: "at step 7 under the profiler",
    39: "at step 1 under the profiler",
}


def profiler_is_on() -> bool:
    return torch.autograd._profiler_enabled()


@pytest.mark.parametrize("call", FORWARDS)
def test_a_run_that_does_not_repeat_itself_fails(tiny_model: Build, inputs_of: Inputs, call: int) -> None:
    model = tiny_model()
    model.lm_head = Nth(model.lm_head, call, torch.neg)
    with pytest.raises(TraceError, match=f"chose token [0-9]+ {FORWARDS[call]}, the traced generation chose [0-9]+"):
        measure(model, [inputs_of()], repeats=2)
    # Both generations are finished before anything is compared.
    assert model.lm_head.calls == max(call, 17)
    assert wrapped_modules(model) == []
    assert not profiler_is_on()


class BrokenError(RuntimeError):
    pass


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 5, 19, 32, 34])
def test_everything_is_undone_after_an_error(
    tiny_model: Build, inputs_of: Inputs, error: type[BaseException], call: int
) -> None:
    model, inputs = tiny_model(), inputs_of()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    head = model.lm_head

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise error

    model.lm_head = Nth(head, call, fail)
    with pytest.raises(error):
        measure(model, [inputs], repeats=2)
    model.lm_head = head
    assert wrapped_modules(model) == []
    assert not profiler_is_on()
    after = {path: dict(vars(module)) for path, module in model.named_modules()}
    assert {path: values.keys() for path, values in after.items()} == {
        path: values.keys() for path, values in before.items()
    }
    assert not any("forward" in values for values in after.values())


def test_a_run_after_an_error(tiny_model: Build, inputs_of: Inputs) -> None:
    model, inputs = tiny_model(), inputs_of()
    head = model.lm_head
    model.lm_head = Nth(head, 33, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(model, [inputs], repeats=2)
    model.lm_head = head
    assert len(measure(model, [inputs]).pages[0].tokens) == 8


# --- spread ---


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        (0, 3, ()),
        (0, None, ()),
        (4, None, (1, 2, 3, 4)),
        (4, 4, (1, 2, 3, 4)),
        (4, 9, (1, 2, 3, 4)),
        (7, 1, (4,)),
        (7, 3, (2, 4, 6)),
        (10, 2, (3, 8)),
        (5, 0, ()),
    ],
)
def test_spread(steps: int, count: int | None, expected: tuple[int, ...]) -> None:
    assert spread(steps, count) == expected


def test_spread_is_even_for_any_size() -> None:
    for steps in range(1, 70):
        for count in range(1, steps + 1):
            chosen = spread(steps, count)
            assert len(set(chosen)) == count
            assert 1 <= chosen[0] <= chosen[-1] <= steps
            gaps = set(np.diff(chosen))
            assert not gaps or max(gaps) - min(gaps) <= 1
            # As far from one end as from the other.
            assert abs((chosen[0] - 1) - (steps - chosen[-1])) <= 1
