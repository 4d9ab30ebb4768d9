"""Where a training stands between two epochs: enough to go on as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingState:
    """A network in training, its optimizer and its sources of randomness, as plain data.

    The tensors are those of the training itself: write them down before it goes on.

    Attributes:
        epochs: passes so far.
        network, optimizer: their state dictionaries.
        random: state of NumPy's generator, JSON.
        torch_random: state of torch's default generator.
    """

    epochs: int
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    random: str
    torch_random: Tensor

    @staticmethod
    def of(
        epochs: int, network: nn.Module, optimizer: torch.optim.Optimizer, random: np.random.Generator
    ) -> TrainingState:
        """The state after `epochs` passes."""
        drawn = json.dumps(random.bit_generator.state)
        return TrainingState(
            epochs, network.state_dict(), optimizer.state_dict(), drawn, torch.get_rng_state()
        )

    def restore(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, random: np.random.Generator
    ) -> int:
        """Bring a training of the same network to this state; returns the epochs that it has behind it.

        Raises:
            RuntimeError: the network has other weights than this one.
        """
        network.load_state_dict(self.network)
        optimizer.load_state_dict(self.optimizer)
        random.bit_generator.state = json.loads(self.random)
        torch.set_rng_state(self.torch_random)
        return self.epochs
