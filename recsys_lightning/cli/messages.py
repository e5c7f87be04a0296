"""One line for what jsonargparse says in many: the wrong key or value, where it stands, and the nearest valid one.

jsonargparse names a faulty key by its last part and repeats the whole configuration. The full key, the file and the
line are found by reading the command line and its files a second time (`read_settings`), the valid keys by signatures.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import lightning as L
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping

from recsys_lightning.analysis.grid_runs import leaves
from recsys_lightning.cli import closest, nearest
from recsys_lightning.data.datamodules import CatalogDataModule
from recsys_lightning.errors import InputError
from recsys_lightning.training.codebook_health import CodebookHealth
from recsys_lightning.training.durable import BestAndLast
from recsys_lightning.training.preemption import Preemption

# What the top-level keys of a configuration build; everything below follows from signatures.
ROOTS: dict[str, type] = {
    "model": L.LightningModule,
    "data": CatalogDataModule,
    "trainer": L.Trainer,
    "checkpoint": BestAndLast,
    "early_stopping": EarlyStopping,
    "codebook_health": CodebookHealth,
    "preemption": Preemption,
}
_SUBCLASS_ROOTS = ("model", "data")
_SUFFIXES = (".yaml", ".yml", ".json")
_MAX_LISTED = 16  # longer lists of keys or classes help nobody
# The parser that jsonargparse reads files with, so that both agree on what is YAML.
_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TYPE_NAMES = {"int": "an int", "float": "a float", "str": "a string", "bool": "true or false", "NoneType": "null"}


class ParseError(InputError):
    """A message as jsonargparse worded it."""


class Setting(NamedTuple):
    """One value that the user wrote.

    Attributes:
        key: dotted, without ``init_args`` and ``class_path``: a class's name stands under the key of its object.
        written: the key as written.
        value: the value, a string.
        where: `` (file, line 3)``, empty for the command line.
    """

    key: str
    written: str
    value: str
    where: str


# -------------------------------------------------------------------------------------------- what the user wrote


def read_settings(arguments: Sequence[str]) -> list[Setting]:
    """All settings of a command line and the files it names, in the order in which they take effect.

    Raises:
        InputError: a configuration file is missing, empty, or not a YAML mapping.
    """
    found: list[Setting] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if name in ("-c", "--config"):
            try:
                found += _read_file(value)
            except RecursionError:
                raise InputError(
                    f"{value} includes itself by its key config, straight or through other files"
                ) from None
        elif name.startswith("--"):
            written = name.removeprefix("--").removesuffix("+")
            found.append(Setting(_short(written), written, value, ""))
            found += _sub_file(_short(written), written, value, Path())
    return found


def written_keys(arguments: Sequence[str]) -> set[str]:
    """The keys that a command line and its files name, without ``init_args`` and ``class_path``."""
    keys = set()
    for setting in read_settings(arguments):
        if setting.value.startswith("{"):
            inner = (key for key, _ in leaves(yaml.safe_load(setting.value), setting.key))
            keys |= {_short(key) for key in inner}
        elif setting.value:
            keys.add(setting.key)
    return keys


def _read_file(value: str) -> list[Setting]:
    if not value or value.lstrip().startswith("{"):  # nothing given, or the configuration itself: left to jsonargparse
        return []
    path = Path(value)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        names = [str(entry) for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"--config {value}: {what}{nearest(value, names, cutoff=0.8)}")
    root = _compose(path)
    if root is None:
        raise InputError(f"{value} is empty; it must hold keys such as model: and data:")
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"{value} is no configuration; it must hold keys such as model: and data:")
    return list(_settings(root, "", "", path))


def _compose(path: Path) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=_YamlLoader)
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{line} is not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    return node


def _settings(node: yaml.Node, key: str, written: str, path: Path) -> Iterator[Setting]:
    where = f" ({path}, line {node.start_mark.line + 1})"
    if isinstance(node, yaml.ScalarNode):
        yield Setting(key, written, node.value, where)
        if written == "config":  # another file, included
            yield from _read_file(str(path.parent / node.value))
        else:
            yield from _sub_file(key, written, node.value, path.parent)
    elif isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            yield from _settings(child, key, f"{written}[{number}]", path)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for name, child in node.value:
            line = name.start_mark.line + 1
            dotted = f"{written}.{name.value}".removeprefix(".")
            if name.value in lines and name.value != "<<":
                raise InputError(
                    f"{path} line {line}: key {dotted!r} already stands in line {lines[name.value]}; keep one"
                )
            lines[name.value] = line
            short = ".".join(part for part in (key, _short(str(name.value))) if part)
            if isinstance(child, yaml.MappingNode):
                yield Setting(short, dotted, "", f" ({path}, line {line})")
            yield from _settings(child, short, dotted, path)


def _sub_file(key: str, written: str, value: str, folder: Path) -> list[Setting]:
    """The settings of a file that stands in place of ``model``, ``data`` or ``trainer``."""
    path = folder / value
    if key not in ROOTS or path.suffix not in _SUFFIXES or not path.is_file():
        return []
    node = _compose(path)
    return list(_settings(node, key, written, path)) if node is not None else []


def _short(written: str) -> str:
    parts = re.sub(r"\[\d+\]", "", written).split(".")
    return ".".join(part for part in parts if part not in ("init_args", "dict_kwargs", "class_path"))


# ------------------------------------------------------------------------------------------- what could be written


class _Schema:
    """Which class each dotted key builds, given what the user wrote; as far as signatures tell."""

    def __init__(self, settings: Sequence[Setting], parser: argparse.ArgumentParser):
        self.settings = settings
        self.command = (getattr(parser, "args", None) or [""])[0]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and self.command in action.choices:
                parser = action.choices[self.command]
        options = {action.dest.split(".")[0] for action in parser._actions if action.option_strings}
        self.roots = sorted(options - {"help", "print_config", argparse.SUPPRESS})

    def bases(self, key: str, before: int | None = None) -> list[type]:
        """The classes of which one must be built under a key."""
        parent, _, name = key.rpartition(".")
        if not parent:
            return [ROOTS[name]] if name in ROOTS else []
        return _classes_of(_hints(self.owner(parent, before)).get(name))

    def owner(self, key: str, before: int | None = None) -> type | None:
        """The class that is built under a key, by the settings before one of them."""
        bases = self.bases(key, before)
        if not key or (key in ROOTS and key not in _SUBCLASS_ROOTS):
            return ROOTS.get(key)
        for setting in [*reversed(self.settings[:before]), *reversed(self.settings)]:
            found = _import_class(setting.value, bases) if setting.key == key and setting.value else None
            if found:
                return found
        parent, _, name = key.rpartition(".")
        owner = self.owner(parent, before) if parent else None
        default = inspect.signature(owner).parameters.get(name) if owner else None
        if default is not None and isinstance(default.default, type) and default.default is not default.empty:
            return default.default
        return next((base for base in bases if dataclasses.is_dataclass(base)), None)

    def keys(self, key: str, before: int | None = None) -> list[str]:
        """The keys that may stand under a key; those at the top if it is empty."""
        if not key:
            return self.roots
        owner = self.owner(key, before)
        parent, _, name = key.rpartition(".")
        hint = _hints(self.owner(parent, before)).get(name) if parent else None
        # What a callable type is called with, e.g. the catalogue, is not the user's to give.
        return _keys_of(owner)[_num_given(hint) :] if owner else []

    def find(self, key: str, value: str | None = None) -> tuple[int | None, str, str]:
        """Position, key as written and place of the last setting of a key, or of one below it."""
        matches = [n for n, setting in enumerate(self.settings) if f"{setting.key}.".startswith(f"{key}.")]
        exact = [n for n in matches if self.settings[n].key == key]
        same = [n for n in exact if self.settings[n].value == value]
        named = [n for n in exact if self.settings[n].value]  # not the line of `init_args:`
        for candidates in (same, named, exact, matches):
            if candidates:
                setting = self.settings[candidates[-1]]
                return candidates[-1], _cut(setting.written, key.count(".") + 1), setting.where
        return None, key, ""


def known_classes(bases: Sequence[type]) -> dict[str, type]:
    """The imported classes at or below `bases` that can be built, by short name."""
    found: dict[str, type] = {}
    queue = [base for base in bases if base.__module__ != "builtins"]
    for base in queue:  # grows on the way
        below: list[type] = type.__subclasses__(base)
        queue += [sub for sub in below if sub not in queue]
        if not inspect.isabstract(base) and not base.__name__.startswith("_"):
            found.setdefault(base.__name__, base)
    return found


def _classes_of(hint: Any) -> list[type]:
    """The classes that a type hint asks for: those of unions and lists, and of callables what they return."""
    if get_origin(hint) is Callable:
        return _classes_of(get_args(hint)[-1])
    if get_origin(hint) is not None:
        return [found for part in get_args(hint) for found in _classes_of(part)]
    return [hint] if isinstance(hint, type) and hint is not type(None) else []


def _num_given(hint: Any) -> int:
    """How many arguments a callable type is called with."""
    given = get_args(hint)[0] if get_origin(hint) is Callable else []
    return len(given) if isinstance(given, list) else 0


def _hints(owner: type | None) -> dict[str, Any]:
    try:
        return get_type_hints(owner if dataclasses.is_dataclass(owner) else owner.__init__) if owner else {}  # type: ignore[misc]
    except (NameError, TypeError):  # a hint that only type checkers can resolve
        return {}


def _import_class(name: str, bases: Sequence[type]) -> type | None:
    module, _, attribute = name.rpartition(".")
    if not module:
        return known_classes(bases).get(name)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError, TypeError):
        return None
    return found if isinstance(found, type) else None


def _keys_of(owner: type) -> list[str]:
    """Names of a constructor's arguments, with those that it hands on as ``**kwargs``."""
    parameters = list(inspect.signature(owner).parameters.values())
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        added = ArgumentParser(exit_on_error=False).add_class_arguments(owner, fail_untyped=False)
        names += [name.split(".")[0] for name in added]
    return list(dict.fromkeys(names))


