"""What ``lowrank --help`` shows, and of each command its own lines."""

from __future__ import annotations

EXAMPLES = """examples:
  lowrank inspect data data=jsonl data.path=my.jsonl      rows as the model reads them, targets marked
  lowrank inspect plan adapter.targets=[q_proj,v_proj]    which sites an adapter would go on
  lowrank inspect plan outputs/A outputs/B                what differs between the plans of two runs
  lowrank plan model=tiny_llama loop.micro_batch=4        what a run would need, and how fast it would be
  lowrank plan --budget 24GiB adapter.r=64                which settings fit so much memory, the fastest first
  lowrank inspect adapter outputs/RUN                     what was learnt, site by site
  lowrank generate outputs/RUN "Write a haiku."           the tuned model's answer, alone on standard output
  lowrank chat outputs/RUN                                the same, turn by turn
  lowrank evaluate outputs/RUN data=jsonl data.path=my.jsonl
  lowrank export outputs/RUN FOLDER                       the adapter in PEFT's format
  lowrank merge outputs/RUN FOLDER                        a plain transformers folder
  lowrank resume outputs/RUN                              go on where it stopped; loop.steps=200 makes it longer
  lowrank verify outputs/RUN                              is every file what the run wrote
  lowrank replay outputs/RUN                              does the run come out the same, bit for bit
  lowrank combine FOLDER outputs/A=0.5 outputs/B=0.5      one adapter of several
  lowrank check my_module:MyAdapter r=4                   does a method keep its promises
  lowrank bench --against loop.fast=false --repeats 5     which of two trains faster, in how much memory
  lowrank report outputs/RUN                              report.html anew, with this version's page
  lowrank compare outputs/multirun/SWEEP --html a.html    its runs beside one another, grouped over seeds
  lowrank compare outputs/A outputs/B --csv runs.csv      a row a configuration, for other programs
  lowrank config explain loop.max_grad_norm               what a key means, its default, where it comes from
  lowrank config explain adapter adapter=dora             the keys of a group, and overrides that choose another
  lowrank config show experiment=demo                     the whole configuration of a command
  lowrank completions bash                                a script that completes all this in a shell, or zsh
"""


def examples(command: str) -> str:
    """Those of one command."""
    head, *lines = EXAMPLES.splitlines()
    return "\n".join([head, *(line for line in lines if line.startswith(f"  lowrank {command} "))])
