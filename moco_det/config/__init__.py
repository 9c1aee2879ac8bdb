"""Detectron2's keys and defaults, how a YAML is read, and every check of a config.

What can be said of a config before anything is built belongs here; what is built from it does not:
that is its room's `from_config` or `build_*`. Start with `loading.load_config`; `defaults.yaml`
lists the keys, `checks.py` asks whether they fit each other, the data and the weights, and how the
images of a step are divided among processes.
"""
