"""The training loop around a detector of a few hundred parameters, and once around a real one."""

import json
import os
import re
import resource
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from float64 import ROUNDING, assert_equal_but_for_rounding, in_float64
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_voc import write_tiny_config, write_tiny_voc
from torch import nn

from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from moco_det.common.launch import launch
from moco_det.config.checks import plan_batch
from moco_det.config.loading import load_config
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate, verify_results
from moco_det.native.engine import trainer
from moco_det.native.engine.output_dir import Checkpoints
from moco_det.native.engine.trainer import build_state, build_trainer, prepare, train
from moco_det.native.modeling.layers import SyncBatchNorm, kernels_of


class Stub(nn.Module):
    """Has what the loop handles: losses that use boxes and draws, BN, detections."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.bn = SyncBatchNorm(4)
        self.box = nn.Linear(4, 4)
        self.score = nn.Linear(4, 2)
        self.at_iteration = {}  # training forward pass (from 0) -> what happens there
        self.passes = 0

    def forward(self, batch):
        images = torch.stack([x["image"][:, :48, :48] for x in batch]).float() / 255
        features = self.bn(self.conv(images)).relu().mean((2, 3))
        if not self.training:
            found = {"boxes": torch.tensor([[8.0, 8, 24, 24]]), "classes": torch.tensor([1])}
            return [found | {"scores": s[:1].sigmoid()} for s in self.score(features)]
        loss_scale = 1.0
        if torch.is_grad_enabled():  # not in precise BN
            loss_scale = self.at_iteration.get(self.passes, lambda: 1.0)() or 1.0
            self.passes += 1
        targets = torch.cat([x["gt_boxes"][:1] for x in batch]) / 64
        classes = torch.cat([x["gt_classes"][:1] for x in batch])
        noise = self.noise(len(batch))
        return {
            "loss_cls": nn.functional.cross_entropy(self.score(features + noise), classes),
            "loss_box_reg": (self.box(features) - targets).square().mean() * loss_scale,
        }

    def noise(self, count):
        return 0.1 * torch.randn(count, 4)


@pytest.fixture
def make_cfg(tmp_path):
    root = write_tiny_voc(tmp_path / "voc")

    def make(output, *opts):
        path = write_tiny_config(tmp_path / "tiny.yaml", root)
        return load_config(str(path), ["OUTPUT_DIR", str(tmp_path / output), *opts])

    return make


@pytest.fixture
def stub(monkeypatch):
    """The next detectors built are stubs; returns the dict of what happens when in them."""
    happenings = {}

    def build(cfg):
        model = Stub()
        model.at_iteration = dict(happenings)
        return model

    monkeypatch.setattr(trainer, "build_model", build)
    return happenings


def final(cfg):
    return torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_accumulated_gradients_are_the_mean_over_the_passes(make_cfg, stub):
    """The oracle: the gradients of each batch alone, averaged by hand."""
    cfg = prepare(make_cfg("out", "SOLVER.GRADIENT_ACCUMULATION_STEPS", "2"))
    state = build_state(cfg)
    loop = build_trainer(cfg, plan_batch(cfg, 1), state, Checkpoints(cfg.OUTPUT_DIR), None)
    batches = loop.batches_from(0)
    two = [next(batches), next(batches)]
    assert [len(batch) for batch in two] == [1, 1]
    expected, losses_by_hand = [], []
    for number, batch in enumerate(two):
        loop.seed_draws(3, number)
        state.model.zero_grad()
        losses = state.model(batch)
        sum(losses.values()).backward()
        expected.append([p.grad.clone() for p in state.model.parameters()])
        losses_by_hand.append({k: v.detach() for k, v in losses.items()})
    losses, _ = loop.compute_gradients(state.model, iter(two), iteration=3)
    for parameter, first, second in zip(state.model.parameters(), *expected, strict=True):
        torch.testing.assert_close(parameter.grad, (first + second) / 2)
    for name, value in losses.items():
        torch.testing.assert_close(value, sum(x[name] for x in losses_by_hand) / 2)


def metrics(cfg):
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as file:
        return [json.loads(line) for line in file]


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("DATALOADER.NUM_WORKERS", "1"),
        ("SOLVER.AMP.ENABLED", "True"),
        ("SOLVER.GRADIENT_ACCUMULATION_STEPS", "2"),
    ],
)
def test_sigterm_then_resume_equals_one_run(make_cfg, stub, capsys, opts):
    whole = make_cfg("whole", *opts)
    results = train(whole)
    parts = make_cfg("parts", *opts)
    # After the evaluation and the precise BN of iteration 3.
    fifth = 4 * parts.SOLVER.GRADIENT_ACCUMULATION_STEPS
    stub[fifth] = sigterm
    with pytest.raises(SystemExit) as stopped:
        train(parts)
    assert stopped.value.code == EXIT_INTERRUPTED == 75
    assert "model_0000004.pth" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    del stub[fifth]
    assert train(parts, resume=True) == results
    assert same(final(whole), final(parts))
    assert metrics(parts)[-1] == metrics(whole)[-1]


def test_a_crash_then_resume_equals_one_run(make_cfg, stub):
    whole, parts = make_cfg("whole", "SEED", "-1"), make_cfg("parts", "SEED", "-1")
    stub[5] = crash
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    del stub[5]
    train(parts, resume=True)  # from iteration 4, with the drawn seed of the first attempt
    seed = final(parts)["seed"]
    train(make_cfg("whole", "SEED", str(seed)))
    assert same(final(whole), final(parts))


def test_precise_bn_before_each_evaluation_and_after_the_last_iteration(
    make_cfg, stub, monkeypatch
):
    """As many images as without accumulation; batches that the training is still to see."""
    calls, begun = [], []
    build = trainer.build_train_loader

    def loader(cfg, plan, records, seed, iteration, **options):
        begun.append(iteration)
        return build(cfg, plan, records, seed, iteration, **options)

    monkeypatch.setattr(trainer, "build_train_loader", loader)
    monkeypatch.setattr(
        trainer, "precise_bn", lambda model, batches, passes: calls.append((begun[-1], passes))
    )
    period = ("TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "5", "TEST.PRECISE_BN.NUM_ITER", "3")
    train(make_cfg("out", *period, "SOLVER.GRADIENT_ACCUMULATION_STEPS", "2"))
    assert calls == [(2, 6), (4, 6), (5, 6)]
    calls.clear()
    train(make_cfg("none", *period, "TEST.PRECISE_BN.ENABLED", "False"))
    assert calls == []


def test_draws_differ_between_processes_iterations_and_passes(make_cfg, stub, monkeypatch):
    cfg = prepare(make_cfg("out", "SOLVER.GRADIENT_ACCUMULATION_STEPS", "2"))
    loop = build_trainer(cfg, plan_batch(cfg, 1), build_state(cfg), None, None)
    draws = []
    for process in range(3):
        monkeypatch.setattr(trainer, "rank", lambda process=process: process)
        for iteration in range(3):
            for number in range(2):
                loop.seed_draws(iteration, number)
                draws.append(torch.rand(()).item())
    assert len(set(draws)) == 3 * 3 * 2


def test_a_crash_before_the_final_checkpoint_does_not_lose_it(make_cfg, stub, monkeypatch):
    whole, parts = make_cfg("whole"), make_cfg("parts")
    results = train(whole)

    def save(checkpoints, name, content):
        if name == "model_final":
            crash()
        return Checkpoints.save(checkpoints, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Checkpoints", type("Crashing", (Checkpoints,), {"save": save}))
        with pytest.raises(KeyboardInterrupt):
            train(parts)
    assert not Path(parts.OUTPUT_DIR, "model_final.pth").exists()
    assert train(parts, resume=True) == results
    assert same(final(whole), final(parts))
    assert Path(parts.OUTPUT_DIR, "last_checkpoint").read_text() == "model_final.pth"


def test_another_seed_is_another_run(make_cfg, stub):
    first, second = make_cfg("first"), make_cfg("second", "SEED", "4")
    train(first)
    train(second)
    assert not same(final(first)["model"], final(second)["model"])


def test_what_a_run_leaves_behind(make_cfg, stub, tmp_path):
    cfg = make_cfg("out")
    results = train(cfg)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.pth")) == [
        "model_0000001.pth", "model_0000003.pth", "model_0000005.pth", "model_final.pth",
    ]  # fmt: skip
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(out.glob("*tmp*"))
    checkpoint = final(cfg)
    assert {"model", "optimizer", "scheduler", "iteration"} <= checkpoint.keys()
    assert checkpoint["iteration"] == 5
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.001)
    assert load_config(str(out / "config.yaml")) == cfg

    periodic, training, last = metrics(cfg)
    assert periodic["iteration"] == 2
    assert last["iteration"] == 6
    assert last["bbox/AP50"] == pytest.approx(results["bbox"]["AP50"])
    assert last["bbox/AP-bar"] == 0.0
    assert training["iteration"] == 5
    assert training["lr"] == pytest.approx(0.001)
    assert {"loss_cls", "loss_box_reg", "time", "data_time", "eta_seconds"} <= training.keys()
    assert training["total_loss"] > 0

    events = EventAccumulator(str(out)).Reload()
    assert {"total_loss", "lr", "bbox/AP50"} <= set(events.Tags()["scalars"])
    pictures = events.Tags()["images"]
    assert pictures
    assert all(re.fullmatch(r"predictions/voc_[\w-]+/\d", name) for name in pictures)
    for name in pictures:  # at each evaluation
        assert [event.step for event in events.Images(name)] == [2, 6]


def test_an_undefined_metric_is_null_in_json(make_cfg, stub, monkeypatch):
    monkeypatch.setattr(
        trainer,
        "evaluate_model",
        lambda cfg, model, show: {"bbox": {"AP": 1.5, "AP-cow": float("nan")}},
    )
    cfg = make_cfg("out")
    train(cfg)
    assert metrics(cfg)[-1] == {"iteration": 6, "bbox/AP": 1.5, "bbox/AP-cow": None}


def test_a_progress_line_every_twenty_iterations(make_cfg, stub, capsys):
    train(make_cfg("out", "SOLVER.MAX_ITER", "41", "TEST.EVAL_PERIOD", "0"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "iter: " in line]
    assert [line.split("iter: ")[1].split()[0] for line in lines] == ["19", "39", "40"]
    for part in ("eta: 0:", "total_loss: ", "loss_cls: ", "time: ", "data_time: ", "lr: "):
        assert part in lines[0]


def test_a_finished_run_is_only_evaluated_again(make_cfg, stub, capsys):
    cfg = make_cfg("out")
    results = train(cfg)
    before = os.stat(f"{cfg.OUTPUT_DIR}/model_final.pth").st_mtime_ns
    assert train(cfg, resume=True) == results
    assert os.stat(f"{cfg.OUTPUT_DIR}/model_final.pth").st_mtime_ns == before


def test_resume_without_a_checkpoint_starts_from_the_weights(make_cfg, stub, capsys):
    train(make_cfg("out"), resume=True)
    assert "random initialisation" in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_refused(make_cfg, stub, monkeypatch):
    cfg = make_cfg("out")
    train(cfg)
    monkeypatch.setattr(trainer, "build_model", lambda cfg: nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"model_final\.pth is from another configuration"):
        train(cfg, resume=True)


def test_the_newest_whole_checkpoint_stands_in_for_a_damaged_last_one(
    make_cfg, stub, tmp_path, capsys
):
    cfg = make_cfg("out", "SOLVER.CHECKPOINT_PERIOD", "1")
    train(cfg)
    expected, numbered = final(cfg), sorted((tmp_path / "out").glob("model_0*.pth"))
    for path in (tmp_path / "out" / "model_final.pth", numbered[-1]):
        path.write_bytes(b"garbage")
    train(cfg, resume=True)
    said = capsys.readouterr().out
    assert "model_final.pth is damaged" in said
    assert f"going on from {numbered[-2]}, the newest that is whole" in said
    assert same(final(cfg), expected)
    for path in (tmp_path / "out").glob("*.pth"):
        path.write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"model_final\.pth is damaged.* beside it is whole"):
        train(cfg, resume=True)


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_last_checkpoint_outside_of_the_folder_is_refused(make_cfg, stub, tmp_path, evaluating):
    cfg = make_cfg("out")
    train(make_cfg("other"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last_checkpoint").write_text("../other/model_final.pth")
    with pytest.raises(UserError, match="outside of its folder"):
        (trainer.evaluate_weights if evaluating else train)(cfg, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(iteration=-1), "iteration is -1"),
        (lambda s: s.update(iteration=True), "iteration is True"),
        (lambda s: s["optimizer"].update(state={}), "the momentum would be lost"),
        (lambda s: s["scheduler"].update(last_epoch=0), "scheduler.last_epoch is 0"),
        (lambda s: s.update(scheduler=[]), "scheduler is a list"),
        (lambda s: s["model"]["bn.running_var"].neg_(), "bn.running_var is a variance"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_from_is_refused(
    make_cfg, stub, tmp_path, change, message
):
    cfg = make_cfg("out")
    train(cfg)
    state = final(cfg)
    change(state)
    for path in (tmp_path / "out").glob("*.pth"):
        path.unlink()
    torch.save(state, tmp_path / "out" / "model_final.pth")
    with pytest.raises(UserError, match=message):
        train(cfg, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(make_cfg, stub):
    stub[3] = lambda: float("nan")
    with pytest.raises(
        UserError, match=r"iteration 3 .*last good checkpoint: .*model_0000001\.pth.*BASE_LR"
    ):
        train(make_cfg("out"))
    stub.clear()
    stub[0] = lambda: float("inf")
    with pytest.raises(UserError, match=r"iteration 0 .*none was saved.*No step was taken yet"):
        train(make_cfg("empty"))


def test_a_gpu_s_losses_are_read_one_iteration_late(make_cfg, stub, monkeypatch):
    """But before a checkpoint or an evaluation; the run is the same."""
    read = []

    def check(metrics, iteration, *others):
        read.append((iteration, passes[-1]))

    passes = []
    stub.update({i: partial(passes.append, i) for i in range(9)})
    monkeypatch.setattr(trainer, "check_finite", check)
    opts = ("SOLVER.MAX_ITER", "9", "SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "0")
    plain, late = make_cfg("plain", *opts), make_cfg("late", *opts)
    train(plain)
    assert read == [(i, i) for i in range(9)]
    read.clear()
    with kernels_of("cuda"):
        train(late)
    # Checkpoints after 3 and 7, the end after 8.
    assert read == [(0, 1), (1, 2), (2, 3), (3, 3), (4, 5), (5, 6), (6, 7), (7, 7), (8, 8)]
    for a, b in zip(final(plain)["model"].values(), final(late)["model"].values(), strict=True):
        torch.testing.assert_close(a, b)
    for ours, theirs in zip(metrics(late), metrics(plain), strict=True):
        timed = {"time", "data_time", "eta_seconds"}
        ours, theirs = ({k: v for k, v in x.items() if k not in timed} for x in (ours, theirs))
        assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)


def test_a_loss_that_is_not_finite_is_in_no_checkpoint_of_a_gpu(make_cfg, stub):
    stub[2] = stub[3] = lambda: float("nan")  # checkpoints are due after 1, 3 and 5
    with kernels_of("cuda"), pytest.raises(UserError, match=r"iteration 2 .*model_0000001\.pth"):
        train(make_cfg("out", "TEST.EVAL_PERIOD", "0"))
    stub.pop(2)
    with kernels_of("cuda"), pytest.raises(UserError, match=r"iteration 3 .*model_0000001\.pth"):
        train(make_cfg("again", "TEST.EVAL_PERIOD", "0"))


def test_a_gpu_s_run_stops_and_goes_on_as_one_run(make_cfg, stub, capsys):
    """On another device too: which kernels an optimizer uses is in no checkpoint's hand."""
    opts = ("TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "0", "SOLVER.MAX_ITER", "6")
    whole, parts = make_cfg("whole", *opts), make_cfg("parts", *opts)
    train(whole)
    stub[2] = sigterm
    with kernels_of("cuda"), pytest.raises(SystemExit) as stopped:
        train(parts)
    assert stopped.value.code == EXIT_INTERRUPTED
    assert "model_0000002.pth" in capsys.readouterr().out
    del stub[2]
    train(parts, resume=True)
    groups = final(parts)["optimizer"]["param_groups"]
    assert {(group["foreach"], group["fused"]) for group in groups} == {(True, None)}
    for a, b in zip(final(whole)["model"].values(), final(parts)["model"].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_full_disk_keeps_the_previous_checkpoint(make_cfg, stub, tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk():  # no file may grow beyond 2 kB from here on
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, unlimited[1]))

    stub[2] = fill_disk
    out = tmp_path / "out"
    try:
        with pytest.raises(UserError, match=r"model_0000003\.pth.*model_0000001\.pth, is intact"):
            train(make_cfg("out", "TEST.EVAL_PERIOD", "0"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [path.name for path in out.glob("model*")] == ["model_0000001.pth"]
    assert torch.load(out / "model_0000001.pth", weights_only=True)["iteration"] == 1


class NoiselessStub(Stub):
    """Without draws of its own, which differ from process to process."""

    def noise(self, count):
        return 0.0


def train_noiseless(cfg):
    trainer.build_model = lambda cfg: NoiselessStub()
    with in_float64():
        train(cfg)


@pytest.mark.usefixtures("forked_launches")
def test_two_processes_train_as_one(make_cfg, monkeypatch):
    opts = ("DATALOADER.ASPECT_RATIO_GROUPING", "False")
    one, two = make_cfg("one", *opts), make_cfg("two", *opts)
    # Restored after `train_noiseless`.
    monkeypatch.setattr(trainer, "build_model", trainer.build_model)
    train_noiseless(one)
    launch(train_noiseless, num_gpus=2, args=(two,))
    for (name, a), b in zip(final(one)["model"].items(), final(two)["model"].values(), strict=True):
        assert_equal_but_for_rounding(a, b, name)
    assert metrics(one)[-1] == pytest.approx(metrics(two)[-1])
    loss, other = (metrics(cfg)[1]["loss_cls"] for cfg in (one, two))
    assert loss == pytest.approx(other, rel=ROUNDING)


class StoppedStub(NoiselessStub):
    """The second process is asked to stop, in the third iteration."""

    def forward(self, batch):
        self.at_iteration = {2: sigterm} if trainer.rank() == 1 else {}
        return super().forward(batch)


def train_stopped(cfg):
    trainer.build_model = lambda cfg: StoppedStub()
    train(cfg)


@pytest.mark.usefixtures("forked_launches")
def test_a_stop_of_any_process_is_one_of_all(make_cfg):
    cfg = make_cfg("out", "TEST.EVAL_PERIOD", "0")
    with pytest.raises(SystemExit) as stopped:
        launch(train_stopped, num_gpus=2, args=(cfg,))
    assert stopped.value.code == EXIT_INTERRUPTED
    assert torch.load(Checkpoints(cfg.OUTPUT_DIR).last(), weights_only=True)["iteration"] == 2


def test_number_of_classes_must_be_the_data_sets(make_cfg):
    message = r"NUM_CLASSES is 80, but voc:.* has 2 classes \(bar, square\): set it to 2"
    with pytest.raises(UserError, match=message):
        prepare(make_cfg("out", "MODEL.ROI_HEADS.NUM_CLASSES", "80"))


def test_data_sets_must_share_their_classes(make_cfg, tmp_path):
    other = write_tiny_voc(tmp_path / "other")
    for path in (other / "Annotations").iterdir():
        path.write_text(path.read_text().replace("square", "disc"))
    with pytest.raises(UserError, match="different classes"):
        prepare(make_cfg("out", "DATASETS.TEST", f"voc:{other}:test"))


def test_files_of_a_metric_are_asked_for_before_the_run(make_cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = f"densepose:{tmp_path}/a.json:{tmp_path}"
    data = ("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)")
    cfg = make_cfg("out", *data, "MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.DENSEPOSE_ON", "True")
    with pytest.raises(UserError, match=r"needs SMPL_subdiv\.mat.* in .*densepose/data: download"):
        prepare(cfg)


def test_cuda_is_optional(make_cfg, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prepare(make_cfg("out", "MODEL.DEVICE", "cuda")).MODEL.DEVICE == "cpu"
    assert "using the CPU" in capsys.readouterr().out


def test_output_dir_that_cannot_be_made(make_cfg, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="OUTPUT_DIR"):
        prepare(make_cfg("file/out"))


def test_expected_results():
    results = {"bbox": {"AP": 40.0, "AP50": 60.0, "AP75": float("nan")}}
    verify_results([], results)
    verify_results([["bbox", "AP", 38.5, 1.5], ["bbox", "AP50", 60.0, 0.1]], results)
    for missed in (["bbox", "AP", 38.4, 1.5], ["bbox", "AP75", 1.0, 9.0], ["segm", "AP", 1.0, 9.0]):
        with pytest.raises(UserError, match=f"{missed[0]}/{missed[1]} is"):
            verify_results([["bbox", "AP50", 60.0, 0.1], missed], results)


def test_a_real_detector_is_trained_and_loaded_again(make_cfg, capsys):
    cfg = make_cfg("out", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "0")
    results = train(cfg)
    assert set(results) == {"bbox"}
    again = make_cfg("again", "MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")
    assert trainer.evaluate_weights(again) == results
    assert trainer.evaluate_weights(cfg, resume=True) == results
    (written,) = Path(cfg.OUTPUT_DIR, "inference").glob("*.json")
    assert evaluate(get_dataset(cfg.DATASETS.TEST[0]), json.loads(written.read_text())) == results
