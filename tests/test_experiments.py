"""Every shipped experiment loads, means what its name says, and runs: two steps and a validation on synthetic data."""

import contextlib
import functools
import importlib
import io
import json
import math
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import polars as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from recsys_lightning.analysis.grid import load_grid
from recsys_lightning.analysis.grid_runs import expand, identity
from recsys_lightning.cli import main
from recsys_lightning.cli.trainer import RecsysCLI, run
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sources import Amazon2014
from recsys_lightning.errors import InputError
from recsys_lightning.models import cobra, sparc, two_tower
from recsys_lightning.nn import item_encoders
from recsys_lightning.semantic_ids.table import SemanticIds

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments"
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
LOGGERS = [name for name in FILES if name.startswith("logger/")]
GRIDS = [name for name in FILES if name.startswith("ablations/")]
SWEEPS = [name for name in FILES if name.startswith("sweeps/")]  # read by W&B: tests/test_sweeps.py
EXPERIMENTS = [name for name in FILES if name not in (*LOGGERS, *GRIDS, *SWEEPS)]
COBRA = [name for name in EXPERIMENTS if name.startswith("cobra/") or name == "demo/cobra.yaml"]
CATEGORIES = {"beauty": "Beauty", "sports": "Sports_and_Outdoors", "toys": "Toys_and_Games", "books": "Books"}


@functools.cache
def resolved(*names: str) -> dict[str, Any]:
    """What `recsys fit` makes of experiment files, every ``${...}`` filled in."""
    out = io.StringIO()
    files = [word for name in names for word in ("-c", str(FOLDER / name))]
    with contextlib.redirect_stdout(out):
        status = main(["fit", *files, "--print_config"])
    assert status == 0, names
    return yaml.safe_load(out.getvalue())


