"""Times bitsandbytes' 4-bit kernels and torch's matmul on the shapes that qlora-bench asks for.

Reads a JSON array of operations from standard input, {"id", "op", sizes...}; prints one JSON line about itself
and its ceilings, then {"id", "seconds"} or {"id", "error"} for each. Timed as qlora-bench times: the median of 15
windows of about 2 ms, two events on the stream around the calls, with a waiting kernel in front so that all of a
window's calls are queued before the first one runs; buffers rotate through three times the L2 cache.

usage: python3 bench_kernels_bnb.py < operations.json      (bitsandbytes on PYTHONPATH; one CUDA GPU)
"""

import json
import sys
import time

import torch

DEVICE = "cuda"
WINDOWS, WINDOW, MAX_CALLS, MAX_WAIT = 15, 2e-3, 64, 0.05
CACHES, MAX_SETS = 3, 256


def sets(make, nbytes):
    """As many sets of buffers as three L2 caches hold."""
    cache = CACHES * torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(max(1, min(MAX_SETS, -(-cache // nbytes))))]


def wait(seconds):
    # _sleep counts cycles; at the highest clock it is at least that long.
    torch.cuda._sleep(int(seconds * 2.0e9))


def window(call, start, calls, wait_seconds):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    t = time.perf_counter()
    if wait_seconds:
        wait(wait_seconds)
    begin.record()
    for i in range(calls):
        call(start + i)
    end.record()
    host = time.perf_counter() - t
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls, host


def measure(call):
    """Median seconds of a call, which gets the number of its set of buffers."""
    n = 0
    for _ in range(3):
        call(n)
        n += 1
    wait_seconds = 2e-4
    seconds, _ = window(call, n, 1, wait_seconds)
    calls = max(1, min(MAX_CALLS, int(WINDOW / max(seconds, 1e-7))))
    for _ in range(4):
        n += calls
        _, host = window(call, n, calls, wait_seconds)
        if host < wait_seconds or wait_seconds >= MAX_WAIT:
            break
        wait_seconds = min(MAX_WAIT, max(2 * wait_seconds, 1.5 * host))
    times = []
    for _ in range(WINDOWS):
        n += calls
        times.append(window(call, n, calls, wait_seconds)[0])
    return sorted(times)[WINDOWS // 2]


def normal(*shape, scale=1.0, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE, dtype=dtype) * scale


def quantized(op):
    import bitsandbytes.functional as F

    w = normal(op["out"], op["in"], scale=0.02)
    return F.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=op.get("nested", True))


def weight_bytes(op):
    return op["out"] * op["in"] // 2


def dequantize(op):
    import bitsandbytes.functional as F

    s = sets(lambda: (*quantized(op), torch.empty(op["out"], op["in"], device=DEVICE, dtype=torch.bfloat16)),
             weight_bytes(op) * 5)
    return lambda i: F.dequantize_4bit(s[i % len(s)][0], s[i % len(s)][1], out=s[i % len(s)][2])


def quantize(op):
    import bitsandbytes.functional as F

    s = sets(lambda: normal(op["out"], op["in"], scale=0.02), weight_bytes(op) * 5)
    nested = op.get("nested", True)
    return lambda i: F.quantize_4bit(s[i % len(s)], quant_type="nf4", blocksize=64, compress_statistics=nested)


def matmul_4bit(op):
    """y = x W^T; one token takes bitsandbytes' gemv kernel, as in its own layers."""
    import bitsandbytes as bnb

    s = sets(lambda: (normal(1, op["tokens"], op["in"]), *quantized(op)),
             weight_bytes(op) + 2 * op["tokens"] * (op["in"] + op["out"]))

    def call(i):
        x, w, state = s[i % len(s)]
        return bnb.matmul_4bit(x, w.t(), quant_state=state)

    return call


def matmul_4bit_gradient(op):
    """dx = dy W, as bitsandbytes' backward does it."""
    import bitsandbytes.functional as F

    s = sets(lambda: (normal(op["tokens"], op["out"]), *quantized(op)),
             weight_bytes(op) + 2 * op["tokens"] * (op["in"] + op["out"]))

    def call(i):
        dy, w, state = s[i % len(s)]
        return torch.matmul(dy, F.dequantize_4bit(w, state).to(dy.dtype))

    return call


def lora_linear_4bit(op):
    """y = x W^T + scaling (x A^T) B^T, as PEFT composes it under bf16 autocast: f32 factors are cast."""
    import bitsandbytes as bnb

    r = op["rank"]
    a, b = normal(r, op["in"], dtype=torch.float32), normal(op["out"], r, dtype=torch.float32)
    s = sets(lambda: (normal(1, op["tokens"], op["in"]), *quantized(op)),
             weight_bytes(op) + 2 * op["tokens"] * (op["in"] + op["out"]))

    def call(i):
        x, w, state = s[i % len(s)]
        y = bnb.matmul_4bit(x, w.t(), quant_state=state)
        low = torch.nn.functional.linear(torch.nn.functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return y + low * 0.25

    return call


def matmul(op):
    """[m, k] by [k, n]; layout nt: the second operand is stored [n, k]; tn: the first one [k, m]."""
    m, k, n, layout = op["m"], op["k"], op["n"], op.get("layout", "nt")

    def make():
        a = normal(k, m).t() if layout == "tn" else normal(m, k)
        b = normal(n, k).t() if layout == "nt" else normal(k, n)
        return a, b, torch.empty(m, n, device=DEVICE, dtype=torch.bfloat16)

    s = sets(make, 2 * (m * k + k * n + m * n))
    return lambda i: torch.matmul(s[i % len(s)][0], s[i % len(s)][1], out=s[i % len(s)][2])


def attention_operands(op):
    """Views as projections give them: tokens before heads in memory."""
    rows, length, dim = op["rows"], op["len"], op["head_dim"]
    return [normal(rows, length, op[heads], dim).transpose(1, 2) for heads in ("heads", "kv_heads", "kv_heads")]


def attention_bytes(op):
    return 4 * op["rows"] * op["len"] * op["head_dim"] * (op["heads"] + op["kv_heads"])


def attend(op, q, k, v):
    grouped = op["heads"] != op["kv_heads"]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def attention(op):
    """Causal; torch picks the kernel (flash attention or cuDNN's)."""
    s = sets(lambda: attention_operands(op), attention_bytes(op))
    return lambda i: attend(op, *s[i % len(s)])


def attention_backward(op):
    """The gradients of q, k and v alone, on a graph that is kept."""

    def make():
        with torch.enable_grad():
            operands = [x.requires_grad_() for x in attention_operands(op)]
            o = attend(op, *operands)
        return operands, o, torch.randn_like(o)

    s = sets(make, 2 * attention_bytes(op))

    def call(i):
        operands, o, d_out = s[i % len(s)]
        return torch.autograd.grad(o, operands, d_out, retain_graph=True)

    return call


def delta_rule_operands(op):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tokens, dim = (op["rows"], op["len"]), op["dim"]
    q, k = (normal(*tokens, op["key_heads"], dim) / dim**0.5 for _ in range(2))
    v = normal(*tokens, op["value_heads"], dim)
    g, beta = (torch.full((*tokens, op["value_heads"]), x, device=DEVICE) for x in (-0.1, 0.5))
    return chunk_gated_delta_rule, (q, k, v, g, beta)


def delta_rule_bytes(op):
    return 4 * op["rows"] * op["len"] * op["dim"] * (op["key_heads"] + op["value_heads"])


def delta_rule(op):
    """flash-linear-attention's, scaled queries and all, beside ours, whose caller scales them."""
    s = sets(lambda: delta_rule_operands(op), delta_rule_bytes(op))

    def call(i):
        rule, operands = s[i % len(s)]
        return rule(*operands)[0]

    return call


def delta_rule_backward(op):
    """The gradients of all five operands alone, on a graph that is kept."""

    def make():
        with torch.enable_grad():
            rule, operands = delta_rule_operands(op)
            operands = [x.requires_grad_() for x in operands]
            o = rule(*operands)[0]
        return operands, o, torch.randn_like(o)

    s = sets(make, 2 * delta_rule_bytes(op))

    def call(i):
        operands, o, d_out = s[i % len(s)]
        return torch.autograd.grad(o, operands, d_out, retain_graph=True)

    return call


OPERATIONS = {
    f.__name__: f
    for f in (dequantize, quantize, matmul_4bit, matmul_4bit_gradient, lora_linear_4bit, matmul, attention,
              attention_backward, delta_rule, delta_rule_backward)
}


def ceilings():
    n = 1 << 29
    a, b = normal(n), torch.empty(n, device=DEVICE, dtype=torch.bfloat16)
    bandwidth = 4 * n / measure(lambda i: b.copy_(a))
    del a, b
    flops = max(2 * n**3 / measure(matmul({"m": n, "k": n, "n": n})) for n in (4096, 8192))
    return bandwidth, flops


@torch.no_grad()
def main():
    operations = json.load(sys.stdin)
    versions = {"torch": torch.__version__}
    try:
        import bitsandbytes

        versions["bitsandbytes"] = bitsandbytes.__version__
    except ImportError as error:
        print(f"bitsandbytes: {error}", file=sys.stderr)
    bandwidth, flops = ceilings()
    print(json.dumps({"versions": versions, "bandwidth": bandwidth, "flops": flops}), flush=True)
    for op in operations:
        try:
            answer = {"id": op["id"], "seconds": measure(OPERATIONS[op["op"]](op))}
        except Exception as error:  # one case that does not run must not end the others
            answer = {"id": op["id"], "error": f"{type(error).__name__}: {error}"}
        torch.cuda.empty_cache()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
