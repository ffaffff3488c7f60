"""The configuration's groups and keys, and the types of their values; what each may be is in ``rules``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Model:
    kind: str
    name: str | None = None  # folder or hub id
    revision: str | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class Quant:
    kind: str
    double: bool = True
    compute_dtype: str | None = None  # None: the dtype of the layer's input
    skip: list[str] = field(default_factory=lambda: ["lm_head"])


@dataclass(frozen=True)
class Adapter:
    target: str  # the YAML's ``_target_``: the dotted path of an Adapter class
    targets: str | list[str] | dict[str, dict[str, Any]]
    options: dict[str, Any]  # every other key: the constructor's
    exclude: list[str] = field(default_factory=list)  # patterns of sites that stay as they are


@dataclass(frozen=True)
class Fields:
    """Column names; None where the file has no such column."""

    instruction: str | None = "instruction"
    input: str | None = "input"
    response: str | None = "response"
    text: str | None = "text"


@dataclass(frozen=True)
class Data:
    kind: str
    eval_fraction: float
    template: str
    max_length: int  # tokens
    limit: int | None
    seed: int
    train_on: str
    on_empty: str
    on_malformed: str = "error"
    path: str | None = None
    eval_path: str | None = None
    fields: Fields = field(default_factory=Fields)


@dataclass(frozen=True)
class Optim:
    target: str  # the YAML's ``_target_``: the dotted path of an Optimizer class
    lr: float
    weight_decay: float
    groups: list[dict[str, Any]]  # ordered rules {match, lr? or lr_ratio?, weight_decay?}
    options: dict[str, Any]  # every other key: the constructor's
    in_backward: bool = False


@dataclass(frozen=True)
class Schedule:
    kind: str
    warmup: float  # optimizer steps, or below 1 a fraction of all
    options: dict[str, Any]


@dataclass(frozen=True)
class Loop:
    steps: int | None
    epochs: float | None
    micro_batch: int | None  # examples
    micro_batch_tokens: int | None
    accumulate: int
    max_grad_norm: float
    precision: str
    device: str
    seed: int
    gradient_checkpointing: str
    packing: str = "best_fit"  # of micro_batch_tokens
    fast: bool = True
    offload: bool = False
    max_seconds: float | None = None
    on_nonfinite: str = "stop"
    max_skipped: int = 10  # batches in a row
    trace_nonfinite: bool = False
    average: float | None = None  # decay of the weights' running average
    patience: int | None = None  # evaluations without a better held-out loss
    prune: int | None = None  # other jobs of the sweep that are done, at least
    diverged: float | None = None  # times the lowest training loss
    profile: int | None = None  # steps under the profiler
    compile: str = "off"


@dataclass(frozen=True)
class Generate:
    limit: int  # examples; 0: none
    batch: int
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_p: float
    num_return_sequences: int
    seed: int


@dataclass(frozen=True)
class Eval:
    before: bool
    every: int  # optimizer steps; 0: at the end only
    limit: int | None
    generate: Generate


@dataclass(frozen=True)
class Checkpoint:
    every: int  # optimizer steps; 0: none
    keep: int
    resume: bool
    allow: list[str]
    background: bool = False


@dataclass(frozen=True)
class Track:
    kind: str
    project: str = "lowrank"
    name: str | None = None
    target: str | None = None  # the YAML's ``_target_``: the dotted path of a Tracker class of the user's own


@dataclass(frozen=True)
class Config:
    model: Model
    quant: Quant
    adapter: Adapter
    data: Data
    optim: Optim
    schedule: Schedule
    loop: Loop
    eval: Eval
    checkpoint: Checkpoint
    track: Track

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the YAML's shape; ``parse`` of it is this configuration again."""
        tree = asdict(self)
        for name, group in tree.items():
            if "target" in group:
                options = group.pop("options") if name in OPEN else {}
                tree[name] = {"_target_": group.pop("target"), **group, **options}
        return tree


@dataclass(frozen=True)
class Sweep:
    """What ``-m`` does with its jobs: no part of a configuration, and of no run's identity."""

    together: int = 1  # jobs that train in one pass
    metric: str | None = None  # a dotted name in summary.json: what a sweeper is told of a job
    resident: bool = False  # compatible jobs one after another in a process that has loaded the base


GROUPS: dict[str, type] = get_type_hints(Config)
NESTED: dict[str, type] = {"data.fields": Fields, "eval.generate": Generate}
OPEN = ("adapter", "optim")  # groups whose further keys are options of the class that `_target_` names
FREE = ("schedule.options", "adapter.targets")  # mappings with keys of the user's own
