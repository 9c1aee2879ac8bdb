"""The parts of training through Detectron2, with it and with a stand-in for it."""

from types import SimpleNamespace

import pytest
import torch
from recorder import Recorder
from tiny_semantic import write_tiny_segmentor, write_tiny_semantic
from tiny_voc import write_tiny_config, write_tiny_voc
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.resume_state import StateFault
from moco_det.native.modeling.meta_arch import build_model as build_native


@pytest.fixture
def load(plugin, tmp_path):
    """Function: KEY VALUE ... -> the tiny detector's config, as the plugin reads it."""
    path = write_tiny_config(tmp_path / "tiny.yaml", write_tiny_voc(tmp_path / "voc"))
    out = ["OUTPUT_DIR", str(tmp_path / "out")]
    return lambda *opts: plugin.extensions.load_config(str(path), [*out, *opts])


# -- a step ---------------------------------------------------------------------------------------


class Line(nn.Module):
    """Losses whose gradients are known: mean(x) of the weight in one, 3 mean(x) in the other."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def forward(self, batch):
        mean = torch.tensor(batch).mean()
        probe = torch.ones(1, 1) @ torch.ones(1, 1)  # of the type that autocast asks for
        self.seen.append((mean.item(), probe.dtype, torch.is_autocast_enabled("cpu")))
        return {"a": self.weight * mean, "b": 3 * self.weight * mean}


@pytest.mark.parametrize("amp", [False, True])
def test_a_step_takes_the_mean_of_its_passes(plugin, amp):
    model, optimizer = Line(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [[1.0, 3.0], [5.0, 7.0], [100.0]]
    model.weight.grad = torch.tensor(1e6)  # of an earlier step
    trainer = plugin.trainer.AccumulatingTrainer(model, batches, optimizer, 2, amp)
    written = []
    trainer._write_metrics = lambda losses, waited: written.append((losses, waited))
    trainer.run_step()
    assert [mean for mean, _, _ in model.seen] == [2.0, 6.0]
    wanted = torch.bfloat16 if amp else torch.float32
    assert [(dtype, on) for _, dtype, on in model.seen] == [(wanted, amp)] * 2
    assert model.weight.grad.item() == pytest.approx(4 * (2 + 6) / 2)
    assert model.weight.item() == pytest.approx(2 - 0.1 * 16)
    ((losses, waited),) = written
    assert {k: v.item() for k, v in losses.items()} == {"a": 8.0, "b": 24.0}
    assert 0 <= waited < 60
    model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.run_step()


def test_the_state_of_a_step_holds_its_scaler(plugin):
    def make():
        model = Line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return plugin.trainer.AccumulatingTrainer(model, [[1.0]], optimizer, 1, False)

    first, second = make(), make()
    first.grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    second.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    state = first.state_dict()
    assert state.keys() >= {"optimizer", "grad_scaler"}
    second.load_state_dict(state)
    assert second.grad_scaler.get_scale() == 64.0


@pytest.mark.parametrize(
    ("opts", "kind", "accumulation"),
    [
        ((), "SimpleTrainer", 1),
        (("SOLVER.AMP.ENABLED", "True"), "AccumulatingTrainer", 1),  # Detectron2's wants a GPU
        (("SOLVER.GRADIENT_ACCUMULATION_STEPS", "2"), "AccumulatingTrainer", 2),
    ],
)
def test_which_trainer_takes_the_steps(plugin, load, opts, kind, accumulation):
    trainer = object.__new__(plugin.trainer.Trainer)
    trainer.cfg = load(*opts)
    model = Line()
    steps = trainer._build_steps(model, [], torch.optim.SGD(model.parameters(), lr=0.1))
    assert type(steps).__name__ == kind
    if kind == "AccumulatingTrainer":
        half = torch.bfloat16 if "SOLVER.AMP.ENABLED" in opts else None  # on a CPU
        assert (steps.accumulation, steps.precision) == (accumulation, half)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", {"broadcast_buffers": False, "device_ids": None}),
        ("cuda", {"broadcast_buffers": False}),
    ],
)
def test_gradients_are_shared_and_statistics_are_not(plugin, load, monkeypatch, device, expected):
    """Detectron2's way; on a CPU without a device, which its default would take from a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parallel = Recorder(Line())
    monkeypatch.setattr(plugin.trainer, "create_ddp_model", parallel)
    trainer = object.__new__(plugin.trainer.Trainer)
    trainer.cfg = load("MODEL.DEVICE", device)
    trainer._build_steps("model", [], None)
    assert parallel.calls == [(("model",), expected)]


