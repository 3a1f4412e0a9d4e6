"""Evaluation: exact counts on a set of images, and the rows and tables of the results.

``evaluate`` is the loop, ``metrics`` its counts, and ``nonfinite`` names the module at fault. ``protocol.EvalConfig``
is how weights are evaluated; ``location``, ``testsets`` and ``classes`` say on which images, and ``compatibility``
whether the weights belong to them. ``predictions`` has the prediction of every image, ``per_class`` their counts by
class. ``rows`` writes and reads results, ``tables`` compares them, ``render`` formats a table, ``cost`` counts
parameters and multiply-adds; ``paper`` and ``baselines`` compare with published figures. The probes are in
``robustness`` (shifts, test size, object size) and ``attribution`` (maps of the pixels). Of detectors, ``matching`` and
``average_precision`` compute COCO's AP and its bootstrap, and ``paper_detection`` compares it with the published one.
"""
