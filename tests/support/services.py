"""Stand-ins for the packages of services that show runs: they note what they are told."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from recorder import Recorder


class Wandb(ModuleType):
    """As far as it is used. `runs`: id -> what was logged there."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.begun, self.ended = {}, [], []

    def Image(self, pixels):  # noqa: N802 (its name)
        return pixels.shape

    def init(self, **given):
        name = given["id"] or f"run{len(self.runs)}"
        self.begun.append(given)
        return SimpleNamespace(
            id=name,
            define_metric=Recorder(),
            log=self.runs.setdefault(name, []).append,
            config=SimpleNamespace(update=lambda flags, **_: self.runs[name].append(dict(flags))),
            finish=lambda exit_code: self.ended.append(exit_code),
        )


class Mlflow(ModuleType):
    """As far as it is used. `runs`: id -> (what, step) in the order in which it came."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.ended, self.broken = {}, [], False
        self.set_experiment = Recorder()

    def start_run(self, run_id, run_name):
        self.active = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.active, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def log_params(self, params):
        self.runs[self.active].append(("params", params))

    def log_metrics(self, values, step):
        if self.broken:
            raise ConnectionError("the server\nis gone")
        self.runs[self.active] += [(name, value, step) for name, value in values.items()]

    def log_image(self, pixels, artifact_file):
        self.runs[self.active].append((artifact_file, pixels.shape))

    def end_run(self, status):
        self.ended.append(status)


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    return sys.modules["wandb"]


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", Mlflow())
    return sys.modules["mlflow"]
