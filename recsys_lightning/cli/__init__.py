"""The `recsys` program. This file imports nothing heavy, so that help and a mistyped command answer at once."""

import difflib
import importlib
import sys
from collections.abc import Iterable, Sequence

from recsys_lightning import __version__
from recsys_lightning.errors import InputError
from recsys_lightning.signals import stop_signals

# command: (module that runs it, one line of help). Each module has a function of the command's name or `run`.
COMMANDS = {
    "prepare": ("recsys_lightning.cli.trainer", "build and cache the data and the item embeddings, print the figures"),
    "fit": ("recsys_lightning.cli.trainer", "train a model or a tokenizer"),
    "validate": ("recsys_lightning.cli.trainer", "measure a trained model on the validation items"),
    "test": ("recsys_lightning.cli.trainer", "measure a trained model on the test items"),
    "predict": ("recsys_lightning.cli.trainer", "write every user's recommendations to predictions.parquet"),
    "append": ("recsys_lightning.cli.append", "give new items semantic IDs without training; known ones keep theirs"),
    "compare": ("recsys_lightning.cli.compare", "put the results of runs into one table, with a paired test"),
    "ablate": ("recsys_lightning.cli.ablate", "run an ablation grid: variants of one experiment, compared at the end"),
    "audit": ("recsys_lightning.cli.audit", "check that a run has learned nothing from its validation and test items"),
    "report": ("recsys_lightning.cli.report", "one HTML file of a run, or of several, to look at and to send"),
    "study": ("recsys_lightning.cli.study", "analyse trained runs: their codes, their searches, their tokenizers"),
    "benchmark": ("recsys_lightning.cli.benchmark", "measure the latency and the recall of retrieval indexes"),
    "demo": ("recsys_lightning.cli.demo", "everything on a small synthetic catalogue with a known answer"),
}

_TOP = """usage: recsys COMMAND [options]

Recommendation with semantic IDs and dense vectors: COBRA and SPARC on PyTorch Lightning.

commands:
{commands}

`recsys COMMAND --help` lists the options of a command, `recsys fit --model.help COBRA` those of a class.
options:
  -h, --help     show this text
  --version      show the version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 where the user's input was at fault, 130 after Ctrl+C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<14} {line}" for name, (_, line) in COMMANDS.items())
        sys.stdout.write(_TOP.format(commands=commands) + "\n")
        return 0
    if "--version" in arguments[:2]:
        sys.stdout.write(f"recsys {__version__}\n")
        return 0
    command = arguments[0]
    if command == "fit":
        stop_signals.listen()  # before all imports: schedulers may signal early
    try:
        if command not in COMMANDS:
            raise InputError(f"no command {command!r}; `recsys --help` lists them{nearest(command, COMMANDS)}")
        module = importlib.import_module(COMMANDS[command][0])
        module.run(arguments)
    except InputError as error:
        sys.stderr.write(f"recsys: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # The Trainer answers Ctrl+C with an exit of its own; help and --print_config exit too.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise
    finally:
        stop_signals.restore()
    return 0


def _interrupted() -> int:
    sys.stderr.write("recsys: interrupted\n")
    return 130  # what shells expect: 128 and the signal's number


def closest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar known word, or None if none is similar."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the most similar known word, or nothing if none is similar."""
    match = closest(word, known, cutoff)
    return f"; did you mean {match!r}?" if match else ""
