"""Wrong configurations that look right, and right ones that look wrong: what is refused, in which words, and where."""

from __future__ import annotations

from typing import Any

import pytest
from torch.optim import SGD
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from lowrank import compose
from lowrank.classes import check_optimizer
from lowrank.errors import ConfigError, nearest
from lowrank.kinds import NEEDED, OPTIONS
from lowrank.rules import RULES

JSONL = ("data=jsonl", "data.path=a.jsonl")


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose.compose([*overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *(("1e3", "1000.0"), ("'\"true\"'", "'\"true\"'"), ("3.0", "3.0"), ("[3]", "[3]"), ("{a:3}", "{a: 3}")),
        *(("yes", "'yes'"), ("nan", "nan"), ("inf", "inf"), ("010", "'010'"), ("0x10", "'0x10'"), ("none", "'none'")),
        *(("2026-10-01", "'2026-10-01'"), ("12:30:45", "'12:30:45'"), ("true", "true"), ("[null]", "[null]")),
        *(("9223372036854775808", "9223372036854775808"), ("1e400", "inf"), ("'3'", "'3'"), ("", "''")),
        (f"1{'0' * 90}", "a number of 91 digits"),
    ],
)
def test_what_only_looks_like_a_number_of_steps_is_none(value: str, shown: str) -> None:
    assert refusal(f"loop.steps={value}") == f"loop.steps: {shown} is not allowed; a positive integer, or null."


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "1", "0", "'true'", "null"])
def test_only_true_and_false_are_true_and_false(value: str) -> None:
    assert refusal(f"loop.fast={value}").endswith("is not allowed; true or false.")
    assert refusal(f"plan={value}").endswith("is not allowed; true or false.")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loop.steps=９", "loop.steps=９: not a valid override ('９' is FULLWIDTH DIGIT NINE, not '9')."),
        ("optim.lr=1e−3", "optim.lr=1e−3: not a valid override ('−' is MINUS SIGN, not '-')."),
        ("loop.stеps=3", "loop.stеps=3: not a valid override ('е' is CYRILLIC SMALL LETTER IE)."),
        ("loop.steps:3", "loop.steps:3: not a valid override (no '=' in it). Write key=value"),
        ("=3", "=3: not a valid override (nothing in front of '=')."),
        ("optim.lr=1,5", "optim.lr: '1,5' is several values. Add -m to run one job for each."),
        ("quant.skip=a,b", "quant.skip: 'a,b' is several values. Add -m to run one job for each, or write a list: "),
        ("optim.betas={a:1}", "optim.betas: a mapping is not allowed; two numbers, each from 0 up to, but"),
        ("loop/steps=3", "loop/steps: no such group. Of a key write loop.steps=…."),
        ("LOOP.steps=3", "LOOP: unknown key. Did you mean 'loop'?"),
        ("plna=true", "plna: unknown key. Did you mean 'plan'?"),
        ("experimnt=demo", "experimnt: unknown key. Did you mean 'experiment'?"),
        ("sweep.togther=2", "sweep.togther: unknown key. Did you mean 'together'?"),
        ("+loop={stepss:3}", "loop.stepss: unknown key. Did you mean 'steps'?"),
        ("loop=3", "loop: 3 is not a choice. Allowed: default."),
        ("model=[tiny_llama,tiny_gpt2]", "model: ['tiny_llama', 'tiny_gpt2'] is not allowed; one choice, such as"),
        ("model=../model/tiny_llama", "model: '../model/tiny_llama' is not a choice. Did you mean 'tiny_llama'?"),
        ("model=tiny_llama.yaml", "model: 'tiny_llama.yaml' is not a choice. Did you mean 'tiny_llama'?"),
        ("model=TINY_LLAMA", "model: 'TINY_LLAMA' is not a choice. Did you mean 'tiny_llama'?"),
        ("model=???", "model: missing; one of hf smollm2 tiny_gpt2 tiny_llama."),
        ("model@adapter=hf", "model@adapter: no group goes there"),
        ("experiment=methods/lorra", "experiment: 'methods/lorra' is not a choice. Did you mean 'methods/lora'?"),
        ("experiment=null", "experiment: null is not a choice; leave it out, or write ~experiment."),
        ("+loop=default", "loop: chosen already. Write loop=…, without '+'."),
        ("~loop.steps=99", "loop.steps: is 100, not 99: nothing is deleted."),
        ("optim.groups.match=x", "optim.groups.match: inside a list; its items have numbers"),
        ("hydra/job_logging=[0]", "configuration: "),
        (
            "adapter._target_=lowrank.adapters.Adapter",
            "adapter._target_: 'lowrank.adapters.Adapter' is not allowed;",
        ),
        ("adapter._target_=LoRA", "adapter._target_: 'LoRA' is not allowed; a dotted path such as lowrank.adapters."),
        ("+optim.amsgrad=yes", "optim.amsgrad: 'yes' is not allowed; true or false."),
        ("+optim.fused=maybe", "optim.fused: 'maybe' is not allowed; true or false, or null."),
        ("adapter.rslora=null", "adapter.rslora: null is not allowed; true or false."),
        ("loop.device=cuda:007", "loop.device: 'cuda:007' is not allowed;"),
        (
            "+schedule.options.power=2",
            "schedule.options.power: unknown key; schedule.kind=linear has no options.",
        ),
        (
            "schedule.kind=warmup_stable_decay",
            "schedule.options.num_decay_steps: missing; warmup_stable_decay",
        ),
        ("schedule.kind=exponential", "schedule.warmup: 0.03 is not allowed; 0, because schedule.kind=exponential"),
        ("hydra.run.dir=", "hydra.run.dir: '' is not allowed; a folder."),
        ("hydra.searchpath=[/nowhere]", "hydra.searchpath: '/nowhere' is not there; a folder, or pkg://PACKAGE."),
        ("hydra.rnu.dir=x", "hydra.rnu: unknown key. Did you mean 'run'?"),
    ],
)
def test_what_hydra_would_let_pass_or_say_unclearly_is_refused_in_our_words(override: str, said: str) -> None:
    assert refusal(override).startswith(said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((*JSONL, "data.path=ü.jsonl"), "As one text, quoted: \"data.path='ü.jsonl'\"."),
        ((*JSONL, "data.path=a=b.jsonl"), "As one text, quoted: \"data.path='a=b.jsonl'\"."),
        ((*JSONL, "data.path=~/a.jsonl"), "As one text, quoted: \"data.path='~/a.jsonl'\"."),
        ((*JSONL, "data.fields.response=1"), "As a text: \"data.fields.response='1'\"."),
        (("model=hf", "model.name=a", "model.revision=1234567"), "As a text: \"model.revision='1234567'\"."),
        (("schedule.kind=polynomial", "+schedule.options.pwoer=2"), "Did you mean 'power'? Allowed: lr_end, power."),
        (("optim=sgd", "optim.betas=[0.9,0.9]"), "fused. These are torch.optim.SGD's."),
    ],
)
def test_a_refusal_ends_with_what_to_write(overrides: tuple[str, ...], said: str) -> None:
    before = overrides[:-1]
    assert refusal(*overrides).endswith(said)
    if quoted := said.partition(': "')[2]:
        compose.compose([*before, quoted.rstrip('."')])  # the advice is true


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["loop.steps=3", "loop.steps=4"], "loop.steps", 4),
        (["adapter=lora", "adapter.r=4", "adapter=dora"], "adapter.r", 4),
        (["loop.steps=1_000"], "loop.steps", 1000),
        (["loop.steps= 3"], "loop.steps", 3),
        (["loop.fast=TRUE"], "loop.fast", True),
        (["optim.lr=1E-3"], "optim.lr", 1e-3),
        (["loop.gradient_checkpointing=off"], "loop.gradient_checkpointing", "off"),
        (["loop.accumulate=${loop.micro_batch}"], "loop.accumulate", 8),
        (["+optim.foreach=null"], "optim.foreach", None),
        (["optim=sgd", "+optim.dampening=0.1"], "optim.dampening", 0.1),
        (["schedule.kind=inverse_sqrt", "+schedule.options.timescale=5"], "schedule.options.timescale", 5),
        (["~experiment"], "loop.steps", 100),
        ([*JSONL, "data.path=a b.jsonl"], "data.path", "a b.jsonl"),
    ],
)
def test_what_is_right_passes(overrides: list[str], key: str, value: Any) -> None:
    found: Any = compose.compose(overrides).to_dict()
    for name in key.split("."):
        found = found[name]
    assert found == value


