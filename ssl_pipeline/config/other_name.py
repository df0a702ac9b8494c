"""Which keys of a recipe's section are dropped when the command line sets another `name` in it."""

from __future__ import annotations

import json
from collections.abc import Collection

from ssl_pipeline.config.base import Config, Location, Tree, Value
from ssl_pipeline.config.schema import annotation_at, section_of, sections_in


def drop_of_other_name(
    schema: type[Config], tree: Tree, location: Location, value: Value, given: Collection[str] = ()
) -> str | None:
    """Take the settings of the old name out of the tree, if `value` at `location` is another; the sentence to say.

    In a section of several forms (the methods) all of them go, otherwise those that `of_name` of the section lists.
    Those that are `given` again, by their dotted keys, are not mentioned.
    """
    *parents, last = location
    place, new = (tuple(parents), value) if last == "name" else (location, None)
    if isinstance(value, dict):
        new = value.get("name")
    inside: Value = tree
    for key in place:
        inside = inside.get(key) if isinstance(inside, dict) else None
    if not place or not isinstance(inside, dict) or not isinstance(new, str) or inside.get("name") in (None, new):
        return None
    annotation, old = annotation_at(schema, tree, place), inside["name"]
    section = section_of(annotation, {"name": new})
    if section is None:
        return None  # an unknown name, which has a sentence of its own
    going = [key for key in inside if key != "name"]
    if len(sections_in(annotation)) == 1:
        going = [key for key in going if key in section.of_name(new)]
    where = ".".join(place)
    dropped = {key: inside.pop(key) for key in going}
    dropped = {key: value for key, value in dropped.items() if f"{where}.{key}" not in given}
    if not dropped:
        return None
    told = ", ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in dropped.items()
    )
    return f"{where}.name={new} replaces {old} and what the recipe says of it ({told}). Set {where}.KEY to keep one."
