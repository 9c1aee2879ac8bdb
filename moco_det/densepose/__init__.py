"""The body model's files, points on its surface, and similarity of surfaces."""
