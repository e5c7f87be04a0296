"""`recsys fit | validate | test | predict | prepare` on LightningCLI."""

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from omegaconf.errors import OmegaConfBaseException

# A class named in a configuration by its short name must have been imported: these imports are the registry.
import recsys_lightning.models.cobra
import recsys_lightning.models.popularity
import recsys_lightning.models.rqvae
import recsys_lightning.semantic_ids.residual_kmeans  # noqa: F401
from recsys_lightning.cli.messages import one_line
from recsys_lightning.cli.statistics import print_statistics
from recsys_lightning.data.datamodules import CatalogDataModule
from recsys_lightning.errors import InputError
from recsys_lightning.training.record import PredictionWriter, RunRecord
from recsys_lightning.training.recommender import RecommenderModule  # noqa: F401
from recsys_lightning.training.tokenizer import TokenizerModule  # noqa: F401

NEED_CHECKPOINT = ("validate", "test", "predict")


class RecsysParser(LightningArgumentParser):
    """A parser that raises one line naming the nearest valid key instead of printing pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviations would take a mistyped key for the one it begins, without a word.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as an `InputError`."""
        raise InputError(one_line(message, self)) from ex


class RecsysTrainer(L.Trainer):
    """Lightning's Trainer with one more verb, which needs no model."""

    def prepare(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
        """Build and cache the data and the item embeddings, print the statistics."""


class RecsysCLI(LightningCLI):
    """LightningCLI with a run folder, results, one-line errors, and a command line that a checkpoint cannot override."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose files, keys and ``${...}`` see one another and the command line."""
        kwargs.setdefault("parser_mode", "omegaconf+")
        parser: LightningArgumentParser = RecsysParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a configuration file; later ones win")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's four and `prepare`."""
        return {**LightningCLI.subcommands(), "prepare": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, and the two callbacks every run has."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="folder of the run: configuration, metrics.csv, checkpoints, results.json. If a fit finds an earlier run "
            "there, that one is moved aside to run_dir.1, .2, ...",
        )
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        monitor = {"monitor": "val/ndcg@10", "mode": "max"}
        fixed = {"filename": "best", "auto_insert_metric_name": False, "enable_version_counter": False, "save_last": True}
        parser.set_defaults({f"checkpoint.{key}": value for key, value in (monitor | fixed).items()})
        parser.set_defaults({f"early_stopping.{key}": value for key, value in (monitor | {"patience": 10}).items()})

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Trainer, model and data; `prepare` needs no model, but reads files that hold one."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        needs_model = self._adding != "prepare"
        parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True, required=needs_model)
        parser.add_lightning_class_args(CatalogDataModule, "data", subclass_mode=True)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._adding = subcommand
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "prepare":
            # A checkpoint from a stranger must not be able to run code.
            parser.set_defaults({"weights_only": True})
        return parser

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's settings override the command line (tested)."""

    def before_instantiate_classes(self) -> None:
        """Name the checkpoint, and make room for a new run."""
        config = self.config[self.subcommand]
        if self.subcommand == "prepare":
            return
        folder = Path(config.run_dir)
        if config.ckpt_path in ("best", "last"):
            config.ckpt_path = str(_checkpoint_folder(config.run_dir) / f"{config.ckpt_path}.ckpt")
        if self.subcommand in NEED_CHECKPOINT and config.ckpt_path is None:
            config.ckpt_path = str(_checkpoint_folder(config.run_dir) / "best.ckpt")
        if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
            files = " ".join(f"-c {path}" for path in config.config or [])
            raise InputError(
                f"no checkpoint {config.ckpt_path}: train first with `recsys fit {files}`, or name one with --ckpt_path"
            )
        if self.subcommand == "fit" and config.ckpt_path is None and not config.trainer.fast_dev_run:
            _move_aside(folder)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer with the project's defaults; `prepare` needs none."""
        config = self._get(self.config_init, "trainer")
        run_dir = self._get(self.config_init, "run_dir")
        if config.logger in (None, True):
            config.logger = CSVLogger(run_dir, name="", version="")
        callbacks = [PredictionWriter()] if self.subcommand == "predict" else []
        config.callbacks = [*(config.callbacks or []), *callbacks]
        return super().instantiate_trainer(use_distributed_sampler=False, **kwargs)

    def instantiate_classes(self) -> None:
        """Instantiate what the command needs."""
        if self.subcommand != "prepare":
            super().instantiate_classes()
            return
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self._get(self.config_init, "data"), None
        self.trainer = RecsysTrainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        if not config.get("enable_checkpointing", True):
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def prepare(self, **_: Any) -> None:
        """Run `recsys prepare`."""
        self.datamodule.prepare_data()
        self.datamodule.setup()
        print_statistics(self.datamodule.statistics())

    def predict(self, **kwargs: Any) -> None:
        """Run `recsys predict`; the writer keeps the lists, so the Trainer need not."""
        self.trainer.predict(**(kwargs | {"return_predictions": False}))


def run(arguments: Sequence[str]) -> RecsysCLI:
    """Parse and run one command line, the command first.

    Raises:
        InputError: the configuration or the data is at fault; the message is one line.
    """
    _quiet()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    try:
        return RecsysCLI(
            model_class=L.LightningModule,
            datamodule_class=CatalogDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=RecsysTrainer,
            trainer_defaults={"num_sanity_val_steps": 0},
            seed_everything_default=42,
            save_config_callback=RunRecord,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(arguments),
        )
    except OmegaConfBaseException as error:
        raise InputError(f"cannot resolve a ${{...}} of the configuration: {error}") from error


def _checkpoint_folder(run_dir: str) -> Path:
    return Path(run_dir) / "checkpoints"


def _move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run to the first free ``<folder>.<n>``: nothing is overwritten.

    Only the first process does so; the others come later and would move the new run.
    """
    if any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        return
    if not (folder / "config.yaml").is_file():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    logging.getLogger(__name__).warning("an earlier run in %s was moved to %s", folder, aside)


def _quiet() -> None:
    """Show what a user can act on; drop Lightning's advertisements and hints."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not logging.getLogger("recsys_lightning").handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("recsys_lightning").addHandler(handler)
    logging.getLogger("recsys_lightning").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", "LightningCLI.s args parameter")
    torch.set_float32_matmul_precision("high")
