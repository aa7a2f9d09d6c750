"""Checkpoint: the one mutable thing that flows through a run.

It owns the tensors, by the names that transformers gives them in memory; a torch module is a view built on demand
(`model()`), so that a pass changes shapes by replacing tensors and a config, and never patches modules. The module
comes from transformers' own loader, which also makes the buffers that checkpoints do not store (rotary tables).

Weights keep the dtype of their source. Scores are computed in float32 on the weights as stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .deferred import Deferred, Store, lent
from .errors import PreflightError
from .layout import LEAN_SHARD, Layout, model_class
from .pretrained import (
    TOKENIZER_FILES,
    WEIGHTS,
    load_tokenizer,
    mapped,
    one_line,
    quiet,
    read_config,
    read_side_files,
    system_errors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Check:
    """A promise that a pass leaves behind; re-run after every later pass and after reload.

    Attributes:
        name: what holds, for people.
        holds: (config, tensors by name) → None if it does, else what is wrong.
    """

    name: str
    holds: Callable[[PreTrainedConfig, Mapping[str, torch.Tensor]], str | None]


@dataclass
class Checkpoint:
    """A model as data.

    Attributes:
        layout: architecture, config, task and dtype.
        tensors: every parameter and stored buffer by its in-memory name; tied names hold the same tensor.
        tokenizer: carried along, or None.
        side_files: small files that travel with the model byte for byte (tokenizer, pooling, generation defaults),
            by relative path.
        checks: promises of the passes so far.
        history: one entry a pass, for the model card.
        lean: the weights stay in their files, and float32 models over them make each weight when it is used.
    """

    layout: Layout
    tensors: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    side_files: dict[str, bytes] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    lean: bool = False

    @property
    def config(self) -> PreTrainedConfig:
        """The transformers config; replace it only through `become`."""
        return self.layout.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored weights."""
        found: torch.dtype = getattr(torch, self.layout.dtype)
        return found

    @classmethod
    def load(cls, directory: Path, task: str | None = None, lean: bool = False) -> Checkpoint:
        """Read a directory written by `save_pretrained`: safetensors, sharded or not, or torch files (weights only).

        Args:
            directory: where it lies.
            task: optimum's name, or None for the config's.
            lean: map the files into memory instead of reading them, where they hold the weights by their own names.

        Raises:
            PreflightError: weights missing, truncated, or not finite.
            RecipeError: see `read_config`.
        """
        layout = read_config(directory, task)
        if not any(
            (directory / name).exists() for name in (*WEIGHTS, "pytorch_model.bin", "pytorch_model.bin.index.json")
        ):
            raise PreflightError(str(directory), "no weights", " or ".join(WEIGHTS))
        if lean and (tensors := mapped(directory, layout)) is not None:
            side_files = read_side_files(directory)
            return cls(layout, tensors, load_tokenizer(directory), side_files, lean=True).verified(str(directory))
        try:
            with quiet():
                model, info = model_class(layout.config, layout.task).from_pretrained(
                    directory,
                    config=layout.config,
                    dtype=layout.dtype,
                    output_loading_info=True,
                    low_cpu_mem_usage=True,
                    ignore_mismatched_sizes=True,  # reported below, by name
                )
        except Exception as error:  # the loaders raise many types for one cause: the file is broken
            raise PreflightError(
                str(directory),
                f"weights that do not load: {one_line(error)}",
                "a whole checkpoint",
                "Copy or download it again.",
            ) from error
        if task is not None:  # a head that the recipe's task leaves out is left out on purpose
            info["unexpected_keys"] = ()
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            wrong = sorted(_key(k) for k in info[kind])
            if wrong:
                raise PreflightError(
                    str(directory),
                    f"{len(wrong)} {kind.replace('_', ' ')}, first {wrong[0]}",
                    "the config's parameters, each once",
                )
        side_files = read_side_files(directory)
        return cls(layout, named_parameters(model), load_tokenizer(directory), side_files).verified(str(directory))

    def verified(self, place: str) -> Checkpoint:
        """The checkpoint, after `verify`."""
        self.verify(place)
        return self

    def verify(self, place: str) -> None:
        """Names and shapes are the layout's; every value is finite.

        Raises:
            PreflightError: names the first tensor that is wrong.
        """
        expected = self.layout.shapes()
        extra, lost = self.tensors.keys() - expected.keys(), expected.keys() - self.tensors.keys()
        for name in sorted(extra | lost):
            what = "a parameter that the architecture does not name" if name in extra else "a parameter missing"
            raise PreflightError(f"{place}: {name}", what, "", f"{self.layout.arch.model_type} is described in arch/.")
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise PreflightError(f"{place}: {name}", f"shape {tuple(tensor.shape)}", str(expected[name]))
            if not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise PreflightError(f"{place}: {name}", f"{bad} values that are NaN or infinite", "finite weights")

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A transformers module over these tensors, in eval mode, sharing storage where the dtype allows.

        In float32, weights of a lean checkpoint and deferred ones are made when they are used.
        """
        held = any(isinstance(t, Deferred) for t in self.tensors.values())
        return self._module(dtype, late=dtype == torch.float32 and (self.lean or held))

    def _module(self, dtype: torch.dtype, late: bool) -> PreTrainedModel:
        hollow = {n for n, t in self.tensors.items() if late and t.ndim > 1}
        model = self._skeleton(dtype, hollow)
        store, made = Store(self.dtype), dict[int, torch.nn.Parameter]()
        for name in hollow:
            tensor = self.tensors[name]
            module, _, leaf = name.rpartition(".")
            weight = made.setdefault(id(tensor), torch.nn.Parameter(lent(name, tensor, store), requires_grad=False))
            setattr(model.get_submodule(module), leaf, weight)
        return model.eval().requires_grad_(False)

    def _skeleton(self, dtype: torch.dtype, hollow: Collection[str]) -> PreTrainedModel:
        """A module over these tensors; those named in `hollow` have their shape and one zero for a value."""
        seen: dict[int, torch.Tensor] = {}
        nothing = torch.zeros((), dtype=dtype)

        def part(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return nothing.expand(tensor.shape) if name in hollow else _cast(tensor.detach(), dtype)

        state = {n: seen.setdefault(id(t), part(n, t)) for n, t in self.tensors.items()}
        config = copy.deepcopy(self.config)
        config.dtype = dtype
        with quiet():
            model: PreTrainedModel = model_class(config, self.layout.task).from_pretrained(
                None, config=config, state_dict=state, dtype=dtype
            )
        model.tie_weights()
        if self.layout.arch.experts is not None and self.layout.arch.own is None and dtype == torch.float64:
            model.set_experts_implementation("eager")  # torch has no grouped product of float64
        return model

    def become(self, layout: Layout, tensors: dict[str, torch.Tensor]) -> None:
        """Take a new shape. Tensors are cast to the stored dtype once, here; tied names are tied again."""
        own = {n: layout.tensors[n].dtype for n in tensors}
        cast = {
            n: _cast(t, getattr(torch, own[n]) if own[n] else self.dtype).contiguous()
            for n, t in ((n, t.settle() if isinstance(t, Deferred) else t) for n, t in tensors.items())
            if not layout.tensors[n].shared_with
        }
        for name, tensor in layout.tensors.items():
            if tensor.shared_with:
                cast[name] = cast[tensor.shared_with]
        self.layout, self.tensors = layout, cast
        self.verify("after the pass")

    def save(self, directory: Path, card: str = "") -> None:
        """Write a plain `from_pretrained` directory: config, safetensors, tokenizer, side files, model card."""
        hollow = self.tensors if self.lean else ()
        model = self._skeleton(self.dtype, hollow)
        with quiet(), system_errors(directory):
            if self.lean:  # safetensors copies what it writes: a shard at a time
                model.save_pretrained(directory, state_dict=dict(self.tensors), max_shard_size=LEAN_SHARD)
            else:
                model.save_pretrained(directory)
        if self.tokenizer is not None and not self.side_files.keys() & set(TOKENIZER_FILES):
            self.tokenizer.save_pretrained(directory)  # one made in code; files that were read are copied below,
            # because transformers rebuilds some tokenizers on loading and writes them out differently
        for name, content in self.side_files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if card:
            (directory / "README.md").write_text(card, "utf-8")

    def failing_checks(self) -> list[str]:
        """Checks of earlier passes that no longer hold, with what is wrong."""
        wrong = ((c.name, c.holds(self.config, self.tensors)) for c in self.checks)
        return [f"{name}: {what}" for name, what in wrong if what]


def named_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers by name, detached; tied names hold the same tensor object."""
    seen: dict[int, torch.Tensor] = {}
    state = model.state_dict(keep_vars=True)
    return {name: seen.setdefault(id(tensor), tensor.detach()) for name, tensor in state.items()}


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _key(found: str | tuple[Any, ...]) -> str:
    """A key of transformers' load report; a mismatched one comes with the shapes found and expected."""
    return found if isinstance(found, str) else f"{found[0]} {list(found[1])} instead of {list(found[2])}"


