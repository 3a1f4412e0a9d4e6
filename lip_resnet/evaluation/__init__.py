"""Evaluation: exact counts, how weights are evaluated, and the rows and tables of the results.

``evaluate`` is the loop and ``metrics`` its counts. ``protocol`` holds how weights are evaluated (``EvalConfig``),
``location`` and ``testsets`` on which images; ``cost`` counts parameters and multiply-adds. ``rows`` writes and reads
results, ``tables`` renders them, and ``paper`` compares them with the published figures.
"""
