"""Runs on this machine: as many at a time as there are places for them."""

import os
import queue
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import timedelta

import torch

from moco_det.benchmark.jobs.execution import Execution, Settings, reasons
from moco_det.benchmark.jobs.grid import Run
from moco_det.benchmark.jobs.runs import FAILED, FINISHED, RUNNING
from moco_det.common.errors import UserError

REPORT_SECONDS = 30.0  # between two lines on what is running

Place = dict[str, str]  # the variables that keep a run to its part of the machine


def places(gpus_per_run: int, jobs: int | None) -> list[Place]:
    """One for each run that is carried out at a time.

    The GPUs are dealt out in groups of `gpus_per_run`. Without any, `jobs` runs (default 1) share
    the cores. Variables that the user has set are left alone.

    Raises:
        UserError: fewer GPUs than a run is to have.
    """
    gpus = _visible_gpus()
    if gpus:
        if gpus_per_run > len(gpus):
            raise UserError(f"--gpus-per-run {gpus_per_run}: only {len(gpus)} are visible")
        groups = [gpus[i : i + gpus_per_run] for i in range(0, len(gpus), gpus_per_run)]
        whole = [group for group in groups if len(group) == gpus_per_run]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in whole[:jobs]]
    count = jobs or 1
    threads = max(1, _cores() // (count * gpus_per_run))
    variable = "OMP_NUM_THREADS"
    return [{} if variable in os.environ else {variable: str(threads)} for _ in range(count)]


def _visible_gpus() -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_locally(runs: Sequence[Run], settings: Settings, where: Sequence[Place]) -> list[Run]:
    """Carry out `runs` in the given places, and print how far they are.

    Returns:
        The runs that failed.

    Raises:
        KeyboardInterrupt, SystemExit: after the running ones have saved their checkpoints.
        UserError: a folder holds a run of other settings.
    """
    free: queue.SimpleQueue[Place] = queue.SimpleQueue()
    for place in where:
        free.put(place)
    executions = [Execution(run, settings) for run in runs]

    def carry_out(execution: Execution) -> str:
        execution.environment = free.get()
        try:
            return execution.carry_out()
        finally:
            free.put(execution.environment)

    with ThreadPoolExecutor(len(where)) as pool:
        futures = {pool.submit(carry_out, execution): execution for execution in executions}
        try:
            return _follow(futures, len(where))
        except BaseException:
            for execution in executions:
                execution.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(futures: dict, at_a_time: int) -> list[Run]:
    """Wait for all, printing each end and, between them, how far the others are."""
    waiting, failed = set(futures), []
    while waiting:
        done, waiting = wait(waiting, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            execution, state = futures[future], future.result()
            if state == FAILED:
                failed.append(execution.run)
                print("\n  ".join(reasons(execution.folder)), flush=True)
        count = f"[{len(futures) - len(waiting)}/{len(futures)}"
        left = _time_left([futures[f] for f in futures], [futures[f] for f in waiting], at_a_time)
        head = f"{count} | {left} left]" if left else f"{count}]"
        for future in done:
            execution = futures[future]
            print(f"{head} {execution.run.name}: {execution.folder.state()}", flush=True)
        if not done:
            print(f"{head} {_running(futures[f] for f in waiting)}", flush=True)
    return failed


def _running(executions) -> str:
    begun = [e for e in executions if e.folder.state() == RUNNING]
    return ", ".join(f"{e.run.name} iteration {e.folder.iteration()}" for e in begun) or "waiting"


def _time_left(executions: Sequence[Execution], waiting: Sequence[Execution], at_a_time: int):
    """A guess from the runs that are done, as text; None where there is none yet."""
    seconds: dict[str, list[float]] = {}
    for execution in executions:
        record = execution.folder.record
        if record.get("state") == FINISHED:
            seconds.setdefault(execution.run.experiment.name, []).append(record["seconds"])
    if not seconds:
        return None
    means = {name: sum(values) / len(values) for name, values in seconds.items()}
    overall = sum(means.values()) / len(means)
    total = sum(means.get(e.run.experiment.name, overall) for e in waiting)
    return str(timedelta(seconds=round(total / at_a_time)))
