// The low-rank products of LoRA; `low_rank.rs` has the idea. `tensor_cores!` comes before, and these macros:
//
//   KIND       0: pack a factor, 1: project (contraction over features), 2: gradient (over tokens),
//              3: sum the partial results of 1 (PROJECT 1) or 2 (PROJECT 0)
//   F16        1: the 16-bit dtype is f16, 0: bf16
//   MT         tiles of 8 tokens, or of 16 features in a gradient, per warp
//   NT         tiles of 16 ranks, or of 8 in a gradient, per warp
//   WARPS_M, WARPS_N, WARPS_K   warps along rows, along ranks, along the contraction
//   DEPTH      panels of the large operand that each warp has in flight, in registers
//   SPLITS     cubes of a cluster, which share one tile's contraction; 0: splits go through scratch memory
//   LAST_ADDS  1: the last cube of a tile adds what its splits have in scratch memory; 0: a launch of KIND 3 does
//   DROPOUT    1: mask the large operand
//   ALIGNED    1: rows of the large operand start at multiples of 16 bytes
//   SMALL_ALIGNED   the same of the gradient's small operand
//   MIN_CUBES  cubes per multiprocessor that registers must leave room for

struct Params {
    u32 seed_low, seed_high;
    u32 tokens;
    u32 features;
    u32 rank;
    u32 splits;
    u32 threshold;  // dropout: elements whose bits are below are zero
    float scale;    // of the sums; dropout's is in it
    u32 flags;
};
// Project: the output is f32.
#define FLAG_F32_OUT 1u
// Gradient: the output is [features, rank], not [rank, features]. Pack: so is the factor.
#define FLAG_FEATURES_FIRST 2u

#define LANES 32
#define THREADS (LANES * WARPS_M * WARPS_N * WARPS_K)
#if KIND == 0 || KIND == 1 || (KIND == 3 && PROJECT)
#define IS_PROJECT 1
#define ROW_TILE 8
#define RANK_TILE 16
#define PANEL 32  // of the contraction, per warp and step
#else
#define IS_PROJECT 0
#define ROW_TILE 16
#define RANK_TILE 8
#define PANEL 16
#endif
#define ROWS (WARPS_M * MT * ROW_TILE)
#define RANK_PADDED (WARPS_N * NT * RANK_TILE)

// ---------------------------------------------------------------------------------------------- pack

#if KIND == 0

// f32 [rank, features] (or [features, rank]) to 16 bits, in the order in which mma takes it as its first
// operand: [panel of 32 features][tile of 16 ranks][half][lane][4 registers], zero where there is no factor.
// Row g of a tile is rank 2g and row g + 8 rank 2g + 1, so that a lane's results are neighbours in the output;
// lane t of a quad has features 8t to 8t + 7 of a panel, as it has of the large operand.
extern "C" __global__ void __launch_bounds__(256)
low_rank_pack(const float* __restrict__ factor, uint4* __restrict__ packed, const __grid_constant__ Params p) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    u32 panel = i / (RANK_PADDED / 16 * 64);
    if (panel * 32 >= p.features) return;
    u32 lane = i % 32, half = i / 32 % 2, tile = i / 64 % (RANK_PADDED / 16);
    u32 n = tile * 16 + lane / 4 * 2, k = panel * 32 + lane % 4 * 8 + half * 4;
    float v[2][4];
#pragma unroll
    for (u32 a = 0; a < 2; a++)
#pragma unroll
        for (u32 b = 0; b < 4; b++) {
            size_t at = p.flags & FLAG_FEATURES_FIRST ? (size_t)(k + b) * p.rank + n + a : (size_t)(n + a) * p.features + k + b;
            v[a][b] = n + a < p.rank && k + b < p.features ? factor[at] : 0.0f;
        }
    packed[i] = make_uint4(pack(v[0][0], v[0][1]), pack(v[1][0], v[1][1]), pack(v[0][2], v[0][3]), pack(v[1][2], v[1][3]));
}

#else

