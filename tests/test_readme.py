"""What only the README promises: it names every command, its Python runs, `make help` lists what there is.

Its commands, targets, paths and links are checked with those of the other pages, by test_docs.py.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recsys_lightning.cli import COMMANDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S))
TARGETS = dict(re.findall(r"^([a-z][\w-]*):(?!=)[^\n]*\n((?:\t.*\n?)*)", MAKEFILE, re.M))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_mentioned(name):
    """By itself, or as what a target of make runs that is mentioned."""
    through_make = [target for target, recipe in TARGETS.items() if re.search(rf"\brecsys {name}\b", recipe)]
    names = [rf"recsys +{name}\b", *(rf"make {target}\b" for target in through_make)]
    code = "\n".join([*SPANS, *(body for _, body in BLOCKS)])
    assert any(re.search(pattern, code) for pattern in names)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_the_targets_there_are():
    command = ["make", "--no-print-directory", "-C", str(ROOT), "help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    listed = set(re.findall(r"^\s*make ([\w-]+)", done.stdout, re.M))
    assert {"demo", "test"} <= listed <= set(TARGETS)


@pytest.mark.parametrize("body", [body for language, body in BLOCKS if language == "python"])
def test_the_python_of_the_readme_runs(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(body, "README.md", "exec"), {"__name__": "readme"})  # what a reader would paste
