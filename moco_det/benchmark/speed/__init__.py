"""Speed and memory, each beside a reference in the same run.

`pretraining` times a step and the data path, `cost` the mechanisms of Table 3 of MoCo v2,
`detector` a detector in either engine. tools/benchmark.py prints all of them.
"""

import resource
from pathlib import Path

import torch


def peak_memory_of_process(device: torch.device) -> int:
    """Bytes that this process has taken at most: of `device`'s memory if it is a GPU, else in all.

    On a CPU the libraries count as well.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss counts the parent process as well
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
