"""The formats of `eval.export`: each writes a backbone, reads it again as its readers do, and compares."""
