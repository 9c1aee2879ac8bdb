"""Whole runs of each mechanism: launches, resumes, what is refused."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from float64 import ROUNDING, assert_equal_but_for_rounding, in_float64
from fork_server import run_in_two_processes
from mean_colour import MeanColour, NormalisedColour, features, features_by_group, views

from moco_det.common.errors import UserError
from pretrain import run as pretraining_run
from pretrain.engine.checkpoints import LAST
from pretrain.engine.optimization import LARS, parallelize
from pretrain.flags.pretraining import parse_pretraining
from pretrain.main import pretrain
from pretrain.moco.end_to_end import EndToEnd
from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.losses import InfoNCE
from pretrain.moco.memory_bank import MemoryBank
from pretrain.moco.momentum_contrast import MoCo

# 34 images in batches of 16 are two steps an epoch.
FLAGS = [
    "-a", "resnet18w0.25x", "--image-size", "32", "-b", "16", "--bn-groups", "2", "--moco-k", "20",
    "--moco-dim", "16", "--seed", "7", "-j", "0", "-p", "1", "--knn-every", "0",
    "--iterations", "3",
]  # fmt: skip
# fmt: off
METHODS = {
    "moco": [],
    "moco-unshuffled": ["--no-shuffle-bn"],
    "end-to-end": ["--mechanism", "end-to-end", "--mlp", "--aug-plus", "--color-strength", "1"],
    "simclr": [
        "--mechanism", "end-to-end", "--mlp", "--aug-plus", "--color-strength", "1",
        "--optimizer", "lars", "--lr", "0.3", "--warmup-epochs", "1", "--crop-min", "0.08",
        "--wd", "1e-6",
    ],
    "end-to-end-unshuffled": ["--mechanism", "end-to-end", "--no-shuffle-bn"],
    "memory-bank": ["--mechanism", "memory-bank"],
    "memory-bank-nce": ["--mechanism", "memory-bank", "--loss", "nce"],
    "neighbours": [
        "--nearest-neighbours", "3", "--mlp", "--multi-crop", "2", "--small-size", "16",
        "--constrained", "--strong-aug", "mix",
    ],
}
# fmt: on
LAUNCHED = [name for name in METHODS if name != "moco"]  # test_main.py launches that


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 34 small images of different colours."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(34):
        coarse = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i:02d}.png"), cv2.resize(coarse, (40, 40)))
    return folder


def run(images, output, *flags) -> dict:
    """The last checkpoint of a run in this process."""
    pretrain(
        parse_pretraining([str(images), *FLAGS, "--output", str(output), *flags]),
        torch.device("cpu"),
    )
    return checkpoint(output)


def checkpoint(output) -> dict:
    return torch.load(output / LAST, weights_only=True)


def records(output, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def momenta(state: dict) -> list[torch.Tensor]:
    """SGD's buffers: sums of the gradients of all steps."""
    return [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]


def run_all(rank: int, images, output) -> None:
    """The methods in turn, as process `rank` of two, in float64."""
    store = f"file://{output / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    with in_float64():
        for name in LAUNCHED:
            run(images, output / name, *METHODS[name], "--bn-groups", "1")
        gradient = end_to_end_gradient(slice(6 * rank, 6 * rank + 6))
    torch.save(gradient, output / f"gradient{rank}")
    dist.destroy_process_group()


def end_to_end_gradient(mine: slice) -> torch.Tensor:
    """Of the mean loss over 12 images, `mine` of which are this process's."""
    torch.manual_seed(0)
    model = EndToEnd(MeanColour(), temperature=0.2)
    parallel = parallelize(model)
    logits, *_ = parallel(views(12, 1)[mine], views(12, 2)[mine], shuffle_index(0, 0, 12))
    InfoNCE()(logits).backward()
    return model.encoder_q.fc.weight.grad


@pytest.fixture(scope="module")
def two_processes(images, tmp_path_factory):
    """The folder with the methods' outputs, run in two processes with a BN group each."""
    output = tmp_path_factory.mktemp("two")
    run_in_two_processes(run_all, images, output)
    return output


@pytest.fixture(scope="module")
def one_process(images, tmp_path_factory):
    """Function: name of a method -> output of its run in one process with two BN groups."""
    outputs = {}

    def output_of(name):
        if name not in outputs:
            outputs[name] = tmp_path_factory.mktemp("one")
            run(images, outputs[name], *METHODS[name])
        return outputs[name]

    return output_of


TAU, GROUPS = 0.2, 3


def slow_loss(queries, positives, negatives) -> torch.Tensor:
    """Eqn. (1), image by image; `negatives` are a list for each query."""
    losses = []
    for q, positive, others in zip(queries, positives, negatives, strict=True):
        terms = [torch.exp(q @ key / TAU) for key in (positive, *others)]
        losses.append(-torch.log(terms[0] / sum(terms)))
    return sum(losses) / len(losses)


def run_once(model, im_q, im_k) -> torch.Tensor:
    """The loss of one step in which 12 images are rows 20 to 31 of the data."""
    pair = [im_q, im_k][: model.num_views]
    logits, *_ = model(*model.inputs(pair, torch.arange(20, 32), seed=5, step=2))
    return InfoNCE()(logits)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shuffled", [True, False])
