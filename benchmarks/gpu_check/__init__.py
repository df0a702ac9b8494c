"""The first ten minutes on a GPU: whether all works there, how fast it is, and which defaults should change."""
