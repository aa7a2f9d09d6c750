"""Architectures as data: every parameter's dimensions by name, the blocks, and who reads and writes the stream.

One file per Hugging Face `model_type`, each ending in `ARCHITECTURE = Architecture(...)`. No forward code: blocks
are walked by the model's own forward (compress/walk.py). Names are relative to the base model and start with `@`,
which stands for `""` in a bare encoder and for `model.`, `bert.`, … under a task head.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..axes import Dim, parse_dims
from ..errors import RecipeError

ANY: tuple[Any, ...] = ("<any>",)


@dataclass(frozen=True)
class Param:
    """A parameter: its name template, its dimensions, and the config switch that creates it."""

    name: str
    dims: str
    when: str = ""
    """Config attribute that must be true for the parameter to exist; `!attr` for false."""
    shared_when: str = ""
    """Config attribute under which the parameter is the same tensor as `shared_with`."""
    shared_with: str = ""

    @property
    def parsed(self) -> tuple[Dim, ...]:
        """The dimensions, parsed."""
        return parse_dims(self.dims)


@dataclass(frozen=True)
class Norm:
    """The normalisation an architecture uses everywhere on its stream."""

    kind: Literal["rms", "layer"]
    eps: str
    """Config attribute that holds epsilon."""
    gain_offset: float = 0.0
    """Gain = weight + offset (Gemma's RMSNorm stores gain − 1)."""


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block: stream → norm → `reads` → inner → `writes` → + stream.

    For a post-norm block `norm` names the norm after the addition. `inner` are the dimensions of what `writes` reads.
    """

    norm: str
    reads: tuple[str, ...]
    writes: str
    inner: str


@dataclass(frozen=True)
class Axis:
    """A named dimension that may change: how the config states it and what the config demands of it."""

    name: str
    multiple_of: str = ""
    """Config attribute that the size must be a multiple of (LlamaConfig: hidden, num_attention_heads)."""
    shrinkable: bool = True


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What tersor knows of one `model_type`. Immutable; algorithms read it and never the model's class."""

    model_type: str
    config: tuple[tuple[str, str], ...]
    """Equations (config attribute, product of axis families). Read to learn sizes, written to state new ones; an
    attribute that two equations would set differently means that no stock config can hold the sizes."""
    axes: tuple[Axis, ...]
    derived: tuple[tuple[str, str, str], ...] = ()
    """(axis, attribute, divisor attribute): the axis' size where the config leaves it out, a quotient of two others."""
    blocks: str
    """Path of the block list, `@layers`."""
    depth: str
    """Config attribute that counts the blocks."""
    embeddings: tuple[str, ...]
    """Modules whose rows are written to the stream before the first block."""
    params: tuple[Param, ...]
    branches: tuple[Branch, ...]
    norm: Norm
    stream: Literal["pre-norm", "post-norm"]
    final_norm: str = ""
    heads: Mapping[str, tuple[Param, ...]] = field(default_factory=dict)
    """Task name (optimum's) → the parameters that its head adds."""
    reads_stream: tuple[str, ...] = ()
    """Head modules that read the final norm's output."""
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config attributes that change the maths → the values understood here (`ANY`: carried through untouched)."""
    activation: str = "hidden_act"
    """Config attribute that names the FFN's activation."""
    position_ids: bool = True
    """Whether forward takes `position_ids`."""
    token_types: bool = False
    causal: bool = True

    def axis(self, name: str) -> Axis | None:
        """The `Axis` of this family, or None if it is fixed."""
        return next((a for a in self.axes if a.name == name), None)


# Attributes that any config may carry and that change nothing a pass computes.
NEUTRAL = frozenset(
    """_name_or_path architectures attn_implementation auto_map bad_words_ids bos_token_id chunk_size_feed_forward
    decoder_start_token_id dtype torch_dtype eos_token_id experts_implementation finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_range is_encoder_decoder keys_to_ignore_at_inference
    label2id max_length max_position_embeddings model_type name_or_path num_labels output_attentions
    output_hidden_states pad_token_id prefix problem_type remove_invalid_values return_dict sep_token_id
    task_specific_params tie_encoder_decoder tie_word_embeddings tokenizer_class torchscript transformers_version
    use_cache use_return_dict""".split()
)


def names() -> list[str]:
    """Every `model_type` that has a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def architecture(model_type: str, place: str = "config.json") -> Architecture:
    """The architecture of a `model_type`.

    Raises:
        RecipeError: there is none; names those there are.
    """
    module = model_type.replace("-", "_")
    if module not in names():
        raise RecipeError(
            f"{place}: model_type",
            repr(model_type),
            f"one of {', '.join(names())}",
            "Another architecture is one file: docs/architecture.md says how.",
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
