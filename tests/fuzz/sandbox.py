"""A command in a forked child with limits on memory and time, and what became of it."""

import faulthandler
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MEMORY = 2 << 30  # bytes a child may allocate, and that may be resident, beside its parent's
PROCESSOR_SECONDS = 20  # for an input
SECONDS = 200  # on the clock: for what waits; what computes on a busy machine may take its time
LONGEST = 300  # characters of a message

# What became of an input, worst first; the last two are as it should be.
FAILURES = ("executed", "crash", "hang", "memory", "traceback", "wrong", "wordy")
KINDS = (*FAILURES, "refused", "ok")

_NO_MEMORY = re.compile(
    "MemoryError|bad_alloc|[Cc]an(?:no|')t allocate memory|Unable to allocate"
    "|not enough memory|Insufficient memory|DefaultCPUAllocator"
)
_CANARY = "canary"


@dataclass
class Step:
    """A command that has been run: `code` is its exit code, None where it raised `exception`."""

    name: str
    code: int | None
    out: str
    err: str
    seconds: float
    exception: str = ""  # type and message
    place: str = ""  # file:line of the innermost frame in the repository

    @property
    def accepted(self) -> bool:
        return self.code == 0

    @property
    def message(self) -> str:
        """What it said on stderr when it refused: all from the word "error" on."""
        found = re.search(r"^(\S+\.py: )?error: ", self.err, re.MULTILINE)
        return self.err[found.start() :].strip() if found else ""


@dataclass
class Outcome:
    """`kind` is one of KINDS; `place` is file:line."""

    kind: str
    detail: str = ""
    place: str = ""
    mutation: str = ""
    rss: int = 0  # bytes, the peak
    seconds: float = 0.0  # of a processor
    steps: list[Step] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES

    @property
    def signature(self) -> tuple[str, str, str]:
        """Equal for inputs that fell for one reason, as far as can be told."""
        if self.kind not in ("wrong", "wordy"):
            return self.kind, self.detail.split(":")[0], self.place
        change = self.mutation.partition(" = ")[0] if self.kind == "wrong" else ""
        words = re.sub(r"\S*(?:layer|conv1|encoder|res\d|stem)\S*", "*", f"{self.detail} {change}")
        return self.kind, re.sub(r"[\d.e+-]*\d|'[^']*'|/\S+", "*", words)[:140], self.place


# -- in the child ---------------------------------------------------------------------------------


def run_command(folder: Path, script: str, *arguments: object, name: str = "") -> Step:
    """A script of the repository in this process, as `python SCRIPT ARGUMENTS`."""
    path = REPOSITORY / script

    def call() -> None:
        sys.argv = [str(path), *map(str, arguments)]
        runpy.run_path(str(path), run_name="__main__")

    return run_call(folder, name or path.stem, call)


def run_call(folder: Path, name: str, call: Callable[[], object]) -> Step:
    """`call` as a step of the input in `folder`, its output in files; it is recorded."""
    paths = [folder / f"{name}.{stream}" for stream in ("out", "err")]
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    code, exception, place, begun = 0, "", "", time.process_time()
    try:
        call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        code, exception = None, f"{type(error).__name__}: {error}"[:500]
        place = _place((f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__))
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    out, err = (path.read_text(errors="replace")[-20000:] for path in paths)
    step = Step(name, code, out, err, time.process_time() - begun, exception, place)
    with open(folder / "steps", "a") as file:
        file.write(json.dumps(vars(step)) + "\n")
    return step


def _place(frames: Iterable[tuple[str, int]]) -> str:
    """The last of the frames that is of the product, outermost first."""
    place = ""
    for name, line in frames:
        path = Path(name)
        if path.is_relative_to(REPOSITORY) and "tests" not in path.parts:
            place = f"{path.relative_to(REPOSITORY)}:{line}"
    return place


def _live(folder: Path, work: Callable[[Path], Any]) -> None:
    """The child's life; `work` returns what the parent is to know, as JSON."""
    os.setpgid(0, 0)
    os.chdir(folder)
    most = MEMORY + _held("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log = open(folder / "fault", "w")  # noqa: SIM115
    faulthandler.enable(log)
    # What computes too long says where, too, before it ends.
    faulthandler.register(signal.SIGXCPU, log, chain=True)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS + 5))
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=log)
    try:
        (folder / "verdict").write_text(json.dumps(work(folder)))
    except BaseException:
        (folder / "broken").write_text(traceback.format_exc())
    os._exit(0)


