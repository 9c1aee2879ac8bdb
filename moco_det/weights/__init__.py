"""Names, files, loading and conversion of weights."""
