"""A PyTorch Lightning experiment framework for recommendation with semantic IDs and dense vectors."""

__version__ = "0.1.0"
