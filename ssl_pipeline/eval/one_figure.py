"""The protocol of one figure of a report: what decides this figure, and nothing that only decides others.

Of settings that are lists of independent measures (the k of k-NN, numbers of labels, corruptions) a figure depends on
one. Lists that are chosen from, as the rates of a linear probe, decide their figure as wholes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from ssl_pipeline.files import JSON

Protocol: TypeAlias = Mapping[str, JSON]

USUAL_TEMPERATURE = 0.07
"""Of k-NN as DINO votes. A figure by another temperature has it in its name, whatever else was measured."""
VOTES = re.compile(r"_k(\d+)(?:_temperature(.+))?$")
LABELS = re.compile(r"top1_(.+)_(per_class|percent)")
CLASSIFIERS_OF_SUITE = ("knn", "logistic", "sgd")
KNN_OFF: Protocol = {"leave_one_out": False, "per_class": None, "seed": 0}
OF_THE_OTHER_HEAD = {
    "linear": {"k", "temperature"},
    "knn": {"learning_rates", "epochs", "sgd_batch_size", "validation_fraction"},
}


def protocol_of_figure(evaluator: str, protocol: Protocol, figure: str = "") -> dict[str, JSON]:
    """The part of an evaluator's protocol that decides a figure, by its name in the report.

    figure: that of a measure; of the suite also `knn.top1_k10`, of a classifier's part. Empty: the headline.
    """
    return OF_FIGURES[evaluator](protocol, figure) if evaluator in OF_FIGURES else dict(protocol)


def votes_name(name: str, *, k: int, temperature: float) -> str:
    """What a figure of k-NN is called: `top1_k20`, or `top1_k20_temperature0.1`."""
    return f"{name}_k{k}" + ("" if temperature == USUAL_TEMPERATURE else f"_temperature{temperature:g}")


def figure_name(evaluator: str, protocol: Protocol, figure: str) -> str:
    """The name of a figure; reports of older versions named those of k-NN by what else was measured."""
    named = VOTES.search(figure) if evaluator == "knn" else None
    temperature = _of_knn(protocol, figure).get("temperature")
    if named is None or not isinstance(temperature, int | float):
        return figure
    return votes_name(figure[: named.start()], k=int(named[1]), temperature=temperature)


def in_list(value: JSON) -> list[JSON]:
    """The values of a setting that takes one or several."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _of_knn(protocol: Protocol, figure: str) -> dict[str, JSON]:
    """k is a list of one, as where only one was asked for; what the suite does not write is off, as in eval.knn."""
    kept, named = {**KNN_OFF, **protocol}, VOTES.search(figure)
    if kept["per_class"] is None:
        kept["seed"] = KNN_OFF["seed"]  # nothing is drawn
    if "k" in protocol:
        kept["k"] = [int(named[1])] if named else in_list(protocol["k"])[:1]
    if "temperature" in protocol:
        several = in_list(protocol["temperature"])
        asked = named and (named[2] or f"{USUAL_TEMPERATURE:g}")
        kept["temperature"] = next((one for one in several if asked and f"{one:g}" == asked), several[0])
    return kept


def _of_few_shot(protocol: Protocol, figure: str) -> dict[str, JSON]:
    named = LABELS.fullmatch(figure)
    if named is None or not {"per_class", "fractions"} <= protocol.keys():
        return dict(protocol)
    per_class: list[JSON] = [int(named[1])] if named[2] == "per_class" else []
    fractions: list[JSON] = [] if per_class else [f"{named[1]}%"]
    return {**protocol, "per_class": per_class, "fractions": fractions}


def _of_retrieval(protocol: Protocol, figure: str) -> dict[str, JSON]:
    """Mean average precision has no k."""
    if figure.startswith("recall_at_") and "recall_at" in protocol:
        return {**protocol, "recall_at": [int(figure.removeprefix("recall_at_"))]}
    return {key: value for key, value in protocol.items() if key != "recall_at"}


def _of_robustness(protocol: Protocol, figure: str) -> dict[str, JSON]:
    """The mean is of all corruptions, in whatever order; what is measured on clean images of none."""
    if "corruptions" not in protocol:
        return dict(protocol)
    name, corruptions = figure.removeprefix("top1_"), sorted(map(str, in_list(protocol["corruptions"])))
    if name == "clean" or name in corruptions:
        corruptions = [one for one in corruptions if one == name]
    return {**protocol, "corruptions": corruptions}


def _of_dense(protocol: Protocol, figure: str) -> dict[str, JSON]:
    head = figure.rpartition("_")[2]
    if head not in OF_THE_OTHER_HEAD:
        return dict(protocol)
    kept = {key: value for key, value in protocol.items() if key not in OF_THE_OTHER_HEAD[head]}
    return {**kept, "heads": [head]}


def _of_suite(protocol: Protocol, figure: str) -> dict[str, JSON]:
    """Measures of the spectrum depend on no classifier, those of a classifier not on the others."""
    shared = {key: value for key, value in protocol.items() if key not in ("knn", "linear")}
    classifier = figure.removeprefix("balanced_accuracy_").partition(".")[0]
    if classifier not in CLASSIFIERS_OF_SUITE:
        return shared
    part = protocol.get("knn" if classifier == "knn" else "linear")
    if not isinstance(part, Mapping):
        return shared
    if classifier == "knn":
        return {**shared, "knn": _of_knn(part, figure)}
    return {**shared, "linear": {**{key: value for key, value in part.items() if key != "about"}, "solver": classifier}}


OF_FIGURES: Mapping[str, Callable[[Protocol, str], dict[str, JSON]]] = {
    "knn": _of_knn,
    "few_shot": _of_few_shot,
    "retrieval": _of_retrieval,
    "robustness": _of_robustness,
    "dense": _of_dense,
    "suite": _of_suite,
}