#define STEP (WARPS_K * DEPTH * PANEL)  // of the contraction, per cube and iteration
#define STAGE_BYTES (STEP * RANK_PADDED * 2)
#define STAGE_CHUNKS (STAGE_BYTES / 16)

// -------------------------------------------------------------------------------------------- output

// One warp's sums of a tile, as mma leaves them, to their place in the output.
__device__ __forceinline__ void store(void* out, const Params& p, u32 tile, u32 wm, u32 mt, u32 tile_n, u32 lane, float4 v) {
    v.x *= p.scale, v.y *= p.scale, v.z *= p.scale, v.w *= p.scale;
#if IS_PROJECT
    u32 n = tile_n * 16 + lane / 4 * 2;
    u32 row = tile * ROWS + (wm * MT + mt) * 8 + lane % 4 * 2;
    bool pair = n + 1 < p.rank;
    if (n >= p.rank) return;
#pragma unroll
    for (u32 h = 0; h < 2; h++, row++) {
        if (row >= p.tokens) return;
        float lo = h ? v.y : v.x, hi = h ? v.w : v.z;
        size_t at = (size_t)row * p.rank + n;
        if (p.flags & FLAG_F32_OUT) {
            float* o = (float*)out + at;
            if (p.rank % 2 == 0) *(float2*)o = make_float2(lo, hi);
            else {
                o[0] = lo;
                if (pair) o[1] = hi;
            }
        } else {
            u16* o = (u16*)out + at;
            u32 two = pack(lo, hi);
            if (p.rank % 2 == 0) *(u32*)o = two;
            else {
                o[0] = (u16)two;
                if (pair) o[1] = (u16)(two >> 16);
            }
        }
    }
#else
    u32 n = tile_n * 8 + lane % 4 * 2;
    u32 row = tile * ROWS + wm * MT * 16 + lane / 4 * (2 * MT) + mt * 2;
    bool pair = n + 1 < p.rank;
    if (n >= p.rank) return;
    float* o = (float*)out;
    if (p.flags & FLAG_FEATURES_FIRST) {
#pragma unroll
        for (u32 h = 0; h < 2; h++, row++) {
            if (row >= p.features) return;
            float lo = h ? v.z : v.x, hi = h ? v.w : v.y;
            float* at = o + (size_t)row * p.rank + n;
            if (p.rank % 2 == 0) *(float2*)at = make_float2(lo, hi);
            else {
                at[0] = lo;
                if (pair) at[1] = hi;
            }
        }
    } else {
        if (row >= p.features) return;
        bool pair_row = row + 1 < p.features;
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            if (h && !pair) return;
            float lo = h ? v.y : v.x, hi = h ? v.w : v.z;
            float* at = o + (size_t)(n + h) * p.features + row;
            if (p.features % 2 == 0) *(float2*)at = make_float2(lo, hi);
            else {
                at[0] = lo;
                if (pair_row) at[1] = hi;
            }
        }
    }
#endif
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Warp tiles of a cube.
#define TILES_PER_CUBE (WARPS_M * MT * WARPS_N * NT)

// Four sums of a tile, by their place in scratch memory, [tile][split][m][n][lane]: adds the splits in their order.
__device__ __forceinline__ void add_splits(const float4* partial, void* out, const Params& p, u32 tile, u32 i) {
    const u32 tile_n = i / LANES % (WARPS_N * NT), m = i / LANES / (WARPS_N * NT);
    if (tile_n * RANK_TILE >= p.rank) return;
    const float4* from = partial + (size_t)tile * p.splits * TILES_PER_CUBE * LANES + i;
    float4 sum = __ldcg(from);
#pragma unroll 8
    for (u32 s = 1; s < p.splits; s++) sum = add4(sum, __ldcg(from + (size_t)s * TILES_PER_CUBE * LANES));
    store(out, p, tile, m / MT, m % MT, tile_n, i % LANES, sum);
}

#if KIND == 3

