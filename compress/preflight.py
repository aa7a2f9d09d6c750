"""What is settled before a run starts: enough memory and disk, the threads, and what exactly goes in."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PreflightError
from .plan import Plan
from .recipe import Recipe
from .rundir import hash_file

if TYPE_CHECKING:
    from .data import Source

DISTRIBUTIONS = ("tersor", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy", "safetensors")


def check(plan: Plan, output: Path, max_memory: int | None = None) -> bool:
    """Refuse a run that the machine cannot carry.

    Args:
        plan: of the run.
        output: its directory.
        max_memory: bytes that the run may use, or None for what is available.

    Returns:
        whether weights must stay in their files.

    Raises:
        PreflightError: names what is short and by how much.
    """
    import psutil

    available = psutil.virtual_memory().available
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        available = min(available, soft)
    allowed = min(available, max_memory or available)
    lean = plan.peak_memory > allowed
    if lean and (plan.lean_memory is None or plan.lean_memory > allowed):
        needed = plan.peak_memory if plan.lean_memory is None else plan.lean_memory
        found = f"{size(allowed)} allowed" if allowed < available else f"{size(available)} available"
        raise PreflightError("memory", found, f"{size(needed)} (see tersor plan)")
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if plan.disk > free:
        raise PreflightError(f"--output {output}", f"{size(free)} free on its disk", size(plan.disk))
    return lean


def parse_size(text: str) -> int:
    """`3.5GB` → 3,500,000,000; units as in `size`, or none for bytes.

    Raises:
        ValueError: no size.
    """
    found = re.fullmatch(r"([0-9.]+) *(B|kB|MB|GB|TB)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(text)
    powers = {"": 0, "b": 0, "kb": 1, "mb": 2, "gb": 3, "tb": 4}
    return int(float(found[1]) * 1000 ** powers[(found[2] or "").lower()])


def size(number: float) -> str:
    """Bytes for people: `9.6 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def thread_count(wanted: int | None) -> int:
    """The number of CPU threads a run uses: as asked, else the cores this process may use."""
    if wanted:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(wanted: int | None) -> Iterator[None]:
    """Torch's intra-op threads for the duration of a run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(thread_count(wanted))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def lock(recipe: Recipe, source: Path) -> dict[str, Any]:
    """What a run depends on: the recipe, the weights and the data by hash, versions and machine for the record."""
    return {
        "recipe": recipe.digest,
        "weights": {
            p.name: hash_file(p) for p in sorted(source.iterdir()) if p.suffix in (".json", ".safetensors", ".bin")
        },
        "data": {
            part: hash_source(data, recipe.base)
            for part in ("calibration", "heldout")
            if (data := getattr(recipe.data, part)) is not None
        },
        "seed": recipe.seed,
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count()},
    }


def hash_source(source: Source, base: Path | None) -> str:
    """SHA-256 (hex) over the names and contents of the files that a source reads."""
    from .units import files

    digest = hashlib.sha256()
    part = source.part(base, "data")
    if part.is_dataset:  # its files are the library's: the name is all there is to hold
        digest.update(f"{source.path} {source.subset} {source.split}\n".encode())
    for file in files(part):
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def cpu_name() -> str:
    """The processor's own name, if it tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
