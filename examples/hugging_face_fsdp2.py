"""Hugging Face Trainer with FSDP2: saved and resumed by the trainer."""

from pathlib import Path

from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

import common
import sharded_optim as so

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


def train(folder: Path, stop: int) -> common.Run:
    resume = folder.exists()
    arguments = common.trainer_arguments(folder, stop)
    args = TrainingArguments(fsdp=True, fsdp_config=dict(FSDP), max_grad_norm=0.0, **arguments)  # StableAdamW clips updates
    common.allow_fsdp_on_cpus()
    trainer = Trainer(
        model=common.make_llama(),
        args=args,
        train_dataset=common.make_rows(common.make_text_batches()),
        optimizer_cls_and_kwargs=(so.StableAdamW, {"lr": common.LR}),
    )
    so.callbacks.hugging_face(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return common.Run(common.logged_losses(trainer, resume), common.whole_params(trainer.model_wrapped, FSDPModule))


if __name__ == "__main__":
    common.main(train, common.make_llama, common.make_text_batches, single_use=True, weight_decay=0.0)  # 0 is TrainingArguments' default
