"""Adapters: one contract (base), one injector (inject), one file per method."""

from lowrank.adapters.adalora import AdaLoRA
from lowrank.adapters.base import Adapted, Adapter, NotMergeable, dense_weight
from lowrank.adapters.bitfit import BitFit
from lowrank.adapters.bottleneck import Bottleneck
from lowrank.adapters.dora import DoRA
from lowrank.adapters.full import Full
from lowrank.adapters.ia3 import IA3
from lowrank.adapters.loha import LoHa
from lowrank.adapters.lokr import LoKr
from lowrank.adapters.lora import LoRA
from lowrank.adapters.oft import OFT
from lowrank.adapters.prefix import Prefix
from lowrank.adapters.prompt import Prompt
from lowrank.adapters.vera import VeRA

__all__ = [
    "IA3",
    "OFT",
    "AdaLoRA",
    "Adapted",
    "Adapter",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "Full",
    "LoHa",
    "LoKr",
    "LoRA",
    "NotMergeable",
    "Prefix",
    "Prompt",
    "VeRA",
    "dense_weight",
]
