"""Checkpoints while processes are killed: `make chaos` kills a training job of two ranks 200 times, and looks at what it has left.

    board.py      what ranks are doing, in memory that outlives them
    job.py        the job, which resumes, trains and saves, and writes down which saves have returned
    __main__.py   starts it, kills it, and compares every checkpoint with what one process computes

Not collected by pytest: it takes minutes.
"""
