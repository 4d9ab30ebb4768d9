"""Train a baseline; called again, it goes on where it stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from evaluators.baseline import BaselineConfig, train_baseline
from spaces.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="weights to write, .safetensors")
    parser.add_argument("--folder", type=Path, default=Path("runs/baselines"), help="cache and checkpoint")
    parser.add_argument("--start", type=Path, help="weights to begin with")
    parser.add_argument("--score-every", type=int, default=10, help="epochs between scores on select")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        config = BaselineConfig.read(options.config)
        train_baseline(config, options.output, options.folder, options.start, options.score_every, _say)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
