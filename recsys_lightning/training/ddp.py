"""Lightning's DDP for every model, also one that has nothing to train."""

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from recsys_lightning.distributed import copy_first_state

_NAMES = {
    "ddp": {},
    "ddp_find_unused_parameters_false": {"find_unused_parameters": False},
    "ddp_find_unused_parameters_true": {"find_unused_parameters": True},
}


class RecsysDDP(DDPStrategy):
    """`DDPStrategy` that leaves a model without trainable parameters as it is, where `DistributedDataParallel` refuses.

    Popularity, and tokenizers that are learned in closed form, are fitted by the same command as all others. Processes
    start with the first one's state here too.
    """

    def configure_ddp(self) -> None:
        """Wrap the model, if there are gradients to reduce."""
        model = self.lightning_module
        if model is not None and not any(parameter.requires_grad for parameter in model.parameters()):
            copy_first_state(model)
            return
        super().configure_ddp()


def register_ddp() -> None:
    """Have ``--trainer.strategy ddp``, and what Lightning chooses for several devices, mean `RecsysDDP`."""
    for name, settings in _NAMES.items():
        StrategyRegistry.register(
            name, RecsysDDP, description=str(RecsysDDP.__doc__), override=True, start_method="popen", **settings
        )
