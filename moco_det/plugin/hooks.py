"""Hooks in place of Detectron2's, where its own leave the paper's numbers to chance."""

from detectron2.engine import hooks
from detectron2.utils.events import EventStorage

from moco_det.precise_bn import precise_bn


class SamePreciseBN(hooks.PreciseBN):
    """PreciseBN that ends with the same statistics on every process.

    Detectron2's estimates them on each process from its own images alone, so that processes
    evaluate different models and the saved one is rank 0's (its issues 5398 and 5409).
    """

    def update_stats(self) -> None:
        if self._disabled:
            return
        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        with EventStorage():  # what the model logs here is no part of the training
            precise_bn(self._model, self._data_iter, self._num_iter)
