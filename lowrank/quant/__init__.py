"""Quantised bases: the NF4 layer and the conversion of a model to it."""
