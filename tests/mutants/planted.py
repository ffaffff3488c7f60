"""All the bugs, by the part of the package that they are in."""

from __future__ import annotations

import in_adapters
import in_data
import in_evaluation
import in_files
import in_methods
import in_models
import in_training

MUTANTS = (
    *in_methods.MUTANTS,
    *in_adapters.MUTANTS,
    *in_models.MUTANTS,
    *in_data.MUTANTS,
    *in_training.MUTANTS,
    *in_evaluation.MUTANTS,
    *in_files.MUTANTS,
)
