"""Training: the loop, its tasks and optimizer, the guard against non-finite steps, and a run with its files.

``engine.build_state`` and ``engine.train_one_epoch`` train; ``run.Run`` is a whole run with its evaluations,
checkpoints and logs; ``run_folder.open_run`` decides where a run writes and continues. Knows nothing of LIP.
"""
