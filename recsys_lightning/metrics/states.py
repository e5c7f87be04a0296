"""What all metrics share: sums as state, and the check of the cut-offs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from recsys_lightning.errors import InputError


class SummedMetric(Metric):
    """A metric whose states are sums: batches and ranks merge by addition.

    Its numbers keep their type wherever the module that holds it goes: a model that is moved to bfloat16 takes plain
    torchmetrics along, and a sum in bfloat16 stops growing at a few hundred.
    """

    is_differentiable = False
    full_state_update = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Add a state of zeros; float64 because float32 sums drift from about a million users on."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        device = fn(torch.zeros(1, device=self.device)).device
        moved: Any = super()._apply(lambda tensor: tensor.to(device), exclude_state)
        return moved  # type: ignore[no-any-return]


def sorted_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """The cut-offs in ascending order.

    Raises:
        InputError: ``ks`` is empty, repeats a value or holds one below 1.
    """
    if not ks or len(set(ks)) != len(ks) or min(ks) < 1:
        raise InputError(f"metrics need different ks of at least 1, got ks={list(ks)}")
    return tuple(sorted(ks))
