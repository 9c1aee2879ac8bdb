"""A contrastive step and what it reports, against both written out."""

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from devices import DEVICES
from float64 import in_float64
from fork_server import run_in_two_processes
from host_reads import HostReads
from mean_colour import MeanColour, NormalisedColour, Residual, views

from pretrain.engine import checkpoints, pretraining
from pretrain.engine.optimization import AMP_DTYPES, ScheduledSGD
from pretrain.engine.pretraining import MoCoPretraining, contrastive_step, pretext_metrics
from pretrain.engine.watching import MetricMeter
from pretrain.moco import MECHANISMS, build_mechanism
from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.losses import LOSSES, InfoNCE
from pretrain.moco.momentum_contrast import MoCo


def test_pretext_metrics_are_those_of_each_query_in_turn():
    torch.manual_seed(0)
    logits, queries = torch.randn(9, 12) / 0.2, torch.randn(9, 4)
    found = pretext_metrics(torch.tensor(3.0), logits, queries, temperature=0.2)
    rows = logits.tolist()
    ranks = [sum(other > row[0] for other in row[1:]) for row in rows]
    wanted = [
        3.0,
        100 * sum(rank < 1 for rank in ranks) / 9,
        100 * sum(rank < 5 for rank in ranks) / 9,
        sum(row[0] for row in rows) / 9 * 0.2,
        sum(sum(row[1:]) for row in rows) / 99 * 0.2,
        sum(float(column.std(correction=0)) for column in queries.T) / 4,
    ]
    assert len(MoCoPretraining.measures) == len(wanted)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_step_is_sgd_on_the_loss_and_then_the_queue():
    torch.manual_seed(0)
    model = MoCo(MeanColour(), dim=4, queue_size=8, temperature=0.2)
    before, queue = model.encoder_q.fc.weight.detach().clone(), model.queue.clone()
    inputs = views(4, 1), views(4, 2), shuffle_index(0, 0, 4)
    optimizer = ScheduledSGD(model, lr=0.5, momentum=0.9, weight_decay=0.01)
    loss, logits, _ = contrastive_step(model, InfoNCE(), optimizer, inputs)
    gradient = model.encoder_q.fc.weight.grad
    wanted = before - 0.5 * (gradient + 0.01 * before)
    torch.testing.assert_close(model.encoder_q.fc.weight.detach(), wanted)
    torch.testing.assert_close(loss, InfoNCE()(logits))
    assert torch.equal(model.queue[:, 4:], queue[:, 4:])
    assert not torch.equal(model.queue[:, :4], queue[:, :4])
    assert int(model.queue_ptr) == 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_encoder_runs_in_mixed_precision_and_the_logits_do_not(dtype):
    torch.manual_seed(0)
    model = MoCo(MeanColour(), dim=4, queue_size=8, temperature=0.2)
    seen = {}
    for name in ("encoder_q", "encoder_k"):
        fc = getattr(model, name).fc
        fc.register_forward_hook(lambda fc, x, y, name=name: seen.update({name: y.dtype}))
    inputs = views(4, 1), views(4, 2), shuffle_index(0, 0, 4)
    optimizer = ScheduledSGD(model, lr=0.5, momentum=0.9, weight_decay=0.0)
    loss, logits, queries = contrastive_step(model, InfoNCE(), optimizer, inputs, dtype)
    assert seen == dict.fromkeys(("encoder_q", "encoder_k"), dtype or torch.float32)
    assert {x.dtype for x in (loss, logits, queries)} == {torch.float32}


# -- a task ---------------------------------------------------------------------------------------


class NoImages:
    """A source of batches that notes what it is resumed with."""

    def state(self):
        return {"images": 0}

    def resume(self, state, path):
        self.resumed = state


def make_task(monitor=None, **options) -> MoCoPretraining:
    model = MoCo(NormalisedColour(), dim=4, queue_size=8)
    optimizer = ScheduledSGD(model, lr=0.1, momentum=0.9, weight_decay=0.0)
    return MoCoPretraining(model, InfoNCE(), optimizer, NoImages(), 0, None, monitor, **options)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_goes_on_with_its_own_generators(monkeypatch, rank):
    states, draws = [], []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states += checkpoints.rng_states()
        draws.append(torch.rand(1).item())
    task = make_task()
    monkeypatch.setattr(pretraining, "rank", lambda: rank)
    state = {"epoch": 1, "state_dict": {}, "rng": states, "data": {"images": 7}}
    task.load_state(checkpoints.Checkpoint("path", state))
    assert torch.rand(1).item() == draws[rank]
    assert task.batches.resumed == {"images": 7}
    task.load_state(checkpoints.Checkpoint("path", state | {"rng": states[:1]}))  # of fewer
    assert len(task.state()["rng"]) == 1


