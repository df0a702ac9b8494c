"""Which reports are columns of a table: if a classifier was measured in two ways, both, the suite's first."""

from __future__ import annotations

from collections.abc import Mapping

from ssl_pipeline.eval.one_figure import in_list
from ssl_pipeline.eval.results import Report, comparable, protocol_hash
from ssl_pipeline.files import JSON

WITHIN_SUITE = ("knn", "linear")
OTHERWISE = ": "
"""Separates, in a column's name, an evaluator from what differs from the suite."""
SAID_BY_THE_TITLE = {"solver", "about", "selection"}
COUNTS = {"train_fingerprint": "num_train", "test_fingerprint": "num_test", "images_fingerprint": "num_images"}


def evaluator_of(name: str) -> str:
    """The evaluator whose column it is."""
    return name.partition(OTHERWISE)[0]


def with_the_suite(reports: Mapping[str, Report]) -> dict[str, Report]:
    """The reports of a directory, where those of the suite are not lost to a later measure with other settings.

    Such a measure keeps a column, behind the suite's, whose name ends in the differences. One with the suite's settings
    needs none.
    """
    suite, found = reports.get("suite"), dict(reports)
    for name in WITHIN_SUITE:
        own = reports.get(name)
        if suite is None or own is None or name not in suite["protocol"] or not _same_network(suite, own):
            continue
        of_suite = _part_of(suite, name)
        otherwise = measured_otherwise(of_suite["protocol"], own["protocol"])
        if otherwise or own.get("solver") != of_suite.get("solver"):
            del found[name]
            found |= {name: of_suite, f"{name}{OTHERWISE}{otherwise}": own}
        elif not own["baselines"]:
            found[name] = of_suite
    return found


def measured_otherwise(first: Mapping[str, JSON], other: Mapping[str, JSON]) -> str:
    """The settings that `other`'s figures depend on and that differ from those of `first`, as `k=5, num_train=100`.

    Of several k and temperatures the first counts; what is off is as good as left out.
    """
    before, now = _headline(first), _headline(other)
    keys = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
    told = {COUNTS.get(key, key): now.get(COUNTS.get(key, key)) for key in keys}
    images = [f"other {key[4:]} images" for key in told if key in COUNTS.values() and key not in keys]
    return ", ".join([*(f"{key}={_word(value)}" for key, value in told.items() if key in keys), *images])


def settings_given(protocol: Mapping[str, JSON], *, but_for: Mapping[str, JSON]) -> list[str]:
    """Of the settings in `but_for` those that a protocol has with other values, as `k=5`."""
    return [f"{key}={_word(protocol[key])}" for key in but_for if protocol.get(key, but_for[key]) != but_for[key]]


def _headline(protocol: Mapping[str, JSON]) -> dict[str, JSON]:
    kept = {key: value for key, value in comparable(protocol).items() if key not in SAID_BY_THE_TITLE}
    kept |= {key: in_list(kept[key])[0] for key in ("k", "temperature") if key in kept}
    return {key: value for key, value in kept.items() if value not in (None, False, 0)}


def _word(value: JSON) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_word(of)}" for key, of in value.items()) + "}"
    if isinstance(value, list | tuple):
        return ",".join(map(_word, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _part_of(suite: Report, name: str) -> Report:
    """The suite's figures of one classifier, as its evaluator would report them."""
    protocol = suite["protocol"]
    key = protocol[name].get("solver", name)
    whole = {**protocol[name], **{key: value for key, value in protocol.items() if key not in WITHIN_SUITE}}
    baselines = {model: result[key] for model, result in suite["baselines"].items() if key in result}
    shown = {"protocol_hash": protocol_hash(name, whole), "baselines": baselines, "protocol": whole}
    return {"evaluator": name, **suite[key], **shown}


def _same_network(suite: Report, own: Report) -> bool:
    first, other = (
        {key: value for key, value in report["protocol"].get("subject", {}).items() if key != "run"}
        for report in (suite, own)
    )
    return first == other
