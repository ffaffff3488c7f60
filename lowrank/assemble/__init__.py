"""From a configuration to the parts of a run, in an order in which what is wrong shows before it costs time.

``parts`` reads no weight: the plan is made on the meta device. ``data`` reads and tokenises the examples. ``load``
reads the weights, quantises, and finds out whether this model's documents can be packed.
"""

from lowrank.assemble.examples import Data, batches, check_length, data, refuse_all_gradients, steps_and_schedule
from lowrank.assemble.resolved import (
    Parts,
    check_optimizer,
    parts,
    quant_options,
    refuse_too_large,
    resolve_device,
    resolve_dtype,
    rule,
    rules,
    skeleton,
    tokenised,
)
from lowrank.assemble.training import evaluator, loss, losses, optimizer, quickened, updating
from lowrank.assemble.weights import Loaded, base, held, load, ready

__all__ = [
    "Data",
    "Loaded",
    "Parts",
    "base",
    "batches",
    "check_length",
    "check_optimizer",
    "data",
    "evaluator",
    "held",
    "load",
    "loss",
    "losses",
    "optimizer",
    "parts",
    "quant_options",
    "quickened",
    "ready",
    "refuse_all_gradients",
    "refuse_too_large",
    "resolve_device",
    "resolve_dtype",
    "rule",
    "rules",
    "skeleton",
    "steps_and_schedule",
    "tokenised",
    "updating",
]
