"""A package, so that processes started by tests find it before the `tests` of another checkout."""
