"""Records to batches: transforms, dataset mappers, loaders."""
