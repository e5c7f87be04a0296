"""One line for what jsonargparse says in many: the wrong key or value, where it stands, and the nearest valid one.

jsonargparse names a faulty key by its last part and repeats the whole configuration. The full key, the file and the line
are found by reading the command line and its files a second time (`read_settings`), the valid keys from the signatures.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import lightning as L
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from recsys_lightning.cli import nearest
from recsys_lightning.data.datamodules import CatalogDataModule
from recsys_lightning.errors import InputError

# What the top-level keys of a configuration build; everything below follows from signatures.
ROOTS: dict[str, type] = {
    "model": L.LightningModule,
    "data": CatalogDataModule,
    "trainer": L.Trainer,
    "checkpoint": ModelCheckpoint,
    "early_stopping": EarlyStopping,
}
_SUBCLASS_ROOTS = ("model", "data")
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
            found += _read_file(value)
        elif name.startswith("--"):
            written = name.removeprefix("--").removesuffix("+")
            found.append(Setting(_short(written), written, value, ""))
            found += _sub_file(_short(written), written, value, Path())
    return found


def _read_file(value: str) -> list[Setting]:
    if not value or value.lstrip().startswith("{"):  # nothing given, or the configuration itself: left to jsonargparse
        return []
    path = Path(value)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        names = [str(entry) for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"--config {value}: {what}{nearest(value, names)}")
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
        yield from _sub_file(key, written, node.value, path.parent)
    elif isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            yield from _settings(child, key, f"{written}[{number}]", path)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        # A class's name first: the keys beside it are keys of that class.
        for name, child in sorted(node.value, key=lambda pair: pair[0].value != "class_path"):
            line = name.start_mark.line + 1
            dotted = f"{written}.{name.value}".removeprefix(".")
            if name.value in lines and name.value != "<<":
                first, second = sorted((lines[name.value], line))
                raise InputError(f"{path} line {second}: the key {dotted!r} already stands in line {first}; keep one")
            lines[name.value] = line
            short = ".".join(part for part in (key, _short(str(name.value))) if part)
            if isinstance(child, yaml.MappingNode):
                yield Setting(short, dotted, "", f" ({path}, line {line})")
            yield from _settings(child, short, dotted, path)


def _sub_file(key: str, written: str, value: str, folder: Path) -> list[Setting]:
    """The settings of a file that stands in place of ``model``, ``data`` or ``trainer``."""
    path = folder / value
    if key not in ROOTS or path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        return []
    node = _compose(path)
    return list(_settings(node, key, written, path)) if node is not None else []


def _short(written: str) -> str:
    parts = re.sub(r"\[\d+\]", "", written).split(".")
    return ".".join(part for part in parts if part not in ("init_args", "dict_kwargs", "class_path"))


# ------------------------------------------------------------------------------------------- what could be written


def classes_of(hint: Any) -> list[type]:
    """The classes that a type hint asks for: of unions and lists all, of callables what they return."""
    if isinstance(hint, type) and get_origin(hint) is None:
        return [hint]
    if get_origin(hint) is Callable:
        return classes_of(get_args(hint)[-1])
    if get_origin(hint) in (typing.Union, types.UnionType, list, typing.Annotated):
        return [found for part in get_args(hint) for found in classes_of(part)]
    returned = getattr(hint, "__call__", None)  # noqa: B004 - a Protocol class such as OptimizerCallable
    return classes_of(typing.get_type_hints(returned).get("return")) if inspect.isfunction(returned) else []


def known_classes(bases: Sequence[type]) -> dict[str, type]:
    """The imported classes below `bases` that can be built, by short name."""
    found: dict[str, type] = {}
    queue = [base for base in bases if base is not type(None)]
    while queue:
        base = queue.pop(0)
        queue += [sub for sub in type.__subclasses__(base) if sub not in queue]
        if not inspect.isabstract(base) and not base.__name__.startswith("_"):
            found.setdefault(base.__name__, base)
    return found


class _Schema:
    """Which class each dotted key builds, given what the user wrote."""

    def __init__(self, settings: Sequence[Setting], parser: argparse.ArgumentParser):
        self.settings = settings
        # The options of the one subcommand that was given.
        arguments = getattr(parser, "args", None) or [""]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and arguments[0] in action.choices:
                parser = action.choices[arguments[0]]
        self.command = arguments[0]
        options = {action.dest for action in parser._actions if action.option_strings} - {"help", argparse.SUPPRESS}
        self.roots = sorted({option.split(".")[0] for option in options} | set(ROOTS))

    def bases(self, key: str) -> list[type]:
        """Classes one of which must be built under a key."""
        if "." not in key:
            return [ROOTS[key]] if key in ROOTS else []
        parent, name = key.rsplit(".", 1)
        owner = self.owner(parent)
        return classes_of(_hints(owner).get(name)) if owner else []

    def owner(self, key: str) -> type | None:
        """The class that is built under a key."""
        bases = self.bases(key)
        for setting in reversed(self.settings):
            found = import_class(setting.value, bases) if setting.key == key and setting.value else None
            if found:
                return found
        if key in ROOTS and key not in _SUBCLASS_ROOTS:
            return ROOTS[key]
        if "." in key:
            parent, name = key.rsplit(".", 1)
            owner = self.owner(parent)
            default = inspect.signature(owner).parameters.get(name) if owner else None
            if default is not None and isinstance(default.default, type):
                return None if default.default is inspect.Parameter.empty else default.default
        data = [base for base in bases if dataclasses.is_dataclass(base)]
        return data[0] if data else None

    def keys(self, key: str) -> list[str]:
        """The keys that may stand under a key; at the top if it is empty."""
        if not key:
            return self.roots
        owner = self.owner(key)
        if owner is None:
            return []
        skipped = _num_given(_hints(self.owner(key.rpartition(".")[0]), "").get(key.rpartition(".")[2]))
        return keys_of(owner)[skipped:]


def import_class(name: str, bases: Sequence[type]) -> type | None:
    """The class of a short name below `bases`, or of a dotted path; None if there is none."""
    if "." not in name:
        return known_classes(bases).get(name)
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError, TypeError):
        return None
    return found if isinstance(found, type) else None


def keys_of(owner: type) -> list[str]:
    """Names of a constructor's arguments, those that it hands on as ``**kwargs`` included."""
    parameters = inspect.signature(owner).parameters.values()
    own = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        added = ArgumentParser(exit_on_error=False).add_class_arguments(owner, fail_untyped=False)
        own += [name.split(".")[0] for name in added]
    return list(dict.fromkeys(own))


def _hints(owner: type | None, *_: str) -> dict[str, Any]:
    if owner is None:
        return {}
    try:
        return typing.get_type_hints(owner if dataclasses.is_dataclass(owner) else owner.__init__)
    except (NameError, TypeError):  # a hint that exists only for type checkers
        return {}


def _num_given(hint: Any) -> int:
    """How many arguments the framework itself gives to what a callable type builds, e.g. the catalogue."""
    if get_origin(hint) is not Callable:
        return 1 if inspect.isfunction(getattr(hint, "__call__", None)) and not isinstance(hint, type) else 0  # noqa: B004
    given = get_args(hint)[0]
    return len(given) if isinstance(given, list) else 0


# --------------------------------------------------------------------------------------------------- the message
