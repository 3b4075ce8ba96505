"""How good a model is: tasks, scores, comparisons of merges, soups and searches."""
