"""Sites: the modules of the bare model by their paths there, and the patterns that name them."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lowrank.adapters.base import LINEAR, Adapted
from lowrank.errors import ConfigError, nearest
from lowrank.quant.nf4 import NF4Linear

Pattern = str | type[nn.Module]

# Patterns that stand for a kind of site; all-linear leaves the head out.
KEYWORDS = {"all-linear": "linear", "embedding": "embedding", "blocks": "block", "backbone": "backbone"}

WHERE = "adapter.targets"  # how the configuration calls a plan's patterns


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its path in the bare model, an ``Adapted`` where one stands and not what it wraps."""
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        inner = module.base if isinstance(module, Adapted) else module
        for name, child in inner.named_children():
            yield from visit(child, f"{path}.{name}" if path else name)

    return visit(model, "")


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the bare model with its path there: an ``Adapted`` stands for its base."""
    return ((path, m.base if isinstance(m, Adapted) else m) for path, m in walk(model))


def adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every wrapped site with its path in the bare model."""
    return ((path, module) for path, module in walk(model) if isinstance(module, Adapted))


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by their paths in the bare model; a tied one under its first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in sites(model):
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
    return dict(found.values())


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """The module that each of the base's own parameters is of, by the parameter's path."""
    return {
        f"{path}.{name}" if path else name: module
        for path, module in sites(model)
        for name, _ in module.named_parameters(recurse=False)
    }


def site_kind(module: nn.Module) -> str:
    """What a module is by itself; what it is to its model, a block or the backbone, only ``kinds`` can say."""
    if isinstance(module, LINEAR):
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


def kinds(model: nn.Module) -> dict[str, str]:
    """Every path of the bare model with the kind of site it is: linear, embedding, block, backbone or other."""
    found = {path: site_kind(module) for path, module in sites(model)}
    trunk = backbone(model)
    if trunk is not None:
        found[trunk] = "backbone"
    return found | dict.fromkeys(blocks(model), "block")


def backbone(model: nn.Module) -> str | None:
    """The path of the decoder without its head (``model``, ``transformer``); None where the model is bare of one."""
    path = getattr(model, "base_model_prefix", "")
    return path if path and isinstance(getattr(model, path, None), nn.Module) else None


def blocks(model: nn.Module) -> list[str]:
    """The paths of the decoder's blocks in order: the first list of modules in the backbone (or the model)."""
    trunk = backbone(model) or ""
    for path, module in sites(model):
        if isinstance(module, nn.ModuleList) and f"{path}.".startswith(f"{trunk}." if trunk else ""):
            return [f"{path}.{name}" for name, _ in module.named_children()]
    return []


def in_layers(path: str, layers: frozenset[int], of: list[str]) -> bool:
    """Whether a path lies in, or is, one of the blocks with these numbers."""
    return any(path == of[n] or path.startswith(f"{of[n]}.") for n in layers)


def layer_range(pattern: str) -> tuple[str, frozenset[int] | None]:
    """``q_proj@0-7,12`` → the pattern and the numbers of the blocks that it is limited to."""
    name, at, ranges = pattern.rpartition("@")
    if not at:
        return pattern, None
    chosen: set[int] = set()
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"{WHERE}: '{pattern}': '{part}' is not a layer or a range of them, such as 3 or 0-7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{WHERE}: '{pattern}': the range {part} is empty.")
        chosen |= set(range(first, last + 1))
    return name, frozenset(chosen)


def head(model: nn.Module) -> nn.Module | None:
    """The output layer (``lm_head``), bare."""
    get = getattr(model, "get_output_embeddings", None)
    found = get() if get else None
    return found.base if isinstance(found, Adapted) else found


def matched(model: nn.Module, pattern: Pattern) -> dict[str, nn.Module]:
    """The modules that a pattern names, by path. Raises ConfigError where it names layers that are not there."""
    known = {path: module for path, module in sites(model) if path}
    if isinstance(pattern, type):
        return {path: module for path, module in known.items() if isinstance(module, pattern)}
    pattern, layers = layer_range(pattern)
    if pattern in KEYWORDS:
        output, kind = head(model), kinds(model)
        found = [path for path in known if kind[path] == KEYWORDS[pattern]]
        found = [path for path in found if pattern != "all-linear" or known[path] is not output]
    else:
        found = [path for path in known if matches(pattern, path)]
    if layers is not None:
        of = blocks(model)
        if max(layers) >= len(of):
            raise ConfigError(f"{WHERE}: '{pattern}': layer {max(layers)}: the model has {len(of)}, from 0.")
        found = [path for path in found if in_layers(path, layers, of)]
    return {path: known[path] for path in found}


def matches(pattern: str, path: str) -> bool:
    """Whether a path meets a glob, a ``re:`` expression, or a bare name of its last part."""
    if pattern.startswith("re:"):
        return regex(pattern).fullmatch(path) is not None
    if "." not in pattern and not any(c in pattern for c in "*?["):
        return path.rpartition(".")[2] == pattern
    return fnmatch.fnmatchcase(path, pattern)


def regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ConfigError(f"{WHERE}: '{pattern}' is not a regular expression: {error}.") from error


def show(pattern: Pattern) -> str:
    return f"'{pattern}'" if isinstance(pattern, str) else pattern.__name__


def suggestion(pattern: Pattern, paths: Mapping[str, Any]) -> str:
    """`` Nearest: 'q_proj' (30 modules).`` among the last parts of the paths of what could have been meant."""
    names = Counter(
        path.rpartition(".")[2]
        for path, found in paths.items()
        if not isinstance(found, nn.Module) or site_kind(found) != "other"
    )
    wanted = pattern.rpartition(".")[2].strip("*") if isinstance(pattern, str) else pattern.__name__
    close = nearest(wanted, names)
    if close is None:
        return f" There are: {', '.join(sorted(names))}."
    return f" Nearest: '{close}' ({names[close]} {'module' if names[close] == 1 else 'modules'})."


def count(model: nn.Module) -> int:
    """Parameters of the base, an NF4 weight counted by its logical shape."""
    total = 0
    quantized: set[int] = set()
    for _, module in sites(model):
        if isinstance(module, NF4Linear):
            total += module.in_features * module.out_features
            quantized |= {id(p) for name, p in module.named_parameters(recurse=False) if name != "bias"}
    return total + sum(p.numel() for p in parameters(model).values() if id(p) not in quantized)


def uncovered(model: nn.Module) -> tuple[str, ...]:
    """What no linear-like pattern can reach: experts kept as one 3D weight."""
    three = [
        parameter
        for _, module in sites(model)
        if site_kind(module) == "other" and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3 and parameter.numel() > parameter.shape[-1]
    ]
    if not three:
        return ()
    total = sum(p.numel() for p in three)
    return (f"not covered: 3D expert weights: {total:,} parameters in {len(three)} sites",)
