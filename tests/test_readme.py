"""The README tells the truth: its commands parse, its targets and paths exist, its Python runs."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from recsys_lightning.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))
TARGETS = dict(re.findall(r"^([a-z][\w-]*):(?!=)[^\n]*\n((?:\t.*\n?)*)", MAKEFILE, re.M))


def block_lines() -> list[list[str]]:
    """The words of each line of the README's code blocks, lines that end in a backslash joined, comments gone."""
    lines = [
        line.strip().removeprefix("$ ")
        for language, body in BLOCKS
        if language in ("", "bash", "sh", "shell", "console")
        for line in body.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(recsys|make)\b", line)]


RECSYS = [" ".join(words[1:]) for words in block_lines() if words[0] == "recsys"]


def files_of(words: list[str]) -> list[str]:
    """The configuration files that a command names."""
    return [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("-c", "--config")]


@pytest.mark.parametrize("command", RECSYS)
def test_a_command_of_the_readme_parses(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    missing = [file for file in files_of(words) if not (ROOT / file).exists()]
    assert not [file for file in missing if file.startswith("experiments/")], "shipped files must be there"
    if missing:
        pytest.skip(f"{', '.join(missing)} is the reader's own file")
    answers_itself = any(word in ("--help", "-h", "--version") or ".help" in word for word in words)
    if not answers_itself:
        without_files = ("compare", "audit", "append", "report", "benchmark", "demo", "study")
        words.append({"ablate": "--dry-run"}.get(words[0], "--help" if words[0] in without_files else "--print_config"))
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_mentioned(name):
    """By itself, or as what a target of make runs that is mentioned."""
    through_make = [target for target, recipe in TARGETS.items() if re.search(rf"\brecsys {name}\b", recipe)]
    names = [rf"recsys +{name}\b", *(rf"make {target}\b" for target in through_make)]
    code = "\n".join([*SPANS, *(body for _, body in BLOCKS)])
    assert any(re.search(pattern, code) for pattern in names)


def named_targets() -> set[str]:
    lines = [line for words in block_lines() if words[0] == "make" for line in words[1:]]
    lines += [word for span in SPANS if span.startswith("make ") for word in span.split()[1:]]
    return {word for word in lines if re.fullmatch(r"[a-z][a-z-]*", word)}


@pytest.mark.parametrize("target", sorted(named_targets()))
def test_every_target_of_the_readme_exists(target):
    assert target in TARGETS


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_the_targets_there_are():
    command = ["make", "--no-print-directory", "-C", str(ROOT), "help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    listed = set(re.findall(r"^\s*make ([\w-]+)", done.stdout, re.M))
    assert {"demo", "test"} <= listed <= set(TARGETS)


def repository_paths() -> list[str]:
    """Paths of the repository in code spans and code blocks, web addresses left out."""
    code = "\n".join([*SPANS, *(body for _, body in BLOCKS)])
    found = re.findall(r"(?<![\w./-])(?:experiments|recsys_lightning|tests|docker)/[\w./*-]+", code)
    return sorted({path.rstrip("./") for path in found if "..." not in path})


@pytest.mark.parametrize("path", repository_paths())
def test_every_path_of_the_readme_exists(path):
    assert any(ROOT.glob(path))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXT))))
def test_every_link_to_a_file_leads_somewhere(target):
    assert "://" in target or (ROOT / target).exists()


@pytest.mark.parametrize("body", [body for language, body in BLOCKS if language in ("yaml", "yml")])
def test_a_configuration_of_the_readme_loads(body, tmp_path, monkeypatch, capsys):
    if not isinstance(yaml.safe_load(body), dict) or "model" not in yaml.safe_load(body):
        pytest.skip("a part of a configuration")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(body)
    assert main(["fit", "-c", "mine.yaml", "--print_config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("body", [body for language, body in BLOCKS if language == "python"])
def test_the_python_of_the_readme_runs(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(body, "README.md", "exec"), {"__name__": "readme"})  # what a reader would paste
