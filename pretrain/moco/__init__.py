"""The pretext task, and where its keys come from: MoCo and what the paper compares it with."""
