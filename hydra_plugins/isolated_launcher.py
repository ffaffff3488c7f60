"""The launcher of ``-m``: checks every job's configuration, then runs each as a process of its own.

Hydra executes this file at each start, ``--help`` included, so nothing here imports torch; and before it is in
``sys.modules``, so nothing here is a dataclass.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from lowrank import compose, config
from lowrank.errors import ConfigError, Interrupted, LowrankError
from lowrank.secrets import redacted, redacted_tree

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # passed on to the running job, which saves


def file_name(text: str) -> str:
    """A readable file name, far below every file system's limit."""
    return re.sub(r"[^\w.=+-]+", "_", text)[:60].strip("_") or "job"


OmegaConf.register_new_resolver("file_name", file_name, replace=True)


class Job(NamedTuple):
    overrides: list[str]
    shown: str  # those of them that the command line did not give all jobs alike
    folder: Path
    identity: list[str]  # hydra.job's own part of the command
    node: DictConfig  # composed, without hydra's part


class Outcome(JobReturn):
    @property
    def return_value(self) -> Any:  # without the line that Hydra's own prints in front of the error
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value


class IsolatedLauncher(Launcher):
    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        given: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        self.hydra_overrides, self.common = given["hydra"], {o.casefold() for o in given["task"]}
        self.script = inspect.getfile(inspect.unwrap(task_function))
        self.sweep = Path(str(config.hydra.sweep.dir)).resolve()
        self.process: Popen[bytes] | None = None
        self.stopped_by: signal.Signals | None = None
        atexit.register(self.take_back)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        jobs = [self.prepare(i, list(overrides)) for i, overrides in enumerate(job_overrides, initial_job_idx)]
        if len({job.folder for job in jobs}) < len(jobs):
            raise ConfigError("hydra.sweep.subdir: two jobs would share a folder. No job was started.")
        self.redact()
        before = {number: signal.signal(number, self.stop) for number in STOPPING}
        if before[signal.SIGINT] == signal.SIG_DFL:  # as train.py's own handler leaves it: a signal came before this
            raise Interrupted("interrupted. No job was started.")
        try:
            causes = [self.run(job, f"[{place}/{len(jobs)}]") for place, job in enumerate(jobs, 1)]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        failed = [f"  {job.folder}: {cause}" for job, cause in zip(jobs, causes, strict=True) if cause]
        error = LowrankError("\n".join([f"{len(failed)} of {len(jobs)} jobs failed:", *failed]))
        ends = [(JobStatus.FAILED, error) if cause else (JobStatus.COMPLETED, None) for cause in causes]
        return [Outcome(j.overrides, j.node, None, str(j.folder), "train", *e) for j, e in zip(jobs, ends, strict=True)]

    def prepare(self, number: int, overrides: list[str]) -> Job:
        """The job, composed and checked. Raises ConfigError naming it."""
        shown = redacted(" ".join(o for o in overrides if o.casefold() not in self.common))
        digest = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:8]
        try:
            node = self.loader.load_sweep_config(self.config, overrides)
            with open_dict(node.hydra.job):
                node.hydra.job.update(id=digest, num=number, override_dirname=shown)
            HydraConfig.instance().set_config(node)  # for ${hydra:…} in the job's own values
            own = OmegaConf.masked_copy(node, [key for key in node if key != "hydra"])
            config.parse(own)
            folder = self.sweep / str(node.hydra.sweep.subdir)
        except Exception as error:
            known = compose.translate(error)
            raise ConfigError(f"job {number + 1} ({shown}): {known}\nNo job was started.") from error
        return Job(overrides, shown, folder, [f"hydra.job.num={number}", f"hydra.job.id='{digest}'"], own)

    def command(self, job: Job) -> list[str]:
        hydra, flags = self.config.hydra, {"main": "--config-path", "command-line": "--config-dir"}
        places = [f"{flags[s.provider]}={s.path}" for s in hydra.runtime.config_sources if s.provider in flags]
        folder = str(job.folder).replace("\\", "\\\\").replace("'", "\\'")
        own = [*job.identity, "hydra.mode=RUN", f"hydra.run.dir='{folder}'"]
        head = [sys.executable, self.script, f"--config-name={hydra.job.config_name}", *places]
        return [*head, *job.overrides, *self.hydra_overrides, *own]

    def run(self, job: Job, place: str) -> str:
        """Runs one job to its end; the cause of its failure, or the empty string."""
        print(place, job.shown, "→", job.folder, flush=True)
        with tempfile.NamedTemporaryFile("r", prefix="lowrank-") as told:
            environment = {**os.environ, "LOWRANK_CAUSE": told.name}
            # A process group of its own: Ctrl-C reaches this process alone, which passes it on, once.
            self.process = Popen(self.command(job), stdin=DEVNULL, env=environment, process_group=0)
            if self.stopped_by:
                self.process.send_signal(self.stopped_by)
            code, cause = self.process.wait(), told.read().strip()
        if self.stopped_by:
            raise Interrupted(f"{self.stopped_by.name} in {job.folder}. The jobs after it did not start.")
        status = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        print(place, "done" if code == 0 else f"failed ({status})", flush=True)
        return "" if code == 0 else cause or status

    def redact(self) -> None:
        """What Hydra wrote of the command line, without the secrets that were in it."""
        path = self.sweep / "multirun.yaml"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if redacted(text) != text:
            written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            OmegaConf.save(OmegaConf.create(redacted_tree(written)), path)

    def stop(self, number: int, frame: object) -> None:
        self.stopped_by = signal.Signals(number)
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def take_back(self) -> None:
        """A sweep that was refused before its first job leaves nothing: Hydra had written multirun.yaml."""
        if self.process is None and self.sweep.is_dir() and os.listdir(self.sweep) == ["multirun.yaml"]:
            (self.sweep / "multirun.yaml").unlink()
            compose.discard(self.sweep)
