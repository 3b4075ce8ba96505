"""What is wrong with a model, whether models can be merged and how well, and what a merge did."""

from weldment.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
