"""Layout: an architecture with the sizes of one config. Knows every parameter's name and shape; holds no weights.

Everything that a plan says is computed here, and everything that a pass changes in a config is written here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .arch import Architecture, Axis, Branch, Param, architecture
from .axes import Dim, family, parse_dims
from .errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
LEAN_SHARD = 256_000_000
"""Bytes of a file's weights where a checkpoint is written that memory does not hold."""


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a layout: full name, dimensions by name, shape, the name it shares storage with, kind, and
    dtype, which is empty where it is the model's.
    """

    name: str
    dims: tuple[Dim, ...]
    shape: tuple[int, ...]
    shared_with: str = ""
    kind: str = "parameter"
    dtype: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Layout:
    """Architecture × config × task.

    Attributes:
        arch: the architecture.
        config: a transformers config; never mutated.
        task: optimum's task name, e.g. `text-generation`.
        dtype: dtype of the stored weights, e.g. `bfloat16`.
    """

    arch: Architecture
    config: PreTrainedConfig
    task: str
    dtype: str

    @classmethod
    def of(cls, config: PreTrainedConfig, task: str, dtype: str | None = None) -> Layout:
        """The layout of a config.

        Raises:
            RecipeError: unknown `model_type`, a task the architecture has no head for, sizes that do not divide.
        """
        arch = architecture(config.model_type)
        if task not in arch.heads:
            raise RecipeError(
                "task", repr(task), f"one of {', '.join(sorted(arch.heads))} for {arch.model_type}"
            )
        layout = cls(arch, config, task, dtype or str(config.dtype or "float32").removeprefix("torch."))
        _ = layout.sizes
        return layout

    @cached_property
    def families(self) -> dict[str, int]:
        """Sizes by axis family (`ffn`, `hidden`), solved from the config's equations."""
        sizes: dict[str, int] = {}
        for axis, of in self.arch.computed.items():
            sizes[axis] = of(self.config)
        for attribute, product in self.arch.config:
            axes = [a.strip() for a in product.split("*")]
            unknown = [a for a in axes if a not in sizes]
            known = math.prod(sizes[a] for a in axes if a in sizes)
            value = self._stated(attribute)
            if not unknown:
                if value is not None and value != known:
                    raise RecipeError(f"config.json: {attribute}", str(value), f"{known} = {product}")
                continue
            if not isinstance(value, int) or value % known:
                raise RecipeError(f"config.json: {attribute}", repr(value), f"a multiple of {known} ({product})")
            sizes[unknown[0]] = value // known
        sizes["labels"] = int(getattr(self.config, "num_labels", 2) or 2)
        return sizes

    def _stated(self, attribute: str) -> Any:
        """The attribute's value, or what transformers takes where the config leaves it out."""
        value = getattr(self.config, attribute, None)
        default = self.arch.defaults.get(attribute)
        return default(self.config) if value is None and default is not None else value

    @property
    def first_position(self) -> int:
        """The position id of a sequence's first token."""
        return int(getattr(self.config, self.arch.positions_after)) + 1 if self.arch.positions_after else 0

    @property
    def longest(self) -> int | None:
        """Tokens in the longest sequence that the config's positions hold; None where it states none."""
        stated = getattr(self.config, "max_position_embeddings", None)
        return None if stated is None else int(stated) - self.first_position

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(getattr(self.config, self.arch.depth)) if self.arch.depth else 0

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes by axis, block axes numbered (`ffn0`, `ffn1`, …)."""
        sizes = dict(self.families)
        for name, size in self.families.items():
            sizes.update({f"{name}{block}": size for block in range(self.depth)})
        return sizes

    @cached_property
    def prefix(self) -> str:
        """What `@` stands for: empty for a bare model, `model.` and the like under a head."""
        if self.task == "feature-extraction":
            return ""
        return f"{model_class(self.config, self.task).base_model_prefix}."

    def full(self, template: str, block: int | None = None) -> str:
        """A full module or parameter name from a template of the architecture."""
        name = template.replace("@", self.prefix)
        return name if block is None else name.replace("{i}", str(block))

    def _exists(self, param: Param) -> bool:
        if param.when.startswith("!"):
            return not getattr(self.config, param.when[1:], False)
        return not param.when or bool(getattr(self.config, param.when, False))

    def _expand(self, param: Param) -> Iterator[Tensor]:
        dims = param.parsed
        for block in range(self.depth) if "{i}" in param.name else (None,):
            if block in param.except_in:
                continue
            at = tuple(d.at(block) for d in dims)
            shared = bool(param.shared_when) and bool(getattr(self.config, param.shared_when, False))
            yield Tensor(
                self.full(param.name, block),
                at,
                tuple(d.size(self.sizes) for d in at),
                self.full(param.shared_with, block) if shared else "",
                param.kind,
                param.dtype,
            )

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by full name, tied ones included (they name what they share)."""
        expanded = self.arch.expand(self.config) if self.arch.expand else ()
        params = (*self.arch.params, *expanded, *self.arch.heads[self.task])
        return {t.name: t for p in params if self._exists(p) for t in self._expand(p)}

    @property
    def parameters(self) -> int:
        """Real parameters: each storage once."""
        return sum(t.numel for t in self.tensors.values() if not t.shared_with and t.kind == "parameter")

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensors."""
        floats = sum(t.numel for t in self.tensors.values() if not t.shared_with and t.kind != "counter")
        return floats * BYTES[self.dtype] + 8 * sum(t.kind == "counter" for t in self.tensors.values())

    def branches(self, block: int) -> list[Branch]:
        """The block's residual branches with full names; `norm` is empty where this block has none."""
        return [
            replace(
                b,
                norm="" if block in b.except_in else self.full(b.norm, block),
                post_norm=self.full(b.post_norm, block),
                reads=tuple(self.full(r, block) for r in b.reads),
                writes=self.full(b.writes, block),
                inner=b.inner.replace("{i}", str(block)),
            )
            for b in self.arch.branches
        ]

    def stored(self, name: str) -> list[str]:
        """The tensors of a module that a branch names, weight first; or the bare parameter itself."""
        names = [name, f"{name}.weight", f"{name}.bias"]
        return [n for n in names if n in self.tensors]

    def inner_size(self, branch: Branch) -> int:
        """Width of what the branch's `writes` module reads."""
        return parse_dims(branch.inner)[0].size(self.sizes)

    def resized(self, changes: Mapping[str, int], untie: bool = False) -> Layout:
        """The layout after `changes` (axis family → new size), as a stock config would state it.

        Raises:
            RecipeError: the architecture keeps an axis fixed, or no stock config holds the sizes.
        """
        from huggingface_hub.errors import StrictDataclassError

        sizes = {**self.families, **changes}
        config = copy.deepcopy(self.config)
        written: dict[str, int] = {}
        for attribute, product in self.arch.config:
            value = math.prod(sizes[a.strip()] for a in product.split("*"))
            if written.setdefault(attribute, value) != value:
                raise RecipeError(
                    f"{self.arch.model_type} with {describe(changes)}",
                    f"{attribute} = {written[attribute]} and {value} at once",
                    "sizes that a stock config can state",
                )
        for name in changes:
            if self.arch.axis(name) is None and not any(name in group for group in self.arch.coupled):
                free = ", ".join(a.name for a in self.arch.axes)
                raise RecipeError(name, f"an axis that is fixed in {self.arch.model_type}", f"one of {free}")
        for axis in self.arch.axes:  # all of them: fewer heads move the grid of an axis that did not change
            multiple = _multiple(axis, written)
            if sizes[axis.name] % multiple:
                stated = f"{axis.multiple_of} ({multiple})" if axis.multiple_of in written else str(multiple)
                raise RecipeError(
                    f"{self.arch.model_type}: {axis.name}", str(sizes[axis.name]), f"a multiple of {stated}"
                )
        for attribute, value in written.items():
            setattr(config, attribute, value)
        if untie:
            config.tie_word_embeddings = False
        try:
            config.validate()
        except (ValueError, StrictDataclassError) as error:
            found = " ".join(str(error).split())
            raise RecipeError(
                f"{self.arch.model_type} with {describe(changes)}", f"a config that transformers refuses ({found})"
            ) from error
        return Layout(self.arch, config, self.task, self.dtype)

    def grid(self, name: str, changes: Mapping[str, int] | None = None) -> int:
        """The step on which the axis' size may move in this config, once other axes have the sizes `changes`."""
        axis = self.arch.axis(name)
        if axis is None:
            raise RecipeError(name, f"an axis that is fixed in {self.arch.model_type}")
        sizes = {**self.families, **(changes or {})}
        products = {a: math.prod(sizes[f.strip()] for f in p.split("*")) for a, p in self.arch.config}
        return _multiple(axis, products)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by full name."""
        return {name: t.shape for name, t in self.tensors.items()}


def _multiple(axis: Axis, stated: Mapping[str, int]) -> int:
    """What the axis' size must be a multiple of, given the values of the config's attributes."""
    return int(axis.multiple_of) if axis.multiple_of.isdigit() else stated.get(axis.multiple_of, 1)


def describe(sizes: Mapping[str, int]) -> str:
    """`hidden 48, ffn 128`."""
    return ", ".join(f"{family(k)} {v}" for k, v in sizes.items())


def model_class(config: PreTrainedConfig, task: str) -> Any:
    """The transformers class for a config and a task, by optimum's task table.

    Raises:
        RecipeError: optimum knows no class for the task, or transformers none for the config.
    """
    from optimum.exporters.tasks import TasksManager

    try:
        auto = TasksManager.get_model_class_for_task(task, framework="pt")
        return auto._model_mapping[type(config)]
    except (KeyError, ValueError) as error:
        raise RecipeError("task", repr(task), f"a task of {config.model_type}", str(error)) from error
