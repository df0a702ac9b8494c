"""The tests; one thread each, which has to be said before numpy, scipy and torch are there.

The machines that run them have few cores and the tests small arrays: threads that wait for each other take five times
the processor time of scikit-learn's logistic regressions, and hold up the other worker.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
