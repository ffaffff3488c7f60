"""The classes that ``_target_`` names: found by their dotted path, kind-checked, and tried with their options.

A method's options are its constructor's parameters and its ranges are what the constructor raises ValueError
for; so a new adapter or optimizer needs no schema. Everything here imports torch, and only when called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lowrank.errors import ConfigError, did_you_mean
from lowrank.rules import ANY, FLAG, Rule, integer, is_number, or_null, refuse, text, unknown_key

KINDS = {"adapter": "lowrank.adapters.Adapter", "optim": "torch.optim.Optimizer", "track": "lowrank.track.Tracker"}
SIDE = 2**9 * 3**2 * 5 * 7  # of the layer without values that options are tried on: any rank, most blocks, fit it
PLAIN = {
    bool: FLAG,
    int: integer("an integer", -(2**63)),
    float: Rule("a number", is_number),
    str: text("a text"),
}
PASSED = ("self", "base", "generator", "params")  # constructor parameters that we give, never the user


def resolve(target: str, kind: type, where: str) -> type:
    """The class at a dotted path. Raises ConfigError naming ``where`` unless it is a subclass of ``kind``."""
    found = locate(target, where)
    if not (isinstance(found, type) and issubclass(found, kind)) or found is kind:
        raise refuse(where, target, f"a subclass of {kind.__module__}.{kind.__qualname__}")
    return found


def locate(target: str, where: str) -> Any:
    """The object at a dotted path. What fails inside an imported module is that module's bug and is raised as is."""
    module_name, _, name = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        example = "lowrank.adapters.LoRA" if where.startswith("adapter") else "torch.optim.AdamW"
        raise refuse(where, target, f"a dotted path such as {example}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{where}: '{target}' cannot be imported; no module '{error.name}'.") from error
    if not hasattr(module, name):
        classes = [known for known, found in vars(module).items() if isinstance(found, type)]
        hint = did_you_mean(name, classes)
        raise ConfigError(f"{where}: '{target}' cannot be imported; {module_name} has no '{name}'.{hint}")
    return getattr(module, name)


def find(target: str, group: str, where: str | None = None) -> type:
    where = f"{where or group}._target_"
    return resolve(target, locate(KINDS[group], where), where)


def options(target: str, group: str) -> list[str]:
    """What a user may set of the class: its constructor's parameters but those that we pass."""
    return named(find(target, group))


def named(cls: type) -> list[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    ours = {*PASSED, *(p.name for p in parameters if p.name.startswith("shared_"))}
    return [p.name for p in parameters if p.name not in ours and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def takes_any(cls: type) -> bool:
    parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_adapter(target: str, targets: Any, given: dict[str, Any]) -> None:
    """Builds the adapter once with its options, and once for each pattern with its overrides, without any values."""
    import torch

    def check(where: str, cls: Any, chosen: dict[str, Any]) -> None:
        def build(options: dict[str, Any]) -> None:
            base, generator = torch.nn.Linear(SIDE, SIDE), torch.Generator("cpu")
            shared = cls.shared({"": (SIDE, SIDE)}, generator=generator, **options)
            cls(base, generator=generator, **options, **shared)

        if "linear" in getattr(cls, "sites", ()):
            with torch.device("meta"):
                attempt(where, cls, build, chosen)

    cls = find(target, "adapter")
    check_options("adapter", given, cls, ["targets", "exclude"])
    check("adapter", cls, given)
    for pattern, overrides in targets.items() if isinstance(targets, dict) else ():
        where = f"adapter.targets['{pattern}']"
        own = {name: value for name, value in overrides.items() if name != "_target_"}
        chosen = find(str(overrides["_target_"]), "adapter", where) if "_target_" in overrides else cls
        check_options(where, own, chosen, [])
        check(where, chosen, own if "_target_" in overrides else {**given, **own})


def check_optimizer(target: str, fixed: dict[str, Any], given: dict[str, Any]) -> None:
    """Builds the optimizer once over one small parameter."""
    import torch

    cls = find(target, "optim")
    check_options("optim", given, cls, [*fixed, "groups", "in_backward"])
    attempt("optim", cls, lambda chosen: cls([torch.nn.Parameter(torch.zeros(1))], **fixed, **chosen), given)


def check_options(where: str, given: Iterable[str], cls: type, fixed: list[str]) -> None:
    """Every option is one of the class's. ``fixed``: the group's other keys, for the error's list."""
    known = named(cls)
    for name in given:
        if name not in known and not takes_any(cls):
            raise unknown_key(f"{where}.{name}", [*fixed, *(option for option in known if option not in fixed)])


def attempt(where: str, cls: type, build: Callable[[dict[str, Any]], Any], given: dict[str, Any]) -> None:
    """Calls a constructor; its ValueError ``r: 0 is not allowed; …`` becomes ``adapter.r: 0 is not allowed; …``. What
    it takes without a word, or stumbles over, is held against the types that it declares."""
    try:
        build(given)
    except ValueError as error:
        option = str(error).partition(":")[0]
        joint = "." if option.isidentifier() else ": "
        end = "" if str(error).endswith((".", "?")) else "."
        raise ConfigError(f"{where}{joint}{error}{end}") from error
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" in str(error).lower():
            raise ConfigError(f"{where}: with these options it would be larger than any memory.") from error
        check_types(where, cls, given)
        raise
    check_types(where, cls, given)


def check_types(where: str, cls: type, given: dict[str, Any]) -> None:
    """Raises ConfigError for a value of another type than its parameter's: 'yes' would be true, and '2' no number."""
    try:
        declared = get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # of names that are there for a type checker alone
        declared = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
        if name in given:
            of_type(declared.get(name, type(parameter.default))).read(f"{where}.{name}", given[name])


def of_type(declared: Any) -> Rule:
    """What a declared type allows; anything, where it is not a plain one."""
    several = get_args(declared) if get_origin(declared) in (Union, UnionType) else ()
    others = [one for one in several if one is not NoneType]
    if len(others) == 1 and len(several) == 2:
        return or_null(of_type(others[0])) if of_type(others[0]) is not ANY else ANY
    return PLAIN.get(declared, ANY) if isinstance(declared, type) else ANY
