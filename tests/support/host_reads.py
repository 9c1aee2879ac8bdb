"""What makes a host wait for its GPU, found without one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# To the host goes the value of an element, or how long a result is; also where a mask is an index.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostReads(TorchDispatchMode):
    """While open, notes in `names` every operation that would wait.

    Copies between host and device cannot be seen on a CPU: on a GPU CUDA's own check is on as well,
    and makes an error of all that waits.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.on_gpu = device == "cuda"
        self.names = []

    def __enter__(self):
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *exception):
        if self.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or masked:
            self.names.append(name)
        return function(*args, **(kwargs or {}))
