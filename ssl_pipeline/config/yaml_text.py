"""YAML as our settings are written in it: plain trees of numbers, text, lists and sections."""

from __future__ import annotations

import re

import yaml

from ssl_pipeline.config.schema import ConfigError, Value


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
