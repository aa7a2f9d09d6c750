"""The contract that every file of compress/arch signs, by existing.

A new architecture is under contract as soon as its file is there; it brings `tests/tiny/<model_type>.json`. Each
statement has a twin that must fail, so that a suite that checks nothing cannot pass.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tersor.compress import arch as arch_package
from tersor.compress.arch import architecture
from tersor.compress.axes import family, shrink, size_of
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.layout import Layout
from tersor.compress.walk import Walk

TINY = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class Case:
    """One architecture, one variant of its tiny config, one head."""

    model_type: str
    variant: str
    task: str

    def __str__(self) -> str:
        return "-".join(filter(None, (self.model_type, self.variant, self.task)))


def cases() -> list[Case]:
    found = []
    for name in arch_package.names():
        path, tasks = (
            TINY / f"{name}.json",
            sorted(architecture(name).heads, key=lambda t: t != "text-generation"),
        )
        variants = list(json.loads(path.read_text("utf-8"))["variants"]) if path.exists() else []
        found += [Case(name, "", task) for task in tasks]
        found += [Case(name, variant, tasks[0]) for variant in variants]
    return found


every_case = pytest.mark.parametrize("case", cases(), ids=str)


@pytest.fixture
def checkpoint(case: Case, tiny) -> Checkpoint:
    return tiny(case.model_type, case.task, variant=case.variant)


def inputs_of(layout: Layout, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch that the model's forward takes: two images, or two sequences, one padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    if layout.arch.inputs == "pixels":
        size = getattr(layout.config, "image_size", 32)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.randn(2, layout.config.num_channels, height, width, generator=generator)}
    ids = torch.randint(4, layout.families["vocab"], (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(checkpoint: Checkpoint) -> torch.Tensor:
    """The first output of the checkpoint's model, padded rows excluded."""
    inputs = inputs_of(checkpoint.layout)
    with torch.no_grad():
        out = checkpoint.model()(**inputs)[0]
    return out[inputs["attention_mask"].bool()] if out.ndim == 3 and "attention_mask" in inputs else out


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((a - b).abs().max() / a.abs().max())


SAME, OTHER = 2e-5, 1e-3


def reshaped(checkpoint: Checkpoint, keeps: dict[str, torch.Tensor], changes: dict[str, int]) -> Checkpoint:
    """A new checkpoint with only `keeps` of each axis, in a config of the new sizes."""
    layout, tensors = checkpoint.layout, {}
    for name, tensor in layout.tensors.items():
        tensors[name] = checkpoint.tensors[name]
        for axis, keep in keeps.items():
            tensors[name] = shrink(tensors[name], tensor.dims, axis, keep, layout.sizes)
    made = Checkpoint(layout, {})
    made.become(layout.resized(changes) if changes else layout, tensors)
    return made


def numbered(layout: Layout, axis_family: str) -> list[str]:
    """The axes of a family: one, or one a block."""
    axes = {a for t in layout.tensors.values() for d in t.dims for s in d.sections for a in s}
    return sorted(a for a in axes if family(a) == axis_family)


def drawn(size: int, drop: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, dropped) indices, seeded, neither a prefix nor a suffix, kept in ascending order."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[drop:].sort().values, order[:drop]


# --- names and shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", arch_package.names())
def test_architecture_brings_a_tiny_config(name):
    assert (TINY / f"{name}.json").is_file(), f"an architecture needs tests/tiny/{name}.json"
    assert architecture(name).model_type.replace("-", "_") == name


@every_case
def test_every_parameter_is_named_once_with_its_shape(checkpoint):
    layout = checkpoint.layout
    expanded = layout.arch.expand(layout.config) if layout.arch.expand else ()
    params = (*layout.arch.params, *expanded, *layout.arch.heads[layout.task])
    counted = Counter(t.name for p in params if layout._exists(p) for t in layout._expand(p))
    assert [n for n, times in counted.items() if times > 1] == []
    model = checkpoint.model()
    assert layout.shapes() == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    trained = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert {n for n, t in layout.tensors.items() if t.kind == "parameter"} == trained
    assert layout.parameters == model.num_parameters()


