"""What pretraining and detection both stand on: processes, errors, files, ResNet shapes."""
