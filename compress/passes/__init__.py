"""Passes of tersor.compress. A module's name is the recipe's word."""
