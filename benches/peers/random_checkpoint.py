"""Writes a checkpoint of random bf16 weights of a shape, for peers that load from disk only.

A 7B takes 13 GB in the folder for temporary files. A checkpoint that is there already is used again.
"""

import json
import os
import shutil
import tempfile

import step_timing

LAYERS_PER_FILE = 8


def checkpoint(args):
    """A folder with a random checkpoint of the shape, written when it is asked for first."""
    name = "-".join(str(part) for part in ("bench-step", args.shape, args.layers, args.words) if part)
    folder = os.path.join(tempfile.gettempdir(), name)
    if not os.path.exists(os.path.join(folder, "complete")):
        os.makedirs(folder, exist_ok=True)
        (of_config if step_timing.is_config(args) else dense)(args, folder)
        tokenizer(args, folder)
        open(os.path.join(folder, "complete"), "w").close()
    return folder


def needs(size):
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < size + (1 << 30):
        raise OSError(f"a checkpoint of {size / 1e9:.0f} GB does not fit into {tempfile.gettempdir()}, {free / 1e9:.0f} GB")


def of_config(args, folder):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = step_timing.sizes(args)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    needs(2 * weights)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


def dense(args, folder):
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    s = step_timing.sizes(args)
    layers, hidden, inner, vocab = (
        s["num_hidden_layers"], s["hidden_size"], s["intermediate_size"], s["vocab_size"]
    )
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    size = 2 * (2 * vocab * hidden + layers * (2 * hidden * (hidden + keys) + 3 * hidden * inner))
    needs(size)
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


def tokenizer(args, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = step_timing.sizes(args)["vocab_size"]
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator([f"hello world {i}" for i in range(2000)], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    made.save_pretrained(folder)
