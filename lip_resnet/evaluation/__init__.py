"""Evaluation: exact counts, how weights are evaluated, and the rows and tables of the results.

``evaluate`` is the loop, ``metrics`` its counts, and ``nonfinite`` names the module at fault. ``protocol`` holds how
weights are evaluated (``EvalConfig``), ``location``, ``testsets`` and ``classes`` on which images and classes; ``cost``
counts parameters and multiply-adds. ``rows`` writes and reads results, ``tables`` groups and compares them, ``render``
makes any table a text, and ``paper`` compares results with the published figures. ``robustness`` measures how a
network's answers change with shifts, test resolution and object size, and ``attribution`` averages the scores of maps
of the pixels, which are handed in. ``predictions`` writes and reads the answers to every image, and ``compatibility``
says whether weights belong to an evaluation. Of detectors, ``matching`` and ``average_precision`` compute COCO's AP and
its bootstrap, and ``paper_detection`` compares it with the published one.
"""