@every_case
def test_tied_parameters_are_those_that_share_storage(checkpoint):
    groups: dict[int, set[str]] = {}
    for name, parameter in checkpoint.model().named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), set()).add(name)
    told = {frozenset((n, t.shared_with)) for n, t in checkpoint.layout.tensors.items() if t.shared_with}
    assert told == {frozenset(g) for g in groups.values() if len(g) > 1}
    for one, other in told:
        assert checkpoint.tensors[one] is checkpoint.tensors[other]


@every_case
def test_modules_named_by_the_architecture_exist(checkpoint):
    layout, model = checkpoint.layout, checkpoint.model()
    modules = [layout.full(n) for n in (*layout.arch.embeddings, layout.arch.final_norm) if n]
    for block in range(layout.depth):
        for branch in layout.branches(block):
            modules += [branch.norm, branch.post_norm, *branch.reads, branch.writes]
    for name in filter(None, modules):
        assert name in layout.tensors or model.get_submodule(name)  # a bare parameter, or a module
    if layout.arch.blocks:
        assert len(model.get_submodule(layout.full(layout.arch.blocks))) == layout.depth


# --- walking ----------------------------------------------------------------------------------------------------


def walked(checkpoint: Checkpoint, skip: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(forward's output, the walk's)."""
    if not checkpoint.layout.arch.blocks:
        pytest.skip("no stream of one width")
    model, inputs = checkpoint.model(), inputs_of(checkpoint.layout)
    walk = Walk(model, checkpoint.layout)
    with torch.no_grad():
        expected = model(**inputs)[0]
        start = walk.start(**inputs)
        stream = start.stream
        for number, arguments in enumerate(start.arguments):
            if number != skip:
                stream = walk.block(number, stream, arguments)
        return expected, walk.finish(stream, **inputs)[0]


@every_case
def test_block_walk_is_the_forward_bit_for_bit(checkpoint):
    expected, found = walked(checkpoint)
    assert torch.equal(expected, found)


@every_case
def test_a_walk_that_skips_a_block_differs(checkpoint):
    expected, found = walked(checkpoint, skip=1)
    assert difference(expected, found) > OTHER


def test_a_walk_starts_without_the_head(tiny):
    checkpoint, calls = tiny("llama", "text-generation"), []
    model, inputs = checkpoint.model(), inputs_of(checkpoint.layout)
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    walk = Walk(model, checkpoint.layout)
    start = walk.start(**inputs)
    assert not calls
    walk.finish(start.stream, **inputs)
    assert calls


# --- axes -------------------------------------------------------------------------------------------------------

# Positions inside a head pair up under rotary embeddings; ids, positions and labels mean something by their number.
ORDERED = {"head_dim", "vocab", "positions", "token_types", "labels", "channels"}


def permutable(layout: Layout) -> list[str]:
    named = {family(a) for t in layout.tensors.values() for d in t.dims for s in d.sections for a in s}
    return sorted(name for name in named - ORDERED - set(layout.arch.computed) if name)


@every_case
def test_permuting_an_axis_changes_nothing(checkpoint):
    before = output(checkpoint)
    for name in permutable(checkpoint.layout):
        if name == "hidden" and checkpoint.layout.task == "feature-extraction":
            continue  # the features themselves would come out permuted
        keeps = {
            axis: torch.randperm(checkpoint.layout.sizes[axis], generator=torch.Generator().manual_seed(number))
            for number, axis in enumerate(numbered(checkpoint.layout, name))
        }
        assert difference(before, output(reshaped(checkpoint, keeps, {}))) < SAME, name


@every_case
def test_permuting_one_tensor_alone_changes_the_output(checkpoint):
    layout = checkpoint.layout
    if not layout.arch.branches:
        pytest.skip("no branches")
    writer = layout.stored(layout.branches(0)[-1].writes)[0]
    axis = next(s[0] for d in layout.tensors[writer].dims for s in d.sections if family(s[0]) != "hidden")
    order = torch.arange(layout.sizes[axis]).roll(1)
    changed = dict(checkpoint.tensors)
    changed[writer] = shrink(changed[writer], layout.tensors[writer].dims, axis, order, layout.sizes)
    assert difference(output(checkpoint), output(Checkpoint(layout, changed))) > OTHER


def zeroed(checkpoint: Checkpoint, names: set[str], axis: str, dead: torch.Tensor) -> None:
    """Zero the indices `dead` of `axis` in the named tensors."""
    layout = checkpoint.layout
    alive = torch.ones(layout.sizes[axis])
    alive[dead] = 0
    for name in names:
        tensor, spec = checkpoint.tensors[name].clone(), layout.tensors[name]
        for number, dim in enumerate(spec.dims):
            if dim.has(axis):
                mask = torch.cat([expanded(alive, section, axis, layout) for section in dim.sections])
                tensor *= mask.reshape([-1 if n == number else 1 for n in range(tensor.ndim)])
        for other, twin in layout.tensors.items():
            if other == name or twin.shared_with == name:
                checkpoint.tensors[other] = tensor


def expanded(alive: torch.Tensor, section: tuple[str, ...], axis: str, layout: Layout) -> torch.Tensor:
    """A mask over an axis as a mask over a section that has it as a factor."""
    shape = [size_of(a, layout.sizes) for a in section]
    if axis not in section:
        return torch.ones(math.prod(shape))
    return alive.reshape([-1 if a == axis else 1 for a in section]).expand(shape).reshape(-1)


def inner_axes(layout: Layout) -> list[str]:
    """Axes that may shrink and that only a branch's reader and writer see: FFN units, attention groups."""
    return [a.name for a in layout.arch.axes if a.shrinkable and a.name != "hidden"]


def cut(checkpoint: Checkpoint, name: str, plant: bool) -> Checkpoint:
    """Remove a quarter of an inner axis, other units in each block, after zeroing what they write (or not)."""
    layout, keeps = checkpoint.layout, {}
    size = layout.families[name]
    drop = max(1, size // 4)
    for number, axis in enumerate(numbered(layout, name)):
        keep, dead = drawn(size, drop, seed=number)
        keeps[axis] = keep
        if plant:
            writers = {layout.stored(b.writes)[0] for block in range(layout.depth) for b in layout.branches(block)}
            zeroed(
                checkpoint,
                {w for w in writers if any(d.has(axis) for d in layout.tensors[w].dims)},
                axis,
                dead,
            )
    return reshaped(checkpoint, keeps, {name: size - drop})


@every_case
def test_removing_dead_units_changes_nothing(checkpoint):
    for name in inner_axes(checkpoint.layout):
        planted = Checkpoint(checkpoint.layout, dict(checkpoint.tensors))
        small = cut(planted, name, plant=True)
        assert small.layout.families[name] < checkpoint.layout.families[name]
        assert small.layout.parameters < checkpoint.layout.parameters
        assert difference(output(planted), output(small)) < SAME, name


@every_case
def test_removing_live_units_changes_the_output(checkpoint):
    for name in inner_axes(checkpoint.layout):
        assert difference(output(checkpoint), output(cut(checkpoint, name, plant=False))) > OTHER, name


def writers_of_stream(layout: Layout) -> set[str]:
    """Parameters of the modules that write to the stream."""
    modules = {b.writes for block in range(layout.depth) for b in layout.branches(block)}
    return writers_of_embeddings(layout) | {n for n in layout.tensors if n.rpartition(".")[0] in modules}


def writers_of_embeddings(layout: Layout) -> set[str]:
    modules = {layout.full(e) for e in layout.arch.embeddings}
    return {n for n in layout.tensors if n.rpartition(".")[0] in modules or n in modules}


def stream_norms(layout: Layout) -> set[str]:
    norms = {layout.full(layout.arch.final_norm)}
    for block in range(layout.depth):
        norms |= {name for b in layout.branches(block) for name in (b.norm, b.post_norm)}
    return {n + ".weight" for n in norms if n}


def narrower(layout: Layout) -> dict[str, int]:
    """Sizes of a narrower stream, with whatever a stock config changes along; empty if it is fixed."""
    d = layout.families.get("hidden", 0)
    if layout.arch.axis("hidden") is not None:
        step = layout.grid("hidden")
        return {"hidden": d - step * max(1, 6 // step)}
    if ("hidden", "heads") in layout.arch.coupled:
        return {"hidden": d - layout.families["head_dim"], "heads": layout.families["heads"] - 1}
    return {}


def narrowed(checkpoint: Checkpoint, plant: bool) -> tuple[Checkpoint, Checkpoint]:
    """(planted, narrow): channels of the stream that hold nothing leave it, in a stock config.

    A norm divides by the root mean square over the width, so a narrower one needs gains × √(d/k) and eps × d/k; a
    scale √width on the embeddings is undone there, and again at a head tied to them. For LayerNorm the stream is
    first centred over the live channels, so that its mean is zero before and after.
    """
    layout, changes = checkpoint.layout, narrower(checkpoint.layout)
    d, k = layout.families["hidden"], changes["hidden"]
    planted, keeps = Checkpoint(layout, dict(checkpoint.tensors)), {}
    own = {n for n, t in layout.tensors.items() if not t.shared_with and any(dim.has("hidden") for dim in t.dims)}
    for number, (axis, name) in enumerate((a, n) for n in changes for a in numbered(layout, n)):
        keeps[axis], dead = drawn(layout.families[name], layout.families[name] - changes[name], seed=number)
        if plant:
            zeroed(planted, {n for n in own if any(dim.has(axis) for dim in layout.tensors[n].dims)}, axis, dead)
    if plant and layout.arch.norm.kind == "layer":
        for name in writers_of_stream(layout) & own:
            axis = next(n for n, dim in enumerate(layout.tensors[name].dims) if dim.has("hidden"))
            live = planted.tensors[name].index_select(axis, keeps["hidden"])
            centred = planted.tensors[name].index_copy(axis, keeps["hidden"], live - live.mean(axis, keepdim=True))
            shared = {n for n, t in layout.tensors.items() if t.shared_with == name}
            planted.tensors.update(dict.fromkeys({name, *shared}, centred))
    narrow = reshaped(planted, keeps, changes)
    ratio = math.sqrt(d / k)
    rescale(narrow, stream_norms(layout), ratio, layout.arch.norm.gain_offset)
    if layout.arch.embedding_scale:
        tables = writers_of_embeddings(layout)
        rescale(narrow, tables, ratio)
        for name, tensor in layout.tensors.items():
            if tensor.shared_with in tables:
                narrow.tensors[name] = narrow.tensors[tensor.shared_with]
                final = layout.full(layout.arch.final_norm) + ".weight"
                rescale(narrow, {final}, 1 / ratio, layout.arch.norm.gain_offset)
    if layout.arch.norm.eps:
        setattr(narrow.config, layout.arch.norm.eps, getattr(layout.config, layout.arch.norm.eps) * d / k)
    return planted, narrow


def rescale(checkpoint: Checkpoint, names: set[str], factor: float, offset: float = 0.0) -> None:
    for name in names:
        checkpoint.tensors[name] = (checkpoint.tensors[name] + offset) * factor - offset


def narrows(layout: Layout) -> bool:
    return bool(narrower(layout)) and layout.task != "feature-extraction"


@every_case
def test_removing_empty_channels_of_the_stream_changes_nothing(checkpoint):
    if not narrows(checkpoint.layout):
        pytest.skip("hidden is fixed in a stock config, or is the output itself")
    planted, narrow = narrowed(checkpoint, plant=True)
    # An epsilon that no config states stays as it is: of the order of epsilon over the stream's variance.
    limit = SAME if checkpoint.layout.arch.norm.eps else 10 * SAME
    assert difference(output(planted), output(narrow)) < limit


@every_case
def test_removing_live_channels_of_the_stream_changes_the_output(checkpoint):
    if not narrows(checkpoint.layout):
        pytest.skip("hidden is fixed in a stock config, or is the output itself")
    planted, narrow = narrowed(checkpoint, plant=False)
    assert difference(output(planted), output(narrow)) > OTHER


# --- files ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_then_load_is_the_identity(case, dtype, tiny, tmp_path):
    checkpoint = tiny(case.model_type, case.task, variant=case.variant, dtype=dtype)
    checkpoint.save(tmp_path / "a")
    again = Checkpoint.load(tmp_path / "a")
    assert again.layout.task == case.task
    assert again.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        counter = checkpoint.layout.tensors[name].kind == "counter"
        own = checkpoint.layout.tensors[name].dtype or dtype
        assert again.tensors[name].dtype == (torch.int64 if counter else getattr(torch, own))
        assert torch.equal(again.tensors[name], tensor), name
    again.save(tmp_path / "b")
    for path in sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


@every_case
def test_the_tokenizer_reads_the_same_after_a_reload(case, tiny, tmp_path):
    checkpoint = tiny(case.model_type, case.task, variant=case.variant)
    if checkpoint.tokenizer is None:
        pytest.skip("no vocabulary")
    checkpoint.save(tmp_path)
    text = "def f(x):\n    return x + 1"
    ids = checkpoint.tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert Checkpoint.load(tmp_path, case.task).tokenizer(text).input_ids == ids
