"""Times DPO steps of Unsloth on a model of random weights, with its own activation checkpointing.

Unsloth puts its trainer in the place of TRL's DPOTrainer when it is imported. It gets Unsloth's model with fresh adapters, as
Unsloth's examples have it: the reference is then a frozen copy of the adapters beside them, which computes what the base does.
Unsloth 2026.10.9 takes TRL up to 1.15, transformers up to 5.17 and torch before 2.15. It loads from disk only: a checkpoint of the
shape is written first, 13 GB for a 7B, where there is room.

usage: python3 bench_step_unsloth_dpo.py [--shape NAME] [--layers N] [--words N] [--rank R] [--optimizer NAME] [--accumulation N]
                                         [--warm-up N] [--steps N] [ROWSxTOKENS-pairs|ROWSxTOKENS-pairs-ahead ...]   (one CUDA GPU)
"""

import os

import bench_step_unsloth
import dpo_steps
import step_timing

BEFORE = step_timing.used_bytes()
os.environ["UNSLOTH_DATASET_NUM_PROC"] = "1"


def build(args, case):
    from trl import DPOConfig

    model = bench_step_unsloth.build(args, case)
    return dpo_steps.trainer(args, case, model, DPOConfig(**dpo_steps.settings(args, case)))


if __name__ == "__main__":
    args = step_timing.arguments(pairs=True)
    try:
        import unsloth  # before torch and transformers, which it patches
        import torch
        import transformers
        import trl

        if "unsloth" not in trl.DPOTrainer.__name__.lower():
            raise ImportError(f"Unsloth {unsloth.__version__} has no trainer for TRL {trl.__version__}'s DPO")
    except Exception as error:  # not there, or not able to run here
        step_timing.missing(args, "Unsloth", error)
    else:
        name = (
            f"Unsloth {unsloth.__version__}, TRL {trl.__version__}, transformers {transformers.__version__}, "
            f"torch {torch.__version__}"
        )
        dpo_steps.run(args, name, build, BEFORE)
