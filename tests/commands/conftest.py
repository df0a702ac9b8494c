"""The small data set and the run that ended, which the evaluators are tested on too."""

from tests.eval.conftest import run, test, train

__all__ = ["run", "test", "train"]
