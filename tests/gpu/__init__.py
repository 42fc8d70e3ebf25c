"""`make gpu-check`: what only a GPU can prove, in one command, within eight minutes and without a network.

    device.py     what the tests run on; a rehearsal without a GPU has another one
    runs.py       optimizers and the same parameters and gradients for each device
    test_*.py     the claims, by theme. `make test` collects them and skips them without a GPU
    __main__.py   runs them in stages, each in processes of its own, and says what became of them

`python -m tests.gpu --rehearse` runs the same tests on a CPU, with the kernels in Triton's interpreter and gloo instead of NCCL, so that a
mistake in a test is found before there is a GPU.
"""
