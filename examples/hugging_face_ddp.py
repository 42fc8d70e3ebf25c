"""Hugging Face Trainer with DDP: saved and resumed by the trainer."""

from pathlib import Path

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import common
import sharded_optim as so


def train(folder: Path, stop: int) -> common.Run:
    resume = folder.exists()
    trainer = Trainer(
        model=common.make_llama(),
        args=TrainingArguments(max_grad_norm=0.0, **common.trainer_arguments(folder, stop)),  # StableAdamW clips updates
        train_dataset=common.make_rows(common.make_text_batches()),
        optimizer_cls_and_kwargs=(so.StableAdamW, {"lr": common.LR}),
    )
    so.callbacks.hugging_face(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return common.Run(common.logged_losses(trainer, resume), common.whole_params(trainer.model_wrapped, DistributedDataParallel))


if __name__ == "__main__":
    common.main(train, common.make_llama, common.make_text_batches, weight_decay=0.0)  # 0 is TrainingArguments' default
