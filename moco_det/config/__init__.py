"""Detectron2's keys and defaults, how a YAML is read, and every check of a config."""
