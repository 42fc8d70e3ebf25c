"""Accelerate with DeepSpeed ZeRO-2: so.deepspeed.attach after prepare, saved with save_state."""

from pathlib import Path

from accelerate import Accelerator, DeepSpeedPlugin

import common
import sharded_optim as so

CONFIG = {
    "train_micro_batch_size_per_gpu": common.ROWS,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # DeepSpeed takes 1.0 when this is not set; StableAdamW clips updates
}


def train(folder: Path, stop: int) -> common.Run:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG))
    model = common.make_net()
    optimizer = so.StableAdamW(model.named_parameters(), lr=common.LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    so.deepspeed.attach(accelerator.deepspeed_engine_wrapped.engine)
    start, losses = 0, []
    if folder.exists():
        accelerator.load_state(str(folder))
        start = common.STOP
    for batch in common.make_net_batches()[start:stop]:
        loss = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if stop < common.STEPS:
        accelerator.save_state(str(folder))
    return common.Run(losses, common.copy_of(model.module.state_dict()))


if __name__ == "__main__":
    common.main(train, single_use=True)  # an Accelerator with DeepSpeed can be made once
