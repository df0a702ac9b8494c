"""The one error that every part of the data path raises for the user."""

from __future__ import annotations

from ssl_pipeline.config import ConfigError


class DataError(ConfigError):
    """Images or shards that cannot be read: one sentence that names the shard and the byte or key."""
