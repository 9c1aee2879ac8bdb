"""MoCo against slow transcriptions of the paper's formulas."""

import collections
import copy

import pytest
import torch
from mean_colour import MeanColour, NormalisedColour, features, features_by_group, views
from torch.nn import functional as F

from pretrain.moco.encoders import build_encoder
from pretrain.moco.instance_discrimination import image_major, shuffle_index
from pretrain.moco.losses import InfoNCE
from pretrain.moco.momentum_contrast import MoCo


@pytest.mark.usefixtures("float64")
def test_logits_are_those_of_algorithm_1():
    torch.manual_seed(0)
    model = MoCo(MeanColour(), dim=4, queue_size=7, momentum=0.9, temperature=0.2)
    with torch.no_grad():
        model.encoder_k.fc.weight.add_(0.3)  # so that the update is seen
    before = copy.deepcopy(model)
    im_q, im_k = views(5, 1), views(5, 2)
    logits, keys, queries = model(im_q, im_k, shuffle_index(0, 0, 5))

    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    w_q, b_q = before.encoder_q.fc.weight, before.encoder_q.fc.bias
    w_k = 0.9 * before.encoder_k.fc.weight + 0.1 * w_q
    b_k = 0.9 * before.encoder_k.fc.bias + 0.1 * b_q
    for i in range(5):
        q = w_q @ ((im_q[i].float() - mean) / std).mean(dim=(0, 1)) + b_q
        k = w_k @ ((im_k[i].float() - mean) / std).mean(dim=(0, 1)) + b_k
        q, k = q / q.norm(), k / k.norm()
        row = [q @ k] + [q @ before.queue[:, j] for j in range(7)]
        torch.testing.assert_close(logits[i], torch.stack(row) / 0.2)
        torch.testing.assert_close(queries[i], q)
        torch.testing.assert_close(keys[i], k)


def test_no_gradient_reaches_keys_and_the_queue_stays_as_the_logits_saw_it():
    model = MoCo(MeanColour(), dim=4, queue_size=6)
    queue = model.queue.clone()
    logits, keys, _ = model(views(4, 1), views(4, 2), shuffle_index(0, 0, 4))
    assert torch.equal(model.queue, queue)
    logits.sum().backward()  # would fail had the queue been written in place before
    model.enqueue(keys)
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    assert all(p.grad is None for p in model.encoder_k.parameters())
    assert not keys.requires_grad


@pytest.mark.usefixtures("float64")
def test_key_encoder_starts_as_a_copy_and_follows_by_momentum():
    torch.manual_seed(0)
    model = MoCo(build_encoder("resnet18", 8), 8, queue_size=4, momentum=0.99)
    pairs = list(zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True))
    assert all(torch.equal(q, k) for q, k in pairs)
    with torch.no_grad():
        for q, _ in pairs:
            q.add_(torch.randn_like(q))
    expected = [0.99 * k + 0.01 * q for q, k in pairs]
    model.update_key_encoder()
    for (_, k), wanted in zip(pairs, expected, strict=True):
        torch.testing.assert_close(k, wanted)


def test_without_momentum_the_key_encoder_is_the_query_encoder():
    """m = 0 of Sec. 4.1, whose training fails in the paper: it must be possible to see that."""
    model = MoCo(MeanColour(), dim=4, queue_size=6, momentum=0.0)
    with torch.no_grad():
        model.encoder_q.fc.weight.mul_(1.7)
    model.update_key_encoder()
    assert torch.equal(model.encoder_k.fc.weight, model.encoder_q.fc.weight)


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (7, 5), (5, 5), (3, 8)])
def test_the_queue_is_a_ring_of_any_length(size, batch):
    model = MoCo(MeanColour(), dim=4, queue_size=size)
    ring = collections.deque(model.queue.T.tolist(), maxlen=size)
    for step in range(9):
        keys = F.normalize(torch.randn(batch, 4), dim=1)
        model.enqueue(keys)
        ring.extend(keys.tolist())
        pointer = int(model.queue_ptr)
        assert pointer == (step + 1) * batch % size
        oldest_first = torch.roll(model.queue, -pointer, dims=1).T
        assert torch.equal(oldest_first, torch.tensor(list(ring)))
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(size))


