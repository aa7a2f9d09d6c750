"""compact removes exactly the zeros: planted units leave the shapes, outputs stay, live units never leave."""

from __future__ import annotations

import pytest
import torch
from tersor.compress.arch import names
from tersor.compress.axes import shrink
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError
from tersor.compress.pass_ import Context
from tersor.sparse.passes.compact import Compact, compactable, dead_units


def plant(checkpoint: Checkpoint, name: str, counts: list[int], side: str) -> dict[str, torch.Tensor]:
    """Zero `counts[block]` units of the family in each block, in the writer or in the readers; by axis."""
    layout, planted = checkpoint.layout, {}
    for block, count in enumerate(counts):
        for branch in layout.branches(block):
            axis = f"{name}{block}"
            if axis not in branch.inner:
                continue
            units = torch.randperm(layout.sizes[axis], generator=torch.Generator().manual_seed(block))[:count]
            modules = [branch.writes] if side == "writer" else branch.reads
            for key in (name for module in modules for name in layout.stored(module)):
                spec = layout.tensors[key]
                if not any(d.has(axis) for d in spec.dims):
                    continue
                index = torch.arange(spec.numel).reshape(spec.shape)
                tensor = checkpoint.tensors[key].clone()
                tensor.view(-1)[shrink(index, spec.dims, axis, units, layout.sizes).reshape(-1)] = 0
                checkpoint.tensors[key] = tensor
            planted[axis] = units.sort().values
    return planted


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if checkpoint.layout.arch.inputs == "pixels":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(4, 100, (2, 12), generator=generator)}
    with torch.no_grad():
        return checkpoint.model()(**inputs)[0]


@pytest.mark.parametrize("side", ["writer", "readers"])
@pytest.mark.parametrize("model_type", names())
def test_zero_units_leave_and_outputs_stay(model_type, side, tiny):
    for word, name in compactable(tiny(model_type).layout).items():
        checkpoint = tiny(model_type)
        step = checkpoint.layout.grid(name)  # experts lose eight units at a time
        planted = plant(checkpoint, name, [step] * checkpoint.layout.depth, side)
        assert {a: u.tolist() for a, u in dead_units(checkpoint.layout, checkpoint.tensors, name).items()} == {
            a: u.tolist() for a, u in planted.items()
        }
        before, context = logits(checkpoint), Context([])
        size = checkpoint.layout.families[name]
        Compact(on=(word,)).apply(checkpoint, context)
        assert checkpoint.layout.families[name] == size - step
        assert context.details["removed"] == {name: step}
        assert float((logits(checkpoint) - before).abs().max()) <= 2e-5 * float(before.abs().max())


def test_one_live_weight_keeps_a_unit(tiny):
    checkpoint = tiny("llama")
    plant(checkpoint, "ffn", [1, 1], "writer")
    unit = int(dead_units(checkpoint.layout, checkpoint.tensors, "ffn")["ffn1"][0])
    checkpoint.tensors["model.layers.1.mlp.down_proj.weight"][3, unit] = 1e-30
    Compact().apply(checkpoint, Context([]))
    assert checkpoint.layout.families["ffn"] == 64


def test_removing_a_live_unit_would_show(tiny):
    checkpoint = tiny("llama")
    before = logits(checkpoint)
    plant(checkpoint, "ffn", [1, 1], "writer")
    assert float((logits(checkpoint) - before).abs().max()) > 1e-3 * float(before.abs().max())


def test_the_smallest_count_over_the_blocks_leaves(tiny):
    checkpoint = tiny("llama")
    plant(checkpoint, "ffn", [9, 5], "writer")
    before, context = logits(checkpoint), Context([])
    Compact().apply(checkpoint, context)
    assert checkpoint.layout.families["ffn"] == 64 - 5
    assert context.details["zero_units_left"] == {"ffn": {"ffn0": 4}}
    assert float((logits(checkpoint) - before).abs().max()) <= 2e-5 * float(before.abs().max())
    assert context.details["parameters_before"] - context.details["parameters_after"] == 2 * 5 * 3 * 48


