"""The launcher of ``-m``: checks every job's configuration, then runs each as a process of its own.

A sweep itself is ``lowrank/sweep/``; here is what Hydra asks of a plug-in. Hydra executes this file at each start,
``--help`` included, so nothing here imports torch; and before it is in ``sys.modules``, so nothing here is a dataclass.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from lowrank import compose, config
from lowrank.errors import ConfigError, Interrupted, LowrankError
from lowrank.rules import POSITIVE, or_null, unknown_key
from lowrank.secrets import redacted, redacted_tree
from lowrank.sweep.names import file_name, sweep_name

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # passed on to the running jobs, which save
OWN = ("n_jobs", "threads")


def typed(root: DictConfig) -> list[str]:
    """A command's overrides as they were written: one may hold an interpolation."""
    given: Any = OmegaConf.to_container(root.hydra.overrides, resolve=False)
    return list(given["task"])


OmegaConf.register_new_resolver("file_name", file_name, replace=True)
OmegaConf.register_new_resolver("sweep_name", lambda *, _root_: sweep_name(typed(_root_)), replace=True)


class Outcome(JobReturn):
    @property
    def return_value(self) -> Any:  # without the line that Hydra's own prints in front of the error
        if self.status is JobStatus.FAILED and self._return_value is not None:
            raise self._return_value
        return self._return_value


class IsolatedLauncher(Launcher):
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.lanes: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        for key, value in self.options.items():
            if key not in OWN:
                raise unknown_key(f"hydra.launcher.{key}", OWN)
            or_null(POSITIVE).read(f"hydra.launcher.{key}", value)
        self.loader, self.config = hydra_context.config_loader, config
        given: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        self.hydra_overrides, self.common = given["hydra"], {o.casefold() for o in given["task"]}
        self.script = inspect.getfile(inspect.unwrap(task_function))
        self.folder = Path(str(config.hydra.sweep.dir)).resolve()
        # Hydra's own sweeper would end the sweep at the first batch with a failure; the others take it for an answer.
        self.raises = not str(config.hydra.sweeper._target_).endswith(".BasicSweeper")
        atexit.register(self.leave)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from lowrank.sweep import launch  # what a sweep needs, --help does not

        settings = config.sweeping({"sweep": self.config.get("sweep", {})})
        asked = [self.prepare(i, list(overrides)) for i, overrides in enumerate(job_overrides, initial_job_idx)]
        jobs = list({job.folder: job for job, _ in asked}.values())
        origins = {(job.folder, job.origin) for job, _ in asked}
        if len(origins) > len(jobs):
            raise ConfigError("hydra.sweep.subdir: two jobs would share a folder. No job was started.")
        self.redact()
        self.lanes = self.lanes or launch.lanes(jobs, *(self.options.get(key) for key in OWN))
        schedule = launch.schedule(jobs, self.lanes, settings, self.folder)
        before = {number: signal.signal(number, schedule.stop) for number in STOPPING}
        try:
            if (
                before[signal.SIGINT] == signal.SIG_DFL
            ):  # as train.py's own handler leaves it: a signal came before this
                raise Interrupted("interrupted. No job was started.")
            ends = launch.run(schedule, settings)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return [self.told(job, node, ends[job.folder]) for job, node in asked]

    def told(self, job: Any, node: DictConfig, end: Any) -> Outcome:
        """``end``: the number that the sweeper is told, and why there is none."""
        value, cause = end
        error = LowrankError(f"{job.folder}: {cause}") if cause and self.raises else None
        status = JobStatus.FAILED if cause else JobStatus.COMPLETED
        return Outcome(list(job.overrides), node, None, str(job.folder), "train", status, error if cause else value)

    def prepare(self, number: int, overrides: list[str]) -> tuple[Any, DictConfig]:
        """The job, composed and checked, and its tree without Hydra's part. Raises ConfigError naming it."""
        from lowrank.sweep import launch

        shown = redacted(" ".join(o for o in overrides if o.casefold() not in self.common))
        digest = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:8]
        try:
            node = self.loader.load_sweep_config(self.config, overrides)
            self.name(node, id=digest, num=number, override_dirname=shown)
            own = OmegaConf.masked_copy(node, [key for key in node if key != "hydra"])
            parsed = config.parse(own)
            origin = launch.Origin.of(parsed)
            self.name(node, id=origin.digest)
            folder = self.folder / str(node.hydra.sweep.subdir)
        except Exception as error:
            known = compose.translate(error)
            raise ConfigError(f"job {number + 1} ({shown}): {known}\nNo job was started.") from error
        place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        mine = (f"hydra.job.num={number}", f"hydra.job.id='{origin.digest}'")
        process = (*self.hydra_overrides, *mine, "hydra.mode=RUN", f"hydra.run.dir='{place}'")
        made = launch.Job(number, tuple(overrides), shown, folder, parsed.to_dict(), origin, self.start(), process)
        return made, own

    def name(self, node: DictConfig, **names: Any) -> None:
        """What ``${hydra:job…}`` in the job's own values and in its folder's name is."""
        OmegaConf.set_readonly(node.hydra, False)  # as the line below leaves it
        with open_dict(node.hydra.job):
            node.hydra.job.update(**names)
        HydraConfig.instance().set_config(node)

    def start(self) -> tuple[str, ...]:
        hydra, flags = self.config.hydra, {"main": "--config-path", "command-line": "--config-dir"}
        places = [f"{flags[s.provider]}={s.path}" for s in hydra.runtime.config_sources if s.provider in flags]
        return (sys.executable, self.script, f"--config-name={hydra.job.config_name}", *places)

    def redact(self) -> None:
        """What Hydra wrote of the command line, without the secrets that were in it."""
        path = self.folder / "multirun.yaml"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if redacted(text) != text:
            written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            OmegaConf.save(OmegaConf.create(redacted_tree(written)), path)

    def leave(self) -> None:
        """Workers end. A sweep that was refused before its first job leaves nothing: Hydra wrote multirun.yaml."""
        if self.lanes is not None:
            for lane in self.lanes.each:
                lane.leave()
        if self.folder.is_dir() and os.listdir(self.folder) == ["multirun.yaml"]:
            (self.folder / "multirun.yaml").unlink()
            compose.discard(self.folder)
