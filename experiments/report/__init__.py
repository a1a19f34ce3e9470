"""The report: one self-contained page from records.

:mod:`.table`, :mod:`.comparison` and :mod:`.views` turn records into plain JSON, :mod:`.page` puts it into the template
with the style sheet and scripts beside it, ``python -m experiments.report`` writes it.
"""
