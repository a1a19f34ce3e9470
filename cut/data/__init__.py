"""Data sets: every one gives batches as :mod:`cut.data.batch` documents them."""
