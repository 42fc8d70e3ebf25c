"""Use the optimizers in a training loop: clipping, gradient release, model preparation, and callbacks for trainers."""
