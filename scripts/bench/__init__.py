"""What ``scripts/benchmark.py`` measures, a module a subcommand, and ``performance.py``, which makes tables of it."""
