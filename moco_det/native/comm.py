"""What the processes of one run ask of each other. Everything works without a process group too.

All of it travels over gloo, on CPU tensors: a run's processes need not share a CUDA device for it.
"""

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def say(message: str) -> None:
    """Print a line, once per run."""
    if is_main():
        print(message, flush=True)


def gather_rows(row: list[float]) -> torch.Tensor:
    """Every process gives a row of equal length; each gets all of them, (world_size, len(row))."""
    mine = torch.tensor(row, dtype=torch.float64)
    if world_size() == 1:
        return mine[None]
    rows = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows)


def synchronize() -> None:
    """Wait for every process."""
    gather_rows([0.0])


def gather_objects(item) -> list:
    """The items of all processes by rank, on the main process; an empty list elsewhere."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size() if is_main() else None
    dist.gather_object(item, items)
    return items or []


def from_main(item):
    """The main process's item, on every process."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box)
    return box[0]
