"""What was done, for people (model card) and for programs (manifest)."""
