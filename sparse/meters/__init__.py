"""Meters of a training step that tell the truth: bytes kept, operations counted and operations that ran."""

from .flops import Flops, measure
from .memory import saved_bytes

__all__ = ["Flops", "measure", "saved_bytes"]