def a_trainer(**position) -> SimpleNamespace:
    """Of a run of three epochs, with what a task asks of it."""
    found = []
    given = {"step": 0, "epoch": 0, "epochs": 3, "step_in_epoch": 1, "epochs_done": 0,
             "last_step": 9}  # fmt: skip
    return SimpleNamespace(
        **given | position,
        output=Path("out"),
        log=SimpleNamespace(kept=[]),
        timed=lambda stage: contextlib.nullcontext(),
        found=found,
        record=lambda values, line: found.append(values["knn_top1"]),
    )


def test_the_monitor_is_asked_once_before_training_and_then_every_so_many_epochs():
    task = make_task(monitor=lambda encoder: 50.0, knn_every=2)
    for step, asked in ((0, 1), (4, 0)):
        trainer = a_trainer(step=step)
        task.before_training(trainer)
        assert len(trainer.found) == asked
    counts = []
    for number in (1, 2, 3):  # 3 is the last
        trainer = a_trainer(step=9)
        task.close_epoch(trainer, number)
        counts.append(len(trainer.found))
    assert counts == [0, 1, 1]


def ask_the_monitor(rank, folder) -> None:
    """Of processes whose running statistics differ, as those of different images do.

    Each trains with its own: they are not the first one's but where the model is looked at.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task = make_task(monitor=lambda encoder: encoder.bn.running_mean.sum().item())
    task.model.encoder_q.bn.running_mean.fill_(1.0 + rank)
    task.parallel(views(4, 1), views(4, 2), shuffle_index(0, 0, 8))
    own = task.model.encoder_q.bn.running_mean.mean().item()
    trainer = a_trainer()
    task.record_knn(trainer)
    (folder / f"{rank}").write_text(f"{own:.2f} {trainer.found}")
    dist.destroy_process_group()


def test_all_processes_monitor_the_model_of_the_first(tmp_path):
    run_in_two_processes(ask_the_monitor, tmp_path)
    (first, seen), (second, also) = (
        (tmp_path / str(rank)).read_text().split(" ") for rank in (0, 1)
    )
    assert float(second) == pytest.approx(float(first) + 0.9, abs=0.02)  # a tenth is of the images
    assert seen == also
    assert float(seen.strip("[]")) == pytest.approx(3 * float(first), abs=0.03)


def task(
    mechanism: str, loss: str, amp: str, device: str, neighbours: int = 0, **options
) -> MoCoPretraining:
    torch.manual_seed(0)
    model = build_mechanism(
        mechanism, Residual(), dim=4, negatives=12, samples=30, key_momentum=0.9, bn_groups=2,
        neighbours=neighbours,
    )  # fmt: skip
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = ScheduledSGD(model, 0.1, 0.9, 1e-4, scale_gradients=amp == "fp16")
    loss = LOSSES[loss]().to(device)
    return MoCoPretraining(model, loss, optimizer, None, seed=0, dtype=AMP_DTYPES[amp], **options)


def batch(model, number: int, crops: int = 0) -> SimpleNamespace:
    seen = [views(8, 10 * number + i, size=16) for i in range(model.num_views)]
    seen += [views(8, 100 + 10 * number + i, size=8) for i in range(crops)]
    if torch.cuda.is_available():
        seen = [view.pin_memory() for view in seen]
    return SimpleNamespace(views=seen, indices=torch.arange(8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("mechanism", "loss"), [*((name, "infonce") for name in MECHANISMS), ("moco", "nce")]
)
def test_a_step_does_not_wait_for_its_device(mechanism, loss, amp, device):
    pretraining = task(mechanism, loss, amp, device)
    meter = MetricMeter(torch.device(device), pretraining.measures)
    pretraining.step(batch(pretraining.model, 0), 0)  # NCE's constant is of the first one
    with HostReads(device) as reads:
        for step in (1, 2):
            pretraining.optimizer.set_rate(0, step)
            meter.add(pretraining.step(batch(pretraining.model, step), step), 0.0)
        meter.send()
    assert reads.names == []
    assert meter.means(batch_size=8)["loss"] > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_step_with_small_views_and_neighbours_does_not_wait_either(amp, device):
    pretraining = task("moco", "infonce", amp, device, neighbours=3, auxiliary_weight=0.4)
    meter = MetricMeter(torch.device(device), pretraining.measures)
    pretraining.step(batch(pretraining.model, 0, crops=2), 0)
    with HostReads(device) as reads:
        meter.add(pretraining.step(batch(pretraining.model, 1, crops=2), 1), 0.0)
        meter.send()
    assert reads.names == []
    means = meter.means(batch_size=8)
    assert means["loss_nn"] > 0
    assert [*means][:7] == [*MoCoPretraining.measures, "loss_nn"]


def test_the_log_is_of_large_views_and_the_loss_of_all():
    pretraining = task("moco", "infonce", "none", "cpu")
    model, seen = copy.deepcopy(pretraining.model), batch(pretraining.model, 0, crops=2)
    values = dict(zip(pretraining.measures, pretraining.step(seen, 0).tolist(), strict=True))
    logits, _, queries = model(*model.inputs(seen.views, seen.indices, 0, 0))
    assert logits.shape == (24, 13)
    assert values["loss"] == pytest.approx(InfoNCE()(logits).item())
    own = logits[:8, 0] * model.temperature
    assert values["positive_similarity"] == pytest.approx(own.mean().item())
    spread = queries[:8].std(dim=0, correction=0).mean()
    assert values["feature_std"] == pytest.approx(spread.item())


@pytest.mark.parametrize(("begins", "counts"), [(0, True), (1, False)])
def test_neighbours_count_from_their_epoch_on(begins, counts):
    """Until then a step is MoCo's to the bit, and their loss is only logged."""
    plain = task("moco", "infonce", "none", "cpu")
    options = {"neighbours": 3, "auxiliary_weight": 0.4, "auxiliary_from": begins}
    pretraining = task("moco", "infonce", "none", "cpu", **options)
    plain.model.load_state_dict(pretraining.model.state_dict(), strict=False)
    seen = batch(plain.model, 0, crops=2)
    metrics = pretraining.step(seen, 0)
    assert torch.equal(metrics[:6], plain.step(seen, 0))
    gradients = [[p.grad for p in t.model.encoder_q.parameters()] for t in (pretraining, plain)]
    same = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert same is not counts


