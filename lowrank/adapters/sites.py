"""Sites: the modules of the bare model by their paths there, and the patterns that name them."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lowrank.adapters.base import LINEAR, Adapted
from lowrank.errors import ConfigError, nearest
from lowrank.quant.nf4 import NF4Linear

Pattern = str | type[nn.Module]

# Patterns that stand for a kind of site; all-linear leaves the head out.
KEYWORDS = {"all-linear": "linear", "embedding": "embedding", "blocks": "block", "backbone": "backbone"}

WHERE, EXCLUDE = "adapter.targets", "adapter.exclude"  # how the configuration calls a plan's patterns

TRAINED = "trained_rows"  # the attribute that keeps a plan's rows of the base's own parameters on the model


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


def called(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is there with what it is called: its path in the bare model, ``….adapter`` for a site's."""
    for path, module in walk(model):
        yield path, module
        if isinstance(module, Adapted):
            yield path, module.base
            for name, part in module.adapter.named_modules():
                yield f"{path}.adapter{name and f'.{name}'}", part


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Sets the module at a bare path, through whatever is wrapped on the way there."""
    parent: nn.Module = model
    *parents, name = path.split(".")
    for part in parents:
        child = getattr(parent, part)
        parent = child.base if isinstance(child, Adapted) else child
    setattr(parent, name, module)


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
    return "embedding" if isinstance(module, nn.Embedding) and looks_up(module) else "other"


def looks_up(table: nn.Embedding) -> bool:
    """Whether it is called with indices alone; OPT's learnt positions are called with a mask and count themselves."""
    return type(table) is nn.Embedding or len(inspect.signature(type(table).forward).parameters) == 2


def kinds(model: nn.Module) -> dict[str, str]:
    """Every path of the bare model with the kind of site it is: linear, embedding, block, backbone or other."""
    found = {path: site_kind(module) for path, module in sites(model)}
    trunk = backbone(model)
    if trunk is not None:
        found[trunk] = "backbone"
    return found | dict.fromkeys(blocks(model), "block")


def backbone(model: nn.Module) -> str | None:
    """The path of the decoder without its head (``model``, ``transformer``, OPT's ``model.decoder``); None where the
    model is bare of one."""
    get = getattr(model, "get_decoder", None)
    found = get() if get else None
    found = found.base if isinstance(found, Adapted) else found
    return next((path for path, module in sites(model) if path and module is found), None)


def blocks(model: nn.Module) -> list[str]:
    """The paths of the decoder's blocks in order: the first list in the backbone (or the model) of what is no site, of
    as many as the configuration says where one is (a vision tower's may stand before it)."""
    trunk, known = backbone(model) or "", dict(sites(model))
    lists = [
        [f"{path}.{name}" for name, _ in module.named_children()]
        for path, module in known.items()
        if isinstance(module, nn.ModuleList) and f"{path}.".startswith(f"{trunk}." if trunk else "")
    ]
    lists = [found for found in lists if found and all(site_kind(known.get(one, model)) == "other" for one in found)]
    config = getattr(model, "config", None)
    deep = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
    return next((found for found in lists if len(found) == deep), lists[0] if lists else [])


def in_layers(model: nn.Module, paths: list[str], pattern: str) -> list[str]:
    """Those of the paths that lie in, or are, one of the blocks that a pattern is limited to; all where it is not.

    Raises ConfigError where the model has no such block.
    """
    _, layers = layer_range(pattern)
    if layers is None:
        return paths
    of = blocks(model)
    if max(layers) >= len(of):
        there = f"the layers are 0 to {len(of) - 1}" if of else "there is no list of blocks"
        raise ConfigError(f"{WHERE}: '{pattern}': no layer {max(layers)} in {type(model).__name__}; {there}.")
    chosen = {of[n] for n in layers}
    return [path for path in paths if path in chosen or within(path, chosen)]


