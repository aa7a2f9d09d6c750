"""Steps of a recipe: `use` names a pass or an exporter, `with` holds its options, `gate` its limits.

The options are the fields of the named class and become an instance of it, so that a recipe that has been
read runs without another look at names. Errors inside them keep their path, which leads to a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from ..errors import RecipeError
from ..evaluate.gate import Gate
from ..exporter import Exporter
from ..pass_ import Pass
from ..registry import find_exporter, find_pass

FORBID = ConfigDict(
    extra="forbid",
    strict=True,
    frozen=True,
    validate_default=True,
    validate_by_name=True,
    validate_by_alias=True,
)


def _one_or_more(value: Any) -> Any:
    """One gate or a list of them."""
    if isinstance(value, (dict, Gate)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Gates = Annotated[tuple[Gate, ...], BeforeValidator(_one_or_more)]


class PassStep(BaseModel):
    """One pass.

    Attributes:
        use: name of the pass.
        options: its options; which there are depends on `use`.
        gate: limits that must hold after this step.
    """

    model_config = FORBID

    use: str
    options: Pass = Field(default_factory=dict, alias="with")  # type: ignore[assignment]
    gate: Gates = ()

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        return _known(use, find_pass)

    @field_validator("options", mode="plain")
    @classmethod
    def _instantiated(cls, value: Any, info: ValidationInfo) -> Any:
        return _instance(value, info, find_pass)


class ExportStep(BaseModel):
    """One export.

    Attributes:
        use: name of the exporter.
        options: its options; which there are depends on `use`.
        gate: limits that must hold on this artifact, besides the recipe's own.
    """

    model_config = FORBID

    use: str
    options: Exporter = Field(default_factory=dict, alias="with")  # type: ignore[assignment]
    gate: Gates = ()

    @field_validator("use")
    @classmethod
    def _known(cls, use: str) -> str:
        return _known(use, find_exporter)

    @field_validator("options", mode="plain")
    @classmethod
    def _instantiated(cls, value: Any, info: ValidationInfo) -> Any:
        return _instance(value, info, find_exporter)


def _known(use: str, find: Callable[[str], type]) -> str:
    try:
        find(use)
    except RecipeError as error:
        raise _said(error) from error
    return use


def _said(error: RecipeError) -> PydanticCustomError:
    context = {"found": error.found, "expected": error.expected, "remedy": error.remedy}
    return PydanticCustomError("recipe", "{found}", context)


def _instance(value: Any, info: ValidationInfo, find: Callable[[str], type]) -> Any:
    if "use" not in info.data:  # refused already
        return value
    kind = find(info.data["use"])
    if isinstance(value, kind):
        return value
    try:
        return adapter(kind).validate_json(json.dumps({} if value is None else value))
    except RecipeError as error:  # a pass's own validator may speak for itself
        raise _said(error) from error


@cache
def adapter(kind: type) -> TypeAdapter[Any]:
    """The validator of an options class."""
    return TypeAdapter(kind)
