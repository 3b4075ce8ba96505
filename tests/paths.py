"""Where the reference material lies."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden"

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference outputs (../shared/golden) are not here")
