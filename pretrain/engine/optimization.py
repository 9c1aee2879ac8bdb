"""Learning rates over a run: by epochs as in the official code, or by iterations."""

import math

import torch

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_schedule(args):
    """(epoch, step) -> factor of `args.lr`; both count from 0, the step over the whole run.

    - `--lr-decay-every S`: `--lr-decay` to the power of step // S (IG-1B: 0.9 and 62,500).
    - `--cos`: half a cosine over all epochs, constant within one as in the official code; over
      `--iterations`, where that is the length of the run.
    - otherwise 0.1 at each epoch of `--schedule`.
    """
    if args.lr_decay_every:
        return lambda epoch, step: args.lr_decay ** (step // args.lr_decay_every)
    if args.cos and args.iterations:
        return lambda epoch, step: cosine_decay(step / args.iterations)
    if args.cos:
        return lambda epoch, step: cosine_decay(epoch / args.epochs)
    return lambda epoch, step: step_decay(epoch, args.schedule)


def step_decay(epoch: int, milestones: list[int]) -> float:
    """0.1 at each of the `milestones`, epochs counted from 0."""
    return 0.1 ** sum(epoch >= milestone for milestone in milestones)


def cosine_decay(done: float) -> float:
    """1 at the beginning (done = 0), 0 at the end (done = 1)."""
    return 0.5 * (1.0 + math.cos(math.pi * done))
