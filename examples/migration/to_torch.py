"""Make the optimizer's state in checkpoint.pt, saved by a script of this folder, one that torch.optim.AdamW, Adam or SGD continues."""

import torch

OURS = ("decay_form", "reference_lr", "learns_reference_lr", "kahan_sum", "stochastic_rounding", "rounding_seed")

saved = torch.load("checkpoint.pt")
for group in saved["optimizer"]["param_groups"]:
    if group["decay_form"] == "corrected" or (group["decay_form"] == "decoupled" and group.get("momentum")):
        if group["weight_decay"]:
            raise SystemExit(f"no optimizer of torch decays weights as decay_form={group['decay_form']!r} does here")
    elif group["decay_form"] == "decoupled":  # torch's AdamW multiplies its decay by lr
        group["weight_decay"] /= group["reference_lr"]
    for key in OURS:  # which torch would keep, though they no longer hold
        group.pop(key, None)
    print(f"lr {group['lr']:g}  weight_decay {group['weight_decay']:g}")
for state in saved["optimizer"]["state"].values():
    state.pop("kahan_comp", None)  # of low-precision parameters, which torch rounds
torch.save(saved, "checkpoint.pt")
