from unittest.mock import Mock

import numpy as np
import pytest

from ssl_pipeline.config import ConfigError, validate
from ssl_pipeline.data.shards.open import ShardIndex
from ssl_pipeline.data.stream import DataConfig
from ssl_pipeline.training.preflight import run_facts

DATA = {"shards": "a", "batch_size": 8}


def labelled(labels: list[int]) -> ShardIndex:
    index = Mock(spec=ShardIndex, class_names=None, num_soft_classes=None, source="few")
    index.labels.return_value = np.array(labels)
    index.__len__ = lambda self: len(labels)
    return index


def test_labels_that_are_identifiers_make_no_classifier_of_billions():
    data = validate(DataConfig, DATA)
    assert run_facts(labelled([7]), labelled([0, 40, 2]), {}, data, global_batch=8).num_classes == 41
    with pytest.raises(ConfigError, match="The 2 labelled images in few have labels up to 3,000,000,000; labels must"):
        run_facts(labelled([7]), labelled([5, 3_000_000_000]), {}, data, global_batch=8)
