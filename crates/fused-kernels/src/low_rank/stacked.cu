// The updates of adapters that lie in stacks, for tokens that have different ones, in two kernels. stacked.rs has the idea.
//
// Defined before this text: F16, KIND (0: products with the first factors, 1: updates), TOKEN_TILES (8 tokens each of a cube's
// products, 16 of a warp's updates).

struct Matrix {
    u32 rows;        // of W: a multiple of 8
    u32 rank;        // of a slot: a multiple of 16
    u32 first_rank;  // where they begin among those of all matrices
    u32 first_tile;  // where its tiles of 32 rows begin among those of all matrices
};

struct Params {
    u32 tokens;
    u32 columns;         // of x: a multiple of 8
    u32 ranks;           // of a slot, of all matrices
    u32 chunk;           // columns of a cube: a multiple of 128
    u32 chunks;
    u32 tiles;           // of 32 rows, of all matrices
    u32 biases;          // bit i: matrix i has a bias
    u32 padding;
    Matrix matrices[3];  // those that there are first; the others begin where all ends
};

#define ALL 0xffffffffu
#define NOBODY 0xffffffffu
#define OF(i, name) ((i) == 0 ? name##0 : (i) == 1 ? name##1 : name##2)

// d += a * b on 16 x 8 x 16.
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 a[4] = {a0, a1, a2, a3};
    mma(d, a, b0, b1);
}

// Calls `take` with first token, end and slot of each span that has tokens from `low` to `high`. A whole warp comes here.
template <typename Take>
__device__ __forceinline__ void for_spans(const u32* spans, u32 low, u32 high, Take take) {
    const u32 count = __ldg(spans), lane = threadIdx.x % 32;
    for (u32 base = 0; base < count; base += 32) {
        const u32* own = spans + 1 + 3 * min(base + lane, count - 1);
        const u32 first = __ldg(own), end = __ldg(own + 1), slot = __ldg(own + 2);
        u32 found = __ballot_sync(ALL, base + lane < count && first < high && end > low);
        for (; found; found &= found - 1) {
            const u32 from = __ffs(found) - 1;
            take(__shfl_sync(ALL, first, from), __shfl_sync(ALL, end, from), __shfl_sync(ALL, slot, from));
        }
    }
}

#if KIND == 0

#define TOKENS (8 * TOKEN_TILES)
#define RANKS 64       // of a cube
#define SUMS (8 * 20)  // of 16 ranks by 8 tokens: a token's lie together, and four tokens in different banks

