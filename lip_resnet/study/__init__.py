"""Studies: variants of one recipe over several seeds, and a verdict with intervals.

``design`` reads a study and checks that its variants differ in the network alone; ``cells`` trains and evaluates every
(variant, seed) as processes; ``results`` and ``probes`` read what they wrote, and ``report`` shows it. Built on the
hall and ``evaluation``; the commands are started, never imported.
"""
