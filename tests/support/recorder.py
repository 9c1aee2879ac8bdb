"""A stand-in for a function: what it was called with, and an answer."""


class Recorder:
    """Keeps the arguments of its calls."""

    def __init__(self, result=None):
        self.calls, self.result = [], result

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.result
