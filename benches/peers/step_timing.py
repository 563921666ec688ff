"""What the peers' step benchmarks share: command line, shapes, the timed loop, and the line of JSON for each case.

Steps are those of `qlora-bench step`: random tokens that all have a label, bf16 autocast, f32 adapters of alpha 16 on
every linear layer of the blocks, gradients clipped at 0.3, bitsandbytes' paged optimizer. The time of a step ends with
a synchronisation; the median counts. `allocated` and `reserved` are the highest of torch's allocator. `driver` is
nvidia-smi's figure after the last step, less what was used before this process: the paged optimizer's state is CUDA's
managed memory, which the allocator does not count. With `--base bf16`, where a peer takes it, the base is not quantized and the
optimizer is torch's own AdamW: what can be measured without bitsandbytes.

Under `torchrun --nproc-per-node N` the N processes are ranks of DistributedDataParallel, each with a card and micro-batches of its own:
gradients are summed in the backward pass of a step's last one. Rank 0 answers, with the tokens of all.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import pathlib
import statistics
import subprocess
import time
import typing

# RoPE's scaling is left out: no time depends on it.
SHAPES = {
    "llama-2-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=32),
    "llama-3.1-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8),
    "llama-2-13b": dict(vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                        num_attention_heads=40, num_key_value_heads=40),
    "llama-2-70b": dict(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                        num_attention_heads=64, num_key_value_heads=8),
    "tiny": dict(vocab_size=4096, hidden_size=128, intermediate_size=344, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2),
}
# Other shapes are read from the files that `qlora-bench` has them from.
TESTDATA = pathlib.Path(__file__).parents[2] / "testdata"
CONFIGS = {}
for file in ("moe_shapes.json", "linear_shapes.json", "latent_shapes.json", "gemma_shapes.json"):
    CONFIGS |= json.loads((TESTDATA / file).read_text())
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = {"adamw_32bit": "PagedAdamW32bit", "adamw_8bit": "PagedAdamW8bit", "lion_8bit": "PagedLion8bit"}


class Case(typing.NamedTuple):
    """Rows of a micro-batch and their tokens. A pair is two such rows: `ROWSxTOKENS-pairs`, and of `-pairs-ahead` the reference's
    log-probabilities are known."""

    rows: int
    length: int
    kind: str = ""

    def __str__(self):
        return f"{self.rows}x{self.length}{self.kind}"

    @property
    def is_pairs(self):
        return self.kind != ""

    @property
    def tokens(self):
        return self.rows * self.length * (2 if self.is_pairs else 1)


def case_of(text):
    kind = next((kind for kind in ("-pairs", "-pairs-ahead") if text.endswith(kind)), "")
    rows, length = text.removesuffix(kind).split("x")
    return Case(int(rows), int(length), kind)


def arguments(pairs=False, options=lambda parser: None):
    """The command line; `pairs` says which cases are measured where none is named, `options` adds a peer's own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=[*SHAPES, *CONFIGS], default="llama-2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--words", type=int)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw_32bit")
    parser.add_argument("--base", choices=["nf4", "bf16"], default="nf4")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("cases", nargs="*", type=case_of, metavar="ROWSxTOKENS[-pairs[-ahead]]")
    options(parser)
    args = parser.parse_args()
    defaults = ["2x1024-pairs", "2x1024-pairs-ahead"] if pairs else ["1x2048", "4x2048"]
    args.cases = args.cases or [case_of(text) for text in defaults]
    return args


def is_config(args):
    """Whether the shape is a whole config.json, and no Llama's sizes."""
    return args.shape in CONFIGS


def has_experts(args):
    return "num_experts_per_tok" in sizes(args)


def sizes(args):
    shape = dict(CONFIGS[args.shape] if is_config(args) else SHAPES[args.shape])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    if args.words:
        shape["vocab_size"] = args.words
    return shape


def ranks():
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join():
    """Takes this process's card, and meets the others."""
    import torch

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ranks() > 1:
        torch.distributed.init_process_group("nccl")


def together(model):
    """The model as a rank trains it, and what keeps a micro-batch's gradients to itself."""
    import torch

    if ranks() == 1:
        return model, contextlib.nullcontext
    card = torch.cuda.current_device()
    model = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[card], gradient_as_bucket_view=True, static_graph=True
    )
    return model, model.no_sync


def used_bytes():
    """What the driver counts as used on the first card that this process sees."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", "-i", card, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def measure(args, case, build, steps, before):
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, loss, used = steps(args, case, build(args, case))
    seconds = statistics.median(seconds[args.warm_up:])
    return {
        "step_seconds": seconds,
        "tokens_per_second": ranks() * case.tokens * args.accumulation / seconds,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "driver_bytes": None if None in (used, before) else used - before,
        # JSON has no other numbers.
        "loss": loss if math.isfinite(loss) else None,
    }


def supervised(args, case, model):
    """Steps on full rows of random tokens: seconds of each, the last micro-batch's loss, and the driver's figure while the optimizer's state
    is there."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.base == "bf16":
        optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    else:
        import bitsandbytes as bnb

        optimizer = getattr(bnb.optim, OPTIMIZERS[args.optimizer])(parameters, lr=2e-4)
    vocab = sizes(args)["vocab_size"]
    model, apart = together(model)
    seconds = []
    for _ in range(args.warm_up + args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for micro_step in range(args.accumulation):
            ids = torch.randint(0, vocab, (case.rows, case.length), device="cuda")
            with contextlib.nullcontext() if micro_step + 1 == args.accumulation else apart():
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss / args.accumulation
                loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    used = used_bytes()
    return seconds, loss.item() * args.accumulation, used


def run(args, peer, build, before, steps=supervised, pairs=False):
    """Answers for every case with what `build(args, case)` makes, of which `steps(args, case, built)` runs warm-up and timed steps, and
    returns what `supervised` does. A case of pairs for a peer of full rows, and the other way round, has an error for an answer."""
    join()
    if ranks() > 1:
        peer += f", {ranks()} ranks"
    for case in args.cases:
        answer = {"peer": peer, "case": str(case)}
        try:
            if case.is_pairs != pairs:
                raise ValueError(f"this peer's steps are on {'pairs' if pairs else 'full rows'} alone")
            answer |= measure(args, case, build, steps, before)
        except Exception as error:  # out of memory among them: the next case may fit
            answer["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(answer), flush=True)


def missing(args, peer, error):
    """Answers for every case of a peer that can't be imported."""
    for case in args.cases:
        print(json.dumps({"peer": peer, "case": str(case), "error": f"can't be imported: {error}"[:200]}), flush=True)