// One thread per four sums.
extern "C" __global__ void __launch_bounds__(256)
low_rank_sum(const float4* __restrict__ partial, void* __restrict__ out, const __grid_constant__ Params p) {
    const u32 i = blockIdx.x * 256 + threadIdx.x, tile = i / (TILES_PER_CUBE * LANES);
    if (tile * ROWS < (IS_PROJECT ? p.tokens : p.features)) add_splits(partial, out, p, tile, i % (TILES_PER_CUBE * LANES));
}

#else

// --------------------------------------------------------------------------------------------- pieces

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3};
    mma(c, a, b0, b1);
}

#ifndef LD
#if WARPS_N > 1
#define LD "ld.global.nc.L2::128B"  // the warps along the ranks read the same rows
#else
#define LD "ld.global.nc.L1::no_allocate.L2::128B"
#endif
#endif

// 16, 8 or 4 bytes of the large operand; zeros where `valid` is 0.
__device__ __forceinline__ void load(u32 (&d)[4], const u16* from, u32 valid) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"
                 "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
                 "@p " LD ".v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "=&r"(d[0]), "=&r"(d[1]), "=&r"(d[2]), "=&r"(d[3]) : "l"(from), "r"(valid));
}
__device__ __forceinline__ void load(u32 (&d)[2], const u16* from, u32 valid) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0;\n"
                 "mov.b32 %0, 0; mov.b32 %1, 0;\n"
                 "@p " LD ".v2.u32 {%0,%1}, [%2]; }"
                 : "=&r"(d[0]), "=&r"(d[1]) : "l"(from), "r"(valid));
}
__device__ __forceinline__ void load(u32 (&d)[1], const u16* from, u32 valid) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0;\n"
                 "mov.b32 %0, 0;\n"
                 "@p " LD ".u32 %0, [%1]; }"
                 : "=&r"(d[0]) : "l"(from), "r"(valid));
}

// As `load` with any alignment: element by element, the first `valid` ones.
template <int N>
__device__ __forceinline__ void load_any(u32 (&d)[N], const u16* from, u32 valid) {
#pragma unroll
    for (u32 i = 0; i < N; i++) {
        u32 lo = 2 * i < valid ? __ldg(from + 2 * i) : 0;
        u32 hi = 2 * i + 1 < valid ? __ldg(from + 2 * i + 1) : 0;
        d[i] = lo | hi << 16;
    }
}

#if DROPOUT
// Elements `index` and `index + 1` with zeros where dropout drops.
__device__ __forceinline__ u32 mask2(u32 x, u32 index, const Params& p) {
    u32 bits = dropout_bits(index / 2, p.seed_low, p.seed_high);
#if !ALIGNED
    // An odd row of an odd length: the two are of different pairs.
    if (index % 2) bits = bits >> 16 | dropout_bits((index + 1) / 2, p.seed_low, p.seed_high) << 16;
#endif
    const u32 low = (bits & 0xFFFF) >= p.threshold ? 0x0000FFFF : 0, high = bits >> 16 >= p.threshold ? 0xFFFF0000 : 0;
    return x & (low | high);
}
#endif

#if SPLITS > 1
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// When nothing was written that others read.
__device__ __forceinline__ void cluster_sync_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 load_from_cube(u32 address, u32 cube) {
    float4 v;
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [a]; }"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(cube) : "memory");
    return v;
}
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif

// ----------------------------------------------------------------------------------------- the product

// Rank tiles that the epilogue exchanges at a time: at most 32 KB.
#define NTC_FIT (32768 / (512 * MT * WARPS_M * WARPS_N * WARPS_K))
#define NTC (NTC_FIT < 1 ? 1 : NTC_FIT < NT ? NTC_FIT : NT)
#define EXCHANGE_BYTES (NTC * MT * WARPS_M * WARPS_N * WARPS_K * 512)
#define SHARED_BYTES (2 * STAGE_BYTES > EXCHANGE_BYTES ? 2 * STAGE_BYTES : EXCHANGE_BYTES)

