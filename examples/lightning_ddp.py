"""Lightning with DDP: saved and resumed by the trainer."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader

import common
import sharded_optim as so


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = common.make_net()
        self.losses: list[float] = []

    def training_step(self, batch: common.Batch, index: int) -> Tensor:
        loss = self.net(**batch)
        self.losses.append(loss.item())
        return loss

    def on_train_end(self) -> None:
        common.check_wrapper(self.trainer.strategy.model, DistributedDataParallel)

    def configure_optimizers(self) -> Any:
        return so.StableAdamW(self.named_parameters(), lr=common.LR)


def train(folder: Path, stop: int) -> common.Run:
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=common.RANKS,
        strategy="ddp",
        max_steps=stop,
        callbacks=[so.callbacks.lightning(), ModelCheckpoint(folder, "middle", every_n_train_steps=common.STOP, save_last=False)],
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,  # the same batches on all ranks, so that one process can be compared
        default_root_dir=folder.parent,
    )
    path = folder / "middle.ckpt"
    data = StatefulDataLoader(common.make_net_batches(), batch_size=None)  # with torch's, a resumed epoch begins with its first batch again
    trainer.fit(module, data, ckpt_path=str(path) if path.exists() else None)
    return common.Run(module.losses, common.copy_of(module.net.state_dict()))


if __name__ == "__main__":
    common.main(train)
