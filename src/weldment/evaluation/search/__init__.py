"""Recipes with marks, searched on validation examples: the best recipe, compared on test examples."""
