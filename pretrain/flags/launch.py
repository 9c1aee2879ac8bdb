"""From flags to processes, and to what a run's processes get of them."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from moco_det.common.errors import UserError, exit_cleanly
from moco_det.common.files import check_output_file
from moco_det.common.launch import (
    check_url,
    free_local_url,
    process_group,
    spawn,
    torchrun_ranks,
)
from moco_det.common.processes import on_main, workers_per_process
from pretrain.data.images import Loading
from pretrain.engine.trainer import RunSettings


def launch(run: Callable, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    """Call `run(parse(arguments), device)` in every process that the flags or torchrun ask for.

    - torchrun: the processes exist; the environment says who is who.
    - `--multiprocessing-distributed`: one process per GPU of this node (one on a CPU), where
      `--world-size` counts nodes and `--rank` is this node's, as in facebookresearch/moco.
    - `--world-size N --rank R`: this is process R of N.
    - otherwise a single process.

    The process ends with the exit codes of `moco_det.common.errors`.
    """
    with exit_cleanly():
        start(run, parse(sys.argv[1:]))


def start(run: Callable, args: argparse.Namespace):
    """`launch` of parsed flags. Returns what `run` does, unless it runs in processes of its own."""
    if args.dist_url == "env://" or "TORCHELASTIC_RUN_ID" in os.environ:
        return _join(run, args, "env://", *torchrun_ranks())
    check_launch(args)
    if args.multiprocessing_distributed:
        local = torch.cuda.device_count() or 1
        nodes, node = max(args.world_size, 1), max(args.rank, 0)
        url = args.dist_url or free_local_url()
        ranks = local, node * local, nodes * local
        return spawn(_run_spawned, (run, args), *ranks, url, args.dist_backend)
    if args.world_size > 1:
        return _join(run, args, args.dist_url, args.rank, args.world_size, args.gpu or 0)
    return run(args, _device(args.gpu or 0))


def check_launch(args: argparse.Namespace) -> None:
    """Raises UserError for flags that no launch can follow, before any process starts."""
    if args.gpu is not None and not torch.cuda.is_available():
        raise UserError(f"--gpu {args.gpu}: torch finds no GPU; without the flag, the CPU is used")
    if args.gpu is not None and not 0 <= args.gpu < torch.cuda.device_count():
        raise UserError(f"--gpu {args.gpu}: there are {torch.cuda.device_count()}, counted from 0")
    if args.rank >= max(args.world_size, 1):
        raise UserError(f"--rank {args.rank}: ranks go from 0 to --world-size - 1")
    if args.world_size > 1:
        if args.rank < 0:
            raise UserError(
                f"--world-size {args.world_size} needs --rank, the number of this node (with "
                "--multiprocessing-distributed) or process"
            )
        if not args.dist_url:
            raise UserError(
                f"--world-size {args.world_size} needs --dist-url tcp://HOST:PORT, the address of "
                "rank 0"
            )
    if args.dist_url and (args.world_size > 1 or args.multiprocessing_distributed):
        check_url(args.dist_url, hosted_here=args.rank <= 0)


def _join(run: Callable, args, url: str, rank: int, world_size: int, local_rank: int):
    """Become process `rank` of `world_size` and run."""
    device = _device(local_rank)
    group = process_group(url, rank, world_size, local_rank, args.dist_backend)
    with group if world_size > 1 else contextlib.nullcontext():
        return run(args, device)


def _run_spawned(run: Callable, args) -> None:
    run(args, _device(torch.cuda.current_device() if torch.cuda.is_available() else 0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"GPU {local_rank} asked for; there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def check_output_files(args: argparse.Namespace) -> None:
    """Raises UserError, before the work, for a file of --output or --sheet that could not be
    written. Collective."""
    for flag in ("output", "sheet"):
        path = getattr(args, flag, None)
        if path:
            on_main(check_output_file, path, f"--{flag}")


def loading(args: argparse.Namespace, device: torch.device, seed: int) -> Loading:
    """What the flags of a training command say of its batches."""
    workers = workers_per_process(args.workers)
    return Loading(args.batch_size, seed, workers, device.type == "cuda", args.max_unreadable)


def run_settings(args: argparse.Namespace, seed: int) -> RunSettings:
    """What the flags of a training command say of its length, its reports and its output."""
    return RunSettings(
        output=Path(args.output),
        arch=args.arch,
        config=vars(args) | {"seed": seed},
        batch_size=args.batch_size,
        epochs=args.epochs,
        start_epoch=args.start_epoch,
        print_freq=args.print_freq,
        save_steps=args.save_steps,
        trackers=tuple(name for name in args.log if name != "none"),
    )
