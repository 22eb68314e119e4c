"""``python -m minidp.calibrate``: measure training steps of probe models on this machine; JSON to standard output.

``minidp.sim.calibrate()`` runs it, in a fresh process with one BLAS thread, and makes a ``Cluster`` of the result.

    probes.py    the models, and how their steps are timed: 1 worker, 2 workers, 1 worker, …
"""