def test_groups_leave_only_in_counts_that_the_config_can_state(tiny):
    """LlamaConfig wants hidden to be a multiple of its heads: 45 holds 15 and 9 heads, 40 holds 8 and not 6."""
    checkpoint = tiny("llama", hidden_size=45, num_attention_heads=15, num_key_value_heads=5, head_dim=4)
    plant(checkpoint, "kv_heads", [2, 2], "writer")
    before, context = logits(checkpoint), Context([])
    Compact(on=("heads",)).apply(checkpoint, context)
    assert checkpoint.layout.families["kv_heads"] == 3
    assert checkpoint.config.num_attention_heads == 9
    assert float((logits(checkpoint) - before).abs().max()) <= 2e-5 * float(before.abs().max())
    odd = tiny("llama", hidden_size=40, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    plant(odd, "kv_heads", [1, 1], "writer")
    Compact(on=("heads",)).apply(odd, Context([]))
    assert odd.layout.families["kv_heads"] == 4


def test_an_activation_that_moves_zero_keeps_silent_units(tiny):
    """sigmoid(0) = ½: a unit that says nothing is still heard."""
    checkpoint = tiny("bert", hidden_act="sigmoid")
    plant(checkpoint, "ffn", [3, 3], "readers")
    before = logits(checkpoint)
    Compact().apply(checkpoint, Context([]))
    assert checkpoint.layout.families["ffn"] == 64
    assert torch.equal(before, logits(checkpoint))


def test_at_least_one_unit_stays(tiny):
    checkpoint = tiny("llama")
    plant(checkpoint, "ffn", [64, 64], "writer")
    Compact().apply(checkpoint, Context([]))
    assert checkpoint.layout.families["ffn"] == 1


def test_nothing_to_remove_changes_nothing(tiny):
    checkpoint = tiny("llama")
    before = dict(checkpoint.tensors)
    Compact(on=("ffn", "heads")).apply(checkpoint, Context([]))
    assert all(checkpoint.tensors[n] is t for n, t in before.items())


def test_bf16_zeros_leave_without_arithmetic(tiny):
    checkpoint = tiny("llama", dtype="bfloat16", variant="tied")
    planted = plant(checkpoint, "ffn", [5, 5], "readers")
    before = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    Compact().apply(checkpoint, Context([]))
    live = torch.tensor([u for u in range(64) if u not in planted["ffn0"].tolist()])
    assert torch.equal(checkpoint.tensors["model.layers.0.mlp.down_proj.weight"], before[:, live])


def test_the_check_notices_an_axis_that_grew(tiny):
    checkpoint, context, step = tiny("llama"), Context([]), Compact()
    original = checkpoint.layout
    plant(checkpoint, "ffn", [5, 5], "writer")
    step.apply(checkpoint, context)
    (check,) = step.checks(context.details)
    assert check.name == "ffn is at most 59"
    assert check.holds(checkpoint.config, checkpoint.tensors) is None
    assert check.holds(original.config, {}) == "ffn is 64, more than 59"


def test_an_axis_that_cannot_leave_is_refused(tiny):
    with pytest.raises(
        RecipeError, match=r"compact: on: found 'heads', expected ffn. A stock bert config keeps heads fixed"
    ):
        Compact(on=("heads",)).requires(tiny("bert").layout)
    with pytest.raises(RecipeError, match="expected another architecture"):
        Compact().requires(tiny("resnet").layout)
    with pytest.raises(ValueError, match="'ffn', 'shared_ffn' or 'heads'"):
        Compact(on=("hidden",))


def test_the_forecast_promises_nothing(tiny):
    layout = tiny("llama").layout
    forecast = Compact().requires(layout)
    assert forecast.layout is layout
    assert not forecast.exact
    assert "when the weights are read" in forecast.notes[0]
