"""From the flags of a run to the mechanism that it compares (arXiv:1911.05722, Fig. 2 and 3)."""

from moco_det.common.errors import UserError
from moco_det.common.processes import world_size
from pretrain.moco.encoders import build_encoder
from pretrain.moco.end_to_end import EndToEnd
from pretrain.moco.grouped_batchnorm import choose_bn_groups
from pretrain.moco.instance_discrimination import InstanceDiscrimination
from pretrain.moco.memory_bank import MemoryBank
from pretrain.moco.momentum_contrast import MoCo

MECHANISMS = {"moco": MoCo, "end-to-end": EndToEnd, "memory-bank": MemoryBank}


def build_mechanism(args, samples: int) -> InstanceDiscrimination:
    """The model of the flags `args` for a data set of `samples` images.

    Raises UserError for a batch that cannot be split, or a data set that is no more than a batch.
    """
    mechanism = MECHANISMS[args.mechanism]
    shuffled = args.shuffle_bn and mechanism is not MemoryBank
    try:
        groups = choose_bn_groups(args.batch_size, world_size(), args.bn_groups, shuffled)
    except ValueError as error:
        raise UserError(str(error)) from error
    encoder = build_encoder(args.arch, args.moco_dim, args.mlp, args.small_stem)
    if mechanism is EndToEnd:
        return EndToEnd(encoder, args.moco_t, groups, args.shuffle_bn)
    if mechanism is MoCo:
        sizes = (args.moco_dim, args.moco_k)
        return MoCo(encoder, *sizes, args.moco_m, args.moco_t, groups, args.shuffle_bn)
    if samples <= args.batch_size:
        raise UserError(
            f"--mechanism memory-bank draws negatives from the images beside the batch: {samples} "
            f"images leave none to a batch of {args.batch_size}; pass a smaller --batch-size"
        )
    sizes = (samples, args.moco_dim, args.moco_k)
    return MemoryBank(encoder, *sizes, args.bank_momentum, args.moco_t, groups)
