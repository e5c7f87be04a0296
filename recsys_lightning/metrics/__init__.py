"""Ranking metrics as torchmetrics: exact item ids over the whole catalogue, sums that add up across ranks."""
