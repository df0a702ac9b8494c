"""Recipe files and `key=value` arguments, read into plain YAML values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from ssl_pipeline.config.base import Config, ConfigError, Location, Tree, Value, nearest


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: `5e-4` is a number, `no` is text, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: '{key}' is given twice in one section.")
        return super().construct_mapping(node, deep)


_YamlLoader.yaml_implicit_resolvers = {}
for tags_of, _pattern, _first in (
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^[-+]?\.(?:inf|nan)$", list("-+.")),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tags_of}", re.compile(_pattern), _first)


def read_yaml(text: str, *, where: str) -> Value:
    """Parse YAML text; an error names `where` and the line."""
    try:
        return yaml.load(text, _YamlLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)}).") from None


def read_arguments(schema: type[Config], argv: Sequence[str], recipes: Path | None) -> tuple[Tree, dict[Location, str]]:
    pairs: list[tuple[str, str]] = []
    mistakes = []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if equals and key and not key.startswith("-"):
            pairs.append((key, text))
        elif schema.positional and not equals and not key.startswith("-"):
            pairs.append((schema.positional, argument))
        else:
            hint = f" Try {key.lstrip('-')}={text or 'VALUE'}." if key.startswith("-") else ""
            mistakes.append(f"'{argument}' is not of the form key=value.{hint}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))

    tree: Tree = {}
    if recipes is not None:
        names = [text for key, text in pairs if key == "recipe"]
        pairs = [(key, text) for key, text in pairs if key != "recipe"]
        if len(names) > 1:
            raise ConfigError(f"recipe= is given {len(names)} times; one run has one recipe.")
        if names:
            tree = read_recipe(names[0], recipes)
            tree["recipe"] = names[0]

    texts: dict[Location, str] = {}
    for key, text in pairs:
        location = tuple(key.split("."))
        if location in texts:
            raise ConfigError(f"{key} is given twice: '{texts[location]}' and '{text}'.")
        texts[location] = text
        _assign(tree, location, read_yaml(text, where=f"{key}={text}"))
    return tree, texts


def read_recipe(name: str, recipes: Path) -> Tree:
    """The settings in `recipes/NAME.yaml`, or in the file itself if a path to one is given."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else recipes / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in recipes.glob("*.yaml"))
        raise ConfigError(f"No recipe '{name}'.{nearest(name, known)} Known: {', '.join(known)}")
    tree = read_yaml(path.read_text(), where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values. Got {tree!r}.")
    return tree


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