// u = scaling * x A^T, [tokens, ranks]; zero where a token has no adapter. A cube takes some tokens, 64 ranks and a chunk of
// the columns; the one that comes last adds up what all chunks have.
extern "C" __global__ void __launch_bounds__(256, 2) stacked_project(
    const u16* __restrict__ a0,           // [slots, rank, columns]
    const u16* __restrict__ a1,
    const u16* __restrict__ a2,
    const float* __restrict__ scalings0,  // of each slot
    const float* __restrict__ scalings1,
    const float* __restrict__ scalings2,
    const u16* __restrict__ x,            // [tokens, columns]
    const u32* __restrict__ spans,        // their number, then first token, end and slot of each
    float* parts,                         // [chunks, tokens, ranks]
    u32* counters,                        // finished chunks, of each tile of tokens and ranks
    u16* __restrict__ u,
    const __grid_constant__ Params p)
{
    __shared__ alignas(16) float sums[8 * 2 * 2 * SUMS];
    __shared__ u32 slots[TOKENS];
    __shared__ u32 is_last;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    // Two warps have 32 ranks each; four of them share these and take different columns.
    const u32 rank_warp = warp % 2, column_warp = warp / 2;
    const u32 first_token = blockIdx.z * TOKENS, first_rank = blockIdx.y * RANKS;
    const u32 begin = blockIdx.x * p.chunk, stop = min(begin + p.chunk, p.columns);
    auto matrix_of = [&](u32 rank) -> u32 {
        return rank < p.matrices[1].first_rank ? 0 : rank < p.matrices[2].first_rank ? 1 : 2;
    };

    const u16* a[2];
    size_t slot_size[2];
    bool has_ranks[2];
    #pragma unroll
    for (u32 m = 0; m < 2; m++) {
        const u32 rank = first_rank + rank_warp * 32 + m * 16;
        has_ranks[m] = rank < p.ranks;
        const u32 i = has_ranks[m] ? matrix_of(rank) : 0;
        a[m] = OF(i, a) + (size_t)(has_ranks[m] ? rank - p.matrices[i].first_rank + g : 0) * p.columns + t * 8;
        slot_size[m] = (size_t)p.matrices[i].rank * p.columns;
    }
    const u16* x_at[TOKEN_TILES];
    #pragma unroll
    for (u32 n = 0; n < TOKEN_TILES; n++)
        x_at[n] = x + (size_t)min(first_token + n * 8 + g, p.tokens - 1) * p.columns + t * 8;

    float d[2][TOKEN_TILES][4] = {};
    u32 own_slot = NOBODY;
    for_spans(spans, first_token, first_token + TOKENS, [&](u32 first, u32 end, u32 slot) {
        auto has = [&](u32 token) { return token >= first && token < end; };
        if (has(first_token + thread % TOKENS)) own_slot = slot;
        const u16* from[2] = {a[0] + slot * slot_size[0], a[1] + slot * slot_size[1]};
        // The order of a sum is free as long as both operands keep it: a lane has eight columns of a row.
        #pragma unroll 2
        for (u32 column = begin + column_warp * 32; column < stop; column += 128) {
            const bool inside = column + t * 8 < stop;
            uint4 low[2], high[2], v[TOKEN_TILES];
            #pragma unroll
            for (u32 m = 0; m < 2; m++) {
                low[m] = high[m] = make_uint4(0, 0, 0, 0);
                if (inside && has_ranks[m]) {
                    low[m] = __ldg((const uint4*)(from[m] + column));
                    high[m] = __ldg((const uint4*)(from[m] + 8 * (size_t)p.columns + column));
                }
            }
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++) {
                v[n] = make_uint4(0, 0, 0, 0);
                if (inside && has(first_token + n * 8 + g)) v[n] = __ldg((const uint4*)(x_at[n] + column));
            }
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++)
                #pragma unroll
                for (u32 m = 0; m < 2; m++) {
                    multiply(d[m][n], low[m].x, high[m].x, low[m].y, high[m].y, v[n].x, v[n].y);
                    multiply(d[m][n], low[m].z, high[m].z, low[m].w, high[m].w, v[n].z, v[n].w);
                }
        }
    });
    if (thread < TOKENS) slots[thread] = own_slot;

    // Of a token in this cube, and four of its ranks from `rank` on.
    auto store = [&](u32 token, u32 rank, float4 sum) {
        const u32 slot = slots[token], i = matrix_of(rank);
        const float scaling = slot == NOBODY ? 0.0f : __ldg(OF(i, scalings) + slot);
        const uint2 packed = make_uint2(pack(scaling * sum.x, scaling * sum.y), pack(scaling * sum.z, scaling * sum.w));
        *(uint2*)(u + (size_t)(first_token + token) * p.ranks + rank) = packed;
    };
    // 16 tokens at a time: a thread has four ranks of one.
    const u32 quad = thread % 16 * 4, rank = first_rank + quad;
    #pragma unroll
    for (u32 tile = 0; tile < TOKEN_TILES; tile += 2) {
        if (tile > 0) __syncthreads();
        #pragma unroll
        for (u32 m = 0; m < 2; m++) {
            #pragma unroll
            for (u32 n = 0; n < 2; n++) {
                float* to = sums + ((warp * 2 + m) * 2 + n) * SUMS + 2 * t * 20 + g;
                const float (&from)[4] = d[m][tile + n];
                to[0] = from[0], to[20] = from[1], to[8] = from[2], to[28] = from[3];
            }
        }
        __syncthreads();
        const u32 token = tile * 8 + thread / 16;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        #pragma unroll
        for (u32 w = 0; w < 4; w++) {
            const u32 place = ((w * 2 + quad / 32) * 2 + quad / 16 % 2) * 2 + thread / 128;
            const float4 one = *(const float4*)(sums + place * SUMS + thread / 16 % 8 * 20 + quad % 16);
            sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
        }
        if (first_token + token < p.tokens && rank < p.ranks) {
            if (p.chunks == 1) store(token, rank, sum);
            else __stcg((float4*)(parts + ((size_t)blockIdx.x * p.tokens + first_token + token) * p.ranks + rank), sum);
        }
    }
    if (p.chunks == 1) return;

    __threadfence();
    __syncthreads();
    if (thread == 0) {
        u32* counter = counters + blockIdx.z * gridDim.y + blockIdx.y;
        is_last = atomicAdd(counter, 1) == p.chunks - 1;
        if (is_last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    #pragma unroll 1
    for (u32 token = thread / 16; token < TOKENS; token += 16) {
        if (first_token + token >= p.tokens || rank >= p.ranks) continue;
        const float* from = parts + (size_t)(first_token + token) * p.ranks + rank;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        #pragma unroll 16
        for (u32 chunk = 0; chunk < p.chunks; chunk++) {
            const float4 one = __ldcg((const float4*)(from + (size_t)chunk * p.tokens * p.ranks));
            sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
        }
        store(token, rank, sum);
    }
}

#else

#define TOKENS (16 * TOKEN_TILES)

// out = sum + u B^T (+ bias), rounded once. A warp takes 32 rows of a W and some tokens.
extern "C" __global__ void __launch_bounds__(128) stacked_update(
    const u16* __restrict__ b0,      // [slots, rows, rank]
    const u16* __restrict__ b1,
    const u16* __restrict__ b2,
    const float* __restrict__ sum0,  // x W^T, [tokens, rows]
    const float* __restrict__ sum1,
    const float* __restrict__ sum2,
    const u16* __restrict__ bias0,   // [rows]
    const u16* __restrict__ bias1,
    const u16* __restrict__ bias2,
    const u16* __restrict__ u,       // [tokens, ranks]
    const u32* __restrict__ spans,
    u16* __restrict__ out0,          // [tokens, rows]
    u16* __restrict__ out1,
    u16* __restrict__ out2,
    const __grid_constant__ Params p)
{
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 tile = blockIdx.x * 4 + threadIdx.x / 32;
    if (tile >= p.tiles) return;
    const u32 i = tile < p.matrices[1].first_tile ? 0 : tile < p.matrices[2].first_tile ? 1 : 2;
    const u32 rows = p.matrices[i].rows, rank = p.matrices[i].rank;
    const u32 first_row = (tile - p.matrices[i].first_tile) * 32, first_token = blockIdx.y * TOKENS;
    auto token_of = [&](u32 m, u32 h) { return first_token + m * 16 + h * 8 + g; };

    // The order of rows is free too: a lane has the results of eight that lie side by side, two of each product.
    const u32 own_row = first_row + t * 8;
    float d[TOKEN_TILES][4][4] = {};
    #pragma unroll
    for (u32 m = 0; m < TOKEN_TILES; m++)
        #pragma unroll
        for (u32 h = 0; h < 2; h++) {
            if (own_row >= rows || token_of(m, h) >= p.tokens) continue;
            const float4* from = (const float4*)(OF(i, sum) + (size_t)token_of(m, h) * rows + own_row);
            const float4 low = __ldcs(from), high = __ldcs(from + 1);
            d[m][0][2 * h] = low.x, d[m][0][2 * h + 1] = low.y, d[m][1][2 * h] = low.z, d[m][1][2 * h + 1] = low.w;
            d[m][2][2 * h] = high.x, d[m][2][2 * h + 1] = high.y, d[m][3][2 * h] = high.z, d[m][3][2 * h + 1] = high.w;
        }
    const u16* b[4];
    #pragma unroll
    for (u32 n = 0; n < 4; n++) {
        const u32 row = min(first_row + g / 2 * 8 + n * 2 + g % 2, rows - 1);
        b[n] = OF(i, b) + (size_t)row * rank + t * 4;
    }
    const u16* own_u = u + p.matrices[i].first_rank + t * 4;
    for_spans(spans, first_token, first_token + TOKENS, [&](u32 first, u32 end, u32 slot) {
        const size_t at = (size_t)slot * rows * rank;
        #pragma unroll 4
        for (u32 k = 0; k < rank; k += 16) {
            uint2 f[4], v[TOKEN_TILES][2];
            #pragma unroll
            for (u32 n = 0; n < 4; n++) f[n] = __ldg((const uint2*)(b[n] + at + k));
            #pragma unroll
            for (u32 m = 0; m < TOKEN_TILES; m++)
                #pragma unroll
                for (u32 h = 0; h < 2; h++) {
                    const u32 token = token_of(m, h);
                    v[m][h] = make_uint2(0, 0);
                    if (token >= first && token < end) v[m][h] = __ldg((const uint2*)(own_u + (size_t)token * p.ranks + k));
                }
            #pragma unroll
            for (u32 m = 0; m < TOKEN_TILES; m++)
                #pragma unroll
                for (u32 n = 0; n < 4; n++) multiply(d[m][n], v[m][0].x, v[m][1].x, v[m][0].y, v[m][1].y, f[n].x, f[n].y);
        }
    });
    if (own_row >= rows) return;
    float bias[8] = {};
    if (p.biases >> i & 1) {
        const uint4 packed = __ldg((const uint4*)(OF(i, bias) + own_row));
        unpack(packed.x, bias[0], bias[1]), unpack(packed.y, bias[2], bias[3]);
        unpack(packed.z, bias[4], bias[5]), unpack(packed.w, bias[6], bias[7]);
    }
    #pragma unroll
    for (u32 m = 0; m < TOKEN_TILES; m++)
        #pragma unroll
        for (u32 h = 0; h < 2; h++) {
            if (token_of(m, h) >= p.tokens) continue;
            auto both = [&](u32 n) { return pack(d[m][n][2 * h] + bias[2 * n], d[m][n][2 * h + 1] + bias[2 * n + 1]); };
            *(uint4*)(OF(i, out) + (size_t)token_of(m, h) * rows + own_row) = make_uint4(both(0), both(1), both(2), both(3));
        }
}

#endif
