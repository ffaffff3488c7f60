"""Trains one run, or with -m a sweep. ``python train.py --help`` says how."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lowrank import compose, config
from lowrank.sweep import standing
from lowrank.sweep.death import end_with_launcher
from lowrank.sweep.failures import failures
from lowrank.train.stopping import Stopping

os.environ.setdefault("LOWRANK_OUTPUTS", str(Path(__file__).resolve().parent / "outputs"))
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; what a user reads is ours
gc.set_threshold(50_000)  # new objects: a start makes millions that stay, and looking through them was a fifth of it
stopping = Stopping()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(node: DictConfig) -> float | None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with compose.of_job(folder):
        settings = config.parse(node)
        from lowrank import run  # imports torch, which --help and --cfg do not wait for
        from lowrank.report import terminal

        if config.planning(node):
            for text in run.plan(settings, folder):
                print(text)
            return None
        command = shlex.join(["python", "train.py", *HydraConfig.get().overrides.task])
        done = run.train(settings, folder, command, stopping)
        terminal.closing(folder, done.summary, done.samples)
        metric = config.sweeping(node).metric if compose.called_by_launcher() else None
        return None if metric is None else standing.number(folder, metric)


if __name__ == "__main__":
    with stopping.held(), compose.reporting():  # a run heeds signals; modules that import would swallow one
        end_with_launcher()
        stopping.install()
        sys.argv[1:] = compose.understood(sys.argv[1:])
        with failures.named():
            main()
