"""Models side by side on the same examples: who takes part, a row for each, and how the rows are shown."""
