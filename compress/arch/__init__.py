"""Architectures as data: every parameter's dimensions by name, the blocks, and who reads and writes the stream.

One file per Hugging Face `model_type`, each ending in `ARCHITECTURE = Architecture(...)`. No forward code: blocks
are walked by the model's own forward (compress/walk.py). Names are relative to the base model and start with `@`,
which stands for `""` in a bare encoder and for `model.`, `bert.`, … under a task head.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..axes import Dim, parse_dims
from ..errors import RecipeError

ANY: tuple[Any, ...] = ("<any>",)
SUFFIX = "_routed"
"""Of the `model_type` of an architecture whose FFN became experts in a class of tersor's own (_routed.py)."""


@dataclass(frozen=True)
class Param:
    """A stored tensor: its name template, its dimensions, and the config switch that creates it."""

    name: str
    dims: str
    when: str = ""
    """Config attribute that must be true for the parameter to exist; `!attr` for false."""
    shared_when: str = ""
    """Config attribute under which the parameter is the same tensor as `shared_with`."""
    shared_with: str = ""
    except_in: tuple[int, ...] = ()
    """Blocks that do not have the parameter."""
    kind: Literal["parameter", "buffer", "counter"] = "parameter"
    """A buffer is stored and not trained (BatchNorm's running statistics); a counter is an int64 one."""
    dtype: str = ""
    """The dtype it is stored in whatever the model's (`float32`); empty: the model's."""

    @property
    def parsed(self) -> tuple[Dim, ...]:
        """The dimensions, parsed."""
        return parse_dims(self.dims)


@dataclass(frozen=True)
class Norm:
    """The normalisation an architecture uses everywhere on its stream."""

    kind: Literal["rms", "layer", "batch"]
    eps: str
    """Config attribute that holds epsilon; empty where transformers' code fixes it."""
    gain_offset: float = 0.0
    """Gain = weight + offset (Gemma's RMSNorm stores gain − 1)."""


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block: stream → norm → `reads` → inner → `writes` → + stream.

    In a post-norm block `norm` is the one after the addition. `inner` are the dimensions of what `writes` reads.
    `reads` and `writes` are modules, or bare parameters where experts are stacked in one tensor.
    """

    norm: str
    reads: tuple[str, ...]
    writes: str
    inner: str
    post_norm: str = ""
    """A norm between `writes` and the addition (Gemma 2): its gain acts on the stream's coordinates, so the stream
    may lose channels but not rotate."""
    except_in: tuple[int, ...] = ()
    """Blocks whose branch reads the stream without a norm."""


Weights = Literal["softmax", "softmax, normalised", "softmax of chosen", "sigmoid", "one"]


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block: y = Σ over the chosen e of weight(e) · down_e (act(gate_e x) ∘ up_e x).

    Attributes:
        router: the parameter `[experts, hidden]` that gives the logits.
        gate_up: the parameter `[experts, ffn + ffn, hidden]`.
        down: the parameter `[experts, hidden, ffn]`.
        count: config attribute that counts the experts.
        active: config attribute that counts the chosen ones.
        weights: how a chosen expert's weight comes from the logits: its share of a softmax over all (`softmax`), made
            to sum to one over the chosen (`softmax, normalised`: the same number as a softmax over the logits of the
            chosen, `softmax of chosen`, but chosen among probabilities, which tie sooner), its sigmoid, or not at all
            (`one`).
        gated: whether there is a gate; if not, `gate_up` is up alone, `[experts, ffn, hidden]`.
    """

    router: str
    gate_up: str
    down: str
    count: str
    weights: Weights
    active: str = "num_experts_per_tok"
    gated: bool = True


@dataclass(frozen=True)
class Own:
    """Where experts stand in a block whose FFN has no gate: no stock class holds them, a class of tersor's own does.

    Attributes:
        ffn: the module of a block, named from the block on, that they replace.
        passed: modules of a block that hand on what they get, for the experts have done their work.
    """

    ffn: str
    passed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rotary:
    """RoPE on whole heads: `head_dim` holds pairs (j, j + head_dim / 2), their frequencies the same in all blocks.

    Attributes:
        module: has the frequencies, `inv_freq`, as `rope_parameters` in the config states them.
        scaled: whether the forward divides scores by √head_dim, not by a number of the config.
    """

    module: str = "@rotary_emb"
    scaled: bool = True


