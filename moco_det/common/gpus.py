"""Between the host and its GPU, in either direction, without one waiting for the other.

On a CPU all of this is what it would be without.
"""

from typing import Any

import torch
from torch import Tensor


def has_bfloat16(device: torch.device) -> bool:
    """Whether the GPU computes in bfloat16: from compute capability 8.0 on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. A GPU copies it in its own time: from memory that is not
    pinned the host would wait until it has done so, and before that all else it was given."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class HostCopy:
    """A tensor, or those in dicts and lists, on the way to the host while the device works on."""

    def __init__(self, value: Any):
        self._value = _to_host(value)
        self._copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if self._copied:
            self._copied.record()

    def wait(self) -> Any:
        """`value` with its tensors on the CPU."""
        if self._copied:
            self._copied.synchronize()
        return self._value


def _to_host(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_host(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_to_host(entry) for entry in value]
    # From a GPU into pinned memory.
    return value.detach().to("cpu", non_blocking=True) if isinstance(value, Tensor) else value
