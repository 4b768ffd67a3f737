"""Checkpoint directories, good and bad, and checkpoints that bring their own code."""

from __future__ import annotations

import json
import re
import socket
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from analytic.errors import InputError
from stage_runners.deepseek_ocr import DeepseekOCRForCausalLM
from stage_runners.generate import Generation
from stage_runners.loading import load_model, model_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from stage_runners.inputs import ModelInputs

SHARDS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def tiny_config() -> dict[str, Any]:
    text = (resources.files("analytic") / "data/variants/deepseek-ocr-v1-tiny.json").read_text(encoding="utf-8")
    return json.loads(text)


def write_config(directory: Path, **changes: Any) -> None:
    (directory / "config.json").write_text(json.dumps(tiny_config() | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_model("builtin", variant="deepseek-ocr-v1-tiny", seed=5).state_dict()


@pytest.fixture
def sharded(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in three shards with an index, as large models are published."""
    write_config(tmp_path)
    weight_map = {name: SHARDS[number % 3] for number, name in enumerate(state)}
    for shard in SHARDS:
        save_file({name: state[name] for name, home in weight_map.items() if home == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return tmp_path


@pytest.fixture
def whole(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """The same in one file."""
    write_config(tmp_path)
    save_file(state, tmp_path / WHOLE)
    return tmp_path


def refused(directory: Path, **options: Any) -> str:
    """The one line that says why `directory` cannot be loaded."""
    with pytest.raises(InputError) as caught:
        load_model(str(directory), **options)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


# --- what loads ---


def test_shards_with_an_index(sharded: Path, state: dict[str, torch.Tensor]) -> None:
    model = load_model(str(sharded))
    assert isinstance(model, DeepseekOCRForCausalLM)
    assert not model.training
    assert same(model, state)


def test_one_file(whole: Path, state: dict[str, torch.Tensor]) -> None:
    assert same(load_model(str(whole)), state)


def test_shards_without_an_index(sharded: Path, state: dict[str, torch.Tensor]) -> None:
    (sharded / INDEX).unlink()
    assert same(load_model(str(sharded)), state)


def test_other_safetensors_files_are_not_read(whole: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, whole / "adapter.safetensors")
    (whole / "broken.safetensors").write_bytes(b"?")
    assert same(load_model(str(whole)), state)


def test_files_that_the_index_does_not_name_are_not_read(sharded: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({"lm_head.weight": torch.zeros(2)}, sharded / "adapter.safetensors")
    assert same(load_model(str(sharded)), state)


def test_stored_buffers_are_computed_anyway(whole: Path, state: dict[str, torch.Tensor]) -> None:
    """The published code's own save_pretrained() writes position_ids too."""
    stored = {"model.vision_model.embeddings.position_ids": torch.zeros(1, 257, dtype=torch.int64)}
    save_file(state | stored, whole / WHOLE)
    model = load_model(str(whole))
    assert same(model, state)
    assert model.model.vision_model.embeddings.position_ids.tolist() == [list(range(257))]


@pytest.mark.parametrize(("named", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_configuration_names_the_type(
    whole: Path, state: dict[str, torch.Tensor], named: str, dtype: torch.dtype
) -> None:
    write_config(whole, torch_dtype=named)
    model = load_model(str(whole))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight.bfloat16(), state["lm_head.weight"])


def test_a_type_by_name(whole: Path) -> None:
    assert next(load_model(str(whole), dtype="fp32").parameters()).dtype is torch.float32
    with pytest.raises(InputError, match=r"no type 'fp8'; choose one of bf16, fp32 with --dtype"):
        load_model(str(whole), dtype="fp8")


def test_the_caller_names_the_type(whole: Path) -> None:
    assert load_model(str(whole), dtype=torch.float32).lm_head.weight.dtype == torch.float32


# --- what does not ---


def drop_shard(directory: Path) -> None:
    (directory / SHARDS[1]).unlink()


def home_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"][name]


def drop_tensor(directory: Path) -> None:
    path = home_of(directory, "model.embed_tokens.weight")
    shard = load_file(path)
    del shard["model.embed_tokens.weight"]
    save_file(shard, path)


def add_tensor(directory: Path) -> None:
    save_file(load_file(directory / SHARDS[0]) | {"model.extra.weight": torch.zeros(2)}, directory / SHARDS[0])


def reshape_tensor(directory: Path) -> None:
    path = home_of(directory, "model.embed_tokens.weight")
    save_file(load_file(path) | {"model.embed_tokens.weight": torch.zeros(9, 128)}, path)


def truncate_shard(directory: Path) -> None:
    path = directory / SHARDS[2]
    path.write_bytes(path.read_bytes()[:-100])


def empty_shard(directory: Path) -> None:
    (directory / SHARDS[2]).write_bytes(b"")


def leave_pickles(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


def leave_nothing(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()


def break_index(directory: Path) -> None:
    (directory / INDEX).write_text("{", encoding="utf-8")


def index_a_list(directory: Path) -> None:
    (directory / INDEX).write_text("[]", encoding="utf-8")


def index_numbers(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": {"lm_head.weight": 1}}', encoding="utf-8")


BAD_FILES: dict[Any, str] = {
    drop_shard: rf"lacks 1 of its 3 shards: {SHARDS[1]}; download it again",
    drop_tensor: r"lacks 1 tensors \(model\.embed_tokens\.weight\); it does not fit its config\.json",
    add_tensor: r"has unknown 1 tensors \(model\.extra\.weight\); it does not fit its config\.json",
    reshape_tensor: r"model\.embed_tokens\.weight has shape \[9, 128\], config\.json makes it \[2020, 128\]",
    truncate_shard: rf"{SHARDS[2]} is not a readable safetensors file \(.+\); download it again",
    empty_shard: rf"{SHARDS[2]} is not a readable safetensors file",
    leave_pickles: r"has only pickle files \(pytorch_model\.bin\), which can run code .*; convert it",
    leave_nothing: r"must hold \.safetensors files, it has none",
    break_index: rf"{INDEX} is not a safetensors index",
    index_a_list: rf"{INDEX} is not a safetensors index",
    index_numbers: r"lacks 1 of its 1 shards: 1;",
}


@pytest.mark.parametrize("spoil", BAD_FILES, ids=lambda spoil: spoil.__name__)
def test_bad_files(sharded: Path, spoil: Callable[[Path], None]) -> None:
    spoil(sharded)
    message = refused(sharded)
    assert re.search(BAD_FILES[spoil], message)
    assert "--model" in message


def test_many_wrong_names_are_shortened(sharded: Path, state: dict[str, torch.Tensor]) -> None:
    (sharded / INDEX).unlink()
    save_file({f"old.{name}": tensor for name, tensor in state.items()}, sharded / WHOLE)
    message = refused(sharded)
    assert (
        f"lacks {len(state)} tensors (lm_head.weight, model.embed_tokens.weight, model.image_newline, ...)" in message
    )
    assert len(message) < 400


def test_shapes_are_compared_before_memory_is_taken(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reshape_tensor(sharded)

    def never(*_: object) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr("stage_runners.loading._allocate", never)
    refused(sharded)


LANGUAGE = tiny_config()["language_config"]
BAD_CONFIGS: dict[str, tuple[str | None, str]] = {
    "none": (None, "has no config.json; give one with --model DIR"),
    "not JSON": ('{"language_config": ', "cannot be read as JSON"),
    "binary": ("\x80\0\1", "cannot be read as JSON"),
    "a list": ("[1, 2]", "holds a JSON list, not an object"),
    "another model": (
        json.dumps({"model_type": "llama", "hidden_size": 64}),
        "is not a DeepSeek-OCR configuration: KeyError: 'language_config'",
    ),
    "latent attention": (
        json.dumps(tiny_config() | {"language_config": LANGUAGE | {"use_mla": True}}),
        "use_mla is true, only plain multi-head attention is built in",
    ),
    "no layers": (
        json.dumps(tiny_config() | {"language_config": LANGUAGE | {"num_hidden_layers": 0}}),
        "decoder.layers is 0, it must be positive",
    ),
    "uneven heads": (
        json.dumps(tiny_config() | {"language_config": LANGUAGE | {"num_attention_heads": 3}}),
        "hidden size 128 does not divide into 3 heads",
    ),
    "a word for a number": (
        json.dumps(tiny_config() | {"language_config": LANGUAGE | {"vocab_size": "many"}}),
        "is not a DeepSeek-OCR configuration: ValueError",
    ),
    "misfit": (
        json.dumps(tiny_config() | {"projector_config": {"input_dim": 99, "n_embed": 128}}),
        "projector input is 99, SAM and CLIP together give 128",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configuration(sharded: Path, case: str) -> None:
    content, fact = BAD_CONFIGS[case]
    path = sharded / "config.json"
    path.unlink() if content is None else path.write_text(content, encoding="latin-1")
    assert fact in refused(sharded)


def test_no_such_directory(tmp_path: Path) -> None:
    assert "is not a checkpoint directory" in refused(tmp_path / "none")


def test_unknown_variant() -> None:
    with pytest.raises(InputError, match=r"no variant 'huge'; choose one of .*-tiny with --variant"):
        load_model("builtin", variant="huge")


# --- a checkpoint's own code ---

#: Its logits depend on every token so far, which only the cache remembers.
CODE = """
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

Path(__file__).with_name("was_run").touch()
print("a line on standard output")

class OwnConfig(PretrainedConfig):
    model_type = "dsocr_trace_test"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        vocabulary = config.language_config["vocab_size"]
        self.embed = torch.nn.Embedding(vocabulary, 8)
        self.head = torch.nn.Linear(8, vocabulary, bias=False)
        self.post_init()

    def forward(self, input_ids, images=None, images_seq_mask=None, images_spatial_crop=None,
                past_key_values=None, use_cache=None):
        x = self.embed(input_ids)
        seen, _ = past_key_values.update(x[:, None], x[:, None], 0)
        logits = self.head(x + seen.mean(dim=2))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}


@pytest.fixture
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where transformers copies a checkpoint's code and imports it from; it must not reach for the network."""

    def offline(*_: object) -> None:
        raise AssertionError("the network was used")

    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield cache
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def own(tmp_path: Path, module_cache: Path) -> Path:
    assert not module_cache.exists()
    directory = tmp_path / "own"
    directory.mkdir()
    write_config(directory, model_type="dsocr_trace_test", torch_dtype="float32", auto_map=AUTO_MAP)
    (directory / "modeling_own.py").write_text(CODE, encoding="utf-8")
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(2020, 8, generator=generator) for name in ("embed.weight", "head.weight")}
    save_file(weights, directory / WHOLE, metadata={"format": "pt"})
    return directory


def expected_tokens(directory: Path, ids: list[int], count: int) -> list[int]:
    weights = load_file(directory / WHOLE)
    embed, head = weights["embed.weight"], weights["head.weight"]
    start = len(ids)
    for _ in range(count):
        ids = [*ids, int((head @ (embed[ids[-1]] + embed[ids].mean(dim=0))).argmax())]
    return ids[start:]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_own_code_generates(
    own: Path,
    module_cache: Path,
    inputs_of: Callable[..., ModelInputs],
    capsys: pytest.CaptureFixture[str],
    attention: str,
) -> None:
    model = load_model(str(own), attention=attention, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert not model.training
    assert list(module_cache.rglob("was_run"))
    assert capsys.readouterr().out == ""
    inputs = inputs_of()
    inputs = attrs.evolve(inputs, workload=attrs.evolve(inputs.workload, no_repeat_ngram_size=1000))
    generation = Generation(model, inputs)
    generation.start()
    for _ in range(5):
        generation.advance()
    assert generation.tokens == expected_tokens(own, inputs.input_ids[0].tolist(), 6)
    generation.rewind(2)
    generation.advance()
    assert generation.tokens == expected_tokens(own, inputs.input_ids[0].tolist(), 3)


def test_own_code_takes_the_type_of_the_run(own: Path) -> None:
    model = load_model(str(own), dtype=torch.bfloat16, trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_own_code_does_not_run_without_the_flag(own: Path, tmp_path: Path) -> None:
    message = refused(own)
    assert "lacks" in message
    assert model_config(str(own)).decoder.vocab_size == 2020
    assert not list(tmp_path.rglob("was_run"))


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoConfig": "modeling_own.OwnConfig"}], ids=str)
def test_a_checkpoint_without_code(own: Path, auto_map: dict[str, str] | None) -> None:
    write_config(own, auto_map=auto_map)
    message = refused(own, trust_remote_code=True)
    assert "brings no code of its own (config.json has no auto_map for AutoModel)" in message
    assert "leave --trust-remote-code out" in message


def test_the_built_in_model_has_no_code_to_trust() -> None:
    with pytest.raises(InputError, match=r"--trust-remote-code needs a checkpoint .*; give it with --model DIR"):
        load_model("builtin", variant="deepseek-ocr-v1-tiny", trust_remote_code=True)


BAD_CODE = {
    "missing package": ("import no_such_package_anywhere\n" + CODE, "ImportError: .*no_such_package_anywhere"),
    "syntax": ("def broken(:\n", "SyntaxError"),
    "fails when imported": ("raise RuntimeError('not\\non this machine')", "RuntimeError: not on this machine"),
    "fails when built": (CODE.replace('"vocab_size"', '"no_such_field"'), "KeyError: 'no_such_field'"),
    "has no such class": (CODE.replace("class OwnModel", "class Other"), "AttributeError"),
}


@pytest.mark.parametrize("case", BAD_CODE)
def test_code_that_cannot_be_loaded(own: Path, case: str) -> None:
    code, fact = BAD_CODE[case]
    (own / "modeling_own.py").write_text(code, encoding="utf-8")
    message = refused(own, trust_remote_code=True)
    assert re.search(f"cannot be loaded with transformers {transformers.__version__}.*{fact}", message)
    assert "pip install 'dsocr-trace[vendor]'" in message
    assert "leave --trust-remote-code out" in message


def test_own_code_takes_no_pickle(own: Path) -> None:
    torch.save(load_file(own / WHOLE), own / "pytorch_model.bin")
    (own / WHOLE).unlink()
    assert "cannot be loaded" in refused(own, trust_remote_code=True)
