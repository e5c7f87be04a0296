"""Metrics as torchmetrics: exact item ids over the whole catalogue, ties by expected value, sums that merge."""
