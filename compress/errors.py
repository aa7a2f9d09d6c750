"""Errors a user can act on, each with the exit code of the command that meets it.

A message is one line: the place, what was found, what was expected, the remedy. Anything that is not a
`TersorError` is a bug of ours and keeps its traceback (exit code 1).
"""

from __future__ import annotations

from pathlib import Path


class TersorError(Exception):
    """One line for the user.

    Attributes:
        exit_code: what the command line ends with.
        directory: the run directory, where the run went as far as a report.
    """

    exit_code = 1
    directory: Path | None = None

    def __init__(self, place: str, found: str, expected: str = "", remedy: str = ""):
        self.place, self.found, self.expected, self.remedy = place, found, expected, remedy
        parts = [f"found {found}" if expected else found]
        if expected:
            parts.append(f"expected {expected}")
        message = f"{place}: " + ", ".join(parts)
        super().__init__(f"{message}. {remedy}" if remedy else message)

    def at(self, place: str) -> TersorError:
        """The same error, said of a place that the caller knows better (a line of the recipe)."""
        return type(self)(f"{place}: {self.place}" if self.place else place, self.found, self.expected, self.remedy)


class RecipeError(TersorError):
    """The recipe or the command line asks for something that cannot be (exit 2)."""

    exit_code = 2


class GateMissed(TersorError):
    """A measured value is outside its limit (exit 3)."""

    exit_code = 3


class ParityMissed(TersorError):
    """An exported graph disagrees with the checkpoint it came from (exit 4)."""

    exit_code = 4


class PreflightError(TersorError):
    """The machine or the input cannot carry the run: memory, disk, a missing extra, a broken file (exit 5)."""

    exit_code = 5
