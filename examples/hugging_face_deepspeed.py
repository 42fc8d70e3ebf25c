"""Hugging Face Trainer with DeepSpeed ZeRO-2, to which the callback attaches: saved and resumed by the trainer."""

from pathlib import Path

from transformers import Trainer, TrainingArguments

import common
import sharded_optim as so

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # DeepSpeed takes 1.0 when this is not set; StableAdamW clips updates
}


def train(folder: Path, stop: int) -> common.Run:
    resume = folder.exists()
    trainer = Trainer(
        model=common.make_llama(),
        args=TrainingArguments(deepspeed=dict(DEEPSPEED), max_grad_norm=0.0, **common.trainer_arguments(folder, stop)),
        train_dataset=common.make_rows(common.make_text_batches()),
        optimizer_cls_and_kwargs=(so.StableAdamW, {"lr": common.LR}),
    )
    so.callbacks.hugging_face(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return common.Run(common.logged_losses(trainer, resume), common.copy_of(trainer.model_wrapped.module.state_dict()))


if __name__ == "__main__":
    common.main(train, common.make_llama, common.make_text_batches, weight_decay=0.0)  # 0 is TrainingArguments' default
