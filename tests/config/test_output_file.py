"""Files that commands write: of known kinds, and none is replaced by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.commands.curate import CurateConfig
from ssl_pipeline.commands.deduplicate import DeduplicateConfig
from ssl_pipeline.commands.embed import WRITERS as EMBED_WRITERS
from ssl_pipeline.commands.embed import EmbedConfig
from ssl_pipeline.commands.predict import WRITERS as PREDICT_WRITERS
from ssl_pipeline.commands.predict import PredictConfig
from ssl_pipeline.config import ConfigError, load
from ssl_pipeline.config.output_file import OutputFile
from ssl_pipeline.data_tools.pseudo_label import PseudoLabelImages, keep_file

OWN = {
    EmbedConfig: ["backbone=raw_pixels", "source=a"],
    PredictConfig: ["run=a", "source=a"],
    CurateConfig: ["backbone=raw_pixels", "shards=a", "clusters=3", "images=3"],
    DeduplicateConfig: ["backbone=raw_pixels", "shards=a", "threshold=0.9"],
    PseudoLabelImages: ["run=a", "shards=a"],
}


@pytest.mark.parametrize("schema", OWN)
def test_one_way_for_all_commands(schema: type[OutputFile], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^output must end in .*{schema.suffixes[-1]}\. Got 'a\.txt'"):
        load(schema, [*OWN[schema], "output=a.txt"])
    output = tmp_path / "deep" / "er" / f"a{schema.suffixes[0]}"
    settings = load(schema, [*OWN[schema], f"output={output}"])
    settings.begin_output()
    output.touch()
    with pytest.raises(ConfigError, match=r"^output=.* exists\. Choose another name, or set overwrite=true\.$"):
        settings.begin_output()
    load(schema, [*OWN[schema], f"output={output}", "overwrite=true"]).begin_output()


def test_the_kinds_are_those_that_are_written() -> None:
    assert EmbedConfig.suffixes == tuple(EMBED_WRITERS)
    assert PredictConfig.suffixes == tuple(PREDICT_WRITERS)


def test_a_file_beside_it_stays_too(tmp_path: Path) -> None:
    settings = PseudoLabelImages(run=tmp_path, shards="a", output=tmp_path / "labels.npy")
    keep_file(settings.output).touch()
    with pytest.raises(ConfigError, match=r"labels\.keep\.npy exists"):
        settings.begin_output()