# --------------------------------------------------------------------------------------------------- the message


def one_line(message: str, parser: argparse.ArgumentParser) -> str:
    """What jsonargparse's message says, on one line; `parser` has parsed the command line that it is about."""
    schema = _Schema(read_settings(getattr(parser, "args", None) or []), parser)
    chain, text = _innermost(message)
    for explain in (_unknown_key, _missing, _wrong_value, _unknown_class):
        line = explain(schema, chain, text)
        if line:
            return line
    _, written, where = schema.find(chain)
    lines = [line.strip(" -") for line in text.splitlines() if not re.match(r"\s*(Given value|Subtypes)", line)]
    text = " ".join(lines)
    return (f"{written}{where}: " if chain else "") + (text if len(text) < 300 else text[:300] + " ...")


def _innermost(message: str) -> tuple[str, str]:
    """The dotted key at fault and what is said of it; outer keys enclose inner ones by their indentation."""
    chain: list[str] = []
    column, lines = -1, []
    for line in message.splitlines():
        named = re.match(r'(\s*(?:- )?)Parser key "([^"]+)":(.*)', line)
        if named and len(named[1]) > column:
            chain.append(named[2])
            column, lines = len(named[1]), [named[3]]
        elif line.strip() and len(line) - len(line.lstrip()) <= column:
            if len(chain) > 1:  # the inner message is over, the rest repeats the outer value
                break
        else:
            lines.append(line)
    return _short(".".join(chain)), "\n".join(lines).strip()


