"""The project as a Detectron2 plugin; the only room that imports detectron2.

`import moco_det.plugin` puts into Detectron2's own registries what the paper needs and Detectron2
lacks, so that any `train_net.py` understands this project's YAMLs: see `extensions`.

    extensions   this project's few config keys; native.modeling, wrapped for the registries
    data         data sets in the catalogs, loaders, evaluators
    trainer      what `tools/train_net.py --engine detectron2` runs: start here
    probe        the model opened up, for comparison with the native engine

Of the native engine only `native.modeling` is used here; what else both engines need is in the
rooms that they share.
"""

# Importing it registers the modules.
from moco_det.plugin.extensions import add_moco_config, load_config

__all__ = ["add_moco_config", "load_config"]
