"""Recipes that ship with tersor, and the embedded default they run on (data only)."""