@pytest.mark.parametrize("name", ["moco", "end-to-end", "memory-bank"])
def test_the_loss_is_eqn_1_with_statistics_of_the_right_companions(name, shuffled):
    """Queries share BN statistics with their neighbours, keys with those of the shuffled order."""
    torch.manual_seed(0)
    encoder, bn = NormalisedColour(), {"temperature": TAU, "bn_groups": GROUPS}
    if name == "moco":
        model = MoCo(encoder, 4, queue_size=7, momentum=0.9, shuffle_bn=shuffled, **bn)
        with torch.no_grad():
            model.encoder_k.fc.weight.add_(0.3)
    elif name == "end-to-end":
        model = EndToEnd(encoder, shuffle_bn=shuffled, **bn)
    else:
        model = MemoryBank(encoder, samples=40, dim=4, negatives=7, **bn)
    im_q, im_k = views(12, 1), views(12, 2)
    neighbours = [list(range(i, i + 4)) for i in (0, 4, 8)]
    order = shuffle_index(5, 2, 12).tolist() if shuffled else list(range(12))
    companions = [order[i : i + 4] for i in (0, 4, 8)]
    queries = features_by_group(encoder.fc, im_q, neighbours)
    if name == "moco":
        key_fc = torch.nn.Linear(3, 4)
        for key, follows in zip(key_fc.parameters(), model.encoder_k.fc.parameters(), strict=True):
            query = dict(encoder.fc.named_parameters())["weight" if key.dim() > 1 else "bias"]
            key.data = 0.9 * follows.detach() + 0.1 * query.detach()
        keys = features_by_group(key_fc, im_k, companions)
        negatives = [list(model.queue.T.clone())] * 12
    elif name == "end-to-end":
        keys = features_by_group(encoder.fc, im_k, companions)
        negatives = [keys[:i] + keys[i + 1 :] for i in range(12)]
    else:
        bank = model.bank.clone()
        keys = list(bank[20:32])
        _, _, drawn = model.inputs([im_q], torch.arange(20, 32), seed=5, step=2)
        negatives = [list(bank[drawn])] * 12
    torch.testing.assert_close(run_once(model, im_q, im_k), slow_loss(queries, keys, negatives))


@pytest.mark.parametrize("name", LAUNCHED)
def test_two_processes_train_as_two_groups_do(images, tmp_path, two_processes, name):
    with in_float64():
        one = run(images, tmp_path, *METHODS[name])
    two = checkpoint(two_processes / name)
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert_equal_but_for_rounding(two["state_dict"][key], value, key)
    torch.testing.assert_close(two["loss"], one["loss"], rtol=ROUNDING, atol=0)
    for ours, theirs in zip(momenta(two), momenta(one), strict=True):
        assert_equal_but_for_rounding(ours, theirs)
    losses = records(tmp_path)
    assert len(losses) == 3
    np.testing.assert_allclose(records(two_processes / name), losses, rtol=ROUNDING)


@pytest.mark.usefixtures("float64")
def test_gradients_reach_the_keys_of_other_processes(two_processes):
    """The mean over all 12 images of Eqn. (1) with the 12 keys of both processes as dictionary."""
    torch.manual_seed(0)
    fc = MeanColour().fc
    q, k = (torch.stack(features(fc, views(12, seed))) for seed in (1, 2))
    losses = [torch.logsumexp(q[i] @ k.T / 0.2, 0) - q[i] @ k[i] / 0.2 for i in range(12)]
    (wanted,) = torch.autograd.grad(sum(losses) / 12, fc.weight)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(two_processes / f"gradient{rank}"), wanted)


