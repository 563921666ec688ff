"""Adds an adapter with trained rows of single tokens (trainable_token_indices) to a reference folder, as PEFT makes it.

usage: make_tokens.py REFERENCE_DIR

On the folder's tiny-llama, whose embedding is the output head, with two rows added: adapters/tokens/ and its logits in
adapters/logits.safetensors, and loss and gradients of one batch in adapters/tokens/training.safetensors. Needs torch
(the CPU is enough), transformers and PEFT.
"""
import os, sys
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

reference = sys.argv[1]
TOKENS = [4097, 20, 4096, 300]
IDS = [[1, 20, 4096, 300, 77, 20], [4097, 5, 20, 4096, 4097, 9]]


def base():
    model = AutoModelForCausalLM.from_pretrained(os.path.join(reference, "tiny-llama"), dtype=torch.float32)
    model.resize_token_embeddings(4098)
    return model


def adapted(**keys):
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=TOKENS, **keys))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if "trainable_tokens_delta" in name and "lm_head" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


model = adapted()
model.peft_config["default"].base_model_name_or_path = "tiny-llama"
out = os.path.join(reference, "adapters/tokens")
model.save_pretrained(out, save_embedding_layers=False)
os.remove(os.path.join(out, "README.md"))
path = os.path.join(reference, "adapters/logits.safetensors")
recorded = load_file(path)
with torch.no_grad():
    recorded["logits.tokens"] = model(input_ids=recorded["input_ids"]).logits.float().contiguous()
save_file(recorded, path)
ids = torch.tensor(IDS)
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
tensors = {"input_ids": ids, "loss": loss.detach().reshape(1)}
for name, parameter in model.named_parameters():
    if parameter.grad is not None and ("trainable_tokens_delta" in name or "layers.3." in name):
        tensors["grad." + name.replace("base_model.model.", "").replace(".default", "")] = parameter.grad.contiguous()
save_file(tensors, os.path.join(out, "training.safetensors"))
print({name: list(tensor.shape) for name, tensor in tensors.items()})
