"""Detectron2's checkpointer, strict about the backbone."""

from detectron2.checkpoint import DetectionCheckpointer
from torch.nn.parallel import DistributedDataParallel

from moco_det.weights import check_against_config, load_backbone_weights


class StrictCheckpointer(DetectionCheckpointer):
    """Initial weights through `moco_det.weights`; all else, resuming too, as Detectron2 does it.

    Detectron2 only warns of backbone arrays that a file lacks, and looks at neither the channel
    order nor the place of the stride that its weights were trained with.

    Args:
        cfg: that the weights must not contradict.
        allow_missing: let arrays of the backbone that the file lacks keep their initial values.
    """

    def __init__(self, model, save_dir, cfg, allow_missing: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.cfg = cfg
        self.allow_missing = allow_missing

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Raises UserError for initial weights that do not fill the backbone or do not fit cfg."""
        if not path or checkpointables != []:  # [] is what `resume_or_load` asks of other weights
            return super().load(path, checkpointables)
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module
        report = load_backbone_weights(model, path, self.allow_missing)
        check_against_config(report.metadata, self.cfg)
        return {}
