"""Recipe files and `key=value` arguments, read into plain YAML values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ssl_pipeline.config.base import Config, ConfigError, Location, Tree, Value, nearest


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `5e-4` is a number, `010` is ten, `no` is text. Plain trees only: no tags, each key once."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None):
            raise ConfigError(f"line {line}: tags are not allowed. Got '{event.tag}'; write a plain value.")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"line {line}: '*{event.anchor}' stands for a whole section; write the section out.")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise ConfigError(f"line {node.start_mark.line + 1}: a key must be text. Got {key!r}.")
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: '{key}' is given twice in one section.")
        for key, (_, value) in zip(keys, node.value, strict=True):
            if ":" in key and value.value == "":  # {key:value}
                raise ConfigError(f"line {node.start_mark.line + 1}: '{key}' needs a space after the colon.")
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value)


class YamlDumper(yaml.SafeDumper):
    """Puts quotes around all text that would read as something else, here or in YAML 1.1."""


_YamlLoader.yaml_implicit_resolvers = {}
_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_integer)
for _name, _pattern, _first in (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^[-+]?\.(?:inf|nan)$", list("-+.")),
):
    for _class in (_YamlLoader, YamlDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def read_yaml(text: str, *, where: str) -> Value:
    """Parse YAML text; an error names `where` and the line."""
    try:
        return yaml.load(text, _YamlLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML ({problem}).") from None


@dataclass(frozen=True)
class Arguments:
    """A command line: the tree of its values over the recipe's, and by key their texts and what is no YAML in them."""

    tree: Tree
    texts: dict[Location, str]
    unreadable: dict[Location, str]


def read_arguments(schema: type[Config], argv: Sequence[str], recipes: Path | None) -> Arguments:
    """Recipe and `key=value` arguments as plain values; a value that is no YAML is taken as text and noted."""
    pairs = _pairs(schema, argv)
    tree: Tree = {}
    if recipes is not None:
        names = [text for key, text in pairs if key == "recipe"]
        pairs = [(key, text) for key, text in pairs if key != "recipe"]
        if len(names) > 1:
            raise ConfigError(f"recipe= is given {len(names)} times; one run has one recipe.")
        if names:
            tree = read_recipe(names[0], recipes)
            tree["recipe"] = names[0]

    arguments = Arguments(tree, {}, {})
    for key, text in pairs:
        location = tuple(key.split("."))
        if location in arguments.texts:
            raise ConfigError(f"{key} is given twice: '{arguments.texts[location]}' and '{text}'.")
        arguments.texts[location] = text
        try:
            value = read_yaml(text, where=f"{key}={text}")
        except ConfigError as error:
            arguments.unreadable[location] = str(error)
            value = text
        _assign(tree, location, value)
    return arguments


def _pairs(schema: type[Config], argv: Sequence[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    mistakes = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if equals and all(key.split(".")) and not key.startswith("-"):
            pairs.append((key, text))
        elif schema.positional and not equals and not key.startswith("-"):
            pairs.append((schema.positional, argument))
        else:
            hint = f" Try {key.lstrip('-')}={text or 'VALUE'}." if key.startswith("-") else ""
            mistakes.append(f"'{argument}' is not of the form key=value.{hint}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return pairs


def read_recipe(name: str, recipes: Path) -> Tree:
    """The settings in `recipes/NAME.yaml`, or in the file itself if a path to one is given."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else recipes / f"{name}.yaml"
    if not path.is_file():
        known = recipe_names(recipes)
        raise ConfigError(f"No recipe '{name}'.{nearest(name, known)} Known: {', '.join(known)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: byte {error.start} is not UTF-8.") from None
    tree = read_yaml(text, where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values. Got {tree!r}.")
    return tree


def recipe_names(recipes: Path) -> list[str]:
    return sorted(file.stem for file in recipes.glob("*.yaml"))


def _assign(tree: Tree, location: Location, value: Value) -> None:
    """Set one dotted key; a bare value over a schedule's section sets its `value`."""
    *parents, last = location
    for name in parents:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = {} if child is None else {"value": child}
            tree[name] = child
        tree = child
    old = tree.get(last)
    if isinstance(old, dict) and isinstance(value, dict):
        for name, item in value.items():
            _assign(old, (name,), item)
    elif isinstance(old, dict) and "value" in old and value is not None:
        old["value"] = value
    else:
        tree[last] = value
