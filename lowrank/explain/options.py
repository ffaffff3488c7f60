"""What the options of our methods may be, in the words with which their constructors refuse another value."""

from __future__ import annotations

POSITIVE = "a positive integer"
FRACTION = "a fraction of the run, from 0 up to, but not including, 1"

ALLOWED: dict[str, str] = {
    "r": POSITIVE,
    "alpha": "a positive number",
    "dropout": "a number from 0 up to, but not including, 1",
    "rslora": "true or false",
    "freeze_a": "true or false",
    "init_r": POSITIVE,
    "target_r": "an integer from 1 to init_r",
    "tinit": FRACTION,
    "tfinal": FRACTION,
    "delta_t": "a positive integer, or null",
    "beta1": "a number between 0 and 1",
    "beta2": "a number between 0 and 1",
    "orth_weight": "a number from 0",
    "feedforward": "true or false",
    "size": POSITIVE,
    "activation": "one of gelu, relu, silu, tanh",
    "factor": "a positive integer, or null",
    "block_size": "an integer, 2 or more, that divides the sites' inputs",
    "neumann": "0, or an integer, 4 or more",
    "d_initial": "a positive number",
    "length": "a positive integer, fewer than the model's positions",
    "hidden": "a positive integer, or null",
    "init_text": "text",
    "lora.init": "one of default, gaussian, orthogonal, zeros, pissa, olora, loftq",
    "prefix.init": "one of vocabulary, text, random",
    "prompt.init": "one of vocabulary, text, random",
}