@pytest.mark.parametrize(
    "name", ["end-to-end", "simclr", "memory-bank", "memory-bank-nce", "neighbours"]
)
def test_a_stopped_run_resumes_to_the_same_bits(images, tmp_path, one_process, name):
    """Both parts need what the first steps left: rows of the bank, NCE's constant."""
    stopped = run(images, tmp_path, *METHODS[name], "--iterations", "1")
    assert (stopped["epoch"], stopped["step_in_epoch"], stopped["step"]) == (0, 1, 1)
    resumed = run(images, tmp_path, *METHODS[name], "--resume", "auto")
    whole = checkpoint(one_process(name))
    for entry in ("state_dict", "loss"):
        assert resumed[entry].keys() == whole[entry].keys()
        for key, value in whole[entry].items():
            assert torch.equal(resumed[entry][key], value), key
    for ours, theirs in zip(momenta(resumed), momenta(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert records(tmp_path) == records(one_process(name))


def test_iterations_end_a_run_within_an_epoch(images, one_process, capsys):
    output = one_process("moco")
    state = checkpoint(output)
    assert (state["epoch"], state["step_in_epoch"], state["step"]) == (1, 1, 3)
    assert [p.name for p in output.glob("checkpoint_0*")] == ["checkpoint_0000.pth.tar"]
    before = (output / LAST).read_bytes()
    capsys.readouterr()
    run(images, output, "--resume", "auto")  # nothing is left to do
    assert "loss" not in capsys.readouterr().out
    assert (output / LAST).read_bytes() == before


def test_an_epoch_that_was_left_after_its_last_step_is_closed(images, tmp_path):
    """As by a kill between `--save-steps` and the end of the epoch."""
    state = run(images, tmp_path, "--iterations", "2")
    assert (state["epoch"], state["step_in_epoch"]) == (1, 0)
    (tmp_path / "checkpoint_0000.pth.tar").unlink()
    torch.save(state | {"epoch": 0, "step_in_epoch": 2}, tmp_path / LAST)
    closed = run(images, tmp_path, "--iterations", "2", "--resume", "auto")
    assert (closed["epoch"], closed["step_in_epoch"], closed["step"]) == (1, 0, 2)
    assert (tmp_path / "checkpoint_0000.pth.tar").exists()


def test_the_log_says_what_the_keys_are(one_process):
    """After 16, 32 and 48 images: 20 keys in the queue, 34 rows in the bank, 15 others a batch."""
    moco, both, bank = (one_process(name) for name in ("moco", "end-to-end", "memory-bank-nce"))
    assert records(moco, "queue_fill") == [0.8, 1, 1]
    assert records(bank, "bank_fill") == pytest.approx([16 / 34, 32 / 34, 1])
    assert not records(both, "queue_fill") + records(both, "bank_fill")
    assert records(moco, "chance_loss")[0] == pytest.approx(np.log(21))
    assert records(both, "chance_loss")[0] == pytest.approx(np.log(16))
    assert records(bank, "chance_loss")[0] == pytest.approx(np.log(21) + 20 * np.log(21 / 20))


def test_what_simclr_has_beyond_v2_arrives(images, monkeypatch):
    """LARS with its own weight decay, which leaves SGD's at 0; two views of smaller crops."""
    drawn = []
    monkeypatch.setattr(pretraining_run, "MoCoAugmentation", lambda *given: drawn.append(given))
    args = parse_pretraining([str(images), *FLAGS, *METHODS["simclr"], "--amp", "none"])
    source = pretraining_run.build_source(args, torch.device("cpu"), seed=0)
    assert drawn == [(32, True, 1.0, 0.08)]
    model = pretraining_run.build_model(args, source.samples)
    sgd = pretraining_run.build_task(args, model, source, 0).optimizer.sgd
    assert isinstance(sgd, LARS) and (sgd.decay, sgd.trust) == (1e-6, 0.001)
    assert [group["weight_decay"] for group in sgd.param_groups] == [0]


def test_lr_rises_over_the_warm_up(images, one_process):
    """An epoch of two steps."""
    assert records(one_process("simclr"), "lr") == [0, pytest.approx(0.15), pytest.approx(0.3)]


def test_lr_decays_by_iterations(images, tmp_path):
    run(images, tmp_path, "--lr", "0.01", "--lr-decay-every", "2", "--lr-decay", "0.5")
    assert records(tmp_path, "lr") == [0.01, 0.01, 0.005]


@pytest.mark.parametrize(
    ("before", "now", "flag"),
    [
        ("moco", "memory-bank", "--mechanism moco"),
        ("memory-bank-nce", "memory-bank", "--loss nce"),
        ("simclr", "end-to-end", "--optimizer lars"),
        ("neighbours", "moco", "with --nearest-neighbours"),
        ("moco", "neighbours", "without --nearest-neighbours"),
    ],
)
def test_another_mechanism_or_loss_is_refused(images, tmp_path, one_process, before, now, flag):
    path = one_process(before) / LAST
    with pytest.raises(UserError, match=f"was trained .*{flag}; resume it with(out)? that"):
        run(images, tmp_path, *METHODS[now], "--resume", str(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mechanism", "memory-bank", "-b", "34"], "34 images leave none to a batch of 34"),
        (["--mechanism", "end-to-end", "--bn-groups", "1"], "at least two BN groups"),
        (["--bank-momentum", "1"], r"--bank-momentum must be in \[0, 1\)"),
        (["--lr-decay", "0"], "--lr-decay must be above 0"),
        (["--iterations", "0"], "--iterations must be at least 1"),
        (["--color-strength", "1"], "pass --aug-plus as well"),
        (["--nearest-neighbours", "21"], "21: there are --moco-k 20 keys in the queue"),
        (["--nearest-neighbours", "5", "--mechanism", "end-to-end"], "end-to-end has not: drop"),
        (["--nn-weight", "0.1"], "pass --nearest-neighbours too"),
        (["--crop-min", "0"], "--crop-min must be above 0 and at most 1"),
        (["--warmup-epochs", "3", "--epochs", "3", "--iterations", "0"], "--iterations must be at"),
    ],
)
def test_bad_input_is_named(images, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(images, tmp_path, *flags)


@pytest.mark.parametrize("flags", [["--no-shuffle-bn"], ["--mechanism", "memory-bank"]])
def test_one_group_will_do_where_nothing_is_shuffled(images, tmp_path, flags):
    assert run(images, tmp_path, *flags, "--bn-groups", "1", "--iterations", "1")["step"] == 1
