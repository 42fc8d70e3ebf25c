"""The training job and the ways to start it: `python -m launch configs/fsdp2.yaml`. Not part of the installed package."""
