"""The detectors: boxes, backbones, heads, meta-architectures."""
