"""Override strings at random, most of them near the grammar, read as a command line is: composed, swept, taken alone.

What may come of one is a configuration or an error of ``lowrank.errors``. The files of each choice of groups are
composed once, and Hydra applies all else to copies of that: a hundred thousand strings are minutes.
"""

from __future__ import annotations

import gc
import pickle
import re
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from benchmarks.ordeals.arm import Figure, Row
from benchmarks.ordeals.ground import Ground
from lowrank import compose
from lowrank.errors import LowrankError
from lowrank.places import find_conf, of_choice
from lowrank.rules import RULES, SWEEP
from lowrank.schema import GROUPS

CHUNK, SECONDS = 500, 20
GROUPED = (*GROUPS, "experiment", "hydra/launcher", "hydra/sweeper", "hydra/help", "hydra/job_logging")
HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.launcher.n_jobs", "hydra.mode", "hydra.verbose", "hydra.job.name")
SCALARS = (
    *("0", "1", "-1", "+3", "8", "010", "0x10", "1_000", "1e3", "1e-4", "1E5", "1e400", ".5", "5.", "-0.0", "nan"),
    *("inf", ".inf", "-inf", "9223372036854775807", "9223372036854775808", "9" * 400, "1e", "1.2.3", "2026-10-01"),
    *("12:30", "true", "false", "True", "TRUE", "yes", "no", "on", "off", "null", "none", "None", "~", "", " ", "???"),
    *("auto", "cpu", "cuda:0", "cuda:-1", "bf16", "jsonl", "linear", "cosine", "all-linear", "q_proj", "*.q_proj"),
    *("re:.*[", "lowrank.adapters.LoRA", "lowrank.adapters.DoRA", "lowrank.adapters.Adapter", "torch.optim.SGD"),
    *("os.system", "a.b", "/dev/null", "../x", "a b", "a=b", "a#b", "C:\\x", "100%", "@", "&", "*", "日本", "ü", "９"),
    *("!!python/object:os.system", "−1", "1–2", "\u200b1", "\ufeff", "\x00", "\x1b[2J", "\udcff", "🙂", "%s{0}"),
    *("$HOME", "a" * 3000),
)
INTERPOLATIONS = (
    *("${loop.steps}", "${nowhere}", "${loop.seed}", "${loop}", "${..steps}", "${.x}", "${oc.env:HOME}"),
    *("${oc.env:NO,1}", "${oc.decode:1}", "${oc.decode:'[1'}", "${oc.select:loop.steps,3}", "${now:%Y}"),
    *(
        "${hydra:job.num}",
        "${hydra:x}",
        "${",
        "${}",
        "${a",
        "$}",
        "${${loop.seed}}",
        "${loop.${loop.seed}}",
        "${foo:1}",
    ),
    *("\\${loop.seed}", "${oc.dict.keys:loop}", "${file_name:a}", "${oc.create:{a:1}}", "${oc.deprecated:loop.seed}"),
    *("${loop.seed}${loop.steps}", "x${loop.seed}", "${foo:1}"),
)
FUNCTIONS = ("choice", "range", "glob", "interval", "sort", "shuffle", "tag", "int", "float", "str", "bool", "json_str")
CHARACTERS = "=,:[]{}()'\"\\$+~@#*?!%&|<>/. \t\n-_0aé９−\u200b\x00"


