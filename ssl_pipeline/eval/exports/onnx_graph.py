"""The network as an ONNX graph: normalised images (N, 3, H, W) -> features (N, D), for any runtime."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ssl_pipeline.backbones import BackboneOfRun, TokenBackbone
from ssl_pipeline.backbones.weights import first_line
from ssl_pipeline.config import ConfigError, RunError
from ssl_pipeline.eval.exports.comparison import example_images, expected_features, quiet, require_same
from ssl_pipeline.eval.exports.plain import plain_model

MODEL_FILE = "model.onnx"
INPUT, OUTPUT = "images", "features"
OTHER = 32  # pixels that a second size has more, where the size is free
Dynamic = dict[int, torch.export.Dim]


def require_onnx() -> None:
    """Raises ConfigError that names the extra if a package is missing."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"format=onnx needs {' and '.join(missing)}. pip install 'ssl-pipeline[onnx]'")


def write_graph(folder: Path, found: BackboneOfRun) -> str:
    """`model.onnx`, with what its images need in its metadata; returns what to say about it.

    The number of images is free, and so are their sides where the network allows that. Raises RunError if no graph can
    be made of it, or if one computes something else.
    """
    path, size = folder / MODEL_FILE, found.preprocessing.size
    print("Making the ONNX graph: seconds for most networks, minutes for deep CNNs ...", file=sys.stderr, flush=True)
    batch = torch.export.Dim("batch", min=1, max=8192)
    if not isinstance(found.backbone, TokenBackbone):  # whose positions are a table for one size
        rows, columns = (torch.export.Dim(name, min=1, max=8192) for name in ("rows", "columns"))
        try:
            _export(path, found, {0: batch, 2: rows, 3: columns})
            difference = max(_difference(path, found, 3, size), _difference(path, found, 1, size + OTHER))
            return f"read again with onnxruntime, any number and size of images: {_at_most(difference)}"
        except Exception:  # a branch on the size, or a window: the sides are those of the evaluation
            path.unlink(missing_ok=True)
    try:
        _export(path, found, {0: batch})
    except Exception as error:
        raise RunError(f"torch.onnx cannot export '{found.backbone.name}': {first_line(error)}") from error
    difference = max(_difference(path, found, count, size) for count in (1, 3))
    return f"read again with onnxruntime, any number of images, {size} x {size} pixels each: {_at_most(difference)}"


def _export(path: Path, found: BackboneOfRun, dynamic: Dynamic) -> None:
    """The graph with its weights in one file, and the facts of its images in the metadata."""
    with quiet():
        program = torch.onnx.export(
            plain_model(found),
            (example_images(found.preprocessing.size),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(dynamic,),
            dynamo=True,
        )
        assert program is not None
        program.save(path, external_data=False)
    _describe(path, found)


def _describe(path: Path, found: BackboneOfRun) -> None:
    """Name and normalisation into the graph's metadata."""
    import onnx

    graph, seen = onnx.load(path), found.preprocessing
    facts = {"name": found.backbone.config.name, "size": seen.size, "mean": seen.mean, "std": seen.std}
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(graph, path)


def _difference(path: Path, found: BackboneOfRun, count: int, size: int) -> float:
    import onnxruntime

    images = example_images(size, count=count)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (features,) = session.run([OUTPUT], {INPUT: images.numpy()})
    computed = torch.from_numpy(np.asarray(features))
    return require_same(computed, expected_features(found, images), reader="onnxruntime")


def _at_most(difference: float) -> str:
    return f"features differ by at most {difference:.1g}"
