"""Faster ways to compute the same: each file one idea, its plain equation beside it."""
