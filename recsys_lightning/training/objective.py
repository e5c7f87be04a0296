"""What every training step does with a model's losses: what is summed is what is logged."""

from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor

from recsys_lightning.distributed import sum_over_processes, world_size


def log_losses(module: L.LightningModule, losses: dict[str, Tensor], num_rows: int) -> Tensor | None:
    """The sum of the losses, logged as ``train/loss`` a step, and each by its name as an average over the epoch.

    What is logged is of the batch of all processes; what is returned is this one's part, and its gradient too.

    Returns None for a model with nothing to minimise, which Lightning takes as a step to skip; on several processes,
    where it lets nobody skip one, a zero.
    """
    if not losses:
        return None if world_size() == 1 else torch.zeros((), device=module.device, requires_grad=True)
    total = torch.stack(list(losses.values())).sum()
    values, num_rows = global_means({**losses, "loss": total}, num_rows)
    loss = values.pop("loss")
    named = {f"train/{name}": value for name, value in values.items()}
    # The values are the same on all processes already; `sync_dist` says so to Lightning and changes nothing.
    module.log_dict(named, on_step=False, on_epoch=True, batch_size=num_rows, sync_dist=True)
    module.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=num_rows)
    return total


def global_means(values: Mapping[str, Tensor], num_rows: int) -> tuple[dict[str, Tensor], int]:
    """The mean over processes of values (), without gradient, and the number of rows of them all.

    Call it on every process, with the same names. Losses are weighted so that this mean is the loss of the batch that
    the processes share out (`recsys_lightning.distributed.row_weight`).
    """
    if world_size() == 1:
        return {name: value.detach() for name, value in values.items()}, num_rows
    parts = torch.stack([value.detach().float() for value in values.values()])
    # One exchange for all, and no wait for a GPU: the number of rows stays a tensor, with which Lightning can reckon.
    total = sum_over_processes(torch.cat([parts, parts.new_tensor([num_rows])]))
    means = total[:-1] / world_size()
    return dict(zip(values, means.unbind(), strict=True)), total[-1]  # type: ignore[return-value]
