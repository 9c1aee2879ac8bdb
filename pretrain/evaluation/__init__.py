"""What a pretrained encoder is worth without a detector: kNN, the linear protocol, fine-tuning."""
