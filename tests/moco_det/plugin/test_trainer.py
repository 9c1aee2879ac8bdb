"""Training through Detectron2, and the same detector in both engines."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_voc import write_tiny_config, write_tiny_voc

pytest.importorskip("detectron2", reason="the plugin of Detectron2, which is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.launch import launch
from moco_det.config import loading as native_config
from moco_det.config.loading import load_config as load_native
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate
from moco_det.native.engine import trainer as native
from moco_det.native.modeling.meta_arch import build_model as build_native
from moco_det.plugin import load_config
from moco_det.plugin import trainer as plugin
from moco_det.plugin.trainer import AccumulatingTrainer, SamePreciseBN, StrictCheckpointer
from moco_det.weights.files import load_backbone_weights

ROOMS = {"native": (native, load_native), "detectron2": (plugin, load_config)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return str(write_tiny_config(folder / "tiny.yaml", write_tiny_voc(folder / "voc", 18)))


@pytest.fixture
def run(tiny, tmp_path):
    """Function: engine, output name, KEY VALUE ... -> results of training there."""

    def run(engine, output, *opts, evaluate=False):
        room, load = ROOMS[engine]
        cfg = load(tiny, [*opts, "OUTPUT_DIR", str(tmp_path / output), "TEST.EVAL_PERIOD", "0"])
        return (room.evaluate_weights if evaluate else room.train)(cfg)

    return run


@pytest.mark.parametrize(("first", "second"), [("native", "detectron2"), ("detectron2", "native")])
def test_weights_of_one_engine_go_on_in_the_other(run, tiny, tmp_path, first, second):
    opts = ("SOLVER.MAX_ITER", "60", "SOLVER.STEPS", "(50,)", "SOLVER.CHECKPOINT_PERIOD", "100")
    run(first, "first", *opts)
    path = str(tmp_path / "first" / "model_final.pth")
    report = load_backbone_weights(build_native(load_native(tiny)), path)
    assert report.missing == report.unexpected == report.skipped == ()
    for output, engine in (("here", first), ("there", second)):
        assert run(engine, output, "MODEL.WEIGHTS", path, evaluate=True)["bbox"]["AP50"] > 0
    # With one evaluator: Detectron2's rounds scores to 0.001 and takes those that are then equal in
    # any order, which on six images makes tenths of a point.
    records = [saved_records(tmp_path / output) for output in ("here", "there")]
    dataset = get_dataset(load_native(tiny).DATASETS.TEST[0])
    here, there = (evaluate(dataset, found)["bbox"] for found in records)
    for metric in ("AP", "AP50", "AP75"):
        assert there[metric] == pytest.approx(here[metric], abs=0.1)
    for a, b in zip(*records, strict=True):
        assert a["image_id"] == b["image_id"]
        assert a["classes"] == b["classes"]
        for key, tolerance in (("boxes", 1e-2), ("scores", 1e-4)):
            found, expected = torch.tensor(a[key]), torch.tensor(b[key])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)
    run(second, "more", "MODEL.WEIGHTS", path, "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)")


def saved_records(folder):
    (path,) = [p for p in (folder / "inference").iterdir() if p.name.startswith("voc_")]
    return json.loads(path.read_text())


def test_the_command_trains_resumes_and_evaluates(tiny, tmp_path, repository):
    def command(*arguments):
        tool = [sys.executable, repository / "tools" / "train_net.py", "--config-file", tiny]
        opts = ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "OUTPUT_DIR", tmp_path / "out"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*tool, *arguments, *opts],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    done = command("--engine", "auto", "SOLVER.CHECKPOINT_PERIOD", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "engine: detectron2 (it is installed)"
    assert "batch 2 = 1 process(es) x 2 images x 1 accumulated" in done.stdout
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")
    done = command("--engine", "detectron2", "--resume")
    assert done.returncode == 0, done.stderr
    assert "Starting training from iteration 2" in done.stdout
    done = command("--num-gpus", "2", "--overwrite", "MODEL.DEVICE", "cuda")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--num-gpus 2: torch finds no GPU here" in done.stderr
    done = command("--num-gpus", "2", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "batch 2 = 2 process(es) x 1 images x 1 accumulated" in done.stdout
    assert "copypaste: " in done.stdout


def test_the_newest_whole_checkpoint_stands_in_for_a_damaged_last_one(tmp_path, capsys):
    model = nn.Linear(2, 1)
    for name in ("model_0000001", "model_0000003"):
        DetectionCheckpointer(model, str(tmp_path)).save(name, iteration=int(name[-1]))
    checkpointer = StrictCheckpointer(model, str(tmp_path), cfg=None)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
    data = bytearray((tmp_path / "model_0000003.pth").read_bytes())
    data[data.index(model.weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "model_0000003.pth").write_bytes(data)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert "model_0000003.pth is damaged or no checkpoint" in capsys.readouterr().out
    (tmp_path / "last_checkpoint").write_text("/tmp/model_0000001.pth")
    with pytest.raises(UserError, match="outside of its folder"):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("amp", [False, True])
def test_accumulated_gradients_are_the_mean_over_the_passes(tiny, amp):
    """The oracle: the gradients of each batch alone, averaged by hand."""
    cfg = load_config(tiny, ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEVICE", "cpu"])
    model = plugin.Trainer.build_model(cfg)
    batches = [[example(seed)] for seed in (0, 1)]

    def gradients():
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = []
    with EventStorage():
        for batch in batches:
            torch.manual_seed(5)
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                losses = model(batch)
            sum(losses.values()).backward()
            expected.append(gradients())
        trainer = AccumulatingTrainer(Seeded(model), batches, build_optimizer(cfg, model), 2, amp)
        trainer.iter = 0
        trainer.optimizer.step = lambda: None
        trainer.run_step()
    for found, first, second in zip(gradients(), *expected, strict=True):
        torch.testing.assert_close(found, (first + second) / 2)


class Seeded(torch.nn.Module):
    """A detector that samples the same in every pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        torch.manual_seed(5)
        return self.model(batch)


