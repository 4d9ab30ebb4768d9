"""Methods by the kind of choice that they carry out, in the order in which they run."""

from __future__ import annotations

from spaces.methods.activate import Activation
from spaces.methods.base import Method
from spaces.methods.codebook import Codebooks
from spaces.methods.drop import Dropping
from spaces.methods.factorize import Factorization
from spaces.methods.gate import ConstantGates
from spaces.methods.proposals import ProposalCount
from spaces.methods.prune import Pruning
from spaces.methods.quantize import Quantization
from spaces.methods.resize import Resizing
from spaces.methods.topk import PreNmsTopK

METHODS: dict[str, Method] = {
    "prune": Pruning(),
    "factorize": Factorization(),
    "activate": Activation(),
    "quantize": Quantization(),
    "codebook": Codebooks(),
    "gate": ConstantGates(),
    "drop": Dropping(),
    "resize": Resizing(),
    "proposals": ProposalCount(),
    "topk": PreNmsTopK(),
}
