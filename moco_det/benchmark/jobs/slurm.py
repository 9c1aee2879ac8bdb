"""Runs as Slurm jobs through submitit: one each, on one machine or, by torchrun, several."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moco_det.benchmark.jobs.grid import AnyRun
from moco_det.benchmark.jobs.job import FINISHED, JobFolder
from moco_det.benchmark.jobs.runner import Execution
from moco_det.benchmark.jobs.runs import Settings
from moco_det.common.documents import read_json
from moco_det.common.errors import UserError, import_optional
from moco_det.common.files import write_json

# submitit's names; others are Slurm's own, which it calls slurm_NAME.
SHARED = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task")
WAITING = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "SUSPENDED")
JOB_FILE = "slurm.json"  # in the run's folder: {job_id, folder}


def parse_parameters(words: Sequence[str]) -> dict[str, Any]:
    """`partition=gpu timeout_min=2880` -> submitit's parameters. Raises UserError."""
    parameters: dict[str, Any] = {"nodes": 1, "timeout_min": 24 * 60}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise UserError(f"--slurm {word}: write NAME=VALUE, such as partition=gpu")
        known = name in SHARED or name.startswith("slurm_")
        parameters[name if known else f"slurm_{name}"] = int(value) if value.isdigit() else value
    return parameters


def make_executor(folder: Path, parameters: Mapping[str, Any], gpus: int, cluster: str = "slurm"):
    """submitit's executor; `gpus`: of each machine; `cluster`: "slurm", or "local" and "debug".

    Raises:
        UserError: submitit is missing, there is no Slurm, or it does not know a parameter.
    """
    submitit = import_optional("submitit", "--launcher slurm", "submitit")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(
            **{"name": "moco_det", "gpus_per_node": gpus, "tasks_per_node": 1, **parameters}
        )
    except (RuntimeError, ValueError, NameError) as error:
        raise UserError(f"--launcher slurm: {error}") from error
    return executor


def submit(runs: Sequence[AnyRun], settings: Settings, executor, nodes: int) -> list:
    """Submit the runs that no job waits for; returns submitit's jobs.

    On several machines a run is not retried within its job: all of them would have to agree on it.
    """
    if nodes > 1:
        settings = replace(settings, retries=0)
    todo = [run for run in runs if not queued(settings.folder(run))]
    if not todo:
        return []
    with executor.batch():
        jobs = [executor.submit(SlurmRun(run, settings)) for run in todo]
    for run, job in zip(todo, jobs, strict=True):
        folder = settings.folder(run)
        folder.path.mkdir(parents=True, exist_ok=True)
        content = {"job_id": job.job_id, "folder": str(executor.folder)}
        write_json(folder.path / JOB_FILE, content, indent=None)
    return jobs


def job_of(folder: JobFolder) -> str | None:
    """The number of the Slurm job that a run was submitted as last; "?" where its note is bad."""
    try:
        found = _submission(folder)
    except UserError:
        return "?"
    return found["job_id"] if found else None


def queued(folder: JobFolder) -> bool:
    """Whether Slurm says that the run's job waits or runs."""
    found = _submission(folder)
    if found is None:
        return False
    import submitit

    return submitit.SlurmJob(found["folder"], found["job_id"]).state.upper() in WAITING


def _submission(folder: JobFolder) -> dict[str, str] | None:
    """{job_id, folder}; None for a run that was never submitted. Raises UserError."""
    path = folder.path / JOB_FILE
    if not path.is_file():
        return None
    content = read_json(path, "the note of the Slurm job")
    names = ("job_id", "folder")
    texts = [content.get(name) if isinstance(content, dict) else None for name in names]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is no note of a Slurm job: remove it")
    return content


class SlurmRun:
    """What a job does; pickled by submitit and called on every machine of the job."""

    def __init__(self, run: AnyRun, settings: Settings):
        self.run, self.settings = run, settings
        self._execution: Execution | None = None

    def __call__(self) -> str:
        """The run's state. On all machines but the first this only takes part in the training."""
        import submitit

        job = submitit.JobEnvironment()
        launch = []
        if job.num_nodes > 1:
            launch = torchrun(job.num_nodes, job.node, job.hostnames[0], job.job_id, self.settings)
        training = self.settings.job(self.run, launch)
        if job.global_rank == 0:
            self._execution = Execution(training, self.settings.retries)
            return self._execution.carry_out()
        if training.folder.state() != FINISHED:
            subprocess.run(training.commands[0].argv, check=False)
        return training.folder.state()

    def checkpoint(self):
        """Before the job is preempted or its time is up: the same again, from a checkpoint."""
        import submitit

        if self._execution:
            self._execution.stop()
            self._execution.end_process()
        return submitit.helpers.DelayedSubmission(SlurmRun(self.run, self.settings))


def torchrun(nodes: int, node: int, first_host: str, job_id: str, settings: Settings) -> list[str]:
    """torchrun on machine `node` of `nodes`, the first of which is called `first_host`."""
    port = 20000 + sum(map(ord, job_id)) * 7919 % 20000  # jobs that share a machine need several
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes),
        "--node-rank", str(node), "--nproc-per-node", str(settings.gpus),
        "--master-addr", first_host, "--master-port", str(port),
    ]  # fmt: skip