def _held(what: str) -> int:
    """Bytes that this process has, VmData or VmRSS: a child begins with them."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


# -- in the parent --------------------------------------------------------------------------------


def run_all(
    works: Iterator[tuple[Any, Callable[[Path], Any]]], root: Path, jobs: int, keep: bool = False
) -> Iterator[tuple[Any, Outcome]]:
    """Run each (key, work) in a child of its own, `jobs` at a time; yields as they end.

    `work(folder)` gets an empty folder, calls `run_command`, and returns [mutation, complaint]:
    what it had changed, and "" or what is wrong with the results.

    Raises:
        RuntimeError: `work` itself has failed, outside of a command.
    """
    running: dict[int, tuple[Any, Path, float, int]] = {}
    numbers = iter(range(1 << 62))
    while True:
        while len(running) < jobs and (found := next(works, None)):
            key, work = found
            folder = root / f"{next(numbers)}"
            folder.mkdir()
            pid = os.fork()
            if pid == 0:
                _live(folder, work)
            running[pid] = key, folder, time.monotonic(), _held("VmRSS")
        if not running:
            return
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            _kill_late(running)
            time.sleep(0.002)
        elif pid in running:
            key, folder, _, held = running.pop(pid)
            outcome = _outcome(folder, status, usage.ru_maxrss * 1024, MEMORY + held)
            outcome.seconds = usage.ru_utime + usage.ru_stime
            yield key, outcome
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _kill_late(running: dict) -> None:
    for pid, (_, _, begun, _) in running.items():
        if time.monotonic() - begun > SECONDS + 15:  # its own watchdog has not got hold of it
            os.killpg(pid, signal.SIGKILL)


def canary(folder: Path) -> Path:
    """The file that a payload writes."""
    return folder / _CANARY


def _outcome(folder: Path, status: int, rss: int, most: int) -> Outcome:
    def read(name: str) -> str:
        path = folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    if read("broken"):
        raise RuntimeError(f"an input could not be made or judged:\n{read('broken')}")
    steps = [Step(**json.loads(line)) for line in read("steps").splitlines()]
    mutation, complaint = json.loads(read("verdict") or '["", ""]')
    kind, detail, place = _judge(folder, status, rss, most, steps, complaint, read("fault"))
    return Outcome(kind, detail, place, mutation or read("mutation"), rss, steps=steps)


def _judge(folder, status, rss, most, steps, complaint, fault) -> tuple[str, str, str]:
    """(kind, detail, place): the worst thing that has happened."""
    if canary(folder).exists():
        return "executed", "a payload in the file was run", ""
    if os.WIFSIGNALED(status) or "Timeout (" in fault:
        found = re.findall(r'File "(.*?)", line (\d+)', fault)
        place = _place((name, int(line)) for name, line in reversed(found))
        if "Timeout (" in fault or os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
            return "hang", "no end within the limits of time", place
        return "crash", signal.Signals(os.WTERMSIG(status)).name, place
    texts = [(step, f"{step.out}{step.err}{step.exception}") for step in steps]
    for step, text in texts:
        if found := _NO_MEMORY.search(text):
            line = next(line for line in text.splitlines() if found[0] in line)
            return "memory", f"{step.name}: {line[-200:]}", step.place
    if rss > most:
        return "memory", f"a peak of {rss >> 20} MB", ""
    for step, text in texts:
        if step.code is None or "Traceback (most recent call last)" in text:
            return "traceback", step.exception or text.strip().splitlines()[-1], step.place
    if complaint:
        return "wrong", complaint, ""
    wordy = next((f"{s.name}: {found}" for s in steps if (found := _wordiness(s))), "")
    if wordy:
        return "wordy", wordy, ""
    return ("refused" if any(not step.accepted for step in steps) else "ok"), "", ""


def _wordiness(step: Step) -> str:
    """What is wrong with the form of a refusal."""
    if step.accepted:
        return ""
    lines = step.message.splitlines() or [line for line in step.out.splitlines() if line]
    if not lines:
        return f"exit code {step.code} without a word"
    if step.message and len(lines) > 1:
        return f"{len(lines)} lines: {lines[0][:120]} / {lines[1][:60]}"
    longest = max(lines, key=len)
    return f"{len(longest)} characters: {longest[:120]}" if len(longest) > LONGEST else ""
