"""Learning-rate schedules and parameter groups, shared by all LightningModules."""

from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from recsys_lightning.errors import InputError

Schedule = Literal["constant", "cosine"]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights that decay, and vectors (biases, norms, gains) that do not, whatever the optimizer's weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_warmup(warmup_steps: int) -> None:
    """Refuse a warm-up of a negative length.

    Raises:
        InputError: it is below 0.
    """
    if warmup_steps < 0:
        raise InputError(f"model.warmup_steps={warmup_steps} must be 0 or more")


def build_optimizer(
    model: nn.Module, optimizer: OptimizerCallable, schedule: Schedule, warmup_steps: int, total_steps: int
) -> dict[str, Any] | None:
    """What `LightningModule.configure_optimizers` returns; None for a model without trainable parameters.

    The rate climbs linearly over `warmup_steps`, then stays, or falls to 0 along a half cosine until `total_steps`.
    """
    groups = parameter_groups(model)
    if not groups:
        return None
    built = optimizer(groups)
    parts: list[LRScheduler] = []
    if warmup_steps:
        parts.append(LinearLR(built, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps))
    if schedule == "cosine":
        parts.append(CosineAnnealingLR(built, T_max=max(total_steps - warmup_steps, 1)))
    elif parts:
        parts.append(LinearLR(built, start_factor=1.0, total_iters=1))
    if not parts:
        return {"optimizer": built}
    scheduler = parts[0] if len(parts) == 1 else SequentialLR(built, parts, milestones=[warmup_steps])
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