def test_what_waits_is_noticed():
    x = torch.ones(3, requires_grad=True)
    with HostReads() as reads:
        float(x.sum().detach())
        bool(x[0] > 0)
        x[x > 0].sum().backward()
        x.detach()[torch.tensor([0, 2])].tolist()
    assert {"_local_scalar_dense", "index"} <= set(reads.names)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("amp", "tolerance"), [("none", 1e-4), ("bf16", 0.1), ("fp16", 0.02)])
def test_a_step_is_that_of_float64(amp, tolerance, device, monkeypatch):
    """The gradient of the loss, and what is left in the running statistics and the queue."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pretraining = task("moco", "infonce", amp, device)
    model, inputs = pretraining.model, batch(pretraining.model, 0)
    exact = copy.deepcopy(model).double().cpu()
    values = pretraining.step(inputs, 0)
    with in_float64():
        order = exact.inputs(inputs.views, inputs.indices, 0, 0)
        logits, keys, _ = exact(*order)
        loss = InfoNCE()(logits)
        loss.backward()
        exact.enqueue(keys)
    torch.testing.assert_close(float(values[0]), float(loss.detach()), rtol=tolerance, atol=0)
    for (name, parameter), other in zip(
        model.encoder_q.named_parameters(), exact.encoder_q.parameters(), strict=True
    ):
        found = parameter.grad.double().cpu()  # the fused optimizer leaves fp16's unscaled
        assert (found - other.grad).norm() <= tolerance * other.grad.norm(), name
    for (name, buffer), other in zip(model.named_buffers(), exact.buffers(), strict=True):
        found = buffer.double().cpu()
        assert (found - other).norm() <= tolerance * other.double().norm(), name


def test_what_is_still_to_come():
    task = make_task(monitor=lambda encoder: 50.0, knn_every=2)
    trainer = a_trainer(epoch=1, epochs=4)
    assert task.to_come(trainer) == {"checkpoint": 3, "kNN": 2}
    task.monitor = None
    assert task.to_come(trainer) == {"checkpoint": 3}


def test_the_first_views_are_shown_as_the_encoders_see_them(monkeypatch):
    task = make_task()
    seen = batch(task.model, 0)
    for step in (0, 1):
        task.step(seen, step)
    (draw,) = task.pictures().values()
    pixels = draw()
    for column, view in enumerate(seen.views):
        tile = pixels[:112, 112 * column : 112 * (column + 1)]
        assert (tile[::7, ::7] == view[0].numpy()).all()  # 16 pixels, 7 times as large
    assert pixels.shape[0] // 140 == min(len(seen.views[0]), pretraining.SHOWN)
    assert task.pictures() == {}  # and are kept no longer
