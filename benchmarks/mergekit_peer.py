"""Runs mergekit's own command; with newer pydantic its plan model must be completed by hand first."""

from __future__ import annotations

import mergekit.plan
import torch
from mergekit.architecture import base
from mergekit.scripts.run_yaml import main

mergekit.plan.ConfiguredModuleArchitecture.model_rebuild(_types_namespace={**vars(base), "torch": torch})
main()
