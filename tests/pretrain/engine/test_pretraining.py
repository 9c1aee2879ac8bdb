"""A contrastive step and what it reports, against both written out."""

import pytest
import torch
from mean_colour import MeanColour, views

from pretrain.engine.optimization import ScheduledSGD
from pretrain.engine.pretraining import MoCoPretraining, contrastive_step, pretext_metrics
from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.losses import InfoNCE
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
