"""Evaluation: exact counts, what is evaluated and how, and the rows and tables that come of it.

``evaluate.evaluate`` is the loop; ``protocol.EvalConfig`` says how; ``testsets`` opens ImageNet's test sets; ``rows``
and ``results`` write, read and compare rows; ``released`` and ``paper`` hold results against the published figures.
"""
