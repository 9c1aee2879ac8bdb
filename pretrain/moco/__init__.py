"""The pretext task, and where its keys come from: MoCo and what the paper compares it with.

Start with `instance_discrimination.py`, what all mechanisms share, then `momentum_contrast.py`,
the paper's Algorithm 1, on which `nearest_neighbours.py` builds. Everything here is a function of
tensors: no files, no flags, no loop.
"""

from torch import nn

from pretrain.moco.end_to_end import EndToEnd
from pretrain.moco.instance_discrimination import InstanceDiscrimination
from pretrain.moco.memory_bank import MemoryBank
from pretrain.moco.momentum_contrast import MoCo
from pretrain.moco.nearest_neighbours import NearestNeighbourMoCo

# The mechanisms of Fig. 2 (arXiv:1911.05722) by the names of --mechanism.
MECHANISMS = {"moco": MoCo, "end-to-end": EndToEnd, "memory-bank": MemoryBank}


def build_mechanism(
    name: str,
    encoder: nn.Module,
    *,
    dim: int = 128,
    negatives: int = 65536,
    samples: int,
    key_momentum: float = 0.999,
    bank_momentum: float = 0.5,
    temperature: float = 0.07,
    bn_groups: int = 1,
    shuffle_bn: bool = True,
    neighbours: int = 0,
) -> InstanceDiscrimination:
    """One of MECHANISMS, which takes what it needs of the settings.

    Args:
        encoder: images (N, 3, H, W) -> features (N, dim).
        negatives: K, length of MoCo's queue or draws from the memory bank.
        samples: images of the data set, the rows of the memory bank.
        key_momentum, bank_momentum: m of MoCo's key encoder, and of the memory bank's rows.
        temperature, bn_groups, shuffle_bn: see InstanceDiscrimination.
        neighbours: k of kNN-MoCo; 0 for MoCo without.
    """
    if name == "end-to-end":
        return EndToEnd(encoder, temperature, bn_groups, shuffle_bn)
    if name == "memory-bank":
        return MemoryBank(encoder, samples, dim, negatives, bank_momentum, temperature, bn_groups)
    moco = encoder, dim, negatives, key_momentum, temperature, bn_groups, shuffle_bn
    return NearestNeighbourMoCo(*moco, neighbours) if neighbours else MoCo(*moco)
