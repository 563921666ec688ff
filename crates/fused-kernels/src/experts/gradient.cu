// The gradients of the low-rank factors of all experts on tensor cores: D[rank, feature] = P^T X over an expert's rows.
//
// A cube takes 128 features and up to 64 ranks of one expert, a warp 32 of the features. Rows come 32 at a time: X by
// cp.async, two chunks ahead; P through registers, where it is weighed. Both contract over rows, which lie in different
// places of memory, so fragments of either come out of shared memory transposed.
//
// `tensor_cores!` comes before. Defined before this text: F16, TILES (of 16 ranks), WEIGHTED, RANK_FIRST.

#define THREADS 128
#define FEATURES 128
#define ROWS 32
#define STAGES 3
#define X_BYTES (ROWS * FEATURES * 2)
#define P_STRIDE (TILES * 32 + 16)  // bytes of a row of P, shifted so that eight rows meet every bank once
#define P_CHUNKS (ROWS * TILES * 2) // 16 bytes each

struct Params {
    u32 features;
    u32 rank;
    u32 entries;  // position of the rows' entries in the words
    u32 offsets;  // position of the experts' first rows
};

struct Shared {
    u8 x[STAGES][X_BYTES];
    u8 p[2][ROWS * P_STRIDE];
};

extern "C" __global__ void __launch_bounds__(THREADS) expert_gradient(
    const u16* __restrict__ x,          // [rows, features]
    const u16* __restrict__ product,    // [rows, rank]
    const float* __restrict__ weights,  // of an entry
    const u32* __restrict__ words,
    float* __restrict__ out,            // [experts, rank, features] or [experts, features, rank]
    const __grid_constant__ Params p
) {
    __shared__ alignas(128) Shared s;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const u32 first_feature = blockIdx.x * FEATURES, first_rank = blockIdx.y * (TILES * 16), expert = blockIdx.z;
    const u32 start = words[p.offsets + expert], end = words[p.offsets + expert + 1];
    const u32 chunks = (end - start + ROWS - 1) / ROWS;

    // Chunk thread % 16, eight features, of rows thread / 16 + 8 i. Its place depends on the row, so that the eight rows
    // of ldmatrix meet every bank once. What is beyond the end is zeros.
    const u32 column = first_feature + thread % 16 * 8;
    auto copy_x = [&](u32 chunk) {
        if (chunk < chunks) {
            const u32 to = shared_address(s.x[chunk % STAGES]);
#pragma unroll
            for (u32 i = 0; i < ROWS / 8; i++) {
                const u32 row = thread / 16 + 8 * i, from = start + chunk * ROWS + row;
                const bool valid = from < end && column < p.features;
                copy_async(to + row * (FEATURES * 2) + (thread % 16 ^ row % 8) * 16, x + (valid ? (u64)from * p.features + column : 0), valid);
            }
        }
        commit();
    };

    // P: chunks of eight ranks, TILES * 2 of a row.
    constexpr u32 EACH = (P_CHUNKS + THREADS - 1) / THREADS;
    uint4 held[EACH];
    auto load_p = [&](u32 chunk) {
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            const u32 at = thread + i * THREADS, row = start + chunk * ROWS + at / (TILES * 2), k = first_rank + at % (TILES * 2) * 8;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (at < P_CHUNKS && row < end && k < p.rank) {
                v = *(const uint4*)(product + (u64)row * p.rank + k);
#if WEIGHTED
                const float weight = weights[words[p.entries + row]];
                u32* pairs = (u32*)&v;
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    float low, high;
                    unpack(pairs[j], low, high);
                    pairs[j] = pack(low * weight, high * weight);
                }
#endif
            }
            held[i] = v;
        }
    };
    auto store_p = [&](u32 chunk) {
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            const u32 at = thread + i * THREADS;
            if (at < P_CHUNKS) *(uint4*)(s.p[chunk % 2] + at / (TILES * 2) * P_STRIDE + at % (TILES * 2) * 16) = held[i];
        }
    };

    float d[TILES][4][4] = {};
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) copy_x(i);
    if (chunks > 0) {
        load_p(0);
        store_p(0);
    }
    // ldmatrix: lane l gives the address of row l % 8 of matrix l / 8.
    const u32 p_at = (lane / 16 * 8 + lane % 8) * P_STRIDE + lane / 8 % 2 * 16;
    const u32 x_row = lane / 8 % 2 * 8 + lane % 8;
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();
        copy_x(chunk + STAGES - 1);
        if (chunk + 1 < chunks) load_p(chunk + 1);
        const u32 at_x = shared_address(s.x[chunk % STAGES]), at_p = shared_address(s.p[chunk % 2]);
#pragma unroll
        for (u32 step = 0; step < ROWS / 16; step++) {
            u32 b[2][4];
#pragma unroll
            for (u32 j = 0; j < 2; j++)
                load_matrices_transposed(b[j], at_x + (step * 16 + x_row) * (FEATURES * 2) + ((warp * 4 + j * 2 + lane / 16) ^ x_row % 8) * 16);
#pragma unroll
            for (u32 tile = 0; tile < TILES; tile++) {
                u32 a[4];
                load_matrices_transposed(a, at_p + step * 16 * P_STRIDE + p_at + tile * 32);
#pragma unroll
                for (u32 j = 0; j < 4; j++) mma(d[tile][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
        if (chunk + 1 < chunks) store_p(chunk + 1);
    }
    wait_for_all_but<0>();

    const u64 of_expert = (u64)expert * p.features * p.rank;
#pragma unroll
    for (u32 tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u32 feature = first_feature + warp * 32 + j * 8 + lane % 4 * 2;
            if (feature >= p.features) continue;
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 k = first_rank + tile * 16 + h * 8 + lane / 4;
                if (k >= p.rank) continue;
                const float y0 = d[tile][j][2 * h], y1 = d[tile][j][2 * h + 1];
#if RANK_FIRST
                *(float2*)(out + of_expert + (u64)k * p.features + feature) = make_float2(y0, y1);
#else
                out[of_expert + (u64)feature * p.rank + k] = y0;
                out[of_expert + (u64)(feature + 1) * p.rank + k] = y1;
#endif
            }
        }
    }
}
