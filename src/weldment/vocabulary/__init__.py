"""Tokenizers and what they mean for weights: reading, aligning rows by token, writing, checking."""
