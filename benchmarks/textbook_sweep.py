"""The textbook loop of peers.py under Hydra, as its tutorial has it: one job after the other.

python benchmarks/textbook_sweep.py -m lr=0.001,0.01 data=DIR
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from peers import textbook


@dataclass
class Work:
    work: str = "mlp_small"
    optim: str = "adam"
    lr: float = 0.001
    batch_size: int = 64
    epochs: int = 1
    seed: int = 0
    data: str = MISSING


ConfigStore.instance().store("work", Work)


@hydra.main(version_base=None, config_name="work", config_path=None)
def main(config: Work) -> float:
    work = argparse.Namespace(**config, save=None, weights=None)  # type: ignore[arg-type]
    return textbook(work).accuracy


if __name__ == "__main__":
    main()
