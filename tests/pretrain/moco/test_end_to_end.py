"""The end-to-end mechanism against Eqn. (1) written out, with gradients to queries and keys."""

import pytest
import torch
from mean_colour import MeanColour, features, views

from pretrain.moco.end_to_end import EndToEnd
from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.losses import InfoNCE


def slow_loss(fc, im_q, im_k, tau: float, gradient_to_keys: bool = True):
    """Eqn. (1), image by image: K keys of the mini-batch, K-1 of them negatives (Fig. 3)."""
    queries, keys = features(fc, im_q), features(fc, im_k)
    if not gradient_to_keys:
        keys = [key.detach() for key in keys]
    losses = []
    for i, q in enumerate(queries):
        terms = [torch.exp(q @ key / tau) for key in keys]
        losses.append(-torch.log(terms[i] / sum(terms)))
    return sum(losses) / len(losses)


@pytest.mark.usefixtures("float64")
def test_loss_and_gradient_are_those_of_the_formula():
    torch.manual_seed(0)
    model = EndToEnd(MeanColour(), temperature=0.2)
    im_q, im_k = views(6, 1), views(6, 2)
    logits, keys, queries = model(im_q, im_k, shuffle_index(0, 0, 6))
    assert logits.shape == (6, 6)
    assert keys.shape == queries.shape == (6, 4)
    loss = InfoNCE()(logits)
    fc = model.encoder_q.fc
    slow = slow_loss(fc, im_q, im_k, 0.2)
    torch.testing.assert_close(loss, slow)
    gradient = torch.autograd.grad(loss, fc.weight)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(slow, fc.weight)[0])
    detached = slow_loss(fc, im_q, im_k, 0.2, gradient_to_keys=False)
    assert not torch.allclose(gradient, torch.autograd.grad(detached, fc.weight)[0], rtol=0.05)


@pytest.mark.usefixtures("float64")
def test_positives_come_first_and_negatives_are_the_other_keys():
    torch.manual_seed(0)
    model = EndToEnd(MeanColour(), temperature=1.0)
    logits, keys, queries = model(views(5, 1), views(5, 2), shuffle_index(0, 0, 5))
    similarity = (queries @ keys.T).detach()
    torch.testing.assert_close(logits[:, 0], similarity.diagonal())
    for i in range(5):
        others = [float(similarity[i, j]) for j in range(5) if j != i]
        assert sorted(logits[i, 1:].tolist()) == pytest.approx(sorted(others), rel=1e-5)


def test_a_checkpoint_holds_the_one_encoder():
    assert set(EndToEnd(MeanColour()).state_dict()) == {"encoder_q.fc.weight", "encoder_q.fc.bias"}


def test_without_shuffling_keys_keep_their_order():
    indices = torch.arange(12)
    pair = [views(12, 1), views(12, 2)]
    *same, order = EndToEnd(MeanColour()).inputs(pair, indices, seed=7, step=3)
    assert all(torch.equal(a, b) for a, b in zip(same, pair, strict=True))
    assert torch.equal(order, shuffle_index(7, 3, 12))
    *_, unshuffled = EndToEnd(MeanColour(), shuffle_bn=False).inputs(pair, indices, seed=7, step=3)
    assert torch.equal(unshuffled, torch.arange(12))