def test_on_a_gpu_detectron2_s_own_mixed_precision_is_taken(plugin, load, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = {name: Recorder(name) for name in ("AMPTrainer", "SimpleTrainer")}
    for name, recorder in made.items():
        monkeypatch.setattr(plugin.trainer, name, recorder)
    for amp, kind in (("True", "AMPTrainer"), ("False", "SimpleTrainer")):
        trainer = object.__new__(plugin.trainer.Trainer)
        trainer.cfg = load("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", amp)
        assert trainer._build_steps("model", "loader", "optimizer") == kind
        assert made[kind].calls == [(("model", "loader", "optimizer"), {})]


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "accumulation", "images"), [(1, 1, 12), (1, 3, 4), (2, 1, 12), (2, 3, 4)]
)
def test_batches_are_of_one_forward_pass(
    plugin, load, monkeypatch, processes, accumulation, images
):
    """Detectron2's loader divides `total_batch_size` among the processes."""
    build, dense = Recorder("loader"), Recorder("dense pose")
    monkeypatch.setattr(plugin.trainer, "shared_records", Recorder("records"))
    monkeypatch.setattr(plugin.trainer, "build_detection_train_loader", build)
    monkeypatch.setattr(plugin.trainer, "build_dense_pose_loader", dense)
    monkeypatch.setattr(plugin.trainer.comm, "get_world_size", lambda: processes)
    key = "SOLVER.GRADIENT_ACCUMULATION_STEPS"
    cfg = load("SOLVER.IMS_PER_BATCH", "12", key, str(accumulation))
    assert plugin.trainer.Trainer.build_train_loader(cfg) == "loader"
    assert build.calls == [
        ((cfg,), {"mapper": None, "dataset": "records", "total_batch_size": images})
    ]
    assert plugin.trainer.shared_records.calls == [((cfg,), {})]
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DENSEPOSE_ON = True
    assert plugin.trainer.Trainer.build_train_loader(cfg) == "dense pose"
    assert dense.calls == [((cfg, images), {})]


def test_a_segmentor_has_its_own_mapper_and_test_loader(plugin, load, tmp_path, monkeypatch):
    root = write_tiny_semantic(tmp_path / "semantic")
    path = write_tiny_segmentor(tmp_path / "segmentor.yaml", root)
    cfg = plugin.extensions.load_config(str(path))
    build = Recorder("loader")
    monkeypatch.setattr(plugin.trainer, "build_detection_train_loader", build)
    monkeypatch.setattr(plugin.trainer, "shared_records", Recorder([]))
    plugin.trainer.Trainer.build_train_loader(cfg)
    ((_, options),) = build.calls
    assert isinstance(options["mapper"], plugin.pixel_data.SemanticDatasetMapper)
    for name in ("build_semantic_test_loader", "build_detection_test_loader"):
        monkeypatch.setattr(plugin.trainer, name, Recorder(name))
    test_loader = plugin.trainer.Trainer.build_test_loader
    assert test_loader(cfg, "x") == "build_semantic_test_loader"
    assert test_loader(load(), "x") == "build_detection_test_loader"


# -- precise BN -----------------------------------------------------------------------------------


def test_precise_bn_is_asked_for_by_its_keys(plugin, load, monkeypatch):
    """As many images as the key says, where a forward pass has fewer; read without workers."""
    loader = Recorder("loader")
    monkeypatch.setattr(plugin.trainer.Trainer, "build_train_loader", loader)
    trainer = object.__new__(plugin.trainer.Trainer)
    key = ("SOLVER.GRADIENT_ACCUMULATION_STEPS", "2", "DATALOADER.NUM_WORKERS", "4")
    trainer.cfg = load(*key, "TEST.PRECISE_BN.NUM_ITER", "7", "TEST.EVAL_PERIOD", "11")
    trainer._trainer = SimpleNamespace(model=nn.Sequential(nn.BatchNorm2d(2)))
    hook = trainer._precise_bn()
    assert isinstance(hook, plugin.trainer.SamePreciseBN)
    assert (hook._num_iter, hook._period, hook._data_loader) == (14, 11, "loader")
    (((cfg,), _),) = loader.calls
    assert cfg.DATALOADER.NUM_WORKERS == 0
    assert trainer.cfg.DATALOADER.NUM_WORKERS == 4


