"""Label propagation through a video on frozen features: nothing is trained.

Each place of a frame takes its labels from the places of earlier frames that look most like it.
This is the evaluation of "Space-Time Correspondence as a Contrastive Random Walk" (Jabri et al.
2020), which "Revisiting Contrastive Methods" uses, as its public code (ajabri/videowalk, test.py)
does it:

- the sources are the first frame, as a long-term memory, searched everywhere; and the `context`
  frames before the current one, searched within `radius`. Where there are not yet so many, the
  first frame stands in for the missing ones, each time anew: all of its copies may be among the
  top k, so that the first steps rely on one or a few places;
- of all their places the `top_k` of highest cosine are taken, and weigh by a softmax of the
  cosines over `temperature`; labels are soft, and are passed on as they are.

Shape legend:
    D: channels     H, W: sides of a feature map     L: labels, the background first
    T: frames of the context     Q: places of a tile     M: places of its window
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16  # side: its affinities to 20 frames are 30 MB, whatever the frame's size


@dataclass(frozen=True)
class Propagation:
    """The settings; those of STC's evaluation of DAVIS by default.

    Args:
        radius: a source within the context lies less than so many places away.
        context: frames before the current one.
    """

    top_k: int = 10
    temperature: float = 0.05
    radius: float = 12.0
    context: int = 20

    def through(self, start: Tensor, frames: Iterable[Tensor], first: Tensor) -> Iterator[Tensor]:
        """The soft labels, L x H x W, of each of the frames.

        Args:
            start: D x H x W, the features of the first frame, of length 1 at each place.
            frames: those of the frames that follow.
            first: L x H x W, the labels of the first frame.
        """
        features = deque([start] * self.context, maxlen=self.context)
        labels = deque([first] * self.context, maxlen=self.context)
        for frame in frames:
            near = torch.stack(list(features)), torch.stack(list(labels))
            found = self.step(frame, (start, first), near)
            yield found
            features.append(frame)
            labels.append(found)

    def step(
        self, frame: Tensor, start: tuple[Tensor, Tensor], near: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The labels of one frame, L x H x W.

        Args:
            frame: D x H x W.
            start: features D x H x W and labels L x H x W of the first frame.
            near: features T x D x H x W and labels T x L x H x W of the context.
        """
        height, width = frame.shape[1:]
        found = torch.empty_like(start[1])
        far = [part.flatten(1) for part in start]  # D x HW and L x HW
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                tile = slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width))
                window = self._reach(tile[0], height), self._reach(tile[1], width)
                beside = [part[(..., *window)].transpose(0, 1).flatten(1) for part in near]
                outside = self._outside(tile, window, frame.device).repeat(1, len(near[0]))
                query = frame[(..., *tile)].flatten(1).T  # Q x D
                cosines = query @ beside[0]  # Q x TM
                cosines = torch.cat([query @ far[0], cosines.masked_fill_(outside, -torch.inf)], 1)
                values = torch.cat([far[1], beside[1]], dim=1)  # L x (HW + TM)
                place = (..., *tile)
                found[place] = self._mean(cosines, values).view_as(found[place])
        return found

    def _mean(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """L x Q: the labels L x S of the top k of the cosines Q x S, weighed."""
        best = cosines.topk(min(self.top_k, cosines.shape[1]), dim=1)
        weights = (best.values / self.temperature).softmax(dim=1)
        return (labels[:, best.indices] * weights).sum(dim=2)

    def _reach(self, side: slice, size: int) -> slice:
        """The part of a map's side, of `size` places, that is near enough to some of a tile's."""
        reach = math.ceil(self.radius) - 1
        return slice(max(0, side.start - reach), min(size, side.stop + reach))

    def _outside(
        self, tile: tuple[slice, slice], window: tuple[slice, slice], device: torch.device
    ) -> Tensor:
        """Q x M: which places of the window are too far from which of the tile."""
        squares = [
            (_places(a, device)[:, None] - _places(b, device)[None, :]).square()
            for a, b in zip(tile, window, strict=True)
        ]
        rows, columns = squares  # of distances, in each direction
        distance = rows[:, None, :, None] + columns[None, :, None, :]
        return (distance >= self.radius**2).flatten(2).flatten(0, 1)


def _places(side: slice, device: torch.device) -> Tensor:
    return torch.arange(side.start, side.stop, device=device)
