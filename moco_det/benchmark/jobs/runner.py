"""Carry jobs out on this machine: in order, with their output on the screen, or side by side.

A command is a process of its own, so that a job behaves as its commands typed by hand would. It
writes to its job's log itself and holds the job's lock, so that it goes on where the process that
started it is killed, and is waited for by the next one.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime, timezone
from statistics import fmean
from typing import Any, BinaryIO

import torch

from moco_det.benchmark.jobs.job import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    Command,
    Job,
    JobFolder,
    cores,
    provenance,
)
from moco_det.common import ending
from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from moco_det.common.processes import signals_handled

POLL_SECONDS = 0.2
STOP_SECONDS = 90  # what a stopped command gets to save its checkpoint
REPORT_SECONDS = 30.0  # between two lines on what runs side by side

Slot = dict[str, str]  # the variables that keep a job to its part of the machine


class JobFailed(UserError):
    """A job did not finish; `code` is what a shell would report of its command."""

    def __init__(self, job: Job, command: Command, code: int):
        self.code = code if code > 0 else 128 - code if code < 0 else 1
        reason = f"failed with exit code {self.code}" if code else "left no result"
        super().__init__(
            f"step '{command.name}' {reason}; its output is above and in {job.folder.log}. "
            f"Its command: {command.as_typed()}"
        )


# -- the time that is left ------------------------------------------------------------------------


class Eta:
    """The time that jobs still need, `at_a_time` of them side by side.

    A command takes as long as those of its name have taken; before any has ended, as long as it
    announces itself or is expected to. `now` is any clock in seconds.
    """

    def __init__(self, jobs: Sequence[Job], at_a_time: int = 1):
        self.commands = [command for job in jobs for command in job.commands]
        self._at_a_time = at_a_time
        self._begun: dict[Command, float | None] = dict.fromkeys(self.commands)  # None: not yet
        self._announced: dict[Command, float] = {}  # when a running command says that it will end
        self._measured: dict[str, list[float]] = {}  # name -> seconds

    def begin(self, command: Command, now: float) -> None:
        self._begun[command] = now
        self._announced.pop(command, None)

    def hear(self, command: Command, line: str, now: float) -> None:
        """Let the running command's own ETA, if `line` holds one, replace the expectation."""
        seconds = announced_eta(line)
        if seconds is not None:
            self._announced[command] = now + seconds

    def finish(self, command: Command, now: float) -> float:
        """Note how long the command took; returns it."""
        seconds = now - self._begun.pop(command)
        self._measured.setdefault(command.name, []).append(seconds)
        return seconds

    def drop(self, job: Job) -> None:
        """Count on nothing more from `job`."""
        for command in job.commands:
            self._begun.pop(command, None)

    def left(self, now: float) -> float | None:
        """None where nothing tells how long some command takes."""
        seconds = []
        for command, begun in tuple(self._begun.items()):  # other threads begin and finish commands
            expected = self._expected(command)
            if begun is None:
                seconds.append(expected)
            else:
                end = self._announced.get(command, expected and begun + expected)
                seconds.append(end and max(0.0, end - now))
        return None if None in seconds else sum(seconds) / self._at_a_time

    def _expected(self, command: Command) -> float | None:
        if command.name in self._measured:
            return fmean(self._measured[command.name])
        if command.seconds is None and self._measured:
            return fmean(map(fmean, self._measured.values()))
        return command.seconds


class ScreenEta(Eta):
    """An Eta that prints what it hears, as "[2/7 pretrain | 6:10 left] line"."""

    def hear(self, command: Command, line: str, now: float) -> None:
        super().hear(command, line, now)
        place = f"{self.commands.index(command) + 1}/{len(self.commands)} {command.name}"
        left = self.left(now)
        time_left = "" if left is None else f" | {clock(left)} left"
        print(f"[{place}{time_left}] {line}", flush=True)


