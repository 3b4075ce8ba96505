"""Soups: means of models of one task, chosen by validation scores."""
