"""The optimizers in a training loop: gradient release and model preparation."""
