"""Packs recipes/ and the mark that the package is typed into the wheel; all else stands in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ssl_pipeline*"]), "ssl_pipeline.recipes"],
    package_dir={"ssl_pipeline.recipes": "recipes"},
    package_data={"ssl_pipeline": ["py.typed"], "ssl_pipeline.recipes": ["**/*.yaml"]},
)
