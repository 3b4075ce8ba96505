"""The mathematics, and nothing else: one function and one row for each method."""

from __future__ import annotations

from weldment.methods.average import AVERAGE
from weldment.methods.method import Method, Parameter
from weldment.methods.selection import SELECTION
from weldment.methods.spectral import SPECTRAL
from weldment.methods.spherical import SPHERICAL
from weldment.methods.task_vectors import TASK_VECTORS

_FAMILIES = (AVERAGE, SPHERICAL, TASK_VECTORS, SELECTION, SPECTRAL)

METHODS: dict[str, Method] = {method.name: method for family in _FAMILIES for method in family}

__all__ = ["METHODS", "Method", "Parameter"]