def announced_eta(line: str) -> float | None:
    """Seconds in a line such as "... ETA 0:03:12" or "eta: 1 day, 2:03:04  iter: 7"."""
    found = re.search(r"\beta:? +(?:(\d+) days?, )?(\d+):(\d\d):(\d\d)\b", line, re.IGNORECASE)
    if not found:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def clock(seconds: float) -> str:
    """4:05, or 1:04:05 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# -- one job --------------------------------------------------------------------------------------


class Execution:
    """One job in this process's hands; `stop` may be called from another thread.

    Args:
        retries: how often a failed job is begun again, but for a user's error.
        environment: variables for the commands, beside this process's own.
        eta: hears what the commands print.
        notify: takes a line for the user.
    """

    def __init__(
        self,
        job: Job,
        retries: int = 0,
        environment: Mapping[str, str] | None = None,
        eta: Eta | None = None,
        notify: Callable[[str], Any] = print,
    ):
        self.job, self.retries, self.environment = job, retries, environment or {}
        self.eta, self.notify = eta or Eta([job]), notify
        self.command, self.code = job.commands[0], None  # the last that was begun, and its end
        # No threading.Event: a signal handler that sets one may wait for a lock for ever.
        self._stop_asked = False
        self._process: subprocess.Popen | None = None

    def stop(self) -> None:
        """Ask the job to save a checkpoint and end; `carry_out` sees to it."""
        self._stop_asked = True

    def carry_out(self) -> str:
        """Run until finished, failed or stopped; returns the state. A finished job is left alone.

        Raises:
            UserError: the folder holds a job of other settings, or cannot be written.
        """
        folder = self.job.folder
        self.job.check_identity()
        with folder.claimed(lambda: self._stop_asked, self.notify) as lock:
            if lock < 0:
                return folder.state()
            state = folder.record.get("state")
            for attempt in range(1 + self.retries if state != FINISHED else 0):
                state = self._attempt(lock)
                if state != FAILED or self._stop_asked or self._is_user_error():
                    break
                if attempt < self.retries:
                    self.notify(f"{self.job.name}: failed, trying again; see {folder.log}")
        self.eta.drop(self.job)
        return state

    def _is_user_error(self) -> bool:
        """Whether the last command refused what it was given: it would do so again.

        Such a command ends with the line that `exit_cleanly` prints, or with argparse's code.
        """
        end = self.job.folder.log_end()
        return self.code == 2 or (self.code == 1 and bool(end) and end[-1].startswith("error: "))

    def _attempt(self, lock: int) -> str:
        """Run the commands and write what came of it; returns the state."""
        job, folder = self.job, self.job.folder
        started, begun = datetime.now(timezone.utc), time.monotonic()
        earlier = folder.record
        record = {
            "name": job.name,
            "state": RUNNING,
            "identity": job.identity,
            "command": job.command,
            **job.about,
            **provenance(),
            "attempts": earlier.get("attempts", []),
            "seconds": earlier.get("seconds", 0.0),
        }
        folder.write_record(record)
        folder.repair()
        result = self._result() if self._run_commands(lock) else None
        attempt = {
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begun, 1),
            "code": self.code,
        }
        record["attempts"].append(attempt)
        record["seconds"] = round(sum(entry["seconds"] for entry in record["attempts"]), 1)
        if result is not None:
            record |= {"state": FINISHED, **result}
        else:
            stopped = self._stop_asked or self.code == EXIT_INTERRUPTED
            record["state"] = INTERRUPTED if stopped else FAILED
        folder.write_record(record)
        return record["state"]

    def _result(self) -> Mapping[str, Any] | None:
        """What the commands have left; None, and why, where it cannot be read."""
        try:
            return self.job.read_result()
        except UserError as error:
            self.notify(f"{self.job.name}: {error}")
            return None

    def _run_commands(self, lock: int) -> bool:
        """Whether all of them ended well."""
        for command in self.job.commands:
            if self._stop_asked:
                return False
            self.command = command
            self.eta.begin(command, time.monotonic())
            self.code = self._run(command, lock)
            if self.code:
                return False
            self.eta.finish(command, time.monotonic())
        return True

    def _run(self, command: Command, lock: int) -> int:
        """The exit code. Asks a stopped command to end, and kills it where it does not."""
        path = self.job.folder.log
        with open(path, "ab", buffering=0) as log, open(path, "rb") as reader:
            reader.seek(0, os.SEEK_END)
            log.write(f"$ {command.as_typed()}\n".encode())
            self._process = subprocess.Popen(
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.environment,
                pass_fds=[lock],  # held as long as the command lives, should this process be killed
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops it
            )
            while self._process.poll() is None and not self._stop_asked:
                self._hear(command, reader)
                time.sleep(POLL_SECONDS)
            self.end_process()
            code = self._process.wait()
            self._hear(command, reader, ended=True)
        return code

    def _hear(self, command: Command, log: BinaryIO, ended: bool = False) -> None:
        """Pass on the new lines; one that is not whole, once the command has ended."""
        while (line := log.readline()).endswith(b"\n") or (line and ended):
            for text in line.decode("utf-8", "replace").splitlines():
                if text.strip():
                    self.eta.hear(command, text.rstrip(), time.monotonic())
        log.seek(-len(line), os.SEEK_CUR)

    def end_process(self) -> None:
        """Have the command, if it runs, save its checkpoint and end; kill it where it does not."""
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)


# -- several jobs ---------------------------------------------------------------------------------


def run_in_order(jobs: Sequence[Job]) -> None:
    """Run what is not finished, one job after another, with their output on the screen.

    Raises:
        JobFailed: a job did not finish; the later ones are not begun.
        KeyboardInterrupt, SystemExit: after the running command was stopped.
    """
    todo = [job for job in jobs if job.folder.state() != FINISHED]
    eta = ScreenEta(todo)
    for job in todo:
        run_on_screen(job, eta)


def run_on_screen(job: Job, eta: ScreenEta) -> None:
    """One of the jobs of `run_in_order`, which see; `eta` is that of all."""
    execution = Execution(job, eta=eta)
    with _in_threads([execution], [{}]) as futures:
        state = next(iter(futures)).result()
    if state != FINISHED:
        raise JobFailed(job, execution.command, execution.code or 0)


def run_side_by_side(jobs: Sequence[Job], slots: Sequence[Slot], retries: int = 0) -> list[Job]:
    """Run jobs, one in each slot at a time, and print how far they are.

    Returns:
        The jobs that failed.

    Raises:
        KeyboardInterrupt, SystemExit: after the running ones have saved their checkpoints.
        UserError: a folder holds a job of other settings.
    """
    eta = Eta(jobs, at_a_time=len(slots))
    with _in_threads([Execution(job, retries, eta=eta) for job in jobs], slots) as futures:
        return _follow(futures, eta)


@contextlib.contextmanager
def _in_threads(executions, slots: Sequence[Slot]) -> Iterator[dict[Future, Execution]]:
    """The states to come, while open; an exception from within stops the jobs and waits for them.

    Threads, so that a signal finds the main one waiting, and never half-way through a record.
    """
    free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)

    def carry_out(execution: Execution) -> str:
        execution.environment = free.get()
        try:
            return execution.carry_out()
        finally:
            free.put(execution.environment)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            yield {pool.submit(carry_out, execution): execution for execution in executions}
        except BaseException:
            for execution in executions:
                execution.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(futures: Mapping[Future, Execution], eta: Eta) -> list[Job]:
    """Wait for all, printing each end and, between them, how far the others are."""
    waiting, failed = set(futures), []
    while waiting:
        done, waiting = wait(waiting, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED)
        left = eta.left(time.monotonic())
        head = f"[{len(futures) - len(waiting)}/{len(futures)}"
        head += "]" if left is None else f" | {clock(left)} left]"
        for future in done:
            job = futures[future].job
            if future.result() == FAILED:
                failed.append(job)
                print("\n  ".join(reasons(job.folder)), flush=True)
            print(f"{head} {job.name}: {job.folder.state()}", flush=True)
        if not done:
            running = [futures[f].job for f in waiting if futures[f].job.folder.state() == RUNNING]
            words = [f"{job.name} {job.folder.progress()}".rstrip() for job in running]
            print(f"{head} {', '.join(words) or 'waiting'}", flush=True)
    return failed


def reasons(folder: JobFolder) -> list[str]:
    """Why a failed job failed, as far as its files tell."""
    attempts = folder.record.get("attempts", [])
    code = attempts[-1]["code"] if attempts else None
    head = "evaluated nothing" if code == 0 else f"exit code {code}"
    return [f"{folder.name}: {head}; the end of {folder.log}:", *folder.log_end()]


# -- the machine, and whoever stops it ------------------------------------------------------------


def gpu_slots(gpus_per_job: int, at_a_time: int | None) -> list[Slot]:
    """One slot for each job that is carried out at a time.

    The GPUs are dealt out in groups of `gpus_per_job`. Without any, `at_a_time` jobs (default 1)
    share the cores. Variables that the user has set are left alone.

    Raises:
        UserError: fewer GPUs than a job is to have.
    """
    gpus = _visible_gpus()
    if gpus:
        if gpus_per_job > len(gpus):
            raise UserError(f"--gpus-per-run {gpus_per_job}: only {len(gpus)} are visible")
        starts = range(0, len(gpus) - gpus_per_job + 1, gpus_per_job)
        groups = [",".join(gpus[start : start + gpus_per_job]) for start in starts]
        return [{"CUDA_VISIBLE_DEVICES": group} for group in groups[:at_a_time]]
    count = at_a_time or 1
    threads = max(1, cores() // (count * gpus_per_job))
    variable = "OMP_NUM_THREADS"
    return [{} if variable in os.environ else {variable: str(threads)} for _ in range(count)]


def _visible_gpus() -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


@contextlib.contextmanager
def exit_on_signals(message: str) -> Iterator[None]:
    """While open, SIGTERM and Ctrl-C print `message` and exit with the code that a shell reports.

    Running commands are stopped first, with their checkpoints saved; a second signal does not wait
    for that.
    """
    begun = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal begun
        now = time.monotonic()
        if begun and now - begun > ending.AGAIN:
            ending.end_now(128 + number, "ended at once; what was running saves and ends by itself")
        if begun:
            return
        begun = now
        print(message, file=sys.stderr, flush=True)
        sys.exit(128 + number)

    with signals_handled(stop, signal.SIGTERM, signal.SIGINT):
        yield
