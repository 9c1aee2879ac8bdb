"""kNN-MoCo against a slow transcription of its Algorithm 1."""

import collections
import copy

import pytest
import torch
from mean_colour import MeanColour, Residual, views
from torch import nn
from torch.nn import functional as F

from pretrain.moco.encoders import build_encoder
from pretrain.moco.instance_discrimination import shuffle_index
from pretrain.moco.losses import InfoNCE
from pretrain.moco.momentum_contrast import MoCo
from pretrain.moco.nearest_neighbours import NearestNeighbourMoCo, neighbour_loss

TAU, K, NEIGHBOURS = 0.2, 11, 3


def residual(mlp: bool = False) -> nn.Module:
    """An encoder without BN, so that images are independent of each other."""
    encoder = Residual()
    encoder.bn1 = encoder.bn2 = nn.Identity()
    if mlp:
        encoder.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), encoder.fc)
    return encoder


def build(encoder: nn.Module, dim: int = 4, **options) -> NearestNeighbourMoCo:
    torch.manual_seed(0)
    options = {"queue_size": K, "momentum": 0.9, "temperature": TAU} | options
    model = NearestNeighbourMoCo(encoder, dim, neighbours=NEIGHBOURS, **options)
    with torch.no_grad():
        for parameter in model.encoder_k.parameters():
            parameter.add_(0.05)  # so that keys are not queries
    return model


def halves(encoder: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The backbone g and the head h of Algorithm 1, which share the encoder's parameters."""
    head, backbone = encoder.fc, copy.copy(encoder)
    head = copy.copy(head)
    head._forward_hooks = collections.OrderedDict()
    backbone._modules = encoder._modules | {"fc": nn.Identity()}
    return backbone, head


def algorithm_1(model, im_q, im_k, small) -> tuple[torch.Tensor, torch.Tensor]:
    """loss_inst and loss_nn, line by line, image by image, positive by positive."""
    mean, std = model.pixel_mean, model.pixel_std
    backbone, head = halves(model.encoder_q)
    key_backbone, key_head = halves(copy.deepcopy(model.encoder_k))
    pairs = zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True)
    updated = [0.9 * k.detach() + 0.1 * q.detach() for q, k in pairs]
    own = [*key_backbone.parameters(), *key_head.parameters()]
    assert len(own) == len(updated)
    for parameter, value in zip(own, updated, strict=True):
        parameter.data = value

    def both(g, h, image):
        x_g = g(((image.double() - mean) / std).permute(2, 0, 1)[None])
        x_h = h(x_g)[0]
        return x_g[0] / x_g[0].norm(), x_h / x_h.norm()

    instance, neighbour = [], []
    for i in range(len(im_q)):
        _, anchor = both(key_backbone, key_head, im_k[i])
        for view in (im_q, *small):
            x_g, x_h = both(backbone, head, view[i])
            exponentials = [torch.exp(x_h @ model.queue[:, j] / TAU) for j in range(K)]
            positive = torch.exp(x_h @ anchor.detach() / TAU)
            instance.append(-torch.log(positive / (positive + sum(exponentials))))
            cosines = [float(x_g.detach() @ model.queue_backbone[:, j]) for j in range(K)]
            nearest = sorted(range(K), key=lambda j: -cosines[j])[:NEIGHBOURS]
            terms = [-torch.log(exponentials[j] / sum(exponentials)) for j in nearest]
            neighbour.append(sum(terms) / NEIGHBOURS)
    return sum(instance) / len(instance), sum(neighbour) / len(neighbour)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("mlp", "count"), [(False, 0), (True, 2)])
