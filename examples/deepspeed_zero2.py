"""DeepSpeed ZeRO-2 by so.deepspeed.initialize: saved with the engine's save_checkpoint."""

from pathlib import Path

import deepspeed

import common
import sharded_optim as so

CONFIG = {
    "train_micro_batch_size_per_gpu": common.ROWS,
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 0.0,  # DeepSpeed takes 1.0 when this is not set; StableAdamW clips updates
}


def train(folder: Path, stop: int) -> common.Run:
    deepspeed.init_distributed("gloo")
    model = common.make_net()
    optimizer = so.StableAdamW(model.named_parameters(), lr=common.LR)
    engine, *_ = so.deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    losses = []
    if folder.exists():
        engine.load_checkpoint(folder)
    for batch in common.make_net_batches()[engine.global_steps : stop]:
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if stop < common.STEPS:
        engine.save_checkpoint(folder)
    return common.Run(losses, common.copy_of(engine.module.state_dict()))


if __name__ == "__main__":
    common.main(train)