def built_by(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The short name and the settings of the recommender or tokenizer of an experiment."""
    settings = config["model"]["init_args"]
    part = settings.get("model") or settings["tokenizer"]
    return part["class_path"].rpartition(".")[2], part.get("init_args") or {}


def tokenizer_of(name: str) -> str:
    """The experiment in whose run folder the semantic IDs of a COBRA experiment lie."""
    return f"{built_by(resolved(name))[1]['semantic_ids'].removeprefix('runs/').rpartition('/')[0]}.yaml"


# ----------------------------------------------------------------------------------------------------------- they load


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_loads_and_no_reference_is_left_open(name):
    config = resolved(name)
    assert "${" not in yaml.safe_dump(config)
    assert config["seed_everything"] is not True, "a run must be repeatable"
    assert config["run_dir"] == f"runs/{name.removesuffix('.yaml')}", "a run lies where its file lies"


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_file_adds_to_an_experiment(name):
    package = Path(name).stem
    pytest.importorskip(package, reason=f'needs pip install "recsys_lightning[{package}]"')
    config = resolved("cobra/beauty.yaml", name)
    loggers = config["trainer"]["logger"]
    names = [logger["class_path"].rpartition(".")[2].lower() for logger in loggers]
    assert names[0] == "csvlogger"
    assert names[1].startswith(package)
    assert {logger["init_args"]["save_dir"] for logger in loggers} == {"runs/cobra/beauty"}
    assert config["model"] == resolved("cobra/beauty.yaml")["model"]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not name.startswith("demo/")])
def test_the_name_of_the_file_is_the_data_set(name):
    config = resolved(name)
    dataset = Path(name).stem.partition("_")[0]
    assert config["dataset"] == dataset
    source = config["data"]["init_args"]["source"]
    if source["class_path"].endswith("Tabular"):  # a sample as a table
        assert source["init_args"]["name"] == dataset
        return
    assert source["class_path"].endswith("Amazon2014")
    files = Amazon2014(**source["init_args"]).files(Path("raw"))
    category = CATEGORIES[dataset]
    assert [path.name for path in files] == [f"reviews_{category}_5.json.gz", f"meta_{category}.json.gz"]


@pytest.mark.parametrize("dataset", ["beauty", "sports", "toys"])
def test_dataset_on_the_command_line_reaches_paths_and_source(dataset, capsys):
    command = ["fit", "-c", str(FOLDER / "cobra/beauty.yaml"), "--dataset", dataset, "--print_config"]
    assert main(command) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["run_dir"] == f"runs/cobra/{dataset}"
    assert built_by(config)[1]["semantic_ids"] == f"runs/rqvae/{dataset}/semantic_ids.safetensors"
    assert config["data"]["init_args"]["source"]["init_args"]["category"] == dataset


# --------------------------------------------------------------------------------------------------- they fit together


@pytest.mark.parametrize("name", COBRA)
def test_cobra_reads_the_semantic_ids_that_the_experiment_of_its_name_writes(name):
    config, tokenizer = resolved(name), resolved(tokenizer_of(name))
    assert built_by(config)[1]["semantic_ids"] == f"{tokenizer['run_dir']}/semantic_ids.safetensors"


@pytest.mark.parametrize("name", COBRA)
def test_cobra_and_its_tokenizer_see_the_same_embeddings(name):
    """Semantic IDs from other embeddings are refused, so all that goes into the embeddings must agree."""
    data, tokenizer = (resolved(file)["data"]["init_args"] for file in (name, tokenizer_of(name)))
    for key in ("source", "encoder", "template", "raw_dir", "cache_dir", "k_core"):
        assert data[key] == tokenizer[key], key


@pytest.mark.parametrize("name", COBRA)
def test_cobra_has_a_position_for_every_item_of_a_history_and_the_answer(name):
    config = resolved(name)
    assert built_by(config)[1]["decoder"]["max_items"] == config["data"]["init_args"]["max_history"] + 1


# ------------------------------------------------------------------------------------------------------- their grids


class Parsed(RecsysCLI):
    """The real parser, built once for many command lines: it takes longer to build than to use."""

    lines: ClassVar[list[list[str]]] = []
    configs: ClassVar[list[dict[str, Any]]] = []

    def _add_subcommands(self, parser, **kwargs):
        LightningCLI._add_subcommands(self, parser, **kwargs)  # of all commands: the lines are of several

    def parse_arguments(self, parser, args):
        for line in self.lines:
            try:
                super().parse_arguments(parser, line)
            except InputError as error:
                raise AssertionError(f"{error}: {line}") from error
            command = self.config.subcommand
            text = self._subcommand_parsers[command].dump(self.config[command], skip_none=False)
            self.configs.append(yaml.safe_load(text))
        raise SystemExit


@functools.cache
def grid_configs(name: str) -> dict[str, dict[str, Any]]:
    """What the runs of one seed of a grid are made of, by entry, through the parser that the command uses."""
    grid = load_grid(FOLDER / name)
    runs = expand(grid, Path("runs/ablations") / grid.path.stem)
    once = [run for run in runs.values() if run.seed in (None, grid.seeds[0])]
    Parsed.lines = [["test" if run.checkpoint else "fit", *run.settings] for run in once]
    Parsed.configs = []
    with mock.patch("recsys_lightning.cli.trainer.RecsysCLI", Parsed), contextlib.suppress(SystemExit):
        run(Parsed.lines[0])
    return {run.entry.name: config for run, config in zip(once, Parsed.configs, strict=True)}


@pytest.mark.parametrize("name", GRIDS)
def test_every_run_of_a_grid_resolves_and_no_two_rows_are_the_same(name):
    configs = grid_configs(name)
    assert not any("${" in yaml.safe_dump(config) for config in configs.values())
    grid = load_grid(FOLDER / name)
    for variant in grid.variants:
        assert (
            configs[variant.name]["run_dir"] == f"runs/ablations/{Path(name).stem}/{variant.name}-seed{grid.seeds[0]}"
        )
    rows = {(identity(configs[variant.name]), variant.weights) for variant in grid.variants}
    assert len(rows) == len(grid.variants)
    assert grid.report is not None
    assert grid.report.parent == Path("experiments/results")


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_and_its_tokenizers_see_the_same_embeddings(name):
    configs = grid_configs(name)
    for entry in load_grid(FOLDER / name).variants:
        for needed in entry.references:
            data, tokenizer = (configs[one]["data"]["init_args"] for one in (entry.name, needed))
            for key in ("source", "encoder", "template", "raw_dir", "cache_dir", "k_core"):
                assert data[key] == tokenizer[key], (entry.name, needed, key)


@pytest.mark.parametrize("name", GRIDS)
def test_every_variant_of_a_grid_builds_learns_and_answers(name, catalog, semantic_ids, batch_of):
    """Settings that exclude one another would only show once the run begins."""
    torch.manual_seed(0)
    for entry, config in grid_configs(name).items():
        model, settings = built_by(config)
        if model not in ("COBRA", "SPARC", "TwoTower"):
            continue
        built = build_cobra(catalog, semantic_ids, settings) if model == "COBRA" else build_towers(catalog, settings)
        for _ in range(2):  # the second step of SPARC is one with codes
            losses = built.losses(batch_of([1, 2, 3], [20, 21], targets=[4, 22]))
            assert all(math.isfinite(float(loss.detach())) for loss in losses.values()), entry
        built.eval()
        found = built.recommend(batch_of([1, 2, 3], [20, 21]), 5, built.build_index())
        assert (found.item_ids[:, 0] > 0).all(), entry


def encoder_of(settings: dict[str, Any]) -> functools.partial[item_encoders.ItemEncoder]:
    """The item encoder that a model's settings name."""
    encoder = settings.pop("item_encoder")
    module, _, name = encoder["class_path"].rpartition(".")
    return functools.partial(getattr(importlib.import_module(module), name), **encoder.get("init_args", {}))


def build_cobra(catalog: Catalog, semantic_ids: SemanticIds, settings: dict[str, Any]) -> cobra.COBRA:
    parts = ("tokens", "decoder", "objective", "search")
    made = {key: getattr(cobra, f"Cobra{key.title()}")(**settings[key]) for key in parts}
    return cobra.COBRA(catalog, semantic_ids, settings["dim"], encoder_of(settings), **made)


def build_towers(catalog: Catalog, settings: dict[str, Any]) -> two_tower.TwoTower:
    """SPARC or a plain two-tower model, small: codes after the first step, and no fields that the catalogue lacks."""
    user = two_tower.UserSettings(**settings.pop("user"))
    encoder = functools.partial(encoder_of(settings), fields=("brand",), min_count=2)
    if "codebooks" not in settings:
        objective = two_tower.PairObjective(**settings.pop("objective"))
        return two_tower.TwoTower(catalog, item_encoder=encoder, user=user, objective=objective, **settings)
    parts = {key: getattr(sparc, f"Sparc{key.title()}")(**settings.pop(key)) for key in ("objective", "search")}
    codes = {"num_codes": min(settings["codebooks"]["num_codes"], 20), "warmup_steps": 1}
    codebooks = sparc.SparcCodebooks(**(settings.pop("codebooks") | codes))
    return sparc.SPARC(catalog, item_encoder=encoder, user=user, codebooks=codebooks, **parts, **settings)


# ------------------------------------------------------------------------------------------------------------ they run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all experiments: they share the data and the embeddings."""
    return tmp_path_factory.mktemp("cache")


def data_settings(cache: Path) -> list[str]:
    """24 items and 60 users in place of an experiment's own data; the rest of the file stays as it is."""
    sizes = {"num_users": 60, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 6}
    return [
        *("--data.source", "Synthetic", *(word for key in sizes for word in (f"--data.source.{key}", str(sizes[key])))),
        *("--data.encoder", "TfidfSVD", "--data.encoder.dim", "8"),
        *("--data.cache_dir", str(cache), "--data.k_core", "0", "--data.batch_size", "12"),
    ]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_takes_two_steps_and_a_validation(name, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what ignores run_dir would show here
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # `fit` writes over it: this puts it back
    file, settings = str(FOLDER / name), data_settings(cache)
    model, own = built_by(resolved(name))
    if "semantic_ids" in own:
        catalog = run(["prepare", "-c", file, *settings]).datamodule.catalog
        sizes = built_by(resolved(tokenizer_of(name)))[1]
        codes = torch.randint(0, sizes["num_codes"], (catalog.num_items + 1, sizes["num_levels"]))
        codes[0] = 0
        SemanticIds(codes, sizes["num_codes"], catalog.text_fingerprint, "random").save("ids.safetensors")
        settings += ["--model.model.semantic_ids", "ids.safetensors"]
    if "path" in own:  # a table of codes that somebody published
        ids = run(["prepare", "-c", file, *settings]).datamodule.catalog.raw_ids
        columns = {f"c{level}": range(len(ids)) for level in range(own["num_levels"])}
        pl.DataFrame({"item_id": ids, "tokenizer": own["tokenizer"], **columns}).write_parquet("ids.parquet")
        settings += ["--model.tokenizer.path", "ids.parquet", "--model.tokenizer.item_ids", "raw"]
    encoder = own.get("item_encoder", {})
    if "min_count" in (encoder.get("init_args") or {}):  # of 24 items few share a brand
        settings += ["--model.model.item_encoder.min_count", "1"]
    settings += ["--trainer.max_steps", "2", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    settings += ["--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1"]
    settings += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]

    assert main(["fit", "-c", file, *settings, "--run_dir", "run"]) == 0

    results = json.loads(Path("run/results.json").read_text())
    assert results["model"] == model
    assert results["steps"] == 2
    assert results["metrics"]
    assert all(math.isfinite(value) for value in results["metrics"].values())
    if "tokenizer" in resolved(name)["model"]["init_args"]:
        table = SemanticIds.load("run/semantic_ids.safetensors", num_items=24)
        assert (table.num_levels, table.num_codes) == (own["num_levels"], own["num_codes"])
    else:
        assert 0 <= results["metrics"]["val/ndcg@10"] <= 1
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "ids.safetensors", "ids.parquet"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_testing_before_training_names_the_command_to_run(name, tmp_path, capsys):
    assert main(["test", "-c", f"experiments/{name}", f"--run_dir={tmp_path}"]) == 2
    expected = f"no checkpoint {tmp_path}/checkpoints/best.ckpt: train first with `recsys fit -c experiments/{name}`"
    assert capsys.readouterr().err.startswith(f"recsys: error: {expected}")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user stands: experiment files are named from the root."""
    monkeypatch.chdir(ROOT)