// Project: `large` is X [tokens, features], `small` the packed factor, a row is a token.
// Gradient: `large` is the same, `small` is [tokens, rank], a row is a feature.
// Splits through scratch write their sums to `partial`, [tile][split][m][n][lane]; `counters` has the cubes of each tile that have.
__device__ __forceinline__ void product(const u16* __restrict__ large, const u16* __restrict__ small, void* out,
                                        float4* partial, u32* counters, const Params& p) {
    __shared__ __align__(128) unsigned char shared[SHARED_BYTES];
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, g = lane / 4, t = lane % 4;
    const u32 wk = warp % WARPS_K, wn = warp / WARPS_K % WARPS_N, wm = warp / WARPS_K / WARPS_N;
#if SPLITS > 0
    const u32 splits = SPLITS;
#else
    const u32 splits = p.splits;
#endif
    const u32 tile = blockIdx.x / splits, split = blockIdx.x % splits;
    const u32 length = IS_PROJECT ? p.features : p.tokens;
    const u32 steps = (length + STEP - 1) / STEP;
    const u32 begin = steps * split / splits, end = steps * (split + 1) / splits;
    const u32 shared_base = shared_address(shared);

    float acc[MT][NT][4];
#pragma unroll
    for (u32 i = 0; i < MT; i++)
#pragma unroll
        for (u32 j = 0; j < NT; j++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) acc[i][j][c] = 0.0f;

    // The large operand: each lane's registers of DEPTH panels. The order of a contraction is free as long as
    // both operands keep it, so lanes take contiguous memory, which also lies in registers as mma wants it: 8
    // features of token g of each tile, or 2 * MT features of tokens 2t, 2t + 1, 2t + 8 and 2t + 9.
#if IS_PROJECT
    u32 x[DEPTH][MT][4];
    const u16* from[MT];
    u32 at = (begin * WARPS_K + wk) * DEPTH * PANEL + t * 8;
#pragma unroll
    for (u32 i = 0; i < MT; i++) {
        u32 row = tile * ROWS + (wm * MT + i) * 8 + g;
        row = row < p.tokens ? row : p.tokens - 1;
        from[i] = large + (size_t)row * p.features + at;
    }
    auto fetch = [&](u32 d) {
        u32 k = at + d * PANEL;
#pragma unroll
        for (u32 i = 0; i < MT; i++) {
#if ALIGNED
            load(x[d][i], from[i] + d * PANEL, k < length);
#else
            load_any(x[d][i], from[i] + d * PANEL, k < length ? length - k : 0);
#endif
        }
    };
    auto advance = [&]() {
        at += STEP;
#pragma unroll
        for (u32 i = 0; i < MT; i++) from[i] += STEP;
    };
#else
    u32 x[DEPTH][4][MT];
    const u32 feature = tile * ROWS + wm * MT * 16 + g * (2 * MT);
    const u32 features_left = feature < p.features ? p.features - feature : 0;
    u32 at = (begin * WARPS_K + wk) * DEPTH * PANEL + t * 2;
    const u16* from = large + (size_t)at * p.features + (features_left ? feature : 0);
    const size_t stride = p.features;
    auto fetch = [&](u32 d) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 ahead = d * PANEL + i % 2 + i / 2 * 8;
#if ALIGNED
            load(x[d][i], from + ahead * stride, at + ahead < length && features_left);
#else
            load_any(x[d][i], from + ahead * stride, at + ahead < length ? features_left : 0);
#endif
        }
    };
    auto advance = [&]() {
        at += STEP;
        from += STEP * stride;
    };
#endif

    // The small operand: a stage of shared memory per iteration, one ahead.
#if !IS_PROJECT
    // 16-byte chunks of a token's ranks, exchanged so that eight tokens' chunks lie in different banks.
