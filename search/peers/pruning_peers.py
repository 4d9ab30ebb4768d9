"""The same share of the channels of every layer, by torch-pruning itself, and the search's own training."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch_pruning as tp

from evaluators.bench import Bench
from evaluators.finetune import fine_tune
from search.peers.models import PeerModel
from search.peers.nncf_peers import quantised
from spaces.layers import learning
from spaces.norms import TRACED_NORMS

RATIOS = (0.125, 0.25, 0.5)


def pruned_peers(bench: Bench, directory: Path) -> list[PeerModel]:
    """Uniformly pruned in groups of 8 channels by magnitude, trained as a candidate is; bfloat16, and int8.

    Args:
        bench: of the study, with OpenVINO as its target.
        directory: where the files go.
    """
    peers = []
    for ratio in RATIOS:
        folder = directory / f"pruned_{ratio:g}"
        file = folder / bench.target.model_file
        name = f"torch-pruning {ratio:.1%}".replace(".0%", "%")
        if not file.exists():
            _prune(bench, ratio, folder)
        peers += [
            PeerModel(f"{name}, bf16", file, hint="bf16"),
            PeerModel(f"{name}, int8 + bf16", quantised(bench, file, folder, "nncf conv only"), hint="bf16"),
        ]
    return peers


def _prune(bench: Bench, ratio: float, folder: Path) -> None:
    network = learning(copy.deepcopy(bench.base), bench.frozen)
    kept = bench.detector.output_layers(network)
    with bench.slot.computing():
        pruner = tp.pruner.BasePruner(
            network,
            torch.zeros(1, 3, *bench.detector.preprocess.size),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            round_to=8,
            ignored_layers=[network.get_submodule(name) for name in sorted(kept)],
            customized_pruners=TRACED_NORMS,
        )
        pruner.step()
    plan, seed = bench.config.finetune, bench.config.seed
    for _ in fine_tune(network, bench.detector, bench.fit, bench.teacher, plan, bench.slot, seed):
        pass
    with bench.slot.computing():
        bench.export(network.eval(), {}, bench.identity, folder)
