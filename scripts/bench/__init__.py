"""The subcommands of ``scripts/benchmark.py``, one module for each kind of measurement, and what they share."""
