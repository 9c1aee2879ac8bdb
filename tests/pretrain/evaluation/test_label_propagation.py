"""Label propagation against a transcription that looks at one place and one source at a time."""

import math

import numpy as np
import pytest
import torch

from pretrain.evaluation import label_propagation
from pretrain.evaluation.label_propagation import Propagation


def slow(start, frames, first, settings):
    """The labels of all frames after the first: lists of sources, sorted by cosine."""
    height, width = first.shape[1:]
    places = [(y, x) for y in range(height) for x in range(width)]
    seen, labels, found = [start], [first], []
    for t, frame in enumerate(frames, 1):
        new = torch.zeros_like(first)
        context = [max(0, t - back) for back in range(settings.context, 0, -1)]
        for y, x in places:
            sources = [(0, v, u) for v, u in places]
            for number in context:
                near = [p for p in places if math.dist(p, (y, x)) < settings.radius]
                sources += [(number, v, u) for v, u in near]
            cosines = [float(frame[:, y, x] @ seen[n][:, v, u]) for n, v, u in sources]
            best = sorted(range(len(sources)), key=lambda i: -cosines[i])[: settings.top_k]
            weights = np.exp([(cosines[i] - cosines[best[0]]) / settings.temperature for i in best])
            for i, weight in zip(best, weights / weights.sum(), strict=True):
                n, v, u = sources[i]
                new[:, y, x] += weight * labels[n][:, v, u]
        seen.append(frame)
        labels.append(new)
        found.append(new)
    return found


@pytest.mark.parametrize("tile", [3, 16])
@pytest.mark.parametrize(
    "settings", [Propagation(4, 0.2, 2.5, 3), Propagation(100, 0.5, 1.0, 1)], ids=["few", "all"]
)
def test_labels_are_those_of_the_slow_way(tile, settings, monkeypatch):
    monkeypatch.setattr(label_propagation, "TILE", tile)
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, 4, 4, 5, dtype=torch.float64), dim=1)
    first = torch.rand(3, 4, 5, dtype=torch.float64).softmax(dim=0)
    start, *frames = features
    expected = slow(start, frames, first, settings)
    found = list(settings.through(start, frames, first))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_scene_that_stands_still_keeps_its_labels():
    torch.manual_seed(0)
    frame = torch.nn.functional.normalize(torch.randn(16, 6, 6), dim=0)
    first = torch.nn.functional.one_hot(torch.randint(3, (6, 6))).permute(2, 0, 1).float()
    for found in Propagation(top_k=1).through(frame, [frame] * 3, first):
        torch.testing.assert_close(found, first)


def test_beyond_the_radius_only_the_first_frame_is_a_source():
    """A thing that jumps is found in the first frame, and nowhere else."""
    thing, ground = torch.eye(2)
    frames = ground.view(2, 1, 1).repeat(3, 1, 1, 40)
    for t, place in enumerate((0, 30, 5)):
        frames[t, :, 0, place] = thing
    first = (torch.arange(40) == 0).float().view(1, 1, 40)
    _, last = Propagation(top_k=1, radius=3, context=1).through(frames[0], frames[1:], first)
    assert last[0, 0].nonzero().tolist() == [[5]]
    # Were the label there taken away, the thing of frame 1 would be too far to give it one.
    none = torch.zeros_like(first)
    near = frames[1][None], (torch.arange(40) == 30).float().view(1, 1, 1, 40)
    step = Propagation(top_k=1, radius=3).step(frames[2], (frames[0], none), near)
    assert not step.any()