def example(seed):
    generator = torch.Generator().manual_seed(seed)
    x = 4.0 + 10 * seed
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[x, 8.0, x + 30, 50.0]]))
    instances.gt_classes = torch.tensor([seed])
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
    return {"image": image, "instances": instances, "height": 64, "width": 64}


def test_accumulation_is_asked_for_by_its_key(tiny, tmp_path):
    out = ["OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    cfg = load_config(tiny, ["SOLVER.GRADIENT_ACCUMULATION_STEPS", "2", *out])
    plugin.prepare(cfg, eval_only=False)
    trainer = plugin.Trainer(cfg)
    assert trainer._trainer.accumulation == 2
    assert len(next(trainer._trainer._data_loader_iter)) == 1
    assert type(plugin.Trainer(load_config(tiny, out))._trainer) is SimpleTrainer


@pytest.fixture
def backbone_file(tiny, tmp_path):
    """Function: names to leave out and metadata -> a file with the rest of a ResNet's weights."""

    def write(without=(), **metadata):
        model = build_native(native_config.load_config(tiny))
        prefix = "backbone.bottom_up."
        arrays = {
            name.removeprefix(prefix): torch.rand_like(value) if value.ndim else value
            for name, value in model.state_dict().items()
            if name.startswith(prefix)
        }
        for name in without:
            del arrays[name]
        content = {"model": arrays, "__author__": "test", "matching_heuristics": True, **metadata}
        torch.save(content, tmp_path / "backbone.pth")
        return str(tmp_path / "backbone.pth")

    return write


def test_initial_weights_are_detectron2_s(tiny, backbone_file):
    cfg, path = load_config(tiny), backbone_file()
    ours, theirs = build_model(cfg), build_model(cfg)
    theirs.load_state_dict(ours.state_dict())
    StrictCheckpointer(ours, "", cfg).resume_or_load(path, resume=False)
    DetectionCheckpointer(theirs).load(path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


def test_a_backbone_array_left_at_random_is_an_error(tiny, backbone_file):
    cfg, path = load_config(tiny), backbone_file(without=["res3.0.conv1.weight"])
    model = build_model(cfg)
    with pytest.raises(UserError, match="backbone.bottom_up.res3.0.conv1.weight"):
        StrictCheckpointer(model, "", cfg).resume_or_load(path, resume=False)
    StrictCheckpointer(model, "", cfg, allow_missing=True).resume_or_load(path, resume=False)


def test_a_config_that_contradicts_the_weights_is_refused(tiny, backbone_file):
    cfg = load_config(tiny)
    path = backbone_file(requires={"INPUT.FORMAT": "RGB"})
    with pytest.raises(UserError, match="INPUT.FORMAT RGB .the config says BGR"):
        StrictCheckpointer(build_model(cfg), "", cfg).resume_or_load(path, resume=False)
    cfg = load_config(tiny, ["INPUT.FORMAT", "RGB"])
    StrictCheckpointer(build_model(cfg), "", cfg).resume_or_load(path, resume=False)


def train_a_little(cfg, folder):
    plugin.prepare(cfg, eval_only=False)
    trainer = plugin.Trainer(cfg)
    before = {name: value.clone() for name, value in trainer.model.module.state_dict().items()}
    trainer.train()
    state = {"before": before, "after": trainer.model.module.state_dict()}
    torch.save(state, f"{folder}/{torch.distributed.get_rank()}.pt")


@pytest.mark.usefixtures("forked_launches")
def test_two_processes_on_a_cpu_train_one_model(tiny, tmp_path):
    """Their images differ; gradients and statistics are shared, so what they hold does not."""
    opts = ["SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "(2,)", "TEST.EVAL_PERIOD", "0"]
    cfg = load_config(tiny, [*opts, "MODEL.RESNETS.NORM", "SyncBN", "OUTPUT_DIR", str(tmp_path)])
    launch(train_a_little, num_gpus=2, args=(cfg, str(tmp_path)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first["after"].items():
        assert torch.equal(value, second["after"][name]), name
    moved = [n for n, value in first["before"].items() if not torch.equal(value, first["after"][n])]
    assert any(name.endswith("conv1.weight") for name in moved)
    assert any(name.endswith("running_var") for name in moved)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()


def two_processes(folder):
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    batches = [rank + torch.randn(4, 3, 5, 5, generator=generator) for _ in range(3)]
    for kind in (SamePreciseBN, hooks.PreciseBN):
        model = layers()
        kind(0, model, batches, 3).update_stats()
        torch.save(model.state_dict(), f"{folder}/{kind.__name__}{rank}.pt")


@pytest.mark.usefixtures("forked_launches")
def test_precise_bn_is_the_same_on_both_processes_and_detectron2_s_is_not(tmp_path):
    launch(two_processes, num_gpus=2, args=(str(tmp_path),))

    def means(kind):
        states = [torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1)]
        return [state["0.running_mean"] for state in states]

    assert torch.equal(*means("SamePreciseBN"))
    assert not torch.allclose(*means("PreciseBN"), atol=0.1)
