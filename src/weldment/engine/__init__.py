"""Runs plans: blocks, threads, devices, statistics, and nothing of what methods mean."""
