"""A multi-layer perceptron."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from recsys_lightning.errors import InputError


class MLP(nn.Sequential):
    """A stack of linear layers with an activation and dropout between them, and neither after the last.

    Shapes: (..., sizes[0]) -> (..., sizes[-1]).

    Args:
        sizes: Widths from input to output, at least two.
        dropout: Share of hidden units set to zero in training.
        activation: Class of the activation between layers.

    Raises:
        InputError: Fewer than two sizes, or a size below 1.
    """

    def __init__(self, sizes: Sequence[int], dropout: float = 0.0, activation: type[nn.Module] = nn.ReLU) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise InputError(f"MLP needs at least an input and an output width, each 1 or more, got {list(sizes)}")
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(width_in, width_out), activation(), nn.Dropout(dropout)]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))