def _unknown_key(schema: _Schema, chain: str, text: str) -> str | None:
    unrecognized = re.search(r"^[\s-]*unrecognized arguments: (\S+)", text, re.MULTILINE)
    pattern = r"(?:Group '([^']+)' does not accept option|Subcommand '[^']+' does not accept option|Option) '([^']+)'"
    refused = re.search(pattern, text)
    if unrecognized:
        word = unrecognized[1]
        if not word.startswith("--"):
            hint = f"; a configuration file is given as -c {word}" if Path(word).suffix in _SUFFIXES else ""
            return f"{word!r} is neither an option nor the value of one{hint}"
        leaf = word.removeprefix("--").partition("=")[0].removesuffix("+")
    elif refused:
        leaf = f"{refused[1]}.{refused[2]}" if refused[1] else refused[2]
    else:
        return None
    parts = _short(f"{chain}.{leaf}".removeprefix(".")).split(".")
    before, _, _ = schema.find(".".join(parts))
    wrong = len(parts) - 1
    for number, part in enumerate(parts):
        known = schema.keys(".".join(parts[:number]), before)
        if known and part not in known:
            wrong = number
            break
    parent = ".".join(parts[:wrong])
    known = schema.keys(parent, before)
    _, written, where = schema.find(".".join(parts[: wrong + 1]))
    owner = schema.owner(parent, before) if parent else None
    of = f" of {owner.__name__}" if owner else ""
    near = closest(parts[wrong], known)
    if near:
        return f"no key {written!r}{of}{where}; did you mean {'.'.join([*written.split('.')[:-1], near])!r}?"
    return f"no key {written!r}{of}{where}" + _listing(
        "its keys are", known, f"`recsys {schema.command} --help` has them"
    )


