"""Recipes: what to do, as frozen data that knows the line and column of each of its values.

Read: recipe.py (the data and how it is loaded) → steps.py (passes and exports with their options) → yaml_file.py
(strict YAML with places) → complaints.py (one line for each fault) → checks.py (what needs no model to be seen wrong).
"""

from .complaints import RecipeFaultsError
from .recipe import Data, Recipe, exporter_options, json_schema, load_recipe, shipped, source_options
from .steps import ExportStep, PassStep, adapter

__all__ = [
    "Data",
    "ExportStep",
    "PassStep",
    "Recipe",
    "RecipeFaultsError",
    "adapter",
    "exporter_options",
    "json_schema",
    "load_recipe",
    "shipped",
    "source_options",
]