def test_statistics_are_those_of_so_many_batches(plugin):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    model[0].momentum = None
    batches = [i + torch.randn(4, 3, 5, 5) for i in range(5)]
    hook = plugin.trainer.SamePreciseBN(0, model, batches, 2)
    for chosen in (batches[:2], batches[2:4]):  # the next time it goes on where it was
        hook.update_stats()
        values = torch.cat(chosen)
        torch.testing.assert_close(model[0].running_mean, values.mean(dim=(0, 2, 3)))
        variance = values.var(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(model[0].running_var, variance, rtol=1e-4, atol=1e-5)
    frozen = plugin.trainer.SamePreciseBN(0, nn.Conv2d(3, 3, 1), None, 2)
    frozen.update_stats()  # nothing to do


# -- a trainer ------------------------------------------------------------------------------------


@pytest.fixture
def trainer(plugin, load, monkeypatch):
    """Function: KEY VALUE ... -> a trainer whose loader has no images."""
    monkeypatch.setattr(plugin.trainer, "build_detection_train_loader", Recorder([]))
    monkeypatch.setattr(plugin.trainer, "shared_records", Recorder([]))
    return lambda *opts, **options: plugin.trainer.Trainer(load(*opts), **options)


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_detectron2_s_precise_bn_is_exchanged(plugin, trainer, enabled):
    made = trainer("TEST.PRECISE_BN.ENABLED", enabled)
    kinds = [type(hook).__name__ for hook in made._hooks]
    assert "PreciseBN" not in kinds
    assert kinds.count("SamePreciseBN") == (enabled == "True")


def test_a_trainer_has_strict_weights_and_the_length_of_its_config(plugin, trainer):
    made = trainer("SOLVER.MAX_ITER", "9", allow_missing=True)
    assert (made.start_iter, made.max_iter) == (0, 9)
    files = made.checkpointer
    assert type(files) is plugin.trainer.StrictCheckpointer
    assert files.allow_missing is True
    assert files.cfg.SOLVER.MAX_ITER == 9
    assert files.checkpointables.keys() == {"trainer"}
    assert files.model is made._trainer.model
    assert files.save_dir == made.cfg.OUTPUT_DIR
    assert trainer().checkpointer.allow_missing is False


@pytest.mark.parametrize(
    ("device", "processes", "kind"),
    [("cpu", 1, "SyncBatchNorm"), ("cpu", 2, "ours"), ("cuda", 2, "SyncBatchNorm")],
)
def test_several_processes_on_a_cpu_have_a_norm_that_runs_there(
    plugin, load, monkeypatch, device, processes, kind
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plugin.trainer.comm, "get_world_size", lambda: processes)
    build = classmethod(lambda cls, cfg: nn.Sequential(nn.SyncBatchNorm(3)))
    monkeypatch.setattr(plugin.trainer.DefaultTrainer, "build_model", build)
    (norm,) = plugin.trainer.Trainer.build_model(load("MODEL.DEVICE", device))
    assert (type(norm) is nn.SyncBatchNorm) == (kind == "SyncBatchNorm")


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def backbone_file(load, tmp_path):
    """Function: names to leave out and metadata -> a file with the rest of a ResNet's weights."""

    def write(without=(), **metadata):
        prefix = "backbone.bottom_up."
        state = build_native(load()).state_dict()
        arrays = {
            name.removeprefix(prefix): torch.rand_like(value) if value.ndim else value
            for name, value in state.items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in without
        }
        content = {"model": arrays, "__author__": "test", "matching_heuristics": True, **metadata}
        torch.save(content, tmp_path / "backbone.pth")
        return str(tmp_path / "backbone.pth"), arrays

    return write


def test_initial_weights_fill_the_backbone_or_are_refused(plugin, load, backbone_file):
    path, arrays = backbone_file()
    model, cfg = build_native(load()), load()
    plugin.trainer.StrictCheckpointer(model, "", cfg).resume_or_load(path, resume=False)
    state = model.state_dict()
    assert all(torch.equal(state[f"backbone.bottom_up.{n}"], value) for n, value in arrays.items())
    path, _ = backbone_file(without=["res3.0.conv1.weight"])
    with pytest.raises(UserError, match="backbone.bottom_up.res3.0.conv1.weight"):
        plugin.trainer.StrictCheckpointer(model, "", cfg).resume_or_load(path, resume=False)
    lenient = plugin.trainer.StrictCheckpointer(model, "", cfg, allow_missing=True)
    lenient.resume_or_load(path, resume=False)


def test_weights_of_another_channel_order_are_refused(plugin, load, backbone_file):
    path, _ = backbone_file(requires={"INPUT.FORMAT": "RGB"})
    for order in ("BGR", "RGB"):
        cfg = load("INPUT.FORMAT", order)
        files = plugin.trainer.StrictCheckpointer(build_native(cfg), "", cfg)
        if order == "RGB":
            files.resume_or_load(path, resume=False)
        else:
            with pytest.raises(UserError, match="INPUT.FORMAT RGB .the config says BGR"):
                files.resume_or_load(path, resume=False)


def test_what_is_resumed_is_the_newest_whole_checkpoint(plugin, tmp_path, capsys):
    model = nn.Linear(2, 1)
    for number in (1, 3):
        content = {"model": {k: v + number for k, v in model.state_dict().items()}}
        torch.save(content | {"iteration": number}, tmp_path / f"model_000000{number}.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    files = plugin.trainer.StrictCheckpointer(model, str(tmp_path), cfg=None)
    before = model.weight.detach().clone()
    assert files.resume_or_load("", resume=True)["iteration"] == 3
    torch.testing.assert_close(model.weight, before + 3)
    data = bytearray((tmp_path / "model_0000003.pth").read_bytes())
    data[data.index(model.weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "model_0000003.pth").write_bytes(data)
    assert files.resume_or_load("", resume=True)["iteration"] == 1
    assert "model_0000003.pth is damaged or no checkpoint" in capsys.readouterr().out
    (tmp_path / "last_checkpoint").unlink()
    assert files.get_checkpoint_file() == ""


def test_a_checkpoint_of_another_configuration_is_refused(plugin, tmp_path):
    class Other:
        """A part of the run that the file does not fit."""

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise ValueError("loaded state dict has a different number of parameter groups")

    model = nn.Linear(2, 1)
    torch.save({"model": model.state_dict(), "optimizer": {}}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    files = plugin.trainer.StrictCheckpointer(model, str(tmp_path), cfg=None, optimizer=Other())
    message = "model_0000001.pth is from another configuration: loaded state dict has a different"
    with pytest.raises(UserError, match=message):
        files.resume_or_load("", resume=True)


def trainer_state(optimizer, **changes):
    inner = {"iteration": 4, "optimizer": optimizer.state_dict()}
    return {"iteration": 4, "hooks": {}, "_trainer": inner} | changes


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda state: state.update(iteration=-1), "trainer.iteration"),
        (lambda state: state.update(hooks=[]), "trainer.hooks"),
        (lambda state: state.pop("_trainer"), "trainer._trainer"),
        (lambda state: state["_trainer"].update(iteration="4"), "trainer._trainer.iteration"),
        (lambda state: state["_trainer"].pop("optimizer"), "optimizer"),
        (lambda state: state["_trainer"]["optimizer"]["state"].clear(), "momentum|optimizer"),
    ],
)
def test_the_state_of_a_trainer_is_checked(plugin, change, name):
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model([1.0])["a"].backward()
    optimizer.step()
    trainer = SimpleNamespace(_trainer=SimpleNamespace(optimizer=optimizer))
    plugin.trainer._check_trainer(trainer_state(optimizer), trainer)
    state = trainer_state(optimizer)
    state["_trainer"]["optimizer"] = {**state["_trainer"]["optimizer"]}
    state["_trainer"]["optimizer"]["state"] = {**state["_trainer"]["optimizer"]["state"]}
    change(state)
    with pytest.raises(StateFault, match=name):
        plugin.trainer._check_trainer(state, trainer)
    scaled = trainer_state(optimizer)
    scaled["_trainer"]["grad_scaler"] = {"scale": 2.0}
    scaled["_trainer"]["optimizer"] = {**scaled["_trainer"]["optimizer"], "state": {}}
    plugin.trainer._check_trainer(scaled, trainer)  # no step was taken yet


# -- a run ----------------------------------------------------------------------------------------


def test_what_is_checked_before_a_run(plugin, load, monkeypatch):
    """In this order, with the records that the model learns from, and scoring of ours alone."""
    calls = []
    names = ("check_input", "register_datasets", "check_voc_scoring", "check_classes")
    for name in (*names, "check_metric_files", "check_scoring", "default_setup"):

        def record(*args, name=name, **kwargs):
            calls.append((name, args[1:] if args and hasattr(args[0], "MODEL") else args, kwargs))

        monkeypatch.setattr(plugin.trainer, name, record)
    cfg = load("DATASETS.TEST", "('coco_2017_val','mine')", "MODEL.MASK_ON", "True")
    plugin.trainer.prepare(cfg, eval_only=True)
    order = ["check_input", "register_datasets", "check_voc_scoring", "check_voc_scoring"]
    order += ["check_classes", "check_metric_files", "check_scoring", "default_setup"]
    assert [name for name, _, _ in calls] == order
    assert calls[0][2] == {"crops_objects": True}
    sets, wanted = calls[1][1]
    assert sets == (*cfg.DATASETS.TRAIN, "coco_2017_val", "mine")
    assert (wanted.masks, wanted.polygons, wanted.keypoints) == (True, True, 0)
    assert [arguments for _, arguments, _ in calls[2:4]] == [("coco_2017_val",), ("mine",)]
    assert calls[6][1] == (["coco_2017_val"],)
    assert calls[7][1][0].eval_only is True


def test_a_folder_is_made_ready(plugin, load, tmp_path, monkeypatch):
    """A line that a kill has cut off is dropped; where nothing can be written, it is said."""
    for name in ("check_input", "register_datasets", "check_voc_scoring", "check_classes"):
        monkeypatch.setattr(plugin.trainer, name, Recorder())
    for name in ("check_metric_files", "check_scoring", "default_setup"):
        monkeypatch.setattr(plugin.trainer, name, Recorder())
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "metrics.json"
    path.write_text('{"iteration": 1}\n{"itera')
    plugin.trainer.prepare(load(), eval_only=False)
    assert path.read_text() == '{"iteration": 1}\n'

    def fail(cfg, args):
        raise OSError("disk full")

    monkeypatch.setattr(plugin.trainer, "default_setup", fail)
    with pytest.raises(UserError, match="cannot write to OUTPUT_DIR .*out: disk full"):
        plugin.trainer.prepare(load(), eval_only=False)


def test_processes_of_a_machine_are_told_of_each_other(plugin, load, monkeypatch):
    class Enough(Exception):
        """Nothing after it is looked at here."""

    def create(count):
        raise Enough(count)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(plugin.trainer.comm, "create_local_process_group", create)
    monkeypatch.setattr(plugin.trainer.comm, "get_world_size", lambda: 6)
    with pytest.raises(Enough, match="3"):
        plugin.trainer.prepare(load(), eval_only=False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FloatingPointError("Loss became infinite"), "infinite Lower SOLVER.BASE_LR"),
        (FileNotFoundError("no a.jpg"), "no a.jpg; .* below DETECTRON2_DATASETS, now /nowhere"),
    ],
)
def test_failures_of_a_run_are_said_in_a_line(plugin, load, monkeypatch, error, message):
    class Failing:
        def __init__(self, *args):
            raise error

    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    monkeypatch.setattr(plugin.trainer, "prepare", Recorder())
    monkeypatch.setattr(plugin.trainer, "Trainer", Failing)
    with pytest.raises(UserError, match=message):
        plugin.trainer.train(load())