def test_a_sweep_that_a_second_override_would_drop_is_refused() -> None:
    said = r"^loop.seed: given twice, as 'loop.seed=1,2' and as '\+\+loop.seed=3'. Leave one of them out\.$"
    with pytest.raises(ConfigError, match=said):
        compose.understood(["-m", "loop.seed=1,2", "++loop.seed=3"])


def test_a_sweep_that_would_never_begin_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^loop.seed: 'loop.seed=range\(1,1e12\)' is more than 10,000 values"):
        compose.understood(["-m", "loop.seed=range(1,1e12)"])
    compose.understood(["-m", "loop.seed=range(0,10000)", "optim.lr=interval(0,1)", "model=glob(tiny*)"])


def test_the_options_of_schedules_are_those_of_transformers() -> None:
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        if str(kind.value) in OPTIONS and OPTIONS[str(kind.value)]:
            code = function.__code__
            assert set(OPTIONS[str(kind.value)]) == {*code.co_varnames[: code.co_argcount]} - ours
            required = code.co_argcount - len(function.__defaults__ or ())
            needed = {*code.co_varnames[:required]} - ours
            assert needed <= {*NEEDED.get(str(kind.value), ())}
    assert set(OPTIONS) == set(RULES["schedule.kind"].names)


class Declared(SGD):
    """An optimizer of a user's own, that checks nothing."""

    def __init__(self, params: Any, lr: float, weight_decay: float, name: str, count: int | None = None) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.name, self.count = name, count


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": 3}, "optim.name: 3 is not allowed; a text."),
        ({"name": "a", "count": "3"}, "optim.count: '3' is not allowed; an integer, or null."),
        ({"name": "a", "count": 2.0}, "optim.count: 2.0 is not allowed; an integer, or null."),
        ({"name": "a", "count": True}, "optim.count: true is not allowed; an integer, or null."),
    ],
)
def test_an_option_is_held_against_the_type_that_its_class_declares(options: dict[str, Any], said: str) -> None:
    fixed = {"lr": 0.1, "weight_decay": 0.0}
    check_optimizer(f"{__name__}.Declared", fixed, {"name": "a", "count": None})
    with pytest.raises(ConfigError) as caught:
        check_optimizer(f"{__name__}.Declared", fixed, options)
    assert str(caught.value).startswith(said)


def test_the_nearest_name_is_found_whatever_its_case() -> None:
    assert nearest("CPU", ["auto", "cpu"]) == "cpu"
    assert nearest("lora", ["LoKr", "LoRA"]) == "LoRA"
