"""The ``cut`` command: one module per command, each with ``add`` (its options) and a function that runs it."""
