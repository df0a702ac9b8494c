"""The folders of small images that shards are made from."""

from tests.packing.conftest import folder

__all__ = ["folder"]
