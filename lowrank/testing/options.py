"""What stands on the command line, ``my_module:MyAdapter r=4``, as a class and its options."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from lowrank import classes
from lowrank.adapters.base import Adapter
from lowrank.adapters.plan import option_names
from lowrank.errors import ConfigError, did_you_mean
from lowrank.rules import unknown_key

PLACE = ("targets", "exclude")  # as in a YAML: where the adapter goes


def options_of(target: str, words: Sequence[str]) -> tuple[type[Adapter], dict[str, Any]]:
    """The Adapter class at ``package.module:Class`` and the values, read as YAML, of ``option=value`` words.

    Raises ConfigError, with the nearest name, where the module, the class or an option is not there, or where the
    class is not an Adapter.
    """
    module, colon, name = target.partition(":")
    if not (colon and module and name):
        raise ConfigError(f"check: '{target}' is not allowed; a class as package.module:Class.")
    find_module(target, module)
    cls = classes.resolve(f"{module}.{name}", Adapter, "check")
    options: dict[str, Any] = {}
    for word in words:
        option, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"check: '{word}' is not an option; write OPTION=VALUE.")
        if option not in (allowed := (*option_names(cls), *PLACE)):
            raise unknown_key(f"check.{option}", allowed)
        options[option] = read(option, value)
    return cls, options


def find_module(target: str, name: str) -> None:
    """Looks the module's first part up among all that can be imported, so that a slip finds its nearest."""
    top = name.partition(".")[0]
    if top.isidentifier() and top not in sys.modules and importlib.util.find_spec(top) is None:
        hint = did_you_mean(top, [found.name for found in pkgutil.iter_modules()])
        raise ConfigError(f"check: '{target}' cannot be imported; no module '{top}'.{hint}")


def read(option: str, text: str) -> Any:
    """A YAML value; 1e-3 is a number here, as it is in a configuration's overrides."""
    if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", text):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"check.{option}: '{text}' is not valid YAML.") from error
