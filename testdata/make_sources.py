"""Records weights in the storages that are decoded while they are read, and what the libraries that write them make of them.

usage: make_sources.py testdata/reference/sources

Written with transformers 5.24 (FP8, gpt-oss's MXFP4), compressed-tensors 0.20.1 and GPTQModel 7.7.0 (GPTQ, AWQ) with torch
2.15 on a CPU. Each folder has the linear layers of one small llama block in one storage:

    quantization_config.json    as config.json has it, and the model's dtype
    coded.safetensors           what the files of such a checkpoint hold
    decoded.safetensors         the libraries' values of some weights
    decoded.json                SHA-256 of the bytes of all of them, with type and shape

Weights are random; the codes come from rounding to the nearest, whose quality does not matter here.
"""
import hashlib, json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

OUT = Path(sys.argv[1])
HIDDEN, HEAD, INNER = 64, 32, 32
SHAPES = {"self_attn.q_proj": (HEAD, HIDDEN), "self_attn.k_proj": (HEAD, HIDDEN), "self_attn.v_proj": (HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEAD),
          "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
KEPT = ("odd.weight", "experts.gate_up_proj", "gate_proj.weight")
FP8 = torch.float8_e4m3fn


def weights(seed, more={}):
    torch.manual_seed(seed)
    shapes = SHAPES | more
    rows = lambda n: torch.exp(torch.randn(n, 1) * 0.7)
    return {name: torch.randn(*shape) * 0.05 * rows(shape[0]) for name, shape in shapes.items()}


def record(name, config, coded, decoded, dtype="bfloat16"):
    path = OUT / name
    path.mkdir(parents=True, exist_ok=True)
    prefix = lambda tensors: {f"model.layers.0.{key}": value.detach().contiguous() for key, value in tensors.items()}
    coded, decoded = prefix(coded), prefix(decoded)
    (path / "quantization_config.json").write_text(json.dumps({"dtype": dtype, "quantization_config": config}, indent=1) + "\n")
    save_file(coded, path / "coded.safetensors", metadata={"format": "pt"})
    save_file({key: value for key, value in decoded.items() if key.endswith(KEPT)}, path / "decoded.safetensors", metadata={"format": "pt"})
    raw = lambda value: value.view(torch.uint8).numpy().tobytes()
    facts = {key: dict(dtype=str(value.dtype)[6:], shape=list(value.shape), sha256=hashlib.sha256(raw(value)).hexdigest()) for key, value in decoded.items()}
    (path / "decoded.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


# FP8 of transformers and of DeepSeek and Qwen.

def decode_fp8(coded, scale, dtype=torch.bfloat16):
    return Fp8Dequantize(None)._dequantize_one(coded, scale, output_dtype=dtype)


def fp8_blocks(weight, rows, columns, scale_dtype=torch.float32):
    n, k = weight.shape
    down, across = -(-n // rows), -(-k // columns)
    padded = torch.zeros(down * rows, across * columns)
    padded[:n, :k] = weight
    blocks = padded.view(down, rows, across, columns)
    scale = blocks.abs().amax((1, 3)) / 448
    if scale_dtype == torch.uint8:
        exponents = torch.ceil(torch.log2(scale)).clamp(-127, 127)
        scale, stored = torch.exp2(exponents), (exponents + 127).to(torch.uint8)
    else:
        stored = scale.to(scale_dtype)
        scale = stored.float()
    codes = (blocks / scale[:, None, :, None]).to(FP8).view(down * rows, across * columns)
    # Blocks at the edge are cut off; the formula is that of DeepSeek's own kernel, which masks what is beyond.
    return codes[:n, :k].contiguous(), stored, decode_fp8(codes, stored)[:n, :k].contiguous()


coded, decoded = {}, {}
for name, weight in weights(1, {"odd": (40, 72)}).items():
    scale_dtype = torch.bfloat16 if "v_proj" in name else torch.float32
    coded[f"{name}.weight"], coded[f"{name}.weight_scale_inv"], decoded[f"{name}.weight"] = fp8_blocks(weight, 32, 16, scale_dtype)
record("fp8-blocks", {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 16], "modules_to_not_convert": ["lm_head"]}, coded, decoded)

coded, decoded = {}, {}
for name, weight in weights(2).items():
    scale = (weight.abs().max() / 448).to(torch.bfloat16)
    codes = (weight / scale.float()).to(FP8)
    coded |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale, f"{name}.activation_scale": torch.tensor(0.5, dtype=torch.bfloat16)}
    decoded[f"{name}.weight"] = decode_fp8(codes, scale.reshape(1, 1))
record("fp8-tensor", {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, coded, decoded)

coded, decoded = {}, {}
for name, weight in weights(3).items():
    coded[f"{name}.weight"], coded[f"{name}.weight_scale_inv"], decoded[f"{name}.weight"] = fp8_blocks(weight, 1, 32, torch.uint8)
record("mxfp8", {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, coded, decoded)

# gpt-oss.

torch.manual_seed(4)
blocks = torch.randint(0, 256, (2, 10, 3, 16), dtype=torch.uint8)
scales = torch.randint(115, 125, (2, 10, 3), dtype=torch.uint8)
scales[0, 0] = torch.tensor([0, 1, 254], dtype=torch.uint8)
blocks[0, 0, 2] &= 0x99
record("mxfp4-gpt-oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
       {"mlp.experts.gate_up_proj_blocks": blocks, "mlp.experts.gate_up_proj_scales": scales},
       {"mlp.experts.gate_up_proj": convert_moe_packed_tensors(blocks, scales)})

# compressed-tensors.

def compressed(format, weight, dtype=torch.bfloat16, **args):
    args = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    n, k = weight.shape
    strategy, size = args.strategy, args.group_size
    view = {"tensor": (1, 1, 1, n * k), "channel": (n, 1, 1, k), "group": (n, 1, k // (size or 1), -1), "tensor_group": (n, 1, k // (size or 1), -1)}
    state, more = {"weight": weight.to(dtype)}, {}
    if strategy == "block":
        rows, columns = args.block_structure
        down, across = -(-n // rows), -(-k // columns)
        padded = torch.zeros(down * rows, across * columns)
        padded[:n, :k] = weight
        parts = padded.view(down, rows, across, columns)
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    else:
        parts = weight.view(view[strategy])
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    if strategy == "tensor_group":
        more["global_scale"] = (448 * 6 / weight.abs().max()).reshape(1).float()
        state["weight_global_scale"] = more["global_scale"]
    if strategy == "tensor":
        low, high = low.reshape(1), high.reshape(1)
    scale, zero = calculate_qparams(low, high, args, **more)
    state["weight_scale"] = scale.to(dtype) if args.scale_dtype is None else scale.float()
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(dict(packed), scheme)["weight"], json.loads(scheme.weights.model_dump_json())


def record_compressed(name, format, chosen, more={}, seed=5):
    coded, decoded, groups = {}, {}, {}
    for layer, weight in weights(seed, more).items():
        args = chosen(layer)
        packed, value, said = compressed(format, weight, **args)
        coded |= {f"{layer}.{key}": part for key, part in packed.items() if part is not None}
        decoded[f"{layer}.weight"] = value
        groups[json.dumps(args, sort_keys=True, default=str)] = dict(targets=["Linear"], weights=said, format=format)
    groups = {f"group_{i}": group for i, group in enumerate(groups.values())}
    record(name, {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "config_groups": groups, "ignore": ["lm_head"]}, coded, decoded)


FLOAT8 = dict(num_bits=8, type="float")
record_compressed("compressed-tensors-fp8", "float-quantized", lambda layer: FLOAT8 | (
    dict(strategy="block", block_structure=[32, 16]) if "mlp" in layer or layer == "odd" else dict(strategy="tensor") if "v_proj" in layer else dict(strategy="channel")), {"odd": (40, 72)})
INT8 = dict(num_bits=8, type="int", strategy="channel")
record_compressed("compressed-tensors-int8", "int-quantized", lambda layer: INT8 | dict(symmetric="mlp" in layer), seed=6)
record_compressed("compressed-tensors-int4", "pack-quantized", lambda layer: (
    dict(num_bits=8, type="int", strategy="channel", symmetric=True) if "v_proj" in layer
    else dict(num_bits=4, type="int", strategy="channel", symmetric=True) if layer == "odd"
    else dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric="mlp" in layer)), {"odd": (40, 51)}, seed=7)
record_compressed("compressed-tensors-nvfp4", "nvfp4-pack-quantized", lambda layer: dict(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=FP8), seed=8)
record_compressed("compressed-tensors-mxfp4", "mxfp4-pack-quantized", lambda layer: dict(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8), seed=9)

# GPTQ and AWQ.

def in_words(codes, bits, across):
    """Codes along the dimension `across`, the first in the low bits."""
    codes = codes.to(torch.int64).movedim(across, -1)
    each = 32 // bits
    words = (codes.reshape(*codes.shape[:-1], -1, each) << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, across).contiguous()


def rounded(weight, bits, group, symmetric, dtype=torch.float16, order=None):
    """Codes [out, in], scales and zero points [groups, out], and the group of each input."""
    n, k = weight.shape
    places = torch.arange(k) // group
    if order is not None:
        shuffled = torch.empty_like(places)
        shuffled[order] = places
        places = shuffled
    top, scales, zeros = 2**bits - 1, [], []
    for g in range(k // group):
        part = weight[:, places == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scale, zero = torch.maximum(-low, high) * 2 / top, torch.full((n,), 2 ** (bits - 1))
        else:
            scale = (high - low) / top
            # The first version of the format has no zero point of 0.
            zero = (-low / scale).round().clamp(1, top).to(torch.int64)
        scales.append(scale.to(dtype))
        zeros.append(zero)
    scales, zeros = torch.stack(scales), torch.stack(zeros)
    codes = (weight / scales.float()[places].T + zeros[places].T).round().clamp(0, top).to(torch.int64)
    return codes, scales, zeros, places.to(torch.int32)


def gptq(weight, bits, group, symmetric, version, order=None, dtype=torch.float16):
    n, k = weight.shape
    codes, scales, zeros, places = rounded(weight, bits, group, symmetric, dtype, order)
    parts = dict(qweight=in_words(codes.T, bits, 0), qzeros=in_words((zeros - int(version == 1)) & (2**bits - 1), bits, 1), scales=scales, g_idx=places)
    module = TorchLinear(bits=bits, group_size=group, sym=symmetric, desc_act=order is not None, in_features=k, out_features=n)
    for key, value in parts.items():
        module.register_buffer(key, value.clone())
    if version == 1:
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    return parts, module.dequantize_weight().T.contiguous()


def record_gptq(name, bits, group, symmetric, version, seed, act_order=False, dtype=torch.float16, more={}):
    coded, decoded = {}, {}
    for layer, weight in weights(seed, more).items():
        order = torch.randperm(weight.shape[1]) if act_order else None
        own = weight.shape[1] if layer == "odd" else group
        parts, decoded[f"{layer}.weight"] = gptq(weight, bits, own, symmetric, version, order, dtype)
        if not act_order and "mlp" in layer:
            del parts["g_idx"]
        coded |= {f"{layer}.{key}": part for key, part in parts.items()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric, "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "lm_head": False}
    record(name, config, coded, decoded, "float16")


record_gptq("gptq", 4, 32, True, 1, 10)
record_gptq("gptq-act-order", 4, 16, False, 1, 11, act_order=True)
record_gptq("gptq-v2", 4, 32, False, 2, 12, dtype=torch.bfloat16)
record_gptq("gptq-8-bits", 8, 32, False, 1, 13)

coded, decoded = {}, {}
for layer, weight in weights(14).items():
    codes, scales, zeros, _ = rounded(weight, 4, 32, False)
    qweight, qzeros = pack_awq(codes.T.contiguous(), zeros, 4)
    coded |= {f"{layer}.qweight": qweight, f"{layer}.qzeros": qzeros, f"{layer}.scales": scales}
    decoded[f"{layer}.weight"] = dequantize_gemm(qweight, qzeros, scales, 4, 32).T
record("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}, coded, decoded, "float16")
