"""The interface of a pass: one change to a checkpoint.

A pass is a frozen pydantic dataclass whose fields are the recipe's options; its module says the maths. It is found by
name through the entry-point group `tersor.passes`. `requires` runs against the plan, before any weight is read;
`apply` changes the checkpoint in place; `checks` says what must hold from then on, from nothing but the journalled
details, so that a resumed run and `tersor verify` hold the result to the same promises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict

if TYPE_CHECKING:
    from pathlib import Path

    from .checkpoint import Check, Checkpoint
    from .layout import Layout
    from .tokens import Input

STRICT = ConfigDict(extra="forbid", strict=True)
"""Configuration of every options dataclass: unknown keys and wrong types are refused."""


@dataclass(frozen=True)
class Forecast:
    """What the plan says of a step before it runs.

    Attributes:
        layout: shapes after the step.
        memory: bytes above the weights that the step needs at its peak.
        notes: lines for people: the grid taken, where parameters go.
        exact: whether the step must deliver these shapes; False where only the weights say how much leaves.
        lean: bytes that it needs at its peak when weights stay in their files; None if it cannot work so.
        disk: bytes that the step keeps in `Context.folder` while it runs.
    """

    layout: Layout
    memory: int = 0
    notes: tuple[str, ...] = ()
    exact: bool = True
    lean: int | None = None
    disk: int = 0


@dataclass(frozen=True)
class Context:
    """What a pass may use beside its options, and where it leaves word.

    Attributes:
        calibration: token sequences (int64 `[n_i]`, or `Tokens` with types) or images, seeded and fixed for the run;
            never held-out data.
        seed: the recipe's seed, already specific to the step.
        track: wraps an iterable of known length in a progress bar.
        details: JSON values for the journal and the report.
        original: the checkpoint that the run started from; not to be changed.
        folder: where a long pass may keep its state. What lies there outlives a kill, and goes when the step is done.
    """

    calibration: list[Input]
    seed: int = 0
    track: Callable[[Iterable[Any], str], Iterable[Any]] = field(default=lambda items, _label: items)
    details: dict[str, Any] = field(default_factory=dict)
    original: Checkpoint | None = None
    folder: Path | None = None


class Pass(ABC):
    """Base of all passes."""

    needs_calibration: ClassVar[bool] = False

    @abstractmethod
    def requires(self, layout: Layout) -> Forecast:
        """Check the options against the shapes they will meet and predict the outcome.

        Raises:
            RecipeError: the options cannot work on this layout.
        """

    @abstractmethod
    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Change the checkpoint in place, through `Checkpoint.become`."""

    def checks(self, details: Mapping[str, Any]) -> list[Check]:
        """What must hold from now on, given the details that `apply` left in its context (JSON values)."""
        return []


@dataclass(frozen=True)
class Unchanged(Pass):
    """What runs when a recipe names no pass: nothing."""

    def requires(self, layout: Layout) -> Forecast:
        """Shapes stay."""
        return Forecast(layout)

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Leave the checkpoint as it is."""
