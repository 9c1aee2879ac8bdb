"""An engine opened up, and compared with the other."""
