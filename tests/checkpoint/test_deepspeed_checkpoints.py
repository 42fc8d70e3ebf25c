"""DeepSpeed's own checkpoints keep the trajectory: ordinary ones, Universal ones on other numbers of ranks, and zero_to_fp32."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed_models
import pytest
import torch
import torch.distributed as dist
from deepspeed_models import AWKWARD, NEEDS_DEEPSPEED, assert_equal, config_of, model, train

import sharded_optim as so
from benchmarks.given_gradients import one_group, two_groups, unsharded

pytestmark = [*NEEDS_DEEPSPEED, pytest.mark.filterwarnings("ignore:weight_decay")]

BEFORE, AFTER = 4, 4  # steps; the spikes are at 3, 6 and 8
MAKERS = {"AdamW": partial(so.AdamW, lr=1e-2, weight_decay=0.1), "StableAdamW": partial(so.StableAdamW, lr=1e-2, weight_decay=0.1)}
BF16_OPTIMIZER = {"top": {"data_types": {"grad_accum_dtype": "fp32"}}}
CELLS: dict[str, tuple[str, int, torch.dtype, dict[str, Any], Any]] = {  # optimizer, stage, dtype, options, groups
    "stage 0": ("StableAdamW", 0, torch.float32, {}, two_groups),
    "stage 0 bf16": ("AdamW", 0, torch.bfloat16, {}, two_groups),
    "stage 1": ("AdamW", 1, torch.bfloat16, {}, two_groups),
    "stage 1 BF16_Optimizer": ("StableAdamW", 1, torch.bfloat16, BF16_OPTIMIZER, two_groups),
    "stage 2": ("StableAdamW", 2, torch.bfloat16, {}, two_groups),
    "stage 2 offload": ("StableAdamW", 2, torch.bfloat16, {"offload_optimizer": {"device": "cpu"}}, one_group),
    "stage 2 round robin": ("StableAdamW", 2, torch.bfloat16, {"round_robin_gradients": True}, one_group),
    "stage 3": ("AdamW", 3, torch.bfloat16, {}, one_group),
    "stage 3 sub-groups": ("StableAdamW", 3, torch.bfloat16, {"sub_group_size": 300}, one_group),
}
# Both are of ZeRO, and wrong with round_robin_gradients, whose mapping DeepSpeed mistakes. zero_to_fp32 does not know the files of
# BF16_Optimizer.
UNIVERSAL = [label for label in CELLS if "stage 0" not in label and "round robin" not in label]
TO_FP32 = [label for label in UNIVERSAL if "BF16_Optimizer" not in label]


def engine_of(label: str, **top: Any) -> Any:
    optimizer, stage, dtype, options, groups = CELLS[label]
    own = model()
    names = {param: name for name, param in own.named_parameters()}
    named = [group | {"params": [(names[param], param) for param in group["params"]]} for group in groups(own)]
    options = {**options, "top": {**options.get("top", {}), **top}}
    engine, *_ = so.deepspeed.initialize(model=own, optimizer=MAKERS[optimizer](named), config=config_of(stage, dtype, **options))
    return engine


def expected_of(label: str) -> Any:
    optimizer, _, _, _, groups = CELLS[label]
    return unsharded(MAKERS[optimizer], BEFORE + AFTER, AWKWARD, groups=groups)


def check_rigid_and_convert(folder: str) -> None:
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for label in CELLS:
        path = str(Path(folder) / label)
        engine = engine_of(label)
        train(engine, 1, BEFORE)
        engine.save_checkpoint(path, tag="saved")
        engine.destroy()
        engine = engine_of(label)
        train(engine, 1, 1)  # what it holds is replaced
        engine.load_checkpoint(path, tag="saved")
        train(engine, BEFORE + 1, BEFORE + AFTER)
        expected = expected_of(label)
        assert_equal(engine, expected, label)
        engine.save_checkpoint(path, tag="done")
        engine.destroy()
        dist.barrier()
        if dist.get_rank() == 0 and label in TO_FP32:
            for name, value in get_fp32_state_dict_from_zero_checkpoint(path, tag="done").items():
                assert torch.equal(value, expected.params[name]), f"zero_to_fp32 {label} {name}"
        if dist.get_rank() == 0 and label in UNIVERSAL:
            folders = {"input_folder": f"{path}/saved", "output_folder": f"{path}/universal", "keep_temp_folder": False}
            workers = {"num_extract_workers": 1, "num_merge_workers": 1}
            ds_to_universal.main(argparse.Namespace(**folders, **workers, strict=True, inject_missing_state=True))
        dist.barrier()
    check_universal(folder)


def check_universal(folder: str) -> None:
    for label in UNIVERSAL:
        engine = engine_of(label, checkpoint={"load_universal": True})
        engine.load_checkpoint(str(Path(folder) / label), tag="universal")
        train(engine, BEFORE + 1, BEFORE + AFTER)
        assert_equal(engine, expected_of(label), f"{label} on {dist.get_world_size()} ranks")
        engine.destroy()


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Rigid at 2 ranks, with zero_to_fp32; Universal from 2 ranks to 1, 2 and 3."""
    deepspeed_models.run(check_rigid_and_convert, 2, str(tmp_path))
    for world_size in (1, 3):
        deepspeed_models.run(check_universal, world_size, str(tmp_path))
