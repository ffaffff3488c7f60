"""The training loop and what it is made of. Nothing here knows an adapter, a data set or a model by name.

``lowrank.train`` is this package and, called, the public function: ``lowrank.train(overrides, folder)``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Importing a subpackage binds its name on the parent, over a function of that name: so the package is called."""

    def __call__(self, overrides: list[str], folder: str | Path) -> Any:
        import lowrank

        return lowrank.train_run(overrides, folder)


sys.modules[__name__].__class__ = _CallablePackage
