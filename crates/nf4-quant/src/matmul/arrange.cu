// A LoRA factor in 16 bits and in the row order of the product's fragments. See arrange.rs.

struct Params {
    u32 features, rank, padded_features, padded_rank, transposed, permuted;
};

extern "C" __global__ void __launch_bounds__(256) arrange(
    const float* __restrict__ factor, u16* __restrict__ out, const __grid_constant__ Params p
) {
    const u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at >= p.padded_features * p.padded_rank) return;
    const u32 cols = p.transposed ? p.padded_features : p.padded_rank;
    const u32 position = p.transposed ? at % cols : at / cols, k = p.transposed ? at / cols : at % cols;
    u32 feature = position;
    if (p.permuted) {
        // Position in wgmma's rows of a tile: warp group, warp, half (eight rows apart), row.
        const u32 group = position / 64 % 2, warp = position / 16 % 4, half = position / 8 % 2, g = position % 8;
        feature = position / 128 * 128 +
                  (p.transposed ? warp * 32 + g * 4 + group * 2 + half : group * 64 + warp * 16 + g * 2 + half);
    }
    float value = 0.0f;
    if (feature < p.features && k < p.rank)
        value = p.transposed ? factor[(size_t)k * p.features + feature] : factor[(size_t)feature * p.rank + k];
    out[at] = narrow(value);
}
