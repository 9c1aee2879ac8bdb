"""What one process of each machine reads, and the others of that machine share with it.

    once_per_machine   a check that need not be made by all of them
    shared_list        a long list of objects, made by one process and mapped by the others
    PackedList         such a list: its objects as bytes in one block of memory

The block is a file without a name (memfd): it needs no room in /dev/shm and no folder that can be
written to, and is gone with the last process that has it, killed or not.
"""

import mmap
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moco_det.common.errors import UserError, one_line
from moco_det.common.processes import all_objects, rank, synchronize, world_size


class PackedList(Sequence):
    """Objects that are unpickled when they are asked for, each time anew.

    Thereby processes share their memory: touching a Python object writes its reference count, and
    so copies it to each of them in time. Handed to another process, it is mapped there.

    Args:
        block: the pickled objects one after the other, and then their ends and the notes; see
            `of`, which makes it.
        file: what the block is mapped from, if anything.

    Attributes:
        notes: what was given with the objects, of a few bytes for each.
    """

    def __init__(self, block: bytes | mmap.mmap, file: Any = None):
        self.block, self.file = block, file
        count, noted = np.frombuffer(block, np.int64, 2, len(block) - 16).tolist()
        numbers = len(block) - 16 - 8 * (count + 1)  # where they begin
        self.ends = np.frombuffer(block, np.int64, count + 1, numbers)
        self.notes = pickle.loads(memoryview(block)[numbers - noted : numbers])

    @classmethod
    def of(cls, items: Iterable, notes: Any = None) -> "PackedList":
        """Raises OSError where the machine has no memory for the block."""
        try:
            descriptor = os.memfd_create("moco_det")
        except (AttributeError, OSError):  # not Linux, or forbidden: it cannot be shared
            return cls(b"".join(_packed(items, notes)))
        with open(descriptor, "wb", closefd=False) as file:
            file.writelines(_packed(items, notes))
        return cls._mapped(descriptor)

    @classmethod
    def at(cls, address: str) -> "PackedList":
        """The one of another process of this machine, by its `address`. Raises OSError."""
        return cls._mapped(os.open(address, os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def _mapped(cls, descriptor: int) -> "PackedList":
        file = open(descriptor, "rb")  # noqa: SIM115 (lives as long as the list)
        return cls(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), file)

    @property
    def address(self) -> str | None:
        """Where other processes of this machine and user find it as long as this one lives."""
        return self.file and f"/proc/{os.getpid()}/fd/{self.file.fileno()}"

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a list of {len(self)}")
        index %= len(self)
        return pickle.loads(memoryview(self.block)[self.ends[index] : self.ends[index + 1]])

    def __reduce__(self):
        return (PackedList.at, (self.address,)) if self.file else (PackedList, (self.block,))


def _packed(items: Iterable, notes: Any) -> Iterable[bytes]:
    """The parts of a block: objects, padding, notes, ends of the objects, two lengths."""
    ends = [0]
    for item in items:
        pickled = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        ends.append(ends[-1] + len(pickled))
        yield pickled
    pickled = pickle.dumps(notes, pickle.HIGHEST_PROTOCOL)
    yield bytes(-(ends[-1] + len(pickled)) % 8)  # the numbers after them are aligned
    yield pickled
    yield np.array([*ends, len(ends) - 1, len(pickled)], np.int64).tobytes()


# -- together --------------------------------------------------------------------------------------


def shared_list(make: Callable[[], PackedList]) -> PackedList:
    """What `make` gives in the first process of each machine, mapped by the others. Collective.

    Where that is not possible, a process says so in a line and calls `make` itself.

    Raises:
        UserError: `make` does in one of them; on every process.
    """
    if world_size() == 1:
        return make()
    first = _first_of_machine()
    packed, error = _attempt(make) if rank() == first else (None, None)
    found = _agreed(None if packed is None else packed.address, error)
    if packed is None:
        try:
            packed = PackedList.at(found[first] or "")
        except OSError as failure:
            reason = one_line(failure.strerror or failure, 80)
            print(
                f"process {rank()} reads the annotations itself: it cannot share those of process "
                f"{first}: {reason}",
                flush=True,
            )
            packed = make()
    synchronize()  # the first keeps its list until the others have mapped it
    return packed


def once_per_machine(check: Callable[..., None], *arguments) -> None:
    """`check(*arguments)` in the first process of each machine. Collective.

    Raises:
        UserError: it does in one of them; on every process.
    """
    first = world_size() == 1 or rank() == _first_of_machine()
    _, error = _attempt(lambda: check(*arguments)) if first else (None, None)
    _agreed(None, error)


def _attempt(function: Callable[[], Any]) -> tuple[Any, UserError | None]:
    try:
        return function(), None
    except UserError as error:
        return None, error


def _agreed(mine: Any, error: UserError | None) -> list:
    """Every process's `mine`; its own error, or else the first of another process, is raised."""
    everyones = all_objects((mine, error and str(error)))
    if error:
        raise error
    for _, text in everyones:
        if text:
            raise UserError(text)
    return [theirs for theirs, _ in everyones]


def _first_of_machine() -> int:
    """The lowest rank among the processes that see each other's in /proc. Collective."""
    try:
        here = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        here = ("", f"process {rank()}")  # shares with none
    machines = all_objects((os.uname().nodename, *here))
    return machines.index(machines[rank()])
