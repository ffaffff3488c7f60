"""lowrank's run in a forked child: as ``train.py`` runs it, on a tiny model, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.ordeals.arm import EVERY, STEPS, Place

# imported here, once, so that children need not; nothing of it runs a torch operation
from lowrank import compose, manifest, run
from lowrank.schema import Config
from lowrank.session import outcome, session
from lowrank.train.checkpoint import Checkpoints
from lowrank.train.stopping import Stopping

SMALL = (
    *("model=tiny_llama", "data=jsonl", "data.fields.response=output", "adapter.r=2"),
    *("adapter.dropout=0.1", "adapter.targets=[q_proj,v_proj]"),
    *("loop.micro_batch=2", "loop.device=cpu", "loop.precision=fp32", f"loop.steps={STEPS}", "optim.lr=1e-2"),
    *("eval.before=false", "eval.limit=2", "eval.generate.limit=1", "eval.generate.max_new_tokens=2"),
    *(f"checkpoint.every={EVERY}", "checkpoint.keep=2"),
)
TIMES = re.compile(rb'"(tokens_per_s|(predicted_)?peak_memory_mb|seconds)": [^,}]+')
BACKGROUND = ("checkpoint.background=true",)


@dataclass(frozen=True)
class Ours:
    """Runs of one kind: the data that they train on, and overrides that all have."""

    data: Path
    overrides: tuple[str, ...] = ()

    name = "lowrank"
    places = (
        Place("the first save", Checkpoints, "commit", 1),
        Place("a later save, which prunes", Checkpoints, "commit", 3),
        Place("the final adapter", outcome, "save_adapter", 1),
        Place("the first background save", Checkpoints, "commit", 1, BACKGROUND),
        Place("a later background save, which prunes", Checkpoints, "commit", 3, BACKGROUND),
        Place("the whole course", session.Session, "course", 1, most=60),
    )

    def having(self, *more: str) -> Ours:
        return replace(self, overrides=(*self.overrides, *more))

    def keeping(self) -> Ours:
        """The same with every checkpoint kept."""
        return self.having("checkpoint.keep=99")

    def config(self) -> Config:
        return compose.compose([*SMALL, f"data.path={self.data}", *self.overrides])

    def program(self, folder: Path) -> None:
        """What ``python train.py`` does but for Hydra's own part: errors are printed and end with their exit code."""
        stopping = Stopping()
        with stopping.held(), compose.reporting(folder):
            stopping.install()
            run.train(self.config(), folder, None, stopping)

    def again(self, folder: Path) -> None:
        """The same command, to go on."""
        self.having("checkpoint.resume=true").program(folder)

    def ended(self, folder: Path) -> dict[str, str]:
        """Hashes of all that must be equal in the end: files of tensors and rows, times left out. A run that a signal
        stopped has one more checkpoint on its way, so the last one counts."""
        last = sorted(folder.glob("checkpoints/step-*"))[-1:]
        tensors = [file for home in (*last, folder / "adapter") for file in sorted(home.glob("*.safetensors"))]
        found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in tensors}
        for path in [folder / name for name in ("metrics.jsonl", "digests.jsonl", "samples.jsonl")]:
            if path.exists():
                found[path.name] = hashlib.sha256(TIMES.sub(b"", path.read_bytes())).hexdigest()
        for path in [home / "state.json" for home in last]:
            loop = {name: v for name, v in json.loads(path.read_bytes())["loop"].items() if name != "seconds"}
            found[str(path.relative_to(folder))] = json.dumps(loop, sort_keys=True)
        summary = folder / "summary.json"
        return {**found, "status": json.loads(summary.read_bytes())["status"] if summary.exists() else "none"}

    def wrong(self, folder: Path, output: str, newest: str) -> str:
        """What is not as it must be in a run that went on, beyond its end: it went on from ``newest``."""
        said = re.search(r"resuming after step \d+ from \S*(step-\d+)", output)
        used = said[1] if said else ""
        if used != newest and "this run is done" not in output:
            return f"went on from {used or 'the start'}, but {newest or 'nothing'} was good"
        faults = [manifest.verify(path) for path in manifest.committed(folder / "checkpoints")]
        return "; ".join(fault for fault in faults if fault)

    def newest(self, folder: Path) -> str:
        """The name of the newest checkpoint that is whole; empty where there is none."""
        found, _ = manifest.newest(folder / "checkpoints")
        return found.name if found else ""
