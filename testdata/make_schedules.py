"""Writes schedules.json: the factors of transformers' learning-rate schedules over a short run.

usage: make_schedules.py REFERENCE_DIR

Needs torch (the CPU is enough) and transformers.
"""
import json, os, sys
import torch
from transformers.optimization import (
    get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup, get_inverse_sqrt_schedule, get_linear_schedule_with_warmup, get_wsd_schedule,
)

WARMUP, TOTAL, DECAY = 4, 24, 8
curves = []


def record(name, schedule, make, warmup=WARMUP, floor=0.0, shape="cosine", cycles=1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=warmup)
    factors = []
    for _ in range(TOTAL + 1):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    curves.append(dict(name=name, schedule=schedule, warmup_steps=warmup, total_steps=TOTAL, floor=floor, decay_steps=DECAY,
                       decay_shape=shape, cycles=cycles, factors=factors))


def over_run(function, **keys):
    return lambda optimizer, **warmup: function(optimizer, num_training_steps=TOTAL, **warmup, **keys)


record("constant", "constant", get_constant_schedule_with_warmup)
record("linear", "linear", over_run(get_linear_schedule_with_warmup))
record("cosine", "cosine", over_run(get_cosine_schedule_with_warmup))
record("cosine without warmup", "cosine", over_run(get_cosine_schedule_with_warmup), warmup=0)
record("cosine with a floor", "cosine", over_run(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1), floor=0.1)
record("three cosines", "cosine_with_restarts", over_run(get_cosine_with_hard_restarts_schedule_with_warmup, num_cycles=3), cycles=3)
record("inverse square root", "inverse_sqrt", get_inverse_sqrt_schedule)
record("inverse square root without warmup", "inverse_sqrt", get_inverse_sqrt_schedule, warmup=0)
for theirs, ours, floor in [("cosine", "cosine", 0.0), ("linear", "linear", 0.25), ("1-sqrt", "sqrt", 0.0)]:
    record(f"stable, then {theirs}", "warmup_stable_decay",
           over_run(get_wsd_schedule, num_decay_steps=DECAY, decay_type=theirs, min_lr_ratio=floor), floor=floor, shape=ours)

lines = ",\n".join(" " + json.dumps(curve) for curve in curves)
with open(os.path.join(sys.argv[1], "schedules.json"), "w") as file:
    file.write(f"[\n{lines}\n]\n")