#define CHUNKS (RANK_PADDED / 8)
#define SWIZZLE(row) (CHUNKS >= 8 ? (row) % 8 : (row) / (8 / (CHUNKS < 8 ? CHUNKS : 8)) % CHUNKS)
#endif
    auto fill = [&](u32 step) {
        u32 to = shared_base + step % 2 * STAGE_BYTES;
#pragma unroll
        for (u32 i = 0; i < (STAGE_CHUNKS + THREADS - 1) / THREADS; i++) {
            u32 c = i * THREADS + threadIdx.x;
            if (STAGE_CHUNKS % THREADS != 0 && c >= STAGE_CHUNKS) break;
#if IS_PROJECT
            u32 chunk = step * STAGE_CHUNKS + c;
            bool valid = step < end && chunk < (length + PANEL - 1) / PANEL * (RANK_PADDED * PANEL / 8);
            copy_async(to + c * 16, small + (valid ? (size_t)chunk * 8 : 0), valid);
#else
            u32 row = c / CHUNKS, column = c % CHUNKS, token = step * STEP + row;
            bool valid = step < end && token < length && column * 8 < p.rank;
            u32 place = to + (row * CHUNKS + (column ^ SWIZZLE(row))) * 16;
            const u16* source = small + (valid ? (size_t)token * p.rank + column * 8 : 0);
#if SMALL_ALIGNED
            copy_async(place, source, valid);
#else
            u32 d[4];
            load_any(d, source, valid ? p.rank - column * 8 : 0);
            asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(place), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
#endif
#endif
        }
        commit();
    };

    fill(begin);
    if (begin < end) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) fetch(d);
    }
    for (u32 step = begin; step < end; step++) {
        wait_for_all_but<0>();
        __syncthreads();
        fill(step + 1);
        const u32 stage = shared_base + step % 2 * STAGE_BYTES;
        const u32 panel_bytes = PANEL * RANK_PADDED * 2;
        advance();
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
#if IS_PROJECT
#if DROPOUT
#pragma unroll
            for (u32 i = 0; i < MT; i++) {
                u32 index = (u32)(from[i] - large) - STEP + d * PANEL;
#pragma unroll
                for (u32 j = 0; j < 4; j++) x[d][i][j] = mask2(x[d][i][j], index + j * 2, p);
            }
#endif
            const u32 panel = stage + (wk * DEPTH + d) * panel_bytes + wn * NT * 1024 + lane * 16;
#pragma unroll
            for (u32 j = 0; j < NT; j++)
#pragma unroll
                for (u32 s = 0; s < 2; s++) {
                    u32 a[4];
                    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(panel + (j * 2 + s) * 512) : "memory");
#pragma unroll
                    for (u32 i = 0; i < MT; i++) mma(acc[i][j], a[0], a[1], a[2], a[3], x[d][i][2 * s], x[d][i][2 * s + 1]);
                }
#else
#if DROPOUT
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 index = (at - STEP + d * PANEL + i % 2 + i / 2 * 8) * p.features + feature;
#pragma unroll
                for (u32 j = 0; j < MT; j++) x[d][i][j] = mask2(x[d][i][j], index + j * 2, p);
            }
#endif
            // Word j of a token holds features 2j and 2j + 1, which become rows g and g + 8 of tile j.
            u32 a[MT][4];
#pragma unroll
            for (u32 i = 0; i < MT; i++) {
                a[i][0] = __byte_perm(x[d][0][i], x[d][1][i], 0x5410);
                a[i][1] = __byte_perm(x[d][0][i], x[d][1][i], 0x7632);
                a[i][2] = __byte_perm(x[d][2][i], x[d][3][i], 0x5410);
                a[i][3] = __byte_perm(x[d][2][i], x[d][3][i], 0x7632);
            }
            const u32 panel = stage + (wk * DEPTH + d) * panel_bytes + lane % 16 * (RANK_PADDED * 2);
            const u32 swizzle = SWIZZLE(lane % 8);
