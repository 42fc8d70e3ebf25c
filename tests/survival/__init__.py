"""`make survive`: whatever ends one rank ends the job in time, with the first cause in the log, under every launcher.

Each fault of `faults.py` happens in a small training job (`job.py`) that is started by torchrun and by both kinds of mpirun
(`launched.py`). `python -m tests.survival` writes the table of docs/survival.md; `restarts.py` kills a job again and again.
"""
