"""Whatever is wrong with a command line or its files is said on one line that names the key, the place and the cure."""

import re
from pathlib import Path

import pytest
import torch

from recsys_lightning.cli.messages import known_classes, while_running
from recsys_lightning.errors import InputError
from recsys_lightning.models.recommender import Recommender

MODEL = "model.init_args.model.init_args"

# On the command line: arguments, and the whole message.
COMMAND_LINES = [
    ("--trainr.max_epochs 3", "no key 'trainr'; did you mean 'trainer'?"),
    ("--trainr.max_epochs=3", "no key 'trainr'; did you mean 'trainer'?"),
    ("--ckpt_pth x", "no key 'ckpt_pth'; did you mean 'ckpt_path'?"),
    ("--trainer.max_epoch 3", "no key 'trainer.max_epoch' of Trainer; did you mean 'trainer.max_epochs'?"),
    ("--trainer.zzz 3", "no key 'trainer.zzz' of Trainer; `recsys fit --help` has them"),
    (f"--{MODEL}.dmi 3", f"no key '{MODEL}.dmi' of COBRA; did you mean '{MODEL}.dim'?"),
    ("--model.model.dmi 3", "no key 'model.model.dmi' of COBRA; did you mean 'model.model.dim'?"),
    (
        f"--{MODEL}.decoder.num_layer 3",
        f"no key '{MODEL}.decoder.num_layer' of CobraDecoder; did you mean '{MODEL}.decoder.num_layers'?",
    ),
    (
        "--model.model.item_encoder.hiden [3]",
        "no key 'model.model.item_encoder.hiden' of EmbeddingItemEncoder; "
        "did you mean 'model.model.item_encoder.hidden'?",
    ),
    (
        "--model.zzz.x 3",
        "no key 'model.zzz' of RecommenderModule; its keys are model, optimizer, schedule, warmup_steps, evaluation",
    ),
    ("--model.optimizer.lrr 3", "no key 'model.optimizer.lrr' of AdamW; did you mean 'model.optimizer.lr'?"),
    (
        "--data.init_args.batchsize 3",
        "no key 'data.init_args.batchsize' of SequenceDataModule; did you mean 'data.init_args.batch_size'?",
    ),
    (
        "--data.source.num_user 3",
        "no key 'data.source.num_user' of Synthetic; did you mean 'data.source.num_users'?",
    ),
    (
        "--trainer.callbacks+=LearningRateMonitor --trainer.callbacks.logging_intervall=step",
        "no key 'trainer.callbacks.logging_intervall' of LearningRateMonitor; "
        "did you mean 'trainer.callbacks.logging_interval'?",
    ),
    (
        "--trainer.logger CSVLogger --trainer.logger.save_dri x",
        "no key 'trainer.logger.save_dri' of CSVLogger; did you mean 'trainer.logger.save_dir'?",
    ),
    ("--model.model COBAR", "no Recommender 'COBAR' for model.model; did you mean 'COBRA'?"),
    (
        "--model.model RQVAE",
        "no Recommender 'RQVAE' for model.model; there are COBRA, Popularity, SASRec, SPARC, TwoTower",
    ),
    (
        "--model.model recsys_lightning.models.cobra.COBAR",
        "no Recommender 'recsys_lightning.models.cobra.COBAR' for model.model; did you mean 'COBRA'?",
    ),
    ("--model.model.class_path COBAR", "no Recommender 'COBAR' for model.model; did you mean 'COBRA'?"),
    ("--data.encoder TfidfSVDD", "no TextEncoder 'TfidfSVDD' for data.encoder; did you mean 'TfidfSVD'?"),
    (
        "--data Sequencedatamodule",
        "no CatalogDataModule 'Sequencedatamodule' for data; did you mean 'SequenceDataModule'?",
    ),
    ("--model.optimizer AdamWW", "no Optimizer 'AdamWW' for model.optimizer; did you mean 'AdamW'?"),
    ("--trainer.logger WandbLoger", "no Logger 'WandbLoger' for trainer.logger; did you mean 'WandbLogger'?"),
    ("--model sub.yaml", "no file 'sub.yaml' for model; a path counts from the folder of the file that names it"),
    (
        f"--{MODEL}.search.fusion globl",
        f"'globl' is no value for {MODEL}.search.fusion: it must be global, per_id, nearest or ranks; "
        "did you mean 'global'?",
    ),
    ("--trainer.max_epochs ten", "'ten' is no value for trainer.max_epochs: it must be an int or null"),
    ("--model.model.decoder.bos maybe", "'maybe' is no value for model.model.decoder.bos: it must be true or false"),
    ("--model.optimizer.lr abc", "'abc' is no value for model.optimizer.lr: it must be a float"),
    ("--model.evaluation.ks [a]", "'a' is no value for model.evaluation.ks: it must be an int"),
    ("--seed_everything abc", "'abc' is no value for seed_everything: it must be true or false or an int"),
    (
        "other.yaml",
        "'other.yaml' is neither an option nor the value of one; a configuration file is given as -c other.yaml",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_a_mistake_on_the_command_line_is_named_with_the_nearest_valid_key_or_value(
    recsys, write_yaml, cobra, arguments, message
):
    assert recsys("fit", "-c", write_yaml(cobra), *arguments.split()).error == message


SUGGESTIONS = [line for line in COMMAND_LINES if re.search(r"no key .* did you mean '[\w.]+'\?", line[1])]


@pytest.mark.parametrize(("arguments", "message"), SUGGESTIONS, ids=[line for line, _ in SUGGESTIONS])
def test_a_suggested_key_exists(recsys, write_yaml, cobra, arguments, message):
    wrong, right = re.search(r"no key '([^']+)'.*did you mean '([^']+)'", message).groups()
    outcome = recsys("fit", "-c", write_yaml(cobra), *arguments.replace(wrong, right).split(), "--print_config")
    assert outcome.status == 0 or "no checkpoint" in outcome.error, outcome.err


# In a file: what is edited, the message without its place, and the word that stands in the line it points to.
FILES = [
    ("trainr", {"max_epochs": 1}, "no key 'trainr'{}; did you mean 'trainer'?", "trainr:"),
    (
        "trainer.max_epoch",
        1,
        "no key 'trainer.max_epoch' of Trainer{}; did you mean 'trainer.max_epochs'?",
        "max_epoch:",
    ),
    (f"{MODEL}.dmi", 3, f"no key '{MODEL}.dmi' of COBRA{{}}; did you mean '{MODEL}.dim'?", "dmi:"),
    (
        f"{MODEL}.decoder.num_layer",
        3,
        f"no key '{MODEL}.decoder.num_layer' of CobraDecoder{{}}; did you mean '{MODEL}.decoder.num_layers'?",
        "num_layer:",
    ),
    (
        "data.init_args.source.init_args.num_user",
        3,
        "no key 'data.init_args.source.init_args.num_user' of Synthetic{}; "
        "did you mean 'data.init_args.source.init_args.num_users'?",
        "num_user:",
    ),
    (
        "model.init_args.model.class_path",
        "COBAR",
        "no Recommender 'COBAR' for model.init_args.model{}; did you mean 'COBRA'?",
        "COBAR",
    ),
    (
        "data.init_args.encoder",
        "TfidfSVDD",
        "no TextEncoder 'TfidfSVDD' for data.init_args.encoder{}; did you mean 'TfidfSVD'?",
        "TfidfSVDD",
    ),
    (
        f"{MODEL}.search.fusion",
        "globl",
        f"'globl' is no value for {MODEL}.search.fusion{{}}: it must be global, per_id, nearest or ranks; "
        "did you mean 'global'?",
        "globl",
    ),
    ("trainer.max_epochs", "ten", "'ten' is no value for trainer.max_epochs{}: it must be an int or null", "ten"),
    (
        "model.init_args.model",
        None,
        "RecommenderModule needs model{}: set 'model.init_args.model'",
        "RecommenderModule",
    ),
    ("run_dir", "${nothing}/x", "cannot resolve '${{nothing}}/x' of run_dir{}: no key 'nothing'", "run_dir"),
    (
        f"{MODEL}.dim",
        "${trainer.max_epoch}",
        f"cannot resolve '${{{{trainer.max_epoch}}}}' of {MODEL}.dim{{}}: no key 'trainer.max_epoch'; "
        "did you mean 'trainer.max_epochs'?",
        "dim:",
    ),
    (
        "run_dir",
        "${oc.env:RECSYS_NO_SUCH_VARIABLE}",
        "cannot resolve '${{oc.env:RECSYS_NO_SUCH_VARIABLE}}' of run_dir{}: "
        "Environment variable 'RECSYS_NO_SUCH_VARIABLE' not found",
        "run_dir",
    ),
]


@pytest.mark.parametrize(("key", "value", "message", "word"), FILES, ids=[f"{case[0]}={case[1]}" for case in FILES])
def test_a_mistake_in_a_file_is_named_with_file_and_line(recsys, write_yaml, cobra, edit, key, value, message, word):
    path = write_yaml(edit(cobra, key, value))
    error = recsys("fit", "-c", path).error
    place = re.search(r" \((\S+), line (\d+)\)", error)
    assert place is not None, error
    assert place[1] == str(path)
    assert word in path.read_text().splitlines()[int(place[2]) - 1]
    assert error == message.format(place[0])


def test_the_line_is_that_of_the_file_with_the_mistake_when_there_are_several(recsys, write_yaml, cobra):
    write_yaml(cobra)
    second = write_yaml("# more\ntrainer:\n  max_epoch: 3\n", "second.yaml")
    error = recsys("fit", "-c", write_yaml(cobra), "-c", second).error
    assert f"({second}, line 3)" in error


def test_a_mistake_in_an_included_file_is_found_there(recsys, write_yaml, cobra):
    cobra["data"]["init_args"]["batchsize"] = 3
    write_yaml(cobra, "base.yaml")
    outer = write_yaml({"config": "base.yaml", "run_dir": "elsewhere"}, "outer.yaml")
    error = recsys("fit", "-c", outer).error
    assert "base.yaml, line" in error
    assert "did you mean 'data.init_args.batch_size'?" in error


def test_a_file_that_includes_itself_or_nothing_is_named(recsys, write_yaml):
    loop = write_yaml({"config": "loop.yaml"}, "loop.yaml")
    assert "includes itself" in recsys("fit", "-c", loop).error
    lost = write_yaml({"config": "nowhere.yaml"}, "lost.yaml")
    assert "nowhere.yaml: no such file" in recsys("fit", "-c", lost).error


def test_a_mistake_in_a_file_for_the_model_is_found_there(recsys, write_yaml, cobra):
    model = write_yaml("class_path: RecommenderModule\ninit_args:\n  warmup_step: 3\n", "model.yaml")
    error = recsys("fit", "-c", write_yaml({**cobra, "model": "model.yaml"})).error
    assert error == (
        f"no key 'model.init_args.warmup_step' of RecommenderModule ({model}, line 3); "
        "did you mean 'model.init_args.warmup_steps'?"
    )


UNREADABLE = [
    ("", "{} is empty; it must hold keys such as model: and data:"),
    ("# only a comment\n", "{} is empty; it must hold keys such as model: and data:"),
    ("- a\n- b\n", "{} is no configuration; it must hold keys such as model: and data:"),
    ("just text\n", "{} is no configuration; it must hold keys such as model: and data:"),
    (
        "run_dir: x\ntrainer: {max_epochs: 3, : [\n",
        "{} line 2 column 26 is not valid YAML: did not find expected node content",
    ),
    ("run_dir: x\ntrainer: {}\nrun_dir: y\n", "{} line 3: key 'run_dir' already stands in line 1; keep one"),
]


@pytest.mark.parametrize(("text", "message"), UNREADABLE)
def test_a_file_that_is_no_configuration_is_named(recsys, write_yaml, text, message):
    path = write_yaml(text)
    assert recsys("fit", "-c", path).error == message.format(path)


def test_a_missing_file_is_named_with_one_that_exists(recsys, write_yaml, tmp_path):
    path = write_yaml("run_dir: x\n")
    wrong = tmp_path / "experimnt.yaml"
    assert recsys("fit", "-c", wrong).error == f"--config {wrong}: no such file; did you mean '{path}'?"
    assert recsys("fit", "-c", tmp_path).error == f"--config {tmp_path}: a folder, not a file"
    assert "expected one argument" in recsys("fit", "-c").error


def test_missing_model_and_data_are_asked_for(recsys, write_yaml, cobra):
    needs = "`recsys fit` needs data and model: name a file with them by -c, or give --data and --model"
    assert recsys("fit").error == needs
    del cobra["model"]
    expected = "`recsys fit` needs model: name a file with it by -c, or give --model"
    assert recsys("fit", "-c", write_yaml(cobra)).error == expected


def test_what_a_constructor_refuses_is_named_with_its_key_and_class(recsys, write_yaml, trained):
    config = trained / "cobra.yaml"
    line = next(n for n, text in enumerate(config.read_text().splitlines(), 1) if "AdamW" in text)
    # The optimizer is built only when the fit begins.
    assert recsys("fit", "-c", config, "--model.optimizer.lr", "-1").error == (
        f"model.init_args.optimizer ({config}, line {line}): AdamW refused its settings: Invalid learning rate: -1.0"
    )
    assert recsys("fit", "-c", config, "--checkpoint.mode", "maxi").error == (
        "checkpoint: BestAndLast refused its settings: `mode` can be min, max but got maxi"
    )
    error = recsys("fit", "-c", config, "--trainer.accelerator", "foo").error
    assert error.startswith("the Trainer refused its settings (trainer.*): You selected an invalid accelerator name")
    assert recsys("fit", "-c", config, "--data.batch_size", "0").error == "data.batch_size=0 must be at least 1"
    assert "got null for k_core" in recsys("fit", "-c", config, "--data.k_core", "null").error
    assert (
        recsys("fit", "-c", config, "--model.model.dim", "15").error
        == "dim=15 must be a multiple of decoder.num_heads=2"
    )


def test_an_error_in_a_data_loader_s_process_is_one_line_too():
    assert while_running(
        InputError("Caught InputError in worker 0.\nOriginal Traceback:\n  x\nrecsys.InputError: too long")
    ) == ("too long")


@pytest.mark.parametrize("key", ["checkpoint", "early_stopping"])
def test_a_metric_that_nobody_logs_is_named_with_the_nearest(recsys, trained, key):
    error = recsys("fit", "-c", trained / "cobra.yaml", f"--{key}.monitor", "val/ndgc@10").error
    assert error == f"no metric 'val/ndgc@10' for {key}.monitor; did you mean 'val/ndcg@10'?"


def test_a_bug_while_training_keeps_its_traceback(trained, recsys, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("recsys_lightning.models.cobra.COBRA.losses", broken)
    with pytest.raises(ValueError, match="a bug"):
        recsys("fit", "-c", trained / "cobra.yaml")


def test_a_checkpoint_of_another_model_or_no_checkpoint_is_refused_in_one_line(trained, recsys):
    config = trained / "cobra.yaml"
    error = recsys("test", "-c", config, "--model.model.dim", "32").error
    assert error.startswith("the checkpoint was made with other model or data settings: size mismatch for")
    error = recsys("test", "-c", config, "--ckpt_path", config).error
    what = "is no checkpoint, is cut off or is damaged (File is not a zip file)"
    assert error == f"{config} {what}; name another one with --ckpt_path"
    cut = trained / "cut.ckpt"
    cut.write_bytes((trained / "cobra/checkpoints/best.ckpt").read_bytes()[:-1000])
    assert "is cut off" in recsys("test", "-c", config, "--ckpt_path", cut).error
    unsafe = trained / "unsafe.ckpt"
    torch.save({"state_dict": {}, "object": Path}, unsafe)
    assert "holds more than weights" in recsys("test", "-c", config, "--ckpt_path", unsafe).error


def test_known_classes_are_those_that_can_be_built():
    assert set(known_classes([Recommender])) >= {"COBRA", "Popularity"}
    assert "Recommender" not in known_classes([Recommender])
