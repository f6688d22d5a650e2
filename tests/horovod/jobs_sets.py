"""The process set of the cases: first and last rank. It must be known to hvd.init()."""

CHOSEN = None