def _missing(schema: _Schema, chain: str, text: str) -> str | None:
    # On a line of its own among others where the key may also be null.
    found = re.search(r"^[\s-]*the following arguments are required: (.+)", text, re.MULTILINE)
    if not found:
        return None
    names = [name.strip().removeprefix(f"{schema.command}.") for name in found[1].split(",")]
    if not chain:
        options = " and ".join(f"--{name}" for name in names)
        it = "it" if len(names) == 1 else "them"
        return f"`recsys {schema.command}` needs {' and '.join(names)}: name a file with {it} by -c, or give {options}"
    before, written, where = schema.find(chain)
    owner = schema.owner(chain, before)
    keys = " and ".join(repr(f"{written}.init_args.{name}") for name in names)
    return f"{owner.__name__ if owner else written} needs {' and '.join(names)}{where}: set {keys}"


def _wrong_value(schema: _Schema, chain: str, text: str) -> str | None:
    parts = re.findall(r"Expected a typing\.Literal\[(.*?)\]", text)
    literals = [value for part in parts for value in literal_eval(f"[{part}]")]
    kinds = re.findall(r"Expected an? <class '([\w.]+)'>", text)
    # A bool or null beside a class, as in `trainer.logger`, is not what a word was meant for.
    plain = {"int", "float", "str"} if "Expected a dot import path" in text else {"int", "float", "str", "bool"}
    if not literals and not set(kinds) & plain:
        return None
    given = re.search(r"(?:Got|Given) value: (.*)", text)
    value = given[1] if given else ""
    _, written, where = schema.find(chain, value)
    # Of other types nothing is said: a learning rate may also be a tensor, which nobody writes in a file.
    wanted = [str(value) for value in literals] + [_TYPE_NAMES[kind] for kind in kinds if kind in _TYPE_NAMES]
    near = closest(value, [str(value) for value in literals])
    hint = f"; did you mean {near!r}?" if near else ""
    return f"{value!r} is no value for {written}{where}: it must be {_either(wanted)}{hint}"


def _unknown_class(schema: _Schema, chain: str, text: str) -> str | None:
    for pattern in (
        r"Expected a dot import path string: (\S+)",
        r"Problem with given class_path '([^']+)'",
        r"expects a function or a callable class: .* Got value: (\S+)",
        r"Not a valid subclass of .*Got value: (\S+)",
    ):
        found = re.search(pattern, text)
        if found:
            break
    else:
        return None
    name = found[1]
    option = re.match(r"--([\w.]+)\.help:", text)
    chain = _short(option[1]) if option else chain
    before, written, where = schema.find(chain, name)
    bases = [base for base in schema.bases(chain, before) if base.__module__ != "builtins"]
    known = known_classes(bases)
    if Path(name).suffix in _SUFFIXES:
        return f"no file {name!r} for {written}{where}; a path counts from the folder of the file that names it"
    near = closest(name.rpartition(".")[2], list(known))
    kind = bases[0].__name__ if bases else "class"
    ours = [label for label, found in known.items() if found.__module__.startswith("recsys_lightning")]
    hint = f"; did you mean {near!r}?" if near else _listing("there are", sorted(ours or known))
    return f"no {kind} {name!r} for {written}{where}{hint}"


def _listing(what: str, names: Sequence[str], otherwise: str = "") -> str:
    if 0 < len(names) <= _MAX_LISTED:
        return f"; {what} {', '.join(names)}"
    return f"; {otherwise}" if otherwise else ""


