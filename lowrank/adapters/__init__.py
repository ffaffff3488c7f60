"""Adapters: one contract (base), one injector (inject), one file per method."""

from lowrank.adapters.base import Adapted, Adapter, NotMergeable, dense_weight
from lowrank.adapters.methods.adalora import AdaLoRA
from lowrank.adapters.methods.bitfit import BitFit
from lowrank.adapters.methods.bottleneck import Bottleneck
from lowrank.adapters.methods.dora import DoRA
from lowrank.adapters.methods.full import Full
from lowrank.adapters.methods.ia3 import IA3
from lowrank.adapters.methods.loha import LoHa
from lowrank.adapters.methods.lokr import LoKr
from lowrank.adapters.methods.lora import LoRA
from lowrank.adapters.methods.oft import OFT
from lowrank.adapters.methods.prefix import Prefix
from lowrank.adapters.methods.prompt import Prompt
from lowrank.adapters.methods.vera import VeRA

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