def layer_range(pattern: str) -> tuple[str, frozenset[int] | None]:
    """``q_proj@0-7,12`` → the pattern and the numbers of the blocks that it is limited to."""
    name, at, ranges = pattern.rpartition("@")
    if not at:
        return pattern, None
    chosen: set[int] = set()
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        if match is None:
            raise ConfigError(f"{WHERE}: '{pattern}': '{part}' is not a layer or a range of them, such as 3 or 0-7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{WHERE}: '{pattern}': the range {part} is empty.")
        chosen |= set(range(first, last + 1))
    return name, frozenset(chosen)


def place(path: str) -> tuple[str, int | None, str]:
    """``model.layers.3.mlp.up_proj`` → what stands before the layer's number, the number, and what stands behind."""
    found = re.fullmatch(r"(.*?)\.(\d+)(?:\.(.*))?", path)
    return (found[1], int(found[2]), found[3] or "") if found else (path, None, "")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """What each path is called whatever its layer: the shortest end of it that tells it from all others.

    ``q_proj``; ``attn.c_proj`` where there is an ``mlp.c_proj`` too; ``blocks`` for the blocks themselves.
    """
    kinds_of = {path: (before, layer is not None, behind) for path in paths for before, layer, behind in [place(path)]}
    ends = {kind: list(name_candidates(*kind)) for kind in kinds_of.values()}
    shared = Counter(end for candidates in ends.values() for end in candidates)
    names = {kind: next((end for end in found if shared[end] == 1), found[-1]) for kind, found in ends.items()}
    return {path: names[kind] for path, kind in kinds_of.items()}


def name_candidates(before: str, in_layer: bool, behind: str) -> Iterator[str]:
    """Names for the sites at one place of every layer, the shortest first; the last names no other sites."""
    parts = (behind if in_layer else before).split(".")
    least = min(2 if parts[-1] in ("weight", "bias") else 1, len(parts))  # every layer has those two
    yield from [".".join(parts[-n:]) for n in range(least, len(parts) + 1)] if parts != [""] else ["blocks"]
    if in_layer:
        yield f"{before}.*.{behind}".rstrip(".")


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
    name, _ = layer_range(pattern)
    if name in KEYWORDS:
        output, kind = head(model), kinds(model)
        found = [path for path in known if kind[path] == KEYWORDS[name]]
        found = [path for path in found if name != "all-linear" or known[path] is not output]
    else:
        found = [path for path in known if matches(name, path)]
    return {path: known[path] for path in in_layers(model, found, pattern)}


def matched_parameters(model: nn.Module, pattern: Pattern) -> list[str]:
    """The base's own parameters that a pattern names, or that lie in a module that it names."""
    own, modules = list(parameters(model)), matched(model, pattern)
    named: list[str] = []
    if isinstance(pattern, str):
        name, _ = layer_range(pattern)
        named = in_layers(model, [path for path in own if matches(name, path)], pattern)
    return [path for path in own if path in named or within(path, modules)]


def within(path: str, modules: Collection[str]) -> bool:
    """Whether a path lies in one of the modules, at any depth."""
    parts = path.split(".")
    return any(".".join(parts[:n]) in modules for n in range(1, len(parts)))


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


def suggestion(pattern: Pattern, *known: Mapping[str, Any]) -> str:
    """`` Nearest: 'q_proj' (30 modules).`` among the last parts of the paths of what could have been meant: of the
    first of ``known`` that has one near."""
    wanted = show(pattern).strip("'").partition("@")[0].rpartition(".")[2].strip("*")
    for paths in known:
        names = ends(paths)
        if close := nearest(wanted, names):
            what = "parameter" if isinstance(next(iter(paths.values())), nn.Parameter) else "module"
            return f" Nearest: '{close}' ({names[close]} {what}{'s' if names[close] > 1 else ''})."
    return f" There are: {', '.join(sorted(ends(known[0])))}."


def ends(paths: Mapping[str, Any]) -> Counter[str]:
    """How often each name is the last part of a path; of modules of those alone that are sites by themselves."""
    meant = (path for path, one in paths.items() if not isinstance(one, nn.Module) or site_kind(one) != "other")
    last = (path.rpartition(".")[2] for path in meant)
    return Counter(name for name in last if not name.isdigit())  # a layer's number is no name


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
