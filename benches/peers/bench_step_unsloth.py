"""Times QLoRA training steps of Unsloth on a model of random weights, with its own activation checkpointing.

Unsloth loads from disk only: a checkpoint of the shape is written first, 13 GB for a 7B, where there is room.

usage: python3 bench_step_unsloth.py [--shape NAME] [--layers N] [--rank R] [--optimizer NAME] [--accumulation N]
                                     [--warm-up N] [--steps N] [ROWSxTOKENS ...]      (one CUDA GPU)
"""

import json
import os
import shutil
import tempfile

import step_timing

BEFORE = step_timing.used_bytes()
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
LAYERS_PER_FILE = 8


def checkpoint(args):
    """A folder with a random checkpoint of the shape, written when it is asked for first."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    s = step_timing.sizes(args)
    layers, hidden, inner, vocab = (
        s["num_hidden_layers"], s["hidden_size"], s["intermediate_size"], s["vocab_size"]
    )
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    folder = os.path.join(tempfile.gettempdir(), f"bench-step-{args.shape}-{layers}")
    if os.path.exists(os.path.join(folder, "complete")):
        return folder
    size = 2 * (2 * vocab * hidden + layers * (2 * hidden * (hidden + keys) + 3 * hidden * inner))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < size + (1 << 30):
        raise OSError(f"a checkpoint of {size / 1e9:.0f} GB does not fit into {tempfile.gettempdir()}, {free / 1e9:.0f} GB")
    os.makedirs(folder, exist_ok=True)
    config = LlamaConfig(
        max_position_embeddings=131072, torch_dtype="bfloat16", architectures=["LlamaForCausalLM"], bos_token_id=1,
        eos_token_id=2, pad_token_id=0, **s,
    )
    config.save_pretrained(folder)
    files = {}

    def random(*shape):
        return (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()

    def ones():
        return torch.ones(hidden, dtype=torch.bfloat16)

    def save(name, tensors):
        save_file(tensors, os.path.join(folder, name), metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    ends = {"model.embed_tokens.weight": random(vocab, hidden), "lm_head.weight": random(vocab, hidden)}
    save("model-00000.safetensors", ends | {"model.norm.weight": ones()})
    outs = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    for first in range(0, layers, LAYERS_PER_FILE):
        tensors = {}
        for layer in range(first, min(first + LAYERS_PER_FILE, layers)):
            path = f"model.layers.{layer}"
            for name, out in outs.items():
                tensors[f"{path}.self_attn.{name}.weight"] = random(out, hidden)
            tensors[f"{path}.mlp.gate_proj.weight"] = random(inner, hidden)
            tensors[f"{path}.mlp.up_proj.weight"] = random(inner, hidden)
            tensors[f"{path}.mlp.down_proj.weight"] = random(hidden, inner)
            tensors[f"{path}.input_layernorm.weight"] = ones()
            tensors[f"{path}.post_attention_layernorm.weight"] = ones()
        save(f"model-{first + 1:05d}.safetensors", tensors)
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as out:
        json.dump({"metadata": {"total_size": size}, "weight_map": files}, out)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([f"hello world {i}" for i in range(2000)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    open(os.path.join(folder, "complete"), "w").close()
    return folder


def build(args, length):
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        checkpoint(args), max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth",
        target_modules=step_timing.PROJECTIONS,
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
