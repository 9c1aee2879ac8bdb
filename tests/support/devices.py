"""The devices on which a test of what runs on GPUs is run: everywhere on the CPU as well."""

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
