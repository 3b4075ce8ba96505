"""Adapters merged with each other into one adapter: a plan from headers, then layer by layer."""
