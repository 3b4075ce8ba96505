"""Merges in the space of singular vectors."""

from __future__ import annotations

from weldment.methods.method import Method
from weldment.methods.spectral.drm import DRM
from weldment.methods.spectral.knots import KNOTS
from weldment.methods.spectral.singular import SINGULAR
from weldment.methods.spectral.wudi import WUDI

SPECTRAL: tuple[Method, ...] = (DRM, *SINGULAR, *KNOTS, *WUDI)
