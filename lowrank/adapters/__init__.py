"""Adapters: one contract (base), one injector (inject), one file per method."""

from lowrank.adapters.base import Adapted, Adapter, NotMergeable, dense_weight
from lowrank.adapters.full import Full
from lowrank.adapters.lora import LoRA

__all__ = ["Adapted", "Adapter", "Full", "LoRA", "NotMergeable", "dense_weight"]
