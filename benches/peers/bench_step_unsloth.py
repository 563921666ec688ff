"""Times QLoRA training steps of Unsloth on a model of random weights, with its own activation checkpointing.

Unsloth loads from disk only: a checkpoint of the shape is written first, 13 GB for a 7B, where there is room.

usage: python3 bench_step_unsloth.py [--shape NAME] [--layers N] [--words N] [--rank R] [--optimizer NAME] [--accumulation N]
                                     [--warm-up N] [--steps N] [ROWSxTOKENS ...]      (one CUDA GPU)
"""

import os

import step_timing
from random_checkpoint import checkpoint

BEFORE = step_timing.used_bytes()
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")


def build(args, case):
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        checkpoint(args), max_seq_length=case.length, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth",
        target_modules=step_timing.PROJECTIONS + (["gate_up_proj"] if step_timing.has_experts(args) else []),
    )
    FastLanguageModel.for_training(model)
    return model


if __name__ == "__main__":
    args = step_timing.arguments()
    try:
        import unsloth  # before torch and transformers, which it patches
        import torch
    except Exception as error:  # not there, or not able to run here
        step_timing.missing(args, "Unsloth", error)
    else:
        step_timing.run(args, f"Unsloth {unsloth.__version__}, torch {torch.__version__}", build, BEFORE)