def _either(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _cut(written: str, count: int) -> str:
    """The first keys of a written key, `count` of them not counting ``init_args``."""
    kept: list[str] = []
    for part in written.split("."):
        if count == 0:
            break
        kept.append(part)
        count -= bool(_short(part))
    return ".".join(kept)


def unresolved(message: str, arguments: Sequence[str]) -> str:
    """One line for a ``${...}`` that OmegaConf cannot resolve."""
    settings = [setting for setting in read_settings(arguments) if "${" in setting.value]
    place = re.search(r"full_key: \w+\.(\S+)", message)
    missing = re.search(r"Interpolation key '\.*([^']*)' not found", message)
    reason = re.sub(r"^\w+ raised while resolving interpolation: ", "", message.splitlines()[0]).strip('"')
    for setting in sorted(settings, key=lambda s: place is None or s.key != _short(place[1])):
        if missing is None or missing[1] in setting.value:
            what = f"no key {missing[1]!r}" if missing else reason
            near = closest(missing[1], [s.written for s in read_settings(arguments) if s.value]) if missing else None
            hint = f"; did you mean {near!r}?" if near else ""
            return f"cannot resolve {setting.value!r} of {setting.written}{setting.where}: {what}{hint}"
    return f"cannot resolve a ${{...}} of the configuration: {reason}"


def not_built(built: type, error: Exception, given: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """One line for an exception from the constructor of a class that a configuration names."""
    named = [s for s in read_settings(arguments) if s.value.rpartition(".")[2] == built.__name__]
    places = [f"{s.written.removesuffix('.class_path')}{s.where}: " for s in named]
    key = (places or [f"{root}: " for root, known in ROOTS.items() if known is built] or [""])[-1]
    nulls = [n for n, value in given.items() if value is None and type(None) not in get_args(_hints(built).get(n))]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, TypeError) and nulls:
        return f"{key}{built.__name__} got null for {' and '.join(nulls)}; give a value or leave the key out"
    return f"{key}{built.__name__} refused its settings: {lines[0]}"


def while_running(error: Exception) -> str | None:
    """One line for an exception of the Trainer that the user can mend; None for what may be a bug."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if isinstance(error, InputError):
        # A data loader's worker process hands over its exception as a traceback.
        return text.splitlines()[-1].partition("InputError: ")[2] if "Original Traceback" in text else text
    pattern = r"ModelCheckpoint\(monitor='([^']+)'\)` could not find|Early stopping conditioned on metric `(.+?)`"
    monitored = re.search(pattern, text)
    if monitored:
        key, name = ("checkpoint", monitored[1]) if monitored[1] else ("early_stopping", monitored[2])
        known = [metric for metric in re.findall(r"['`](val\S*?/\S+?)['`]", text) if metric != name]
        near = closest(name, known)
        hint = f"did you mean {near!r}?" if near else f"there are {', '.join(dict.fromkeys(known))}"
        return f"no metric {name!r} for {key}.monitor; {hint}"
    if isinstance(error, MisconfigurationException):
        return " ".join(text.split())
    if first.startswith("Error(s) in loading state_dict"):
        details = [line.strip() for line in text.splitlines()[1:]]
        return f"the checkpoint was made with other model or data settings: {details[0] if details else first}"
    if isinstance(error, UnpicklingError) or "PytorchStreamReader" in first:
        return f"cannot read the checkpoint, it is damaged or holds more than weights and plain values: {first}"
    return None


# ------------------------------------------------------------------------------------------------- help on a class


def class_help(arguments: Sequence[str]) -> str | None:
    """What ``--model.help COBRA`` asks for, where the class belongs deeper than the key, which jsonargparse refuses."""
    asked = re.search(r"(?:^| )--(model|data)\.help[= ]([A-Za-z_]\w*)(?: |$)", " ".join(arguments))
    if asked is None or asked[2] in known_classes([ROOTS[asked[1]]]):
        return None
    for key, hint in _places(asked[1], ROOTS[asked[1]]):
        known = known_classes(_classes_of(hint))
        if asked[2] in known:
            parser = ArgumentParser(prog=f"recsys {arguments[0]}", usage=argparse.SUPPRESS, add_help=False)
            parser.add_class_arguments(known[asked[2]], key, skip=set(_keys_of(known[asked[2]])[: _num_given(hint)]))
            return parser.format_help()
    return None


def _places(key: str, base: type) -> Iterator[tuple[str, Any]]:
    """Keys below a key that build classes, with their type hints; the shallow ones first."""
    owners = [owner for owner in known_classes([base]).values() if owner.__module__.startswith("recsys_lightning")]
    hints = [(f"{key}.{name}", hint) for owner in owners for name, hint in _hints(owner).items()]
    yield from hints
    for place, hint in hints:
        for inner in _classes_of(hint):
            if inner is not base:
                yield from _places(place, inner)
