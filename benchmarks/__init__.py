"""How fast this library is beside its peers, on this machine; docs/performance.md says how each figure is made."""
