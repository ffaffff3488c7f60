"""What a run will take, before it is measured: bytes by part and FLOPs, from the run's own code on tensors without
values."""

from lowrank.ledger.ledger import Ledger, Shape
from lowrank.ledger.predict import predict

__all__ = ["Ledger", "Shape", "predict"]
