"""Times generation of transformers + bitsandbytes (+ PEFT) and Unsloth, on the cases of `qlora-bench serve`.

A case is STREAMSxPROMPTxANSWERxADAPTERS: so many rows of one batch begin at once, each with a random prompt and an answer of
exactly so many tokens, greedy; with 1 adapter a LoRA of the rank on every linear layer. Peers with more adapters in a batch are
not among these. A line of JSON for each case: tokens of all answers over the seconds of the whole call, prompts among them.

usage: python3 bench_serve.py transformers|unsloth [--shape NAME] [--layers N] [--rank R] [CASE ...]   (one CUDA GPU)
"""

import argparse
import json
import os
import time

import step_timing
from random_checkpoint import checkpoint

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["transformers", "unsloth"])
    parser.add_argument("--shape", choices=step_timing.SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("cases", nargs="*", default=["1x32x256x0", "1x32x256x1", "16x512x256x0", "16x512x256x1"])
    return parser.parse_args(namespace=argparse.Namespace(words=None))


def transformers_model(args, adapted):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(args), quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    if adapted:
        model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=16, target_modules=step_timing.PROJECTIONS))
    return model.eval()


def unsloth_model(args, adapted):
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        checkpoint(args), max_seq_length=2048, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    if adapted:
        model = FastLanguageModel.get_peft_model(
            model, r=args.rank, lora_alpha=16, target_modules=step_timing.PROJECTIONS, use_gradient_checkpointing=False
        )
    FastLanguageModel.for_inference(model)
    return model


def measure(model, streams, prompt, answer):
    import torch

    seconds = []
    for tokens in (8, answer):  # the first call warms up
        ids = torch.randint(10, 4000, (streams, prompt), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0,
            )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return streams * answer / seconds[-1]


def main():
    args = arguments()
    if args.peer == "unsloth":
        import unsloth  # before torch and transformers, which it patches

        name, build = f"Unsloth {unsloth.__version__}", unsloth_model
    else:
        import bitsandbytes
        import transformers

        name = f"transformers {transformers.__version__} + bitsandbytes {bitsandbytes.__version__}"
        build = transformers_model
    cases = [(case, *map(int, case.split("x"))) for case in args.cases]
    for adapted in (0, 1):
        of_kind = [case for case in cases if case[4] == adapted]
        model = build(args, adapted) if of_kind else None
        for case, streams, prompt, answer, _ in of_kind:
            rate = measure(model, streams, prompt, answer)
            print(json.dumps({"peer": name, "case": case, "tokens_per_second": rate}), flush=True)
        del model


if __name__ == "__main__":
    main()
