"""Hugging Face Trainer with PEFT LoRA, DDP: the adapter is saved and resumed by the trainer."""

from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import common
import sharded_optim as so


def make_lora() -> nn.Module:
    """Only the adapter is trained."""
    return get_peft_model(common.make_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def train(folder: Path, stop: int) -> common.Run:
    resume = folder.exists()
    trainer = Trainer(
        model=make_lora(),
        args=TrainingArguments(max_grad_norm=0.0, **common.trainer_arguments(folder, stop)),  # StableAdamW clips updates
        train_dataset=common.make_rows(common.make_text_batches()),
        optimizer_cls_and_kwargs=(so.StableAdamW, {"lr": common.LR}),
    )
    so.callbacks.hugging_face(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return common.Run(common.logged_losses(trainer, resume), common.whole_params(trainer.model_wrapped, DistributedDataParallel))


if __name__ == "__main__":
    common.main(train, make_lora, common.make_text_batches, weight_decay=0.0)  # 0 is TrainingArguments' default
