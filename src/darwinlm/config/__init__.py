"""Recipes: their settings, targets and exports."""
