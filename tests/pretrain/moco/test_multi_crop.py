"""Small views as further positives of the image's key, against slow transcriptions."""

import copy

import pytest
import torch
from mean_colour import MeanColour, NormalisedColour, features, features_by_group, views

from pretrain.moco.instance_discrimination import image_major, shuffle_index
from pretrain.moco.losses import InfoNCE
from pretrain.moco.momentum_contrast import MoCo

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
