"""MoCo checkpoints to Detectron2 transfer tables."""

import warnings

# fvcore scripts two losses on import, which recent torch deprecates: noise that no user can act on.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
