"""The README and the pages of docs/ tell the truth: every command in them works, every link leads somewhere.

Commands of `recsys` are parsed for real, also where torchrun, srun, sbatch or a container runs them; targets of make
exist; other programs stand in `RUN_BY`, with the test or the target of make that runs them. A program that stands
nowhere fails.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from recsys_lightning.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
TOPICS = ("one-gpu", "many-gpus", "slurm", "sweeps", "ablations", "docker")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))

# What runs the commands that no parser of this project can check: a target of make or a file of tests.
RUN_BY = {
    "wandb sweep": "tests/tracking/test_sweep.py",
    "wandb agent": "tests/tracking/test_sweep.py",
    "wandb sync": "tests/tracking/test_offline.py",
    "pip install": "install",
    "docker run": "docker-test",
    "docker compose": "docker-test",
    "docker stop": "docker-test",
    "sbatch": "tests/slurm/test_sbatch.py",
    "srun": "tests/slurm/test_sbatch.py",
    "squeue": "tests/slurm/conftest.py",
    "scancel": "tests/slurm/test_sbatch.py",
    "scontrol": "tests/slurm/test_sbatch.py",
    "sinfo": "tests/slurm/conftest.py",
    "torchrun": "tests/distributed/test_fit.py",
}
# Every shell has them, and they do nothing that could have changed.
PLAIN = {"cd", "export", "ls", "mkdir", "tail", "cat", "kill", "sudo", "nvidia-smi", "wandb login"}
# What a container's or a batch script's words are handed to.
PROGRAMS = ("recsys", "make", "torchrun", "python", "bash")

Words = tuple[str, ...]


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [body for language, body in found if language in languages]


def spans(page: Path) -> list[str]:
    """The code within the lines of a page."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def written(page: Path) -> list[Words]:
    """The commands of a page: comments and variables before a command gone, lines of `a && b | c` taken apart."""
    found: list[Words] = []
    for body in blocks(page, "bash", "sh", "shell", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split, words = True, []
            for word in [*lexer, ";"]:
                if word not in ("|", "&&", "||", ";", "&"):
                    words += [word]
                    continue
                while words and re.match(r"[A-Z_]\w*=", words[0]):
                    words.pop(0)
                found += [tuple(words)] if words else []
                words = []
    return found


def within(words: Words) -> Words | None:
    """The command that another one runs, such as what a container or torchrun is given; None if it runs none."""
    for at, word in enumerate(words[1:], start=1):
        rest = words[at + 1 :]
        if word in ("recsys", "torchrun", "make"):
            return words[at:]
        if word == "recsys_lightning" and words[at - 1] == "-m":
            return ("recsys", *rest)
        if word == "--wrap":
            return tuple(shlex.split(rest[0].removeprefix("exec ")))
        if word.endswith(".sbatch"):
            return ("recsys", "fit", *rest) if rest else None
        if word.startswith(("recsys:", "recsys-gpu")) and rest:
            return rest if rest[0] in PROGRAMS else ("recsys", *rest)
    return None


def all_commands(page: Path) -> Iterator[Words]:
    """The commands of a page with those that they run."""
    for words in written(page):
        step: Words | None = words
        while step is not None:
            yield step
            step = within(step) if step[0] not in ("recsys", "make") else None


def without_variables(words: Words) -> list[str]:
    """The words with a number in the place of ``$NAME`` and ``${NAME}``; what jsonargparse resolves is left."""
    return [re.sub(r"\$(\w+|\{\w+\}|\([^)]*\))", "1", word) for word in words]


COMMANDS_OF_PAGES = {words: page for page in reversed(PAGES) for words in all_commands(page)}


def every(program: str) -> list[object]:
    """One case for each different command of a program, named after its page."""
    cases = [(page, words) for words, page in COMMANDS_OF_PAGES.items() if words[0] == program]
    return [pytest.param(words, id=f"{page.stem}: {' '.join(words)}") for page, words in reversed(cases)]


def files_of(words: list[str]) -> list[str]:
    """The configuration files that a command names."""
    return [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-c", "--config")]


@pytest.mark.parametrize("command", every("recsys"))
def test_a_command_of_recsys_parses(command, tmp_path, monkeypatch, capsys):
    # As in a fresh clone: runs that lie in this one are none of the reader's.
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2c3d4")
    words = without_variables(command[1:])
    missing = [file for file in files_of(words) if not (ROOT / file).exists()]
    assert not [file for file in missing if file.startswith("experiments/")], "shipped files must be there"
    if missing:
        pytest.skip(f"{', '.join(missing)} is the reader's own file")
    answers_itself = any(word in ("--help", "-h", "--version") or ".help" in word for word in words)
    if not answers_itself:
        without_files = ("compare", "audit", "append", "report", "benchmark", "demo", "study")
        words.append({"ablate": "--dry-run"}.get(words[0], "--help" if words[0] in without_files else "--print_config"))
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", every("make"))
def test_a_target_of_make_exists(command):
    targets = [word for word in command[1:] if "=" not in word and not word.startswith("-")]
    assert targets
    assert set(targets) <= TARGETS


@pytest.mark.parametrize("command", every("torchrun"))
def test_torchrun_takes_its_options_and_starts_recsys(command):
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(without_variables(command[1:]))
    starts = (parsed.training_script, parsed.module, parsed.no_python)
    assert starts in (("recsys_lightning", True, False), ("recsys", False, True))


@pytest.mark.parametrize("command", every("sbatch"))
def test_a_batch_script_exists(command):
    if "--wrap" in command:
        pytest.skip("the command itself stands in the place of a script")
    scripts = [word for word in command[1:] if word.endswith((".sbatch", ".sh"))]
    assert len(scripts) == 1
    assert (ROOT / scripts[0]).is_file()


@pytest.mark.parametrize("command", every("docker"))
def test_a_service_of_compose_exists(command):
    if command[1] != "compose":
        pytest.skip("not of compose")
    file = command[command.index("--file") + 1]
    services = yaml.safe_load((ROOT / file).read_text())["services"]
    assert [word for word in command if word in services]


@pytest.mark.parametrize("command", every("wandb"))
def test_wandb_takes_the_options(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli = pytest.importorskip("wandb.cli.cli", reason='needs pip install "recsys_lightning[wandb]"').cli
    _, name, *rest = command
    words = [str(tmp_path) if word.startswith("runs/") else word for word in without_variables(tuple(rest))]
    cli.commands[name].make_context(name, words)  # raises on an option that it has not
    assert all((ROOT / word).exists() for word in rest if word.startswith("experiments/"))


@pytest.mark.parametrize("command", every("pip"))
def test_the_extras_that_are_installed_exist(command):
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {extra for word in command for part in re.findall(r"\[([\w,]+)\]", word) for extra in part.split(",")}
    assert named <= extras


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_other_program_stands_in_the_table_with_what_runs_it(page):
    for words in all_commands(page):
        kinds = {words[0], " ".join(words[:2])}
        if kinds & (PLAIN | {"recsys", "make"}):
            continue
        (kind,) = kinds & RUN_BY.keys() or [f"{words[0]}: put it into RUN_BY, with what runs it"]
        place = RUN_BY.get(kind)
        assert place in TARGETS or (ROOT / str(place)).is_file(), f"{kind} is run by {place}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_target_that_a_text_names_exists(page):
    named = {word for span in spans(page) if span.startswith("make ") for word in span.split()[1:]}
    assert {word for word in named if re.fullmatch(r"[a-z][a-z-]*", word)} <= TARGETS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_of_the_repository_exists(page):
    code = "\n".join([*spans(page), *blocks(page, "", "bash", "sh", "shell", "console", "text", "yaml", "python")])
    found = re.findall(r"(?<![\w./-])(?:experiments|recsys_lightning|tests|docker|docs)/[\w./*-]+", code)
    assert not [path for path in found if "..." not in path and not any(ROOT.glob(path.rstrip("./")))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_to_a_file_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


@pytest.mark.parametrize(
    "body", [pytest.param(body, id=page.stem) for page in PAGES for body in blocks(page, "yaml", "yml")]
)
def test_a_configuration_loads(body, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load(body)
    if not isinstance(config, dict) or not {"model", "data"} <= config.keys():
        pytest.skip("a part of a configuration")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(body)
    assert main(["fit", "-c", "mine.yaml", "--print_config"]) == 0, capsys.readouterr().err


def test_there_is_a_page_for_each_topic_and_the_index_has_a_line_for_each():
    listed = re.findall(r"^- \[.+\]\((.+)\.md\): .+", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(TOPICS)
    assert {page.stem for page in PAGES} >= set(TOPICS)


def test_a_command_within_a_command_is_found():
    page_of = "docker run --rm recsys:cpu torchrun --nproc_per_node 2 -m recsys_lightning fit -c x.yaml"
    steps, step = [], tuple(page_of.split())
    while step is not None:
        steps.append(step)
        step = within(step) if step[0] != "recsys" else None
    assert [words[0] for words in steps] == ["docker", "torchrun", "recsys"]
    assert steps[-1] == ("recsys", "fit", "-c", "x.yaml")
    batch = ("sbatch", "--nodes=2", "experiments/cluster/slurm.sbatch", "-c", "x.yaml")
    assert within(batch) == ("recsys", "fit", "-c", "x.yaml")
    assert within(("docker", "run", "recsys:cpu", "--version")) == ("recsys", "--version")
    assert "fit" in COMMANDS
