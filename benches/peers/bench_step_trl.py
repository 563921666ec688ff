"""Times DPO steps of TRL with PEFT + bitsandbytes on a model of random weights, with activation checkpointing.

TRL's DPOTrainer gets a 4-bit base and the adapters' settings, so that its reference is the base with the adapter off. It turns
adapters on such a base to bf16: each case is measured so, and with f32 adapters, which the other benchmarks have. Embedding, head and
norms stay in 16 bits, as TRL leaves them. The steps are its own `train()`: see dpo_steps.py.

usage: python3 bench_step_trl.py [--shape NAME] [--layers N] [--words N] [--rank R] [--optimizer NAME] [--base nf4|bf16] [--accumulation N]
                                 [--warm-up N] [--steps N] [--adapters f32|bf16|both] [ROWSxTOKENS-pairs|ROWSxTOKENS-pairs-ahead ...]
"""

import functools

import bench_step_peft
import dpo_steps
import step_timing

BEFORE = step_timing.used_bytes()


def build(args, case, adapters):
    import torch
    from trl import DPOConfig

    if step_timing.is_config(args):
        model = bench_step_peft.base_of_config(args)
    else:
        model = as_loaded(bench_step_peft.dense_base(args))
    config = DPOConfig(
        **dpo_steps.settings(args, case), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    trainer = dpo_steps.trainer(args, case, model, config, peft_config=bench_step_peft.adapters(args))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if adapters == "f32" else torch.bfloat16)
    return trainer


def as_loaded(model):
    """Says of a model that was quantized in place what transformers says of one that it loaded in 4 bits."""
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.quantization_method = config.quant_method
    return model


def options(parser):
    parser.add_argument("--adapters", choices=["f32", "bf16", "both"], default="both")


if __name__ == "__main__":
    args = step_timing.arguments(pairs=True, options=options)
    if args.base == "bf16" and not step_timing.is_config(args):
        raise SystemExit("--base bf16 is for shapes that are a whole config.json")
    try:
        import peft
        import torch
        import transformers
        import trl
        from trl import DPOTrainer  # noqa: F401  TRL imports it now, and not before

        base = "bf16"
        if args.base == "nf4":
            import bitsandbytes

            base = f"bitsandbytes {bitsandbytes.__version__}"
    except Exception as error:  # not there, or not able to run here
        step_timing.missing(args, "TRL", error)
    else:
        name = (
            f"TRL {trl.__version__}, PEFT {peft.__version__} + {base}, transformers {transformers.__version__}, "
            f"torch {torch.__version__}"
        )
        for adapters in ["f32", "bf16"] if args.adapters == "both" else [args.adapters]:
            dpo_steps.run(args, f"{name}, {adapters} adapters", functools.partial(build, adapters=adapters), BEFORE)
