"""What a run asks of its device: seeds, precision, and encoders that are compiled or are not."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from devices import DEVICES
from mean_colour import Residual, views
from same_bits import assert_same_bits
from torch.nn.parallel import DistributedDataParallel

from moco_det.common.errors import UserError
from moco_det.common.launch import free_local_url, launch, process_group
from moco_det.common.processes import _Gather, rank, world_size
from pretrain.engine import device as module
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.device import (
    PAYS_FROM,
    compile_encoders,
    seed_run,
    settle_compilation,
    settle_precision,
)
from pretrain.engine.optimization import AMP_DTYPES, OWN_BUFFERS, ScheduledSGD, parallelize
from pretrain.engine.pretraining import contrastive_step
from pretrain.moco import build_mechanism
from pretrain.moco.grouped_batchnorm import GroupedBatchNorm2d
from pretrain.moco.instance_discrimination import embed
from pretrain.moco.losses import InfoNCE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def kernel_choice():
    """The process's settings are put back."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    yield
    cudnn.benchmark, cudnn.deterministic = before[:2]
    torch.use_deterministic_algorithms(before[2])


# -- seeds ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernel_choice")
def test_a_seed_is_wanted_else_resumed_else_drawn():
    checkpoint = Checkpoint(None, {"config": {"seed": 3}})
    assert seed_run(5, checkpoint) == 5
    first = [torch.rand(1).item(), random.random(), np.random.rand()]
    assert seed_run(5, None) == 5
    assert [torch.rand(1).item(), random.random(), np.random.rand()] == first
    assert seed_run(None, checkpoint) == 3
    assert seed_run(None, None) != seed_run(None, Checkpoint(None, {}))  # in all but 2^-31 of runs


