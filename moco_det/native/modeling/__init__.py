"""The networks: pure modules and functions, with Detectron2's class and parameter names.

    meta_arch       GeneralizedRCNN, SemanticSegmentor, build_model: start here
    backbones       ResNet, FPN, DilatedC5
    rpn             proposals
    roi_heads       the second stage: sampling, pooling, and a module for each head:
                    box_head, mask_head, keypoint_head, densepose_head
    semantic_head   FCN16Head
    boxes, pooling, layers   what they are made of

Constructors take explicit arguments; only the `build_*` functions read a config. The plugin wraps
modules of this room, so nothing here may depend on the native engine's data or training loop.
"""
