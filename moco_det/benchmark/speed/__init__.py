"""Speed and memory, beside a reference in the same run."""
