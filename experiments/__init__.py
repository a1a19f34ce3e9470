"""Experiments: runs, the demo, tables, the report, the bench and the renderer of rooms."""
