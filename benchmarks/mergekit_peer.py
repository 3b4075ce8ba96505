"""Runs mergekit's own command; with newer pydantic its architecture models must be completed by hand first."""

from __future__ import annotations

import typing

import mergekit.plan
import torch
from mergekit.architecture import base
from mergekit.scripts.run_yaml import main
from pydantic import BaseModel

names = {**vars(typing), **vars(base), "torch": torch}
for model in [kind for kind in vars(base).values() if isinstance(kind, type) and hasattr(kind, "model_rebuild")]:
    if model is not BaseModel:
        model.model_rebuild(_types_namespace=names, raise_errors=False)
mergekit.plan.ConfiguredModuleArchitecture.model_rebuild(_types_namespace=names, raise_errors=False)
main()