#if NT == 1
            u32 b[2];
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                         : "=r"(b[0]), "=r"(b[1]) : "r"(panel + (wn ^ swizzle) * 16) : "memory");
#pragma unroll
            for (u32 i = 0; i < MT; i++) mma(acc[i][0], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
#else
#pragma unroll
            for (u32 j = 0; j < NT; j += 2) {
                u32 b[4];
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                             : "r"(panel + ((wn * NT + j) ^ (lane / 16) ^ swizzle) * 16) : "memory");
#pragma unroll
                for (u32 i = 0; i < MT; i++) {
                    mma(acc[i][j], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
                    mma(acc[i][j + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
                }
            }
#endif
#endif
            if (step + 1 < end) fetch(d);
        }
    }

    // Sums over the warps and cubes that share the tile, in a fixed order.
    wait_for_all_but<0>();
    const u32 exchange = shared_base;
#pragma unroll
    for (u32 first = 0; first < NT; first += NTC) {
#if SPLITS > 1 || WARPS_K > 1
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < NTC; j++)
#pragma unroll
            for (u32 i = 0; i < MT; i++)
                if (first + j < NT)
                    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(exchange + ((warp * NTC + j) * MT + i) * 512 + lane * 16),
                                 "f"(acc[i][first + j][0]), "f"(acc[i][first + j][1]), "f"(acc[i][first + j][2]), "f"(acc[i][first + j][3])
                                 : "memory");
#endif
#if SPLITS > 1
        cluster_sync();
        const u32 owners = SPLITS * WARPS_K, me = split * WARPS_K + wk;
#elif WARPS_K > 1
        __syncthreads();
        const u32 owners = WARPS_K, me = wk;
#else
        const u32 owners = 1, me = 0;
#endif
#pragma unroll
        for (u32 j = 0; j < NTC; j++) {
#pragma unroll
            for (u32 i = 0; i < MT; i++) {
                if (first + j >= NT || (j * MT + i) % owners != me) continue;
                const u32 tile_n = wn * NT + first + j;
#if SPLITS > 1 || WARPS_K > 1
                float4 sum;
#pragma unroll
                for (u32 s = 0; s < (SPLITS > 1 ? SPLITS : 1); s++) {
#pragma unroll
                    for (u32 k = 0; k < WARPS_K; k++) {
                        u32 place = exchange + (((warp - wk + k) * NTC + j) * MT + i) * 512 + lane * 16;
                        float4 v;
#if SPLITS > 1
                        v = load_from_cube(place, s);
#else
                        asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(place) : "memory");
#endif
                        sum = s + k == 0 ? v : add4(sum, v);
                    }
                }
#else
                float4 sum = make_float4(acc[i][first + j][0], acc[i][first + j][1], acc[i][first + j][2], acc[i][first + j][3]);
#endif
#if SPLITS == 0
                size_t place = ((size_t)(tile * splits + split) * (WARPS_M * MT) + wm * MT + i) * (WARPS_N * NT) + tile_n;
                partial[place * LANES + lane] = sum;
#else
                store(out, p, tile, wm, i, tile_n, lane, sum);
#endif
            }
        }
#if SPLITS > 1
        cluster_sync_relaxed();
#endif
    }

#if SPLITS == 0 && LAST_ADDS
    // The cube of a tile that comes last adds up what all have written.
    u32* last = (u32*)shared;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(counters + tile, 1) == splits - 1;
        if (*last) counters[tile] = 0;
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
    for (u32 i = threadIdx.x; i < TILES_PER_CUBE * LANES; i += THREADS) add_splits(partial, out, p, tile, i);
#endif
}

#if LAST_ADDS
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES)
low_rank_product_and_sum(const u16* __restrict__ large, const u16* __restrict__ small, void* __restrict__ out, float4* partial,
                         u32* counters, const __grid_constant__ Params p) {
    product(large, small, out, partial, counters, p);
}
#else
// `out` is scratch memory where there are splits through it.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, MIN_CUBES)
low_rank_product(const u16* __restrict__ large, const u16* __restrict__ small, void* __restrict__ out,
                 const __grid_constant__ Params p) {
    product(large, small, out, (float4*)out, nullptr, p);
}
#endif

#endif
#endif
