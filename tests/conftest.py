"""Fixtures that all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# Before anything imports huggingface_hub: tests never reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes run tests; each keeps to one processor.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shared machine may halt any test for seconds.
settings.register_profile("weldment", deadline=None)
settings.load_profile("weldment")