@dataclass(frozen=True)
class Axis:
    """A named dimension that may change: how the config states it and what the config demands of it."""

    name: str
    multiple_of: str = ""
    """Config attribute that the size must be a multiple of (LlamaConfig: hidden, num_attention_heads), or a number."""
    shrinkable: bool = True


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What tersor knows of one `model_type`. Immutable; algorithms read it and never the model's class."""

    model_type: str
    config: tuple[tuple[str, str], ...]
    """Equations (config attribute, product of axis families). Read to learn sizes, written to state new ones; an
    attribute that two equations would set differently means that no stock config can hold the sizes."""
    axes: tuple[Axis, ...]
    """Axes that may change alone."""
    coupled: tuple[tuple[str, ...], ...] = ()
    """Axes that a stock config can change only together (GPT-2 has no head_dim: hidden with heads)."""
    defaults: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    """Config attribute of an equation → its value where the config leaves it out (head_dim: hidden / heads)."""
    computed: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    """Axis that no equation states → its size (ViT's patches). Such an axis is fixed."""
    blocks: str
    """Path of the block list, `@layers`; empty where no stream of one width runs through (ResNet)."""
    depth: str
    """Config attribute that counts the blocks; empty without blocks."""
    embeddings: tuple[str, ...]
    """Modules and bare parameters that write to the stream before the first block."""
    params: tuple[Param, ...]
    expand: Callable[[Any], tuple[Param, ...]] | None = None
    """More parameters, where the config lists names or sizes one by one (ResNet's stages)."""
    branches: tuple[Branch, ...]
    experts: Experts | None = None
    """Of a mixture of experts; every block has them."""
    own: Own | None = None
    """Where experts without a gate would stand (compress/moe/own.py)."""
    norm: Norm
    stream: Literal["pre-norm", "post-norm"]
    parallel: bool = False
    """Whether both branches of a block read the stream that enters it (Phi), not one after the other."""
    rotary: Rotary | None = None
    """Of heads that may become narrower; None where a norm, learned positions or the config fix their width."""
    embedding_scale: Literal["", "sqrt(hidden)"] = ""
    """What the forward multiplies the embeddings by and derives from a size: changes with it, in no config."""
    branch_scale: str = ""
    """Config attribute that multiplies what a branch adds to the stream (Granite); empty: 1."""
    final_norm: str = ""
    heads: Mapping[str, tuple[Param, ...]] = field(default_factory=dict)
    """Task name (optimum's) → the parameters that its head adds."""
    reads_stream: tuple[str, ...] = ()
    """Modules that read the final norm's output; those that the task does not have are passed over."""
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config attributes that change the maths → the values understood here (`ANY`: carried through untouched)."""
    activation: str = "hidden_act"
    """Config attribute that names the FFN's activation."""
    inputs: Literal["tokens", "pixels"] = "tokens"
    """What the model reads: `input_ids`, or `pixel_values` `[batch, channels, height, width]`."""
    positions_after: str = ""
    """Config attribute after whose value position ids start (RoBERTa: pad_token_id); empty: they start at 0."""
    positions_count: Literal["columns", "mask", "ids"] = "columns"
    """What the stock model counts when it is given a plain mask and no position ids: columns, tokens that the mask
    shows, or ids that are not the padding id."""
    position_ids: bool = True
    """Whether forward takes `position_ids`."""
    token_types: bool = False
    causal: bool = True

    def axis(self, name: str) -> Axis | None:
        """The `Axis` of this family, or None if it is fixed."""
        return next((a for a in self.axes if a.name == name), None)


def linear(name: str, out: str, inp: str, bias_when: str = "", **options: Any) -> tuple[Param, Param]:
    """Weight and bias of a Linear; the bias exists under `bias_when`, or always."""
    return (
        Param(f"{name}.weight", f"{out}, {inp}", **options),
        Param(f"{name}.bias", out, when=bias_when, **options),
    )


def layer_norm(name: str, bias_when: str = "", **options: Any) -> tuple[Param, Param]:
    """Gain and bias of a LayerNorm on the stream."""
    return Param(f"{name}.weight", "hidden", **options), Param(f"{name}.bias", "hidden", when=bias_when, **options)


def causal_heads(embeddings: str, *more: Param) -> dict[str, tuple[Param, ...]]:
    """A decoder bare and with its language-model head, which a config may tie to the `embeddings`."""
    head = Param("lm_head.weight", "vocab, hidden", shared_when="tie_word_embeddings", shared_with=embeddings)
    return {"feature-extraction": (), "text-generation": (head, *more)}


# Attributes that any config may carry and that change nothing a pass computes.
NEUTRAL = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bad_words_ids",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "dtype",
        "torch_dtype",
        "eos_token_id",
        "experts_implementation",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_length",
        "max_position_embeddings",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "torchscript",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    )
)


def names() -> list[str]:
    """Every `model_type` that has a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def architecture(model_type: str, place: str = "config.json") -> Architecture:
    """The architecture of a `model_type`.

    Raises:
        RecipeError: there is none; names those there are.
    """
    module = model_type.replace("-", "_")
    if module.endswith(SUFFIX) and module.removesuffix(SUFFIX) in names():
        base = architecture(module.removesuffix(SUFFIX), place)
        if base.own is not None:
            return importlib.import_module(f"{__name__}._routed").routed(base)
    if module not in names():
        raise RecipeError(
            f"{place}: model_type",
            repr(model_type),
            f"one of {', '.join(names())}",
            "Another architecture is one file: docs/writing_an_architecture.md says how.",
        )
    found: Architecture = importlib.import_module(f"{__name__}.{module}").ARCHITECTURE
    return found


def understood(arch: Architecture, raw: Mapping[str, Any], place: str = "config.json") -> None:
    """Refuse a config attribute that may change the maths and that nobody here has thought through.

    Args:
        arch: the architecture.
        raw: config.json as it lies on disk (defaults not filled in).
        place: for the message.

    Raises:
        RecipeError: names the attribute and its value.
    """
    stated = {attribute for attribute, _ in arch.config} | {arch.depth, arch.norm.eps}
    for name, value in raw.items():
        if name in NEUTRAL or name in stated:
            continue
        allowed = arch.settings.get(name)
        if allowed is None:
            raise RecipeError(
                f"{place}: {name}",
                f"{value!r}, an attribute that is not understood for {arch.model_type}",
                "",
                "If it changes nothing, remove it from config.json; if it does, a pass would get the maths wrong.",
            )
        if allowed is not ANY and value not in allowed:
            raise RecipeError(
                f"{place}: {name}",
                repr(value),
                " or ".join(repr(a) for a in allowed),
                f"tersor has no {arch.model_type} with this setting.",
            )
