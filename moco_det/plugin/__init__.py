"""The project as a Detectron2 plugin; the only room that imports detectron2.

`import moco_det.plugin` puts into Detectron2's own registries what the paper needs and Detectron2
lacks, so that any `train_net.py` understands this project's YAMLs:

- ROI_HEADS: `Res5ROIHeadsExtraNorm`, the C4 head with a norm after res5;
- BACKBONE: `build_resnet_dilated_c5_backbone`, dilated res5 with a 3x3 reduction;
- SEM_SEG_HEADS: `FCN16Head`, for label maps on a dilated res5.

`moco_det.plugin.trainer` is what `tools/train_net.py --engine detectron2` runs.
"""

# Importing them registers them.
from moco_det.plugin import modeling  # noqa: F401
from moco_det.plugin.configuration import add_moco_config, load_config

__all__ = ["add_moco_config", "load_config"]
