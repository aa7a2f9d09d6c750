"""Reading and writing checkpoints: what is whole comes back byte for byte, what is not is refused in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.compress.checkpoint import Check, Checkpoint
from tersor.compress.errors import PreflightError, RecipeError, TersorError
from tersor.compress.pretrained import infer_task, load_tokenizer, locate, read_config


def edited(directory: Path, **changes) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")
    return directory


def rewritten(directory: Path, change) -> Path:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def refusal(kind: type[TersorError], directory: Path, task: str | None = None) -> str:
    with pytest.raises(kind) as caught:
        Checkpoint.load(directory, task)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(directory), "DIR")


# --- what is refused, and how it reads --------------------------------------------------------------------------


def test_unknown_model_type(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("llama"), model_type="mamba"))
    assert message.startswith("DIR/config.json: model_type: found 'mamba', expected one of bert, ")
    assert "llama" in message


def test_attribute_that_is_not_understood(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("llama"), logit_scale=0.5))
    assert message.startswith("DIR/config.json: logit_scale: 0.5, an attribute that is not understood for llama")


def test_value_that_is_not_understood(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("llama"), pretraining_tp=2))
    assert message == ("DIR/config.json: pretraining_tp: found 2, expected 1. tersor has no llama with this setting.")


def test_quantised_checkpoint(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("llama"), quantization_config={"bits": 4}))
    assert message == (
        "DIR/config.json: quantization_config: found a quantised checkpoint, expected plain weights. "
        "Dequantise it first."
    )


def test_sizes_that_do_not_divide(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("mistral"), num_key_value_heads=3))
    assert "num_attention_heads: found 8, expected a multiple of 3 (kv_heads * queries)" in message


def test_config_that_transformers_refuses(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("llama"), hidden_size=50))
    assert message.startswith("DIR/config.json: a config that transformers refuses")


def test_task_without_a_head(save_tiny):
    message = refusal(RecipeError, save_tiny("llama"), task="text-classification")
    assert message == (
        "task: found 'text-classification', expected one of feature-extraction, text-generation for llama"
    )


def test_class_that_does_not_exist(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("llama"), architectures=["LlamaForTea"]))
    assert "architectures: found 'LlamaForTea', expected a transformers class" in message


def test_dtype_that_is_not_stored_plainly(save_tiny):
    message = refusal(RecipeError, edited(save_tiny("llama"), dtype="float8_e4m3fn"))
    assert "dtype: found 'float8_e4m3fn', expected float32 or" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "an unreadable file"), ("[]", "no model_type"), ("{}", "no model_type"), (None, "no config.json")],
)
def test_broken_config(save_tiny, content, says):
    directory = save_tiny("llama")
    path = directory / "config.json"
    path.unlink() if content is None else path.write_text(content, "utf-8")
    assert says in refusal(PreflightError, directory)


def test_no_weights(save_tiny):
    directory = save_tiny("llama")
    (directory / "model.safetensors").unlink()
    message = refusal(PreflightError, directory)
    assert message == "DIR: found no weights, expected model.safetensors or model.safetensors.index.json"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(save_tiny, share):
    directory = save_tiny("llama")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "weights that do not load" in refusal(PreflightError, directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(save_tiny, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, :2] = value

    message = refusal(PreflightError, rewritten(save_tiny("llama"), spoil))
    assert message == (
        "DIR: model.layers.1.mlp.up_proj.weight: found 2 values that are NaN or infinite, expected finite weights"
    )


def test_missing_parameter(save_tiny):
    directory = rewritten(save_tiny("llama"), lambda t: t.pop("model.norm.weight"))
    assert "1 missing keys, first model.norm.weight" in refusal(PreflightError, directory)


def test_parameter_of_another_shape(save_tiny):
    def spoil(tensors):
        tensors["model.norm.weight"] = torch.ones(3)

    message = refusal(PreflightError, rewritten(save_tiny("llama"), spoil))
    assert "1 mismatched keys, first model.norm.weight [3] instead of [48]" in message


def test_parameter_that_would_be_dropped(save_tiny):
    def add(tensors):
        tensors["model.layers.0.adapter.weight"] = torch.ones(3)

    message = refusal(PreflightError, rewritten(save_tiny("llama"), add))
    assert "1 unexpected keys, first model.layers.0.adapter.weight" in message


def test_tokenizer_that_does_not_load(save_tiny):
    directory = save_tiny("llama")
    (directory / "tokenizer.json").write_text("{", "utf-8")
    assert "tokenizer: found files that do not load" in refusal(PreflightError, directory)


def test_torch_file_with_code_in_it_runs_nothing(save_tiny, tmp_path):
    directory, witness = save_tiny("llama"), tmp_path / "witness"
    (directory / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (Path.touch, (witness,))

    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}, protocol=2))
    assert "weights that do not load" in refusal(PreflightError, directory)
    assert not witness.exists()


def test_code_beside_the_weights_is_never_run(save_tiny, tmp_path):
    witness = tmp_path / "witness"
    code = f"from pathlib import Path\nPath({str(witness)!r}).touch()\nclass Mine: ...\n"
    directory = save_tiny("llama")
    (directory / "mine.py").write_text(code, "utf-8")
    known = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    Checkpoint.load(edited(directory, auto_map=known)).save(tmp_path / "out")
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text("utf-8")
    assert not (tmp_path / "out" / "mine.py").exists()
    path = directory / "tokenizer_config.json"
    stated = {**json.loads(path.read_text("utf-8")), "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps({**stated, "tokenizer_class": "Mine"}), "utf-8")
    assert "tokenizer: found files that do not load" in refusal(PreflightError, directory)
    assert not witness.exists()


# --- what comes back --------------------------------------------------------------------------------------------


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        t.dtype == b.tensors[n].dtype and torch.equal(t, b.tensors[n]) for n, t in a.tensors.items()
    )


def test_shards_come_back(tiny, tmp_path):
    checkpoint = tiny("llama", variant="tied")
    checkpoint.model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert equal(Checkpoint.load(tmp_path), checkpoint)
    shards[1].unlink()
    refusal(PreflightError, tmp_path)


def test_torch_files_come_back(tiny, tmp_path):
    checkpoint = tiny("llama")
    checkpoint.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(checkpoint.tensors, tmp_path / "pytorch_model.bin")
    assert equal(Checkpoint.load(tmp_path), checkpoint)


def test_dtype_is_that_of_the_file_where_the_config_is_silent(save_tiny):
    directory = save_tiny("llama", dtype="bfloat16")
    path = directory / "config.json"
    raw = json.loads(path.read_text("utf-8"))
    del raw["dtype"]
    path.write_text(json.dumps(raw), "utf-8")
    assert Checkpoint.load(directory).dtype == torch.bfloat16


def test_a_model_without_tokenizer_stays_without(save_tiny, tmp_path):
    directory = save_tiny("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    checkpoint = Checkpoint.load(directory)
    assert checkpoint.tokenizer is None
    checkpoint.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out") is None


def test_side_files_travel_byte_for_byte(save_tiny, tmp_path):
    directory = save_tiny("bert")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_bytes(b'{"pooling_mode_mean_tokens":true}')
    (directory / "modules.json").write_bytes(b"[]\n")
    (directory / "private-notes.txt").write_bytes(b"not mine to copy")
    tokenizer = (directory / "tokenizer.json").read_bytes().replace(b"\n", b"\n ")
    (directory / "tokenizer.json").write_bytes(tokenizer)
    Checkpoint.load(directory).save(tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b'{"pooling_mode_mean_tokens":true}'
    assert (tmp_path / "out" / "modules.json").read_bytes() == b"[]\n"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer
    assert not (tmp_path / "out" / "private-notes.txt").exists()


def test_card_is_written(tiny, tmp_path):
    tiny("llama").save(tmp_path, card="# what was done\n")
    assert (tmp_path / "README.md").read_text("utf-8") == "# what was done\n"


def test_stock_reload_gives_the_same_logits(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint = tiny("qwen2", dtype="bfloat16", variant="tied")
    checkpoint.save(tmp_path)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits
        ours = checkpoint.model(torch.bfloat16)(ids).logits
    assert stock.dtype == torch.bfloat16
    assert torch.equal(stock, ours)


def test_models_share_storage_with_the_tensors(tiny):
    checkpoint = tiny("llama")
    pointers = {p.data_ptr() for p in checkpoint.model().parameters()}
    assert {t.data_ptr() for t in checkpoint.tensors.values()} == pointers


def test_become_casts_once_and_ties_again(tiny):
    checkpoint = tiny("llama", variant="tied", dtype="bfloat16")
    wide = {n: t.double() + 1 / 3 for n, t in checkpoint.tensors.items()}
    checkpoint.become(checkpoint.layout, wide)
    assert checkpoint.tensors["lm_head.weight"] is checkpoint.tensors["model.embed_tokens.weight"]
    assert all(torch.equal(t, wide[n].bfloat16()) for n, t in checkpoint.tensors.items() if n != "lm_head.weight")


def test_become_refuses_a_wrong_shape_and_a_nan(tiny):
    checkpoint = tiny("llama")
    with pytest.raises(
        PreflightError, match=r"after the pass: model\.norm\.weight: found shape \(3,\), expected \(48,\)"
    ):
        tiny("llama").become(checkpoint.layout, {**checkpoint.tensors, "model.norm.weight": torch.ones(3)})
    with pytest.raises(PreflightError, match="48 values that are NaN"):
        tiny("llama").become(
            checkpoint.layout, {**checkpoint.tensors, "model.norm.weight": torch.full((48,), torch.nan)}
        )
    with pytest.raises(PreflightError, match="a parameter missing"):
        tiny("llama").become(
            checkpoint.layout, {n: t for n, t in checkpoint.tensors.items() if n != "model.norm.weight"}
        )


def test_failing_checks_say_what_is_wrong(tiny):
    checkpoint = tiny("llama")
    checkpoint.checks = [
        Check("holds", lambda c, t: None),
        Check("fails", lambda c, t: f"hidden is {c.hidden_size}"),
    ]
    assert checkpoint.failing_checks() == ["fails: hidden is 48"]


# --- where checkpoints are --------------------------------------------------------------------------------------


def test_locate_finds_directories(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert locate(str(tmp_path / "a")) == tmp_path / "a"
    assert locate("a/b", base=tmp_path) == tmp_path / "a" / "b"
    assert locate("./a", base=tmp_path) == tmp_path / "a"


def test_locate_finds_package_data():
    assert (locate("package:tersor.compress/arch") / "llama.py").is_file()


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("./nowhere", "no such directory"),
        ("package:no_such_package_here/model", "no package '?no_such_package_here"),
        ("package:tersor.compress/nowhere", "found no"),
        ("nobody/no-such-model", "a hub id that cannot be fetched"),
    ],
)
def test_locate_refuses(reference, says):
    with pytest.raises(PreflightError, match=says):
        locate(reference, offline=True)


def test_task_of_the_config(save_tiny):
    assert read_config(save_tiny("llama")).task == "text-generation"
    assert read_config(save_tiny("bert")).task == "feature-extraction"
    assert read_config(save_tiny("bert", "text-classification")).task == "text-classification"


def test_task_of_a_class_unknown_to_optimum(tiny):
    config = tiny("bert").config
    config.architectures = ["BertConfig"]
    with pytest.raises(RecipeError, match=r"State `task:` in the recipe"):
        infer_task(config, Path("config.json"))
