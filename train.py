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
from lowrank.train.stopping import Stopping

os.environ.setdefault("LOWRANK_OUTPUTS", str(Path(__file__).resolve().parent / "outputs"))
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; what a user reads is ours
gc.set_threshold(50_000)  # new objects: a start makes millions that stay, and looking through them was a fifth of it
stopping = Stopping()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(node: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with compose.reporting(folder):
        settings = config.parse(node)
        from lowrank import run  # imports torch, which --help and --cfg do not wait for
        from lowrank.report import terminal

        if config.planning(node):
            for text in run.plan(settings, folder):
                print(text)
            return
        command = shlex.join(["python", "train.py", *HydraConfig.get().overrides.task])
        done = run.train(settings, folder, command, stopping)
        terminal.closing(folder, done.summary, done.samples)


if __name__ == "__main__":
    with stopping.held(), compose.reporting():  # a run heeds signals; modules that import would swallow one
        stopping.install()
        sys.argv[1:] = compose.whole_targets(sys.argv[1:])
        main()
