"""Tuning of a quantized checkpoint: codes by block, then scales end to end, at several lengths."""
