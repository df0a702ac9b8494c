"""How fast this library is beside its peers, on this machine: interleaved rounds, medians and ratios.

`python -m benchmarks` runs everything; docs/performance.md says how each figure is made.
"""