def test_losses_and_gradients_are_those_of_algorithm_1(mlp, count):
    model = build(residual(mlp))
    im_q, im_k = views(5, 1), views(5, 2)
    small = [views(5, 3 + i, size=6) for i in range(count)]
    before = copy.deepcopy(model)
    logits, keys, queries, loss_nn = model(im_q, im_k, shuffle_index(0, 0, 5), *small)
    loss = InfoNCE()(logits)
    wanted, wanted_nn = algorithm_1(before, im_q, im_k, small)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss_nn, wanted_nn, rtol=1e-6, atol=0)
    assert queries.shape == (5 * (1 + count), 4)
    assert keys.shape == (5, 4 + 8)
    found = torch.autograd.grad(loss + 0.4 * loss_nn, list(model.encoder_q.parameters()))
    total = torch.autograd.grad(wanted + 0.4 * wanted_nn, list(before.encoder_q.parameters()))
    for gradient, other in zip(found, total, strict=True):
        assert (gradient - other).norm() <= 1e-6 * other.norm()


@pytest.mark.usefixtures("float64")
def test_the_loss_by_hand():
    """Two of four keys are neighbours: log 4 where all are alike, less the nearer they are."""
    nearest = torch.tensor([[0, 3]])
    assert float(neighbour_loss(torch.zeros(1, 4), nearest)) == pytest.approx(1.3862943611)
    logits = torch.tensor([[2.0, 0.0, 0.0, 4.0]])
    total = torch.tensor([2.0, 0.0, 0.0, 4.0]).exp().sum()
    wanted = -(torch.log(torch.e**2 / total) + torch.log(torch.e**4 / total)) / 2
    torch.testing.assert_close(neighbour_loss(logits, nearest), wanted)


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (7, 5), (3, 8)])
def test_both_queues_hold_the_same_images(size, batch):
    model = NearestNeighbourMoCo(MeanColour(), 4, queue_size=size, neighbours=2)
    ring = collections.deque(torch.cat([model.queue, model.queue_backbone]).T.tolist(), maxlen=size)
    for step in range(9):
        keys = torch.randn(batch, 4 + 3)
        model.enqueue(keys)
        ring.extend(keys.tolist())
        pointer = int(model.queue_ptr)
        assert pointer == (step + 1) * batch % size
        held = torch.cat([model.queue, model.queue_backbone]).roll(-pointer, dims=1).T
        assert torch.equal(held, torch.tensor(list(ring)))


def test_keys_are_of_both_and_normalised():
    model = build(residual())
    _, keys, _, _ = model(views(5, 1), views(5, 2), shuffle_index(0, 0, 5))
    backbone, head = halves(model.encoder_k)
    pixels = views(5, 2).permute(0, 3, 1, 2).float()
    pixels = (pixels - model.pixel_mean.view(3, 1, 1)) / model.pixel_std.view(3, 1, 1)
    features = backbone(pixels)
    torch.testing.assert_close(keys[:, :4], F.normalize(head(features), dim=1))
    torch.testing.assert_close(keys[:, 4:], F.normalize(features, dim=1))


def test_all_else_is_moco_s():
    """The same draws, logits and gradients of the instance loss; one more name in checkpoints."""
    encoder = build_encoder("resnet18w0.25x", 8, mlp=True)
    torch.manual_seed(0)
    plain = MoCo(copy.deepcopy(encoder), 8, queue_size=K, bn_groups=2)
    torch.manual_seed(0)
    model = NearestNeighbourMoCo(encoder, 8, queue_size=K, bn_groups=2, neighbours=3)
    assert set(model.state_dict()) - set(plain.state_dict()) == {"queue_backbone"}
    assert model.queue_backbone.shape == (128, K)
    inputs = views(4, 1, size=32), views(4, 2, size=32), shuffle_index(0, 0, 4)
    (logits, keys, queries), found = plain(*inputs), model(*inputs)
    assert torch.equal(found[0], logits)
    assert torch.equal(found[1][:, :8], keys)
    assert torch.equal(found[2], queries)
    for output in (logits, found[0]):
        InfoNCE()(output).backward()
    pairs = zip(model.encoder_q.parameters(), plain.encoder_q.parameters(), strict=True)
    assert all(torch.equal(p.grad, other.grad) for p, other in pairs)
