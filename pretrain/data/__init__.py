"""Image files, tar shards and labelled folders to batches of views."""
