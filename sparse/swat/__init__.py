"""Sparse weight activation training that is sparse in memory and, in structured mode, in arithmetic."""

from .options import Sparsity
from .shrink import shrink
from .training import SparseTraining, swat

__all__ = ["SparseTraining", "Sparsity", "shrink", "swat"]