def test_state_dict_has_the_official_names():
    model = MoCo(build_encoder("resnet18", 16, mlp=True), 16, queue_size=8, bn_groups=2)
    names = set(model.state_dict())
    assert {"queue", "queue_ptr", "encoder_q.conv1.weight", "encoder_k.fc.2.bias"} <= names
    assert all(n.startswith(("encoder_q.", "encoder_k.", "queue")) for n in names)
    assert model.queue.shape == (16, 8)
    assert model.queue_ptr.shape == (1,)


# -- multi-crop -----------------------------------------------------------------------------------

SMALL = [views(6, seed, size=4) for seed in (3, 4, 5)]  # three of each of six images


@pytest.mark.usefixtures("float64")
def test_the_loss_is_the_mean_over_all_positives_of_the_anchor_s_key():
    torch.manual_seed(0)
    model = MoCo(MeanColour(), dim=4, queue_size=7, momentum=0.0, temperature=0.2)
    im_q, im_k, order = views(6, 1), views(6, 2), shuffle_index(0, 0, 6)
    logits, keys, queries = model(im_q, im_k, order, *SMALL)
    assert logits.shape == (24, 8)
    assert queries.shape == (24, 4)

    fc = model.encoder_q.fc
    anchors = [key.detach() for key in features(fc, im_k)]
    terms = []
    for view in [im_q, *SMALL]:
        for q, k in zip(features(fc, view), anchors, strict=True):
            row = [torch.exp(q @ key / 0.2) for key in (k, *model.queue.T)]
            terms.append(-torch.log(row[0] / sum(row)))
    wanted = sum(terms) / len(terms)
    loss = InfoNCE()(logits)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, fc.weight)[0] for x in (loss, wanted)))
    torch.testing.assert_close(queries[:6], torch.stack(features(fc, im_q)))
    # A key is of its large view alone, and the same as without small ones.
    torch.testing.assert_close(keys, torch.stack(anchors))
    assert torch.equal(logits[:6], model(im_q, im_k, order)[0])


def test_small_views_stand_image_by_image():
    together = image_major(SMALL)
    assert together.shape == (18, 4, 4, 3)
    for image in range(6):
        for number, view in enumerate(SMALL):
            assert torch.equal(together[3 * image + number], view[image])


@pytest.mark.usefixtures("float64")
def test_a_group_normalises_the_small_views_of_its_own_images():
    """Those of another group's images are none of its companions, as on another GPU."""
    torch.manual_seed(0)
    model = MoCo(NormalisedColour(), dim=4, queue_size=7, bn_groups=2)
    alone = copy.deepcopy(model.encoder_q.bn)
    _, _, queries = model(views(6, 1), views(6, 2), shuffle_index(0, 0, 6), *SMALL)
    small = features_by_group(
        model.encoder_q.fc, image_major(SMALL), [list(range(9)), list(range(9, 18))]
    )
    large = features_by_group(model.encoder_q.fc, views(6, 1), [[0, 1, 2], [3, 4, 5]])
    torch.testing.assert_close(queries, torch.stack([*large, *small]))
    # The running statistics are those of the first group, of the large views and then the small.
    alone.groups = 1
    for images in (views(6, 1)[:3], image_major(SMALL)[:9]):
        pixels = images.permute(0, 3, 1, 2).double()
        alone((pixels - model.pixel_mean.view(3, 1, 1)) / model.pixel_std.view(3, 1, 1))
    torch.testing.assert_close(model.encoder_q.bn.running_mean, alone.running_mean)
    torch.testing.assert_close(model.encoder_q.bn.running_var, alone.running_var)
