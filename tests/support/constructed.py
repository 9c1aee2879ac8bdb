"""All that the native engine constructs from a config, as {path: plain value}, without any data.

What decides on numbers is either such a value or code, so two configs whose values are the same
train alike; and a key that changes none of them has no effect.
"""

import functools
import itertools
import types
from pathlib import Path

import torch
from torch import nn

from moco_det.config.checks import plan_batch
from moco_det.native.data import loader, mapper
from moco_det.native.engine import trainer

PLAIN = (type(None), bool, int, float, str)
# The images that a loader shuffles: tall, square and wide ones, the first two without objects.
RECORDS = [
    {
        "file_name": f"{i}.jpg",
        "image_id": i,
        "height": 40,
        "width": 30 + 10 * (i % 3),
        "annotations": [{"category_id": int(i > 3)}] * (i > 1),
    }
    for i in range(12)
]


def describe(thing, path: str, found: dict, seen: set[int]) -> None:
    """Add what `thing` holds, however deep, to `found`."""
    if isinstance(thing, PLAIN):
        found[path] = thing
        return
    if isinstance(thing, (list, tuple)) and all(isinstance(value, PLAIN) for value in thing):
        found[path] = list(thing)
        return
    if isinstance(thing, torch.Tensor):
        if isinstance(thing, nn.Parameter):  # its values are random
            found[path] = f"{list(thing.shape)}{' trained' if thing.requires_grad else ' frozen'}"
        else:
            found[path] = thing.flatten().tolist() if thing.numel() < 16 else list(thing.shape)
        return
    if isinstance(thing, torch.dtype):
        found[path] = str(thing)
        return
    if id(thing) in seen or isinstance(thing, (torch.device, Path)):
        return
    seen.add(id(thing))
    if isinstance(thing, (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        found[path] = thing.__qualname__
        parts = {"self": getattr(thing, "__self__", None)}
        closure = getattr(thing, "__closure__", None) or ()
        names = thing.__code__.co_freevars if closure else ()
        parts |= {name: cell.cell_contents for name, cell in zip(names, closure, strict=True)}
        parts = {name: value for name, value in parts.items() if value is not None}
    elif isinstance(thing, functools.partial):
        parts = {"calls": thing.func} | thing.keywords | dict(enumerate(thing.args))
    elif isinstance(thing, dict):
        parts = thing
    elif isinstance(thing, (list, tuple, set)):
        parts = dict(enumerate(thing))
    else:
        found[path] = type(thing).__name__
        parts = {k: v for k, v in getattr(thing, "__dict__", {}).items() if k[:1] != "_"}
        if isinstance(thing, nn.Module):
            parts |= thing._parameters | thing._buffers | thing._modules
        parts |= {name: getattr(thing, name) for name in getattr(type(thing), "__slots__", ())}
    for name, value in parts.items():
        describe(value, f"{path}.{name}" if path else str(name), found, seen)


def construct(cfg, monkeypatch) -> dict:
    """{path: value} of the model, the optimizer and its schedule, the loaders and the loop."""
    monkeypatch.setattr(loader, "load", lambda mapped, batches, workers, pin_memory: locals())
    monkeypatch.setattr(loader, "training_records", lambda *args, **kwargs: (args, kwargs))
    monkeypatch.setattr(loader, "all_records", lambda names: names)
    monkeypatch.setattr(mapper, "mirrored_keypoints", lambda names: names)
    monkeypatch.setattr(trainer, "evaluate_model", lambda *_: None)
    monkeypatch.setattr(trainer, "shared_training_records", lambda cfg: RECORDS)
    monkeypatch.setattr(trainer, "print_on_main", lambda _: None)
    plan = plan_batch(cfg, 1)
    state = trainer.build_state(cfg)
    state.seed = 0 if cfg.SEED < 0 else state.seed
    loop = trainer.build_trainer(cfg, plan, state, None, None)
    train = loader.build_train_loader(cfg, plan, RECORDS, state.seed)
    train["batches"] = list(itertools.islice(train["batches"], 4))
    train["mapped"].records = None
    test = loader.build_test_loader(cfg, RECORDS)
    test["mapped"].records = None
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    groups = {
        names[id(group["params"][0])]: {k: v for k, v in group.items() if k != "params"}
        for group in state.optimizer.param_groups
    }
    (multiplier,) = set(state.scheduler.lr_lambdas)
    everything = {
        "model": state.model,
        "optimizer": groups,
        "clip": list(state.optimizer._optimizer_step_pre_hooks.values()),
        "schedule": [round(multiplier(i), 9) for i in range(0, cfg.SOLVER.MAX_ITER, 10)],
        "records": loader.build_training_records(cfg),
        "train loader": train,
        "test loader": test,
        "plan": plan,
        "loop": {
            name: value
            for name, value in vars(loop).items()
            if name not in ("state", "batches_from", "evaluate")
        },
        "seed": state.seed,
        "scaler": state.scaler.is_enabled(),
    }
    found: dict = {}
    describe(everything, "", found, set())
    return found