@pytest.mark.parametrize(("found", "resume"), [({"bbox": {"AP": 5.0}}, True), (None, False)])
def test_a_run_resumes_trains_and_returns_the_last_results(
    plugin, load, monkeypatch, capsys, found, resume
):
    calls = []

    class Fake:
        def __init__(self, cfg, allow_missing):
            calls.append(("made", cfg.SOLVER.IMS_PER_BATCH, allow_missing))

        def resume_or_load(self, resume):
            calls.append(("resumed", resume))

        def train(self):
            calls.append("trained")
            if found:
                self._last_eval_results = found

    prepare = Recorder()
    monkeypatch.setattr(plugin.trainer, "prepare", prepare)
    monkeypatch.setattr(plugin.trainer, "Trainer", Fake)
    asked = {"resume": resume, "allow_missing": not resume}
    assert plugin.trainer.train(load(), **asked) == (found or {})
    assert calls == [("made", 2, not resume), ("resumed", resume), "trained"]
    assert prepare.calls[0][1] == {"eval_only": False}
    assert "batch 2 = 1 process(es) x 2 images x 1 accumulated" in capsys.readouterr().out


def test_weights_are_evaluated(plugin, load, backbone_file, monkeypatch):
    monkeypatch.setattr(plugin.trainer, "prepare", Recorder())
    tests = Recorder({"bbox": {"AP": 5.0}})
    monkeypatch.setattr(plugin.trainer.Trainer, "test", tests)
    path, arrays = backbone_file()
    cfg = load("MODEL.WEIGHTS", path)
    assert plugin.trainer.evaluate_weights(cfg) == {"bbox": {"AP": 5.0}}
    (((_, model), _),) = tests.calls
    stem = model.state_dict()["backbone.bottom_up.stem.conv1.weight"]
    assert torch.equal(stem, arrays["stem.conv1.weight"])
