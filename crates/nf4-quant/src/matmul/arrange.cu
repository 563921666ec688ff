// A LoRA factor in 16 bits and in the row order of the product's fragments. See arrange.rs.

typedef unsigned int u32;

struct Params {
    u32 features, rank, padded_features, padded_rank, transposed, permuted;
};

__device__ __forceinline__ u32 pack2(float lo, float hi) {
    u32 d;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#endif
    return d;
}

// Eight neighbours of a row per thread: rows are padded to multiples of eight.
extern "C" __global__ void __launch_bounds__(256) arrange(
    const float* __restrict__ factor, uint4* __restrict__ out, const __grid_constant__ Params p
) {
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    const u32 cols = (p.transposed ? p.padded_features : p.padded_rank) / 8;
    const u32 row = at / cols, col = at % cols * 8;
    if (row >= (p.transposed ? p.padded_rank : p.padded_features)) return;
    float v[8];
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        const u32 position = p.transposed ? col + i : row, k = p.transposed ? row : col + i;
        u32 feature = position;
        if (p.permuted) {
            // Position in wgmma's rows of a tile: warp group, warp, half (eight rows apart), row.
            const u32 group = position / 64 % 2, warp = position / 16 % 4, half = position / 8 % 2, g = position % 8;
            feature = position / 128 * 128 +
                      (p.transposed ? warp * 32 + g * 4 + group * 2 + half : group * 64 + warp * 16 + g * 2 + half);
        }
        const bool there = feature < p.features && k < p.rank;
        v[i] = there ? factor[p.transposed ? (size_t)k * p.features + feature : (size_t)feature * p.rank + k] : 0.0f;
    }
    out[at] = make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}
