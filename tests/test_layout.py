"""Layout: sizes from configs, configs from sizes, counts without weights, and what no stock config can hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.arch import names
from tersor.compress.errors import RecipeError
from tersor.compress.layout import Layout, describe


def test_counts_tied_storage_once(tiny):
    tied, untied = tiny("llama", variant="tied").layout, tiny("llama").layout
    assert untied.parameters - tied.parameters == 100 * 48
    assert tied.resized({}, untie=True).parameters == untied.parameters
    assert tied.config.tie_word_embeddings is True, "a layout's config is never mutated"


def test_bytes_follow_the_dtype(tiny):
    assert tiny("llama", dtype="bfloat16").layout.bytes * 2 == tiny("llama").layout.bytes


def test_sizes_that_the_config_leaves_out(tiny):
    config = tiny("llama").config
    config.head_dim = None
    assert Layout.of(config, "text-generation").families["head_dim"] == 6


def test_resizing_states_the_config(tiny):
    layout = tiny("llama").layout.resized({"ffn": 50, "kv_heads": 2})
    config = layout.config
    assert (config.intermediate_size, config.num_key_value_heads, config.num_attention_heads) == (50, 2, 4)
    assert config.head_dim == 6
    assert layout.tensors["model.layers.1.self_attn.q_proj.weight"].shape == (24, 48)


@pytest.mark.parametrize("name", names())
def test_resizing_by_nothing_is_the_identity(name, tiny):
    layout = tiny(name).layout
    again = layout.resized({})
    assert again.shapes() == layout.shapes()
    for attribute, _ in layout.arch.config:
        stated = getattr(layout.config, attribute, None)
        assert stated is None or getattr(again.config, attribute) == stated


@settings(max_examples=25, deadline=None)
@given(ffn=st.integers(1, 70), kv_heads=st.integers(1, 6), hidden=st.integers(1, 60))
def test_what_resizing_states_is_read_back(tiny, ffn, kv_heads, hidden):
    layout = tiny("mistral").layout
    wanted = {"ffn": ffn, "kv_heads": kv_heads, "hidden": hidden}
    made = layout.resized(wanted)
    again = Layout.of(made.config, made.task)
    assert {n: again.families[n] for n in wanted} == wanted
    assert again.shapes() == made.shapes()


def test_an_axis_that_is_fixed_is_refused(tiny):
    with pytest.raises(
        RecipeError, match=r"queries: found an axis that is fixed in llama, expected one of hidden, ffn"
    ):
        tiny("llama").layout.resized({"queries": 1})
    with pytest.raises(RecipeError, match="fixed in bert"):
        tiny("bert").layout.grid("hidden")


def test_a_size_off_the_grid_is_refused(tiny):
    layout = tiny("llama").layout
    assert layout.grid("hidden") == 8
    with pytest.raises(
        RecipeError, match=r"llama: hidden: found 44, expected a multiple of num_attention_heads \(8\)"
    ):
        layout.resized({"hidden": 44})
    with pytest.raises(
        RecipeError, match=r"llama: hidden: found 40, expected a multiple of num_attention_heads \(6\)"
    ):
        tiny("llama", hidden_size=40).layout.resized({"kv_heads": 3})
    assert layout.resized({"hidden": 42, "kv_heads": 3}).config.num_attention_heads == 6
    assert tiny("mistral").layout.resized({"hidden": 45}).families["hidden"] == 45


def test_sizes_that_two_equations_state_differently_are_refused(tiny):
    with pytest.raises(RecipeError, match="hidden_size = 40 and 48 at once"):
        tiny("bert").layout.resized({"hidden": 40})


def test_describe():
    assert describe({"ffn0": 3, "hidden": 4}) == "ffn 3, hidden 4"


def test_positions_that_start_late_shorten_the_longest_sequence(tiny):
    assert (tiny("roberta").layout.first_position, tiny("roberta").layout.longest) == (1, 63)
    assert tiny("roberta", pad_token_id=3).layout.longest == 60
    assert (tiny("gpt2").layout.first_position, tiny("gpt2").layout.longest) == (0, 64)
    assert tiny("vit").layout.longest is None
