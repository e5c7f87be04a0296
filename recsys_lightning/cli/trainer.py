"""`recsys fit | validate | test | predict | prepare` on LightningCLI, and what `recsys audit` reads a run with."""

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from omegaconf.errors import OmegaConfBaseException

import recsys_lightning.models
import recsys_lightning.semantic_ids
from recsys_lightning.cli.launch import alone, prepare_together, trainer_settings
from recsys_lightning.cli.messages import (
    ParseError,
    class_help,
    not_built,
    one_line,
    read_settings,
    unresolved,
    while_running,
    written_keys,
)
from recsys_lightning.cli.run_folder import (
    checkpoint_folder,
    chosen_checkpoint,
    csv_logger,
    is_finished,
    move_aside,
    refuse_other_settings,
)
from recsys_lightning.cli.statistics import (
    print_codebook_warning,
    print_codebooks,
    print_metrics,
    print_statistics,
)
from recsys_lightning.data.datamodules import CatalogDataModule
from recsys_lightning.errors import InputError
from recsys_lightning.memory import keep_freed_memory
from recsys_lightning.training.codebook_health import CodebookHealth, codebook_report
from recsys_lightning.training.durable import BestAndLast, DurableCheckpointIO
from recsys_lightning.training.preemption import Preemption
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.record import PredictionWriter, RunRecord
from recsys_lightning.training.tokenizer import TokenizerModule  # noqa: F401

# A class named in a configuration by its short name must have been imported: these imports are the registry, so a new
# model or tokenizer is one new file.
for _package in (recsys_lightning.models, recsys_lightning.semantic_ids):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)

_WITHOUT_TRAINER = ("prepare", "audit")
# What constructors raise on settings they cannot use; torch has RuntimeError for a negative size.
_REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException)


class RecsysParser(LightningArgumentParser):
    """A parser that raises what it has to say instead of printing pages of usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Abbreviations would take a mistyped key for the one it begins, without a word.
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the message as it is: the parsers of nested classes quote one another, `one_line` reads the whole."""
        raise ParseError(message) from ex


class _Builder:
    """Calls the constructors that a configuration names: at once or, of models and optimizers, when fit begins.

    An object with plain attributes, since modules that may be copied or sent to a process refer to it.
    """

    def __init__(self, arguments: Sequence[str]):
        self.arguments = list(arguments)
        self.refused: InputError | None = None

    def __call__(self, built: type, *args: Any, **settings: Any) -> Any:
        try:
            return built(*args, **settings)
        except InputError as error:
            self.refused = error
            raise
        except _REFUSALS as error:
            self.refused = InputError(not_built(built, error, settings, self.arguments))
            raise self.refused from error


class _NoSignals(_SignalConnector):
    """Registers no handlers."""

    def register_signal_handlers(self) -> None:
        """Leave them as they are."""


