"""What every training step does with a model's losses: what is summed is what is logged."""

import lightning as L
import torch
from torch import Tensor


def log_losses(module: L.LightningModule, losses: dict[str, Tensor], num_rows: int) -> Tensor | None:
    """The sum of the losses, logged as ``train/loss`` a step, and each by its name as an average over the epoch.

    Returns None for a model with nothing to minimise, which Lightning takes as a step to skip.
    """
    if not losses:
        return None
    total = torch.stack(list(losses.values())).sum()
    values = {f"train/{name}": value.detach() for name, value in losses.items()}
    module.log_dict(values, on_step=False, on_epoch=True, batch_size=num_rows, sync_dist=True)
    module.log("train/loss", total.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=num_rows)
    return total