@pytest.mark.usefixtures("kernel_choice")
@pytest.mark.parametrize("gpu", [False, True])
def test_a_seed_alone_leaves_the_choice_of_kernels_free(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    for seed in (None, 5):
        seed_run(seed, None)
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    seed_run(5, None, deterministic=True)
    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert torch.are_deterministic_algorithms_enabled() == gpu
    seed_run(5, None)
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
    assert not torch.are_deterministic_algorithms_enabled()


# -- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "device", "capability", "precision"),
    [
        ("auto", CPU, None, "none"),
        ("auto", CUDA, (9, 0), "bf16"),
        ("auto", CUDA, (8, 0), "bf16"),
        ("auto", CUDA, (7, 5), "none"),
        ("none", CUDA, (9, 0), "none"),
        ("fp16", CPU, None, "fp16"),
    ],
)
def test_precision_of_a_new_run(wanted, device, capability, precision, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert settle_precision(wanted, device, None) == precision
    said = "mixed precision: bf16 (--amp none for float32, the paper's)\n"
    assert capsys.readouterr().out == (said if precision == "bf16" else "")


@pytest.mark.parametrize(
    ("state", "precision"),
    [
        ({"config": {"amp": "fp16"}}, "fp16"),
        ({"config": {"amp": "none"}}, "none"),
        ({"config": {}}, "none"),
        ({}, "none"),  # of the official code
    ],
)
def test_a_resumed_run_keeps_its_precision(state, precision, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert settle_precision("auto", CUDA, Checkpoint(tmp_path, state)) == precision
    assert settle_precision("bf16", CUDA, Checkpoint(tmp_path, state)) == "bf16"


def test_a_precision_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match="entry config.amp is bf17"):
        settle_precision("auto", CPU, Checkpoint(tmp_path, {"config": {"amp": "bf17"}}))


# -- compiled encoders ----------------------------------------------------------------------------


@pytest.mark.usefixtures("kernel_choice")
def test_compiling_is_for_gpus_and_long_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [settle_compilation("auto", CPU, 10**6), settle_compilation("off", CUDA, 10**6)] == [
        False,
        False,
    ]
    assert settle_compilation("on", CPU, 1)
    assert settle_compilation("auto", CUDA, PAYS_FROM)
    assert capsys.readouterr().out == ""
    assert not settle_compilation("auto", CUDA, 300)
    assert "not compiled: a run of 300 steps ends before it pays" in capsys.readouterr().out
    seed_run(5, None, deterministic=True)
    assert not settle_compilation("auto", CUDA, 10**6)
    assert "not compiled: --deterministic" in capsys.readouterr().out


def build(mechanism="moco", device=CPU, groups=2, neighbours=0):
    torch.manual_seed(0)
    model = build_mechanism(
        mechanism, Residual(), dim=4, negatives=6, samples=20, key_momentum=0.9, bn_groups=groups,
        neighbours=neighbours,
    )  # fmt: skip
    return model.to(device, memory_format=torch.channels_last)


def train(model, dtype=None, steps=2, local=slice(None), parallel=None, crops=0):
    """Losses and gradients of steps on 8 images, of which this process has `local`."""
    device, batch = model.pixel_mean.device, torch.arange(8)
    optimizer, parallel = ScheduledSGD(model, 0.1, 0.9, 1e-4), parallel or parallelize(model)
    found = []
    for step in range(steps):
        seen = [views(8, 2 * step + i, size=16)[local].to(device) for i in range(model.num_views)]
        seen += [small[local].to(device) for small in small_views(step, crops)]
        inputs = model.inputs(seen, batch, 0, step)
        loss, *_ = contrastive_step(parallel, InfoNCE(), optimizer, inputs, dtype, 0.4)
        found.append(loss.detach())
    return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def small_views(step, count):
    return [views(8, 100 + 10 * step + i, size=8) for i in range(count)]


def compile_for(device):
    """A CPU's compiler takes half a minute; this one has the program that it would get."""
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    return partial(compile_encoders, required=True, backend=backend)


def close(found, wanted, tolerance):
    for tensor, other in zip(found, wanted, strict=True):
        tensor, other = tensor.float(), other.float()
        assert (tensor - other).norm() <= tolerance * other.norm() + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("amp", "tolerance"), [("none", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize("mechanism", ["moco", "end-to-end", "memory-bank"])
def test_a_compiled_step_is_a_step(mechanism, amp, tolerance, device, monkeypatch, capsys):
    dtype = AMP_DTYPES[amp]
    plain, compiled = (build(mechanism, device) for _ in range(2))
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    assert before.keys() == plain.state_dict().keys()
    compile_for(device)(compiled, views(8, size=16).to(device), dtype)
    assert_same_bits(dict(compiled.state_dict()), before)  # what was rehearsed has left nothing
    assert all(p.grad is None for p in compiled.parameters())
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("compiling the encoders")
    assert printed[1].startswith("compiled in ")

    wanted, gradients = train(plain, dtype)
    monkeypatch.delattr(GroupedBatchNorm2d, "in_turn")
    with torch._dynamo.config.patch(error_on_recompile=True):  # the rehearsal was of the step
        found, same = train(compiled, dtype)
    close(found, wanted, tolerance)
    close(same.values(), [gradients[name] for name in same], tolerance)
    close(compiled.buffers(), plain.buffers(), tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_has_both_sizes_of_views_and_the_backbone_s_features(device, monkeypatch):
    plain, compiled = (build("moco", device, neighbours=2) for _ in range(2))
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    small = [view.to(device) for view in small_views(0, 3)]
    compile_for(device)(compiled, views(8, size=16).to(device), None, small=small)
    assert_same_bits(dict(compiled.state_dict()), before)
    wanted, gradients = train(plain, crops=3)
    monkeypatch.delattr(GroupedBatchNorm2d, "in_turn")
    with torch._dynamo.config.patch(error_on_recompile=True):  # the rehearsal was of the step
        found, same = train(compiled, crops=3)
    close(found, wanted, 1e-4)
    close(same.values(), [gradients[name] for name in same], 1e-4)
    close(compiled.buffers(), plain.buffers(), 1e-4)


def test_evaluation_between_steps_compiles_nothing_again():
    model = build()
    compile_for("cpu")(model, views(8, size=16), None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, steps=1)
        with torch.inference_mode():
            model.encoder_q.eval()(torch.zeros(3, 3, 8, 8))
        model.encoder_q.train()
        train(model, steps=1)


def failing(graph, inputs):
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


def test_without_a_compiler_a_run_goes_on_and_says_why(capsys):
    torch._dynamo.reset()
    model = build()
    compile_encoders(model, views(8, size=16), None, required=False, backend=failing)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("encoders are not compiled: ")
    assert "Failed to find C compiler. Please specify via CC" in last
    assert model.embed is embed
    assert train(model)[0] == train(build())[0]
    with pytest.raises(UserError, match="--compile on: .*Failed to find C compiler"):
        compile_encoders(model, views(8, size=16), None, required=True, backend=failing)


def test_memory_that_does_not_suffice_is_not_for_want_of_a_compiler():
    def exhausted(graph, inputs):
        def run(*_):
            raise torch.OutOfMemoryError("out of memory")

        return run

    torch._dynamo.reset()
    with pytest.raises(torch.OutOfMemoryError):
        compile_encoders(build(), views(8, size=16), None, required=False, backend=exhausted)


def test_replayed_graphs_hand_out_copies(monkeypatch):
    """The next replay writes over what the one before has returned."""
    monkeypatch.setattr(module, "CUDA_GRAPHS", True)
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda function, **given: seen.update(given) or function)
    model = build()
    compile_encoders(model, views(8, size=16), None, required=True)
    assert seen["mode"] == "reduce-overhead"
    kept = torch.ones(8, 4)
    model.embed = lambda *_: kept
    assert model.encode(model.encoder_k, views(8)) is not kept
    model.use_plain_encoders()
    assert model.encode(model.encoder_k, views(8)) is not None
    assert not model.replayed


def train_in_one_of_two(folder, compiles):
    torch.set_num_threads(1)
    model = build(groups=2 // world_size())
    local = slice(8 // world_size() * rank(), 8 // world_size() * (rank() + 1))
    if compiles:
        compile_for("cpu")(model, views(8, size=16)[local], None)
    losses, gradients = train(model, local=local)
    gradients = {name: value.tolist() for name, value in gradients.items()}
    queue = model.queue.tolist()
    with open(f"{folder}/{compiles}{world_size()}{rank()}.json", "w") as file:
        json.dump({"queue": queue, "gradients": gradients}, file)


@pytest.mark.usefixtures("forked_launches")
def test_two_processes_with_compiled_encoders_train_as_one_without(tmp_path):
    train_in_one_of_two(tmp_path, False)
    launch(train_in_one_of_two, num_gpus=2, args=(str(tmp_path), True))
    names = "False10", "True20", "True21"
    (one, *two) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    for found in two:
        close([torch.tensor(found["queue"])], [torch.tensor(one["queue"])], 1e-4)
        assert found["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            close([torch.tensor(found["gradients"][name])], [torch.tensor(gradient)], 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_process_group_of_one_trains_as_none(device):
    """Through NCCL on a GPU: what several processes exchange goes through it, too."""
    wanted, gradients = train(build(device=device))
    model = build(device=device)
    backend = "nccl" if device == "cuda" else None
    with process_group(free_local_url(), 0, 1, local_rank=0, backend=backend):
        parallel = DistributedDataParallel(model, **OWN_BUFFERS, gradient_as_bucket_view=True)
        found, same = train(model, parallel=parallel)
        rows = torch.ones(3, 2, device=device, requires_grad=True)
        _Gather.apply(rows).square().sum().backward()
        assert torch.equal(rows.grad, 2 * rows)
    close(found, wanted, 1e-5)
    close(same.values(), gradients.values(), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mechanism", ["moco", "end-to-end"])
def test_replayed_steps_are_steps(mechanism, monkeypatch):
    """The first of them records, the others replay."""
    monkeypatch.setattr(module, "CUDA_GRAPHS", True)
    plain, replayed = (build(mechanism, "cuda") for _ in range(2))
    compile_for("cuda")(replayed, views(8, size=16).to("cuda"), None)
    wanted, gradients = train(plain, steps=5)
    found, same = train(replayed, steps=5)
    close(found, wanted, 1e-3)
    close(same.values(), [gradients[name] for name in same], 1e-2)
