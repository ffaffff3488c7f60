"""The dry run: what a configuration makes of this machine before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from lowrank import assemble
from lowrank.assemble import Data, Parts
from lowrank.ledger.calibrate import Speed, expected
from lowrank.ledger.ledger import Ledger
from lowrank.ledger.predict import predict
from lowrank.schema import Config


@dataclass
class DryRun:
    """Each is found when it is first asked for, and reads no weight. They raise the errors of ``lowrank.errors``."""

    config: Config

    @cached_property
    def parts(self) -> Parts:
        return assemble.parts(self.config)

    @cached_property
    def data(self) -> Data:
        found = assemble.data(self.config, self.parts.tokenizer)
        assemble.check_length(self.parts, found)
        return found

    @cached_property
    def ledger(self) -> Ledger:
        return predict(self.parts, self.data)

    @cached_property
    def speed(self) -> Speed | None:
        """For which the machine works up to ten seconds, once; None where it has not the memory for that."""
        return expected(self.parts, self.data)

    @property
    def with_speed(self) -> Ledger:
        """The ledger, with the tokens a second."""
        return self.ledger if self.speed is None else replace(self.ledger, tokens_per_s=self.speed.tokens_per_s)
