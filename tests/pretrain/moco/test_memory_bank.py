"""The memory bank against Eqn. (1) and Wu et al.'s update, row by row."""

import copy
import math

import pytest
import torch
from mean_colour import MeanColour, features, views

from pretrain.moco.losses import InfoNCE
from pretrain.moco.memory_bank import MemoryBank, draw_others


@pytest.mark.usefixtures("float64")
def test_loss_and_rows_are_those_of_the_formulas():
    torch.manual_seed(0)
    model = MemoryBank(MeanColour(), samples=20, dim=4, negatives=7, momentum=0.3, temperature=0.2)
    torch.testing.assert_close(model.bank.norm(dim=1), torch.ones(20))
    before = copy.deepcopy(model)
    images, indices = views(5, 1), torch.tensor([3, 17, 0, 8, 4])
    im_q, *rows = model.inputs([images], indices, seed=1, step=2)
    logits, keys, _ = model(im_q, *rows)
    logits = logits.detach()
    assert torch.equal(rows[0], indices)
    assert not set(rows[1].tolist()) & set(indices.tolist())

    queries = [q.detach() for q in features(before.encoder_q.fc, images)]
    losses = []
    for q, i in zip(queries, indices, strict=True):
        positive = math.exp(q @ before.bank[i] / 0.2)
        negatives = [math.exp(q @ before.bank[j] / 0.2) for j in rows[1]]
        assert len(negatives) == 7
        losses.append(-math.log(positive / (positive + sum(negatives))))
    assert float(InfoNCE()(logits)) == pytest.approx(sum(losses) / 5, rel=1e-5)

    expected = before.bank.clone()
    for q, i in zip(queries, indices, strict=True):
        row = 0.3 * before.bank[i] + 0.7 * q
        expected[i] = row / row.norm()
    torch.testing.assert_close(model.bank, expected)
    torch.testing.assert_close(keys, expected[indices])
    others = sorted(set(range(20)) - set(indices.tolist()))
    assert torch.equal(model.bank[others], before.bank[others])


@pytest.mark.usefixtures("float64")
def test_the_gradient_is_that_of_the_rows_before_the_update():
    torch.manual_seed(0)
    model = MemoryBank(MeanColour(), samples=20, dim=4, negatives=7, temperature=0.2)
    images, indices = views(5, 1), torch.arange(5)
    negatives = torch.arange(5, 12)
    queries = torch.stack(features(model.encoder_q.fc, images))
    bank = model.bank.clone()
    positive = (queries * bank[:5]).sum(dim=1, keepdim=True)
    slow = InfoNCE()(torch.cat([positive, queries @ bank[5:12].T], dim=1) / 0.2)
    (wanted,) = torch.autograd.grad(slow, model.encoder_q.fc.weight)
    loss = InfoNCE()(model(images, indices, negatives)[0])
    torch.testing.assert_close(torch.autograd.grad(loss, model.encoder_q.fc.weight)[0], wanted)
    assert not model.bank.requires_grad


def test_the_bank_is_part_of_the_state():
    model = MemoryBank(MeanColour(), samples=20, dim=4, negatives=7)
    assert set(model.state_dict()) == {"bank", "encoder_q.fc.weight", "encoder_q.fc.bias"}
    assert model.bank.shape == (20, 4)
    assert model.bank.dtype == torch.float32


def test_negatives_are_uniform_over_the_images_beside_the_batch():
    taken = torch.tensor([9, 0, 4, 3])
    drawn = draw_others(5, 0, 60_000, 10, taken)
    counts = torch.bincount(drawn, minlength=10)
    assert counts[taken].tolist() == [0, 0, 0, 0]
    # Six remain, each 10,000 times: five standard deviations are 456.
    assert ((counts[[1, 2, 5, 6, 7, 8]] - 10_000).abs() < 456).all()


def test_negatives_are_a_function_of_seed_and_step():
    batch = torch.tensor([2, 30])
    assert torch.equal(draw_others(1, 2, 50, 100, batch), draw_others(1, 2, 50, 100, batch))
    assert not torch.equal(draw_others(1, 2, 50, 100, batch), draw_others(1, 3, 50, 100, batch))
    assert not torch.equal(draw_others(1, 2, 50, 100, batch), draw_others(2, 2, 50, 100, batch))


@pytest.mark.parametrize("free", [1, 2])
def test_the_last_free_images_are_found(free):
    taken = torch.randperm(12)[free:]
    left = sorted(set(range(12)) - set(taken.tolist()))
    assert sorted(set(draw_others(0, 0, 100, 12, taken).tolist())) == left
