"""Evaluation: generation that depends on the seed alone, scores of texts, and intervals of their differences."""