class RecsysTrainer(L.Trainer):
    """Lightning's Trainer with two more verbs, one that needs no model and one that needs no training.

    It leaves signals alone: Lightning's own handlers talk to other processes from within, which hangs where those are
    at another step. See `Preemption`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._signal_connector = _NoSignals(self)

    def prepare(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
        """Build and cache the data and the item embeddings, print the statistics."""

    def audit(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = True,
    ) -> None:
        """Build the model and the data module of a run.

        Args:
            model: of the run.
            datamodule: of the run.
            ckpt_path: checkpoint to audit: best, last or a file.
            weights_only: what `recsys fit` has saved; an audit reads a checkpoint as weights and plain values always.
        """


class RecsysCLI(LightningCLI):
    """LightningCLI with a run folder, results, one-line errors, and a command line that checkpoints cannot override."""

    def __init__(self, args: Sequence[str], **kwargs: Any) -> None:
        self.command = args[0]
        super().__init__(args=list(args), **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose files, keys and ``${...}`` see one another and the command line."""
        kwargs.setdefault("parser_mode", "omegaconf+")
        parser: LightningArgumentParser = RecsysParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a configuration file; later ones win")
        return parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's four, `prepare` and `audit`."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _WITHOUT_TRAINER}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Build the parser of the one command that is run: building all six would take most of the time to start."""
        wanted, command = self.subcommands(), self.command
        # The instance's own, where Lightning looks for it.
        self.subcommands = lambda: {command: wanted[command]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, and the callbacks every run has."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/default",
            help="folder of the run: configuration, metrics.csv, checkpoints, results.json. If a fit finds an earlier "
            "run there, that one is moved aside to run_dir.1, .2, ...",
        )
        parser.add_argument(
            "--dataset",
            type=str,
            default="default",
            help="a short name of the data, for ${dataset} in paths and keys: one file then serves several data sets",
        )
        parser.add_lightning_class_args(BestAndLast, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(CodebookHealth, "codebook_health")
        parser.add_lightning_class_args(Preemption, "preemption")
        monitor = {"monitor": "val/ndcg@10", "mode": "max"}
        fixed: dict[str, Any] = {"filename": "best", "save_last": True}
        fixed |= {"auto_insert_metric_name": False, "enable_version_counter": False}
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
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; whatever is wrong with it or with its files is said on one line."""
        self.arguments = list(args)
        # The files first: jsonargparse would not say which of them is missing, empty or not YAML.
        read_settings(self.arguments)
        text = class_help(self.arguments)
        if text is not None:
            sys.stdout.write(text)
            raise SystemExit(0)
        try:
            self.config = parser.parse_args(self.arguments)
        except ParseError as error:
            raise InputError(one_line(str(error), parser)) from error
        except OmegaConfBaseException as error:
            raise InputError(unresolved(str(error), self.arguments)) from error

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's settings override the command line (tested)."""

    def before_instantiate_classes(self) -> None:
        """Name the checkpoint."""
        config = self.config[self.subcommand]
        if self.subcommand == "prepare":
            return
        # Not parser links: those would copy a ${...} of run_dir before it is resolved.
        config.trainer.default_root_dir = config.run_dir
        if self.subcommand == "audit":  # a logger of the run would open its files again
            config.trainer.logger = config.trainer.callbacks = None
        config.checkpoint.dirpath = str(checkpoint_folder(config.run_dir))
        self.automatic = config.ckpt_path == "auto"
        if self.automatic and self.subcommand == "fit" and is_finished(config.run_dir):
            logging.getLogger(__name__).info(
                "%s is finished; --ckpt_path last goes on with it, another --run_dir begins anew", config.run_dir
            )
            raise SystemExit(0)
        config.ckpt_path = chosen_checkpoint(self.command, config.ckpt_path, config.run_dir, self.arguments)

    def before_predict(self) -> None:
        """Refuse a model that recommends nothing."""
        if not isinstance(self.model, RecommenderModule):
            raise InputError(
                f"{type(self.model).__name__} recommends nothing to predict; `recsys fit` has written its semantic IDs"
            )

    def before_fit(self) -> None:
        """Make room for a new run, now that its settings have built all they name."""
        config = self.config[self.subcommand]
        if config.ckpt_path is None and not config.trainer.fast_dev_run:
            move_aside(Path(config.run_dir))
        if config.ckpt_path is not None and self.automatic:
            resolved = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False))
            refuse_other_settings(config.run_dir, resolved, written_keys(self.arguments))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer with the project's defaults; `prepare` needs none."""
        config = self._get(self.config_init, "trainer")
        run_dir, checkpoint = self._get(self.config_init, "run_dir"), self._get(self.config, "ckpt_path")
        own = [csv_logger(run_dir, checkpoint)] if self.subcommand == "fit" else []
        if config.logger in (None, True):
            config.logger = own or False
        elif config.logger is not False:
            # Of the other commands results.json is the record; a CSVLogger would delete the metrics.csv of the fit.
            given = [[logger] if not _writes_into(logger, run_dir) else own for logger in _listed(config.logger)]
            config.logger = [logger for part in given for logger in part] or False
        callbacks = [PredictionWriter()] if self.subcommand == "predict" else []
        config.callbacks = [*(config.callbacks or []), *callbacks]
        config.plugins = [*_listed(config.plugins), DurableCheckpointIO()]
        return super().instantiate_trainer(use_distributed_sampler=False, **trainer_settings(config), **kwargs)

    def instantiate_classes(self) -> None:
        """Instantiate what the command needs."""
        builder = _Builder(self.arguments)
        self._parser(self.subcommand).add_instantiator(builder, object)
        try:
            if self.subcommand not in _WITHOUT_TRAINER:
                super().instantiate_classes()
                return
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            # jsonargparse wraps what a constructor raised into pages on the types it tried.
            if builder.refused is None or builder.refused is error:
                raise
            raise builder.refused from error
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        self.trainer = RecsysTrainer(logger=False, enable_checkpointing=False, accelerator="cpu", **alone())

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        if config.get("enable_checkpointing") is False:  # None, the default, means true
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except InputError:
            raise
        except _REFUSALS as error:
            raise InputError(f"the Trainer refused its settings (trainer.*): {str(error).strip()}") from error

    def prepare(self, **_: Any) -> None:
        """Run `recsys prepare`."""
        if prepare_together(self.datamodule):
            print_statistics(self.datamodule.statistics())

    def audit(self, **_: Any) -> None:
        """All is built: `recsys audit` goes on from here."""

    def after_fit(self) -> None:
        """Print what became of the codebooks, if the model has any."""
        report = codebook_report(self.trainer)
        if self.trainer.is_global_zero and report is not None:
            print_codebooks(report)

    def after_test(self) -> None:
        """Print the headline; Lightning would print each of some hundred metrics on its own line."""
        if self.trainer.is_global_zero:
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            print_metrics(metrics, Path(self.trainer.default_root_dir) / "results.json")
        report = codebook_report(self.trainer)
        if self.trainer.is_global_zero and report is not None:
            print_codebook_warning(report)

    after_validate = after_test

    def predict(self, **kwargs: Any) -> None:
        """Run `recsys predict`; the writer keeps the lists, so the Trainer need not."""
        self.trainer.predict(**(kwargs | {"return_predictions": False}))


def _writes_into(logger: Any, run_dir: str) -> bool:
    """Whether a logger writes the metrics.csv of a run folder."""
    return isinstance(logger, CSVLogger) and Path(logger.log_dir) == Path(run_dir)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


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
            args=arguments,
        )
    except Exception as error:
        line = while_running(error)
        if line is None:
            raise
        raise InputError(line) from error


class _ToStderr(logging.Handler):
    """Writes to what `sys.stderr` is at the time: a program that calls `main` may replace it between two calls."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _quiet() -> None:
    """Show what a user can act on; drop Lightning's advertisements and hints."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    log = logging.getLogger("recsys_lightning")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(_ToStderr())
    # The last of them is about data loaders; ours go on in the middle of an epoch by themselves.
    noises = ("Experiment logs directory", ".*treespec, LeafSpec", "Couldn't infer the batch indices")
    ours = ("You're resuming from a checkpoint that ended before the epoch", "The `srun` command is available")
    for noise in (*noises, *ours):
        warnings.filterwarnings("ignore", noise)
    torch.set_float32_matmul_precision("high")
    if not torch.cuda.is_available():
        keep_freed_memory()