def rows(ground: Ground, count: int) -> Iterator[Row]:
    chunks = [(start, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]
    results = [found for _, found in ground.each(chunks, partial(chunk_of, ground.seed))]
    accepted, failures = sum(taken for taken, _ in results), [fault for _, faults in results for fault in faults]
    refused = count - accepted - len(failures)
    yield Row(
        f"override strings ({accepted:,} read, {refused:,} refused in a sentence): none ends in a traceback",
        Figure(count, failures),
    )


def chunk_of(seed: int, chunk: tuple[int, int], alone: float = 0.1) -> tuple[int, list[str]]:
    """How many of a chunk were accepted, and those that ended in anything else than that or a refusal. ``alone``: the
    share that changes a configuration that is there, as ``lowrank resume`` does, which is faster than composing one."""
    start, count = chunk
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    accepted, failures = 0, []
    with composed_once():
        for number in range(start, start + count):
            draw = Random(f"{seed} {number}")
            text = override(draw)
            end = read(text, draw.random() < alone)
            accepted += end == "accepted"
            failures += [f"{number}: {text[:200]!r}: {end}"] if end not in ("accepted", "refused") else []
    return accepted, failures


def too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def read(text: str, alone: bool) -> str:
    """``accepted``, ``refused`` or the exception, of one override string: as a sweep's or a run's, or on a run."""
    signal.alarm(SECONDS)
    try:
        if alone:
            compose.changed(base(), [text])
        else:
            for job in jobs([text]):
                compose.compose(job)
    except LowrankError as error:
        return "refused" if str(error).strip() else "refused without a word"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
    finally:
        signal.alarm(0)
    return "accepted"


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The first of the jobs that Hydra's own sweeper makes of a command line; the line itself where it is no sweep."""
    given = compose.understood(overrides)
    try:
        parsed = compose.OverridesParser.create().parse_overrides(given)
        if not any(one.is_sweep_override() for one in parsed):
            return [given]
        split = BasicSweeper.split_arguments(parsed, None)
    except Exception as error:
        raise compose.translate(error) from error
    return [list(job) for batch in split for job in batch][:3]


KNOWN: dict[str, Any] = {}


def base() -> Any:
    if "base" not in KNOWN:
        KNOWN["base"] = compose.compose(["model=tiny_llama"])
    return KNOWN["base"]


@contextmanager
def composed_once() -> Iterator[None]:
    """Composing files anew where a group is chosen, and else taking a copy of what was composed before."""
    loader: Any = config_loader_impl.ConfigLoaderImpl
    listed, merged = config_loader_impl.create_defaults_list, loader._compose_config_from_defaults_list
    loaded: Any = ConfigRepository.load_config
    lists: dict[tuple[str, ...], Any] = {}
    trees: dict[int, bytes] = {}
    files: dict[str, bytes] = {}

    def load(self: Any, config_path: str) -> Any:
        if len(self.sources) > 3:  # a search path of somebody's own
            return loaded(self, config_path)
        if config_path not in files:
            files[config_path] = pickle.dumps(loaded(self, config_path))
        return pickle.loads(files[config_path])

    def create(repo: Any, config_name: Any, overrides_list: Any, **more: Any) -> Any:
        choosing = [one for one in overrides_list if not re.match(r"\w+\.[^/@]*$", one.key_or_group)]
        name = (str(config_name), *(str(one.input_line) for one in choosing))
        if len(repo.get_sources()) > 3 or not all(re.fullmatch(r"[\w/]+=\w+", text) for text in name[1:]):
            return listed(repo=repo, config_name=config_name, overrides_list=overrides_list, **more)
        if name not in lists:
            lists[name] = listed(repo=repo, config_name=config_name, overrides_list=choosing, **more)
        found = lists[name]
        groups = [one.input_line for one in choosing if one not in found.config_overrides]
        return replace(found, config_overrides=[one for one in overrides_list if one.input_line not in groups])

    def tree(self: Any, defaults: Any, repo: Any) -> Any:
        if not any(defaults is one.defaults for one in lists.values()):
            return merged(self, defaults=defaults, repo=repo)
        if id(defaults) not in trees:
            trees[id(defaults)] = pickle.dumps(merged(self, defaults=defaults, repo=repo))
        return pickle.loads(trees[id(defaults)])

    config_loader_impl.create_defaults_list, ConfigRepository.load_config = create, load
    loader._compose_config_from_defaults_list = tree
    gc.freeze()
    try:
        yield
    finally:
        ConfigRepository.load_config = loaded
        config_loader_impl.create_defaults_list, loader._compose_config_from_defaults_list = listed, merged
        gc.unfreeze()


def override(draw: Random) -> str:
    """``key=value`` as somebody could have typed it; a third of them damaged."""
    sign = draw.choices(["", "+", "++", "~"], [70, 12, 8, 10])[0]
    key = key_of(draw)
    value = (right(key, draw) if draw.random() < 0.4 else "") or value_of(draw, 0)
    text = f"{sign}{key}" if sign == "~" and draw.random() < 0.5 else f"{sign}{key}={value}"
    for _ in range(draw.choice([0, 0, 1, 3]) if draw.random() < 0.66 else 0):
        text = damaged(text, draw)
    return text


def key_of(draw: Random) -> str:
    kind = draw.random()
    key = draw.choice(real_keys() if kind < 0.7 else GROUPED if kind < 0.9 else HYDRA)
    match draw.randrange(12):
        case 0:
            at = draw.randrange(len(key))
            return key[:at] + draw.choice("xs_.") + key[at + 1 :]
        case 1:
            return (
                f"{key}{draw.choice(['.x', '.0', '[0]', '@model', '@_global_', ' ', '..', '.options.a', '.*.q_proj'])}"
            )
        case 2:
            return draw.choice(["", ".", "loop", "defaults", "_target_", "a.b", "日本", "hydra", "3", "null"])
    return key


def real_keys() -> list[str]:
    """Every key of every choice, and a few that are added."""
    if "keys" not in KNOWN:
        files = [(file.parent.name, file.stem) for file in find_conf().glob("*/*.yaml") if file.parent.name in GROUPS]
        values: dict[str, list[str]] = {}
        for group, name in files:
            for key, place in of_choice(group, name, [find_conf()]).items():
                values.setdefault(key, []).append(place.value)
        more = ["schedule.options.power", "optim.amsgrad", "optim.fused", "adapter.targets.q_proj", "plan"]
        KNOWN.update(values=values, keys=sorted({*values, *RULES, *SWEEP, *more}))
    return list(KNOWN["keys"])


def right(key: str, draw: Random) -> str:
    """A choice of a group, one of a key's names, or what one of its files has for it; empty where there is none."""
    if key in GROUPED:
        names = sorted(file.stem for file in (find_conf() / key).glob("*.yaml"))
        return draw.choice(names) if names else ""
    real_keys()
    found = [*KNOWN["values"].get(key, ()), *(RULES[key].names if key in RULES else ())]
    return draw.choice(found) if found else ""


def value_of(draw: Random, depth: int) -> str:
    kind = draw.randrange(20)
    if depth > 3 or kind < 9:
        return draw.choice(SCALARS)
    parts = [value_of(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind < 11:
        return f"[{','.join(parts)}]"
    if kind < 13:
        keys = ["r", "*.q_proj", "match", "lr", "steps", "_target_", "a b", "'q'", "3", "a.b"]
        return f"{{{','.join(f'{draw.choice(keys)}:{part}' for part in parts)}}}"
    if kind < 15:
        mark = draw.choice("'\"")
        return f"{mark}{value_of(draw, depth + 1)}{mark}"
    if kind < 17:
        return draw.choice(INTERPOLATIONS)
    if kind < 19:
        named = draw.choice(["", "", "start=1,stop=9", "step=2", "include=*", "exclude=a", "reverse=true", "seed=1"])
        return f"{draw.choice(FUNCTIONS)}({','.join([*parts, *([named] if named else [])])})"
    return ",".join(parts) or ","


def damaged(text: str, draw: Random) -> str:
    at = draw.randint(0, len(text))
    match draw.randrange(6):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + text[at + draw.randint(1, 4) :]
        case 2:
            return text[:at] + text[max(0, at - draw.randint(1, 8)) :]
        case 3:
            return text[:at] + draw.choice(SCALARS + INTERPOLATIONS) + text[at:]
        case 4:
            return text[:at] + draw.choice("[{('\"") * draw.choice([1, 2, 300]) + text[at:]
        case _:
            return text[:at] + draw.choice(CHARACTERS) + text[at:]
