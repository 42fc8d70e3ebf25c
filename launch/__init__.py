"""How a training job starts and what it does: `python -m launch configs/fsdp2.yaml`. Not part of the installed package."""
