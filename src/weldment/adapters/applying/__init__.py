"""Adapters applied to a model: its tensors with what the adapters change, known from headers alone."""
