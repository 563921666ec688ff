"""Adapters on experts that transformers holds stacked, beside PEFT, in both directions.

    cargo build --release --bin qlora --example logits
    pip install torch transformers peft==0.21.*
    python benches/peers/check_stacked.py --bin target/release --archs testdata/reference/archs [--only NAME]

Of each recorded model with experts, as it is in its files, in f32 on the CPU:
1. An adapter of PEFT's with random values on attention and on the experts' parameters (`target_parameters`): our logits of it against those of PEFT's
   own reload, and PEFT's again after we have read and written it.
2. Of families that have experts stacked in all files: an adapter that three steps of ours trained on all linear layers, our logits against PEFT's, which
   must find all its keys. In other families ours have names of single experts, which PEFT converts by itself (docs/src/models.md says where it loses some).
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, warnings
from pathlib import Path
import torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

p = argparse.ArgumentParser(); p.add_argument("--bin", required=True); p.add_argument("--archs", required=True); p.add_argument("--only", default="")
a = p.parse_args(); bins = os.path.abspath(a.bin); tmp = Path(tempfile.mkdtemp()); bad = 0
transformers.utils.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar(); torch.set_num_threads(1)
# f32 sums in other orders; updates are of the size of the weights.
BAR = 1e-5


def base(folder):
    kind = AutoModelForImageTextToText if hasattr(AutoConfig.from_pretrained(folder), "text_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def theirs(folder, adapter, ids):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always"); model = PeftModel.from_pretrained(base(folder), adapter).eval()
    lost = [str(w.message)[:200] for w in seen if "adapter keys" in str(w.message)]
    return model(input_ids=ids, use_cache=False).logits.float(), lost


def ours(folder, adapter, ids, resaved):
    save_file({"input_ids": ids}, tmp / "ids")
    r = subprocess.run([os.path.join(bins, "examples/logits"), folder, tmp / "ids", tmp / "out", adapter, resaved], capture_output=True, text=True)
    if r.returncode: return None, r.stderr.strip()
    return torch.frombuffer(bytearray((tmp / "out").read_bytes()), dtype=torch.float32).view(*ids.shape, -1), ""


def report(what, ok, more):
    global bad; bad += not ok; print(("ok    " if ok else "WRONG ") + what, more, flush=True)


def compare(what, folder, adapter, ids, plain):
    resaved = tmp / "resaved"; shutil.rmtree(resaved, ignore_errors=True); resaved.mkdir()
    try: want, lost = theirs(folder, adapter, ids)
    except ValueError as error: return report(what, False, f"PEFT does not load it: {' '.join(str(error).split())[:200]}")
    got, why = ours(folder, adapter, ids, resaved)
    if got is None: return report(what, False, why)
    again, lost_again = theirs(folder, resaved, ids)
    far, back = (got - want).abs().max().item(), (again - want).abs().max().item()
    scale = want.abs().max().item()
    report(what, far < BAR * max(scale, 1) and back < BAR * max(scale, 1) and not lost and not lost_again,
           f"logits up to {scale:.1f}, moved by {(want - plain).abs().max():.2f}: apart {far:.1e}, written again {back:.1e} {' '.join(lost)}")


def words(folder, count):
    """A tokenizer of as many words as the model has, and rows of them."""
    word = lambda i: ["<pad>", "<s>", "</s>"][i] if i < 3 else f"w{i}"
    special = [dict(id=i, content=word(i), special=True, single_word=False, lstrip=False, rstrip=False, normalized=False) for i in range(3)]
    tokenizer = dict(version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=None, added_tokens=special,
                     pre_tokenizer=dict(type="WhitespaceSplit"), model=dict(type="WordLevel", vocab={word(i): i for i in range(count)}, unk_token="<pad>"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")))
    rows = [" ".join(word(3 + (row * 5 + i * 7) % (count - 3)) for i in range(12)) for row in range(8)]
    (tmp / "rows.jsonl").write_text("".join(json.dumps(dict(text=row)) + "\n" for row in rows))


def trained(folder, run):
    config = tmp / "qlora.toml"
    config.write_text(f'device = "cpu"\n[model]\npath = "{folder}"\n[quantization]\nquant_type = "none"\n[lora]\nrank = 2\n[data]\ntrain = "{tmp}/rows.jsonl"\nformat = "text"\n'
                      f'[train]\noutput_dir = "{run}"\nmax_steps = 3\nbatch_size = 2\ngradient_accumulation_steps = 1\nlearning_rate = 5e-2\n')
    return subprocess.run([os.path.join(bins, "qlora"), "train", config], capture_output=True, text=True)


for source in sorted(Path(a.archs).iterdir()):
    config = json.loads((source / "config.json").read_text()); text = config.get("text_config", config)
    model = base(source)
    stacked = sorted({".".join(n.split(".")[-3 if "mlp." in n else -2:]) for n, t in model.named_parameters() if ".experts." in n and t.ndim == 3})
    if not stacked or a.only not in source.name: continue
    folder = tmp / source.name; shutil.copytree(source, folder); words(folder, text["vocab_size"])
    ids = load_file(source / "reference.safetensors")["input_ids"].contiguous()
    with torch.no_grad(): plain = model(input_ids=ids, use_cache=False).logits.float()
    torch.manual_seed(3)
    # No DoRA and no dropout on parameters: PEFT has none.
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, init_lora_weights=False, target_modules=["o_proj"], target_parameters=stacked, exclude_modules=".*(vision|visual|audio).*")
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, t in adapted.named_parameters():
            if "lora_" in name: t.copy_(torch.randn_like(t) * 0.2)
    adapted.peft_config["default"].base_model_name_or_path = source.name
    adapted.save_pretrained(tmp / "peft", save_embedding_layers=False)
    compare(f"{source.name}: PEFT's adapter on {', '.join(stacked)}", folder, tmp / "peft", ids, plain)
    shutil.rmtree(tmp / "peft"); run = tmp / f"run-{source.name}"; r = trained(folder, run)
    if r.returncode: report(f"{source.name}: trained", False, r.stderr[-300:]); continue
    if json.loads((run / "adapter/adapter_config.json").read_text()).get("target_parameters"):
        compare(f"{source.name}: ours, trained", folder, run / "adapter", ids, plain)
shutil.rmtree(tmp); sys.exit(bad > 0)
