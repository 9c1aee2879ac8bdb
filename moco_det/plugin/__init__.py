"""The project as a Detectron2 plugin; the only room that imports detectron2.

`import moco_det.plugin` puts into Detectron2's own registries what the paper needs and Detectron2
lacks, so that any `train_net.py` understands this project's YAMLs: see `modeling`.

    configuration   Detectron2's config with this project's few keys
    modeling        native.modeling, wrapped for the registries
    data            data sets in the catalogs, label maps in the loaders, evaluators
    dense_pose      Detectron2's DensePose project, where it is installed
    trainer         what `tools/train_net.py --engine detectron2` runs: start here
    probe           the model opened up, for comparison with the native engine

Of the native engine only `native.modeling` is used here; what else both engines need is in the
rooms that they share.
"""

# Importing them registers them.
from moco_det.plugin import modeling  # noqa: F401
from moco_det.plugin.configuration import add_moco_config, load_config

__all__ = ["add_moco_config", "load_config"]
