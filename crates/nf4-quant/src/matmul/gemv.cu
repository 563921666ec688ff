// y_i = x W_i^T for a few rows of x and up to three W_i in 4 bits, on tensor cores (mma.sync), with the low-rank updates
// of LoRA. gemv.rs has the idea. few_tokens.cu comes before.
//
// Defined before this text: F16 (x is f16, else bf16), OUT_F32, NESTED (double quantization), TAIL (the columns are no
// multiple of 256), HALF_BIAS (biases are in the format of x), ADAPTERS (0: none, 1: one whose product with x is given, 2: each row of x has one of a stack, or
// none), and the variant: TILE (rows of x in a tile: 4 or 8), TOKEN_TILES, ROW_TILES (16 rows of W each, per warp), WARPS,
// CUBES (per multiprocessor).

#define THREADS (32 * WARPS)
#define STEP 256    // columns that a warp takes at once
#define TURNS 4     // of 32 columns each, that a warp takes of a part of a product with a stack's first factor
#define CHUNK (TURNS * WARPS * 32)  // columns of such a part

#define PIECES 8    // of 8 columns each, that a lane has of a step

#if TILE == 4
#define GROUP 4      // pieces of one block of W
#define OFFSET(i) ((i) / 4 * 128 + t * 32 + (i) % 4 * 8)  // where in a step a lane's piece begins
#else
#define GROUP 2
#define OFFSET(i) ((i) / 2 * 64 + t * 16 + (i) % 2 * 8)
#endif
// Pieces of x that a lane holds.
#define HELD (TOKEN_TILES == 1 || CUBES == 1 ? PIECES : 2)
// Tiles of 8 rows of x, for products with a stack's first factor.
#define WIDE_TILES (TILE == 4 ? 1 : TOKEN_TILES)

// Codes are read once: they leave the first-level cache to x and the statistics.
__device__ __forceinline__ void load_codes(u32 (&to)[4], const u8* p) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(p));
}

__device__ __forceinline__ void load_codes(u32 (&to)[2], const u8* p) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(p));
}

__device__ __forceinline__ u32 lookup(u32 address) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address));
    return r;
}

// What a lane reads for one step: the codes of its pieces of each row, and one block's statistics.
struct Load {
    u32 codes[ROW_TILES][2][PIECES / GROUP][GROUP];  // [tile][row g or g + 8][block][piece]
    float absmax[ROW_TILES][2];
    u32 code[ROW_TILES][2];
};

extern "C" __global__ void __launch_bounds__(THREADS, CUBES) gemv(
    const u8* __restrict__ codes0,
    const u8* __restrict__ codes1,
    const u8* __restrict__ codes2,
    const void* __restrict__ absmax0,
    const void* __restrict__ absmax1,
    const void* __restrict__ absmax2,
    const float* __restrict__ nested0,
    const float* __restrict__ nested1,
    const float* __restrict__ nested2,
    const void* __restrict__ bias0,   // [rows], f32, or in the format of x
    const void* __restrict__ bias1,
    const void* __restrict__ bias2,
    const u16* __restrict__ a0,       // a stack: [slots, rank, columns]
    const u16* __restrict__ a1,
    const u16* __restrict__ a2,
    const void* __restrict__ b0,      // a stack: [slots, rows, rank] in the format of x; else f32 [rows, rank]
    const void* __restrict__ b1,
    const void* __restrict__ b2,
    const float* __restrict__ scalings0,  // of each slot
    const float* __restrict__ scalings1,
    const float* __restrict__ scalings2,
    const float* __restrict__ tables,
    const u16* __restrict__ x,        // [tokens, columns]
    const u16* __restrict__ u,        // [tokens, ranks], where the product is given
    const u32* __restrict__ spans,    // their number, then first token, end and slot of each
    float* parts,                     // [chunks, tokens, ranks]: products with the stacks' first factors
    u32* counters,                    // finished parts, cubes that have left
    void* __restrict__ out0,          // [tokens, rows]
    void* __restrict__ out1,
    void* __restrict__ out2,
    const __grid_constant__ Params p)
{
    // The pair of values of each byte of codes, once for each lane: every lane has a bank of its own.
    __shared__ alignas(16) u32 pairs[256 * 32];
#if NESTED
    __shared__ float map[256];
#endif
    __shared__ alignas(8) float partials[WARPS * (TOKEN_TILES * TILE > WIDE_TILES * 8 ? TOKEN_TILES * TILE : WIDE_TILES * 8) * 16];

    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // so that branches on it are uniform
    const u32 g = lane / 4, t = lane % 4;
    const u32 bank = shared_address(pairs) + lane * 4;
    const u32 row_warps = 1u << p.log2_row_warps, column_warps = WARPS >> p.log2_row_warps;
    const u32 row_warp = warp & (row_warps - 1), column_warp = warp >> p.log2_row_warps;
    const u32 tile_rows = row_warps * (16 * ROW_TILES);
    const u32 steps = (p.columns + STEP - 1) / STEP;
    // Tiles of the first matrix come first.
    const u32 end0 = (p.matrices[0].rows + tile_rows - 1) / tile_rows;
    const u32 end1 = end0 + (p.matrices[1].rows + tile_rows - 1) / tile_rows;
    const u32 tiles = end1 + (p.matrices[2].rows + tile_rows - 1) / tile_rows;
    auto matrix_of = [&](u32 tile) -> u32 { return tile < end0 ? 0 : tile < end1 ? 1 : 2; };
    // The first of 16 rows of a warp.
    auto row_of = [&](u32 tile, u32 m) -> u32 {
        return (tile - (tile < end0 ? 0 : tile < end1 ? end0 : end1)) * tile_rows + (row_warp * ROW_TILES + m) * 16;
    };

    // Where the next load reads: its codes, and the element whose block's statistics this lane fetches.
    const u32 own_block = TILE == 4 ? (t % 2) * 128 + t / 2 * 64 : t * 64;
    const u8* at[ROW_TILES][2];
    u32 element[ROW_TILES][2];
    u32 last_element;
    const void* absmax;
    const float* nested;
    auto seek = [&](u32 tile) {
        const u32 i = matrix_of(tile), rows = p.matrices[i].rows;
        const u8* codes = OF(i, codes);
        absmax = OF(i, absmax);
        nested = OF(i, nested);
        last_element = rows * p.columns - 1;
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            #pragma unroll
            for (u32 h = 0; h < 2; h++) {
                // Rows beyond the last are computed, and not stored.
                const u32 first = min(row_of(tile, m) + h * 8 + g, rows - 1) * p.columns + column_warp * STEP;
                at[m][h] = codes + (first + OFFSET(0)) / 2;
                element[m][h] = first + own_block;
            }
        }
    };
    auto load = [&](Load& to, u32 step) {
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            #pragma unroll
            for (u32 h = 0; h < 2; h++) {
                #pragma unroll
                for (u32 q = 0; q < PIECES / GROUP; q++) {
                    // Beyond the columns the last codes stay: they are finite, and are multiplied by zero.
                    if (!TAIL || step * STEP + OFFSET(q * GROUP) < p.columns) {
                        load_codes(to.codes[m][h][q], at[m][h] + q * (STEP / 2 / (PIECES / GROUP)));
                    }
                }
                const u32 block = (TAIL ? min(element[m][h], last_element) : element[m][h]) >> p.log2_blocksize;
#if NESTED
                to.code[m][h] = __ldg((const u8*)absmax + block);
                to.absmax[m][h] = __ldg(nested + (block >> p.log2_nested));
#else
                to.absmax[m][h] = __ldg((const float*)absmax + block);
#endif
                at[m][h] += column_warps * (STEP / 2);
                element[m][h] += column_warps * STEP;
            }
        }
    };

    // Columns of a tile of x^T. Of 8 tokens, each has one. Of 4, lanes t = 0 and 1 have them in columns 0 to 3 and the
    // others in columns 4 to 7, zero elsewhere: each pair of lanes has sums of its own, of one block of W.
    auto token_of = [&](u32 n) -> u32 { return TILE == 4 ? n * 4 + g % 4 : n * 8 + g; };
    const u16* x_at[TOKEN_TILES];
    bool x_mine[TOKEN_TILES];
    uint4 b[TOKEN_TILES][HELD];
    #pragma unroll
    for (u32 n = 0; n < TOKEN_TILES; n++) {
        x_mine[n] = (TILE == 8 || g / 4 == t / 2) && token_of(n) < p.tokens;
        x_at[n] = x + (size_t)min(token_of(n), p.tokens - 1) * p.columns;
        #pragma unroll
        for (u32 i = 0; i < HELD; i++) b[n][i] = make_uint4(0, 0, 0, 0);
    }

    float sums[ROW_TILES][TOKEN_TILES][4] = {};

    auto compute = [&](const Load& from, u32 step, float offset) {
        float own[ROW_TILES][2];
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            #pragma unroll
            for (u32 h = 0; h < 2; h++) {
                own[m][h] = from.absmax[m][h];
#if NESTED
                own[m][h] = __fadd_rn(__fmul_rn(map[from.code[m][h]], own[m][h]), offset);
#endif
                if (TAIL && step * STEP + own_block >= p.columns) own[m][h] = 0.0f;
            }
        }
        #pragma unroll
        for (u32 q = 0; q < PIECES / GROUP; q++) {
            float d[ROW_TILES][TOKEN_TILES][4] = {};
            #pragma unroll
            for (u32 j = 0; j < GROUP; j++) {
                const u32 i = q * GROUP + j, held = i % HELD;
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++) {
                    if (x_mine[n] && (!TAIL || step * STEP + OFFSET(i) < p.columns)) {
                        b[n][held] = __ldg((const uint4*)(x_at[n] + (size_t)step * STEP + OFFSET(i)));
                    } else if (TAIL) {
                        b[n][held] = make_uint4(0, 0, 0, 0);
                    }
                }
                #pragma unroll
                for (u32 m = 0; m < ROW_TILES; m++) {
                    auto pair = [&](u32 word, u32 byte) { return lookup(bank + __byte_perm(word, 0, 0x4440 + byte) * 128); };
                    const u32 low = from.codes[m][0][q][j], high = from.codes[m][1][q][j];
                    const u32 f0 = pair(low, 0), f1 = pair(high, 0), f2 = pair(low, 1), f3 = pair(high, 1);
                    const u32 f4 = pair(low, 2), f5 = pair(high, 2), f6 = pair(low, 3), f7 = pair(high, 3);
                    #pragma unroll
                    for (u32 n = 0; n < TOKEN_TILES; n++) {
                        multiply(d[m][n], f0, f1, f2, f3, b[n][held].x, b[n][held].y);
                        multiply(d[m][n], f4, f5, f6, f7, b[n][held].z, b[n][held].w);
                    }
                }
            }
            #pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++) {
                // The block's statistics are with lane q of the row; of 4 tokens, with the pair's lane q.
                const u32 source = TILE == 4 ? (lane & ~1u) + q : g * 4 + q;
                const float low = __shfl_sync(0xffffffffu, own[m][0], source);
                const float high = __shfl_sync(0xffffffffu, own[m][1], source);
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++)
                    #pragma unroll
                    for (u32 i = 0; i < 4; i++) sums[m][n][i] = fmaf(i < 2 ? low : high, d[m][n][i], sums[m][n][i]);
            }
        }
    };

    // A warp takes every `column_warps`th step, two at a time: while one is computed, the other's loads and
    // then its own next ones are under way, across tiles.
    u32 tile = blockIdx.x, step = column_warp;
    Load even = {}, odd = {};
#if ADAPTERS == 2
    const u32 num_spans = __ldg(spans);
#endif
    if (tile < tiles) {
        seek(tile);
        if (step < steps) load(even, step);
    }

#if ADAPTERS == 2
    // Products with the stacks' first factors, one part for 16 ranks, a span of tokens and a chunk of the columns. All
    // cubes are on the device at once, so those that wait for parts keep none from being made. Everything waits for the parts in the
    // end: what the first one of a cube reads goes before all codes but the first.
    const u32 chunks = (p.columns + CHUNK - 1) / CHUNK;
    const u32 num_parts = p.ranks / 16 * num_spans * chunks;
    struct Part {
        uint4 low[TURNS], high[TURNS], v[TURNS][WIDE_TILES];
    };
    auto read_part = [&](Part& to, u32 part) {
        const u32 chunk = part % chunks, span = part / chunks % num_spans, rank16 = part / chunks / num_spans * 16;
        const u32 i = rank16 < p.matrices[1].first_rank ? 0 : rank16 < p.matrices[2].first_rank ? 1 : 2;
        const u32 slot = __ldg(spans + 3 + span * 3), rank = rank16 - p.matrices[i].first_rank;
        const u16* a = OF(i, a) + ((size_t)slot * p.matrices[i].rank + rank + g) * p.columns + chunk * CHUNK + t * 8;
        const u32 width = min(CHUNK, p.columns - chunk * CHUNK);
        #pragma unroll
        for (u32 turn = 0; turn < TURNS; turn++) {
            const u32 column = (turn * WARPS + warp) * 32;
            to.low[turn] = to.high[turn] = make_uint4(0, 0, 0, 0);
            if (column < width) {
                to.low[turn] = __ldg((const uint4*)(a + column));
                to.high[turn] = __ldg((const uint4*)(a + 8 * (size_t)p.columns + column));
            }
            #pragma unroll
            for (u32 n = 0; n < WIDE_TILES; n++) {
                const u32 token = n * 8 + g;
                to.v[turn][n] = make_uint4(0, 0, 0, 0);
                if (token < p.tokens && column < width)
                    to.v[turn][n] = __ldg((const uint4*)(x + (size_t)token * p.columns + chunk * CHUNK + t * 8 + column));
            }
        }
    };
    auto write_part = [&](const Part& from, u32 part) {
        const u32 chunk = part % chunks, span = part / chunks % num_spans, rank16 = part / chunks / num_spans * 16;
        const u32 first = __ldg(spans + 1 + span * 3), end = __ldg(spans + 2 + span * 3);
        float d[WIDE_TILES][4] = {};
        #pragma unroll
        for (u32 turn = 0; turn < TURNS; turn++) {
            const uint4 low = from.low[turn], high = from.high[turn];
            #pragma unroll
            for (u32 n = 0; n < WIDE_TILES; n++) {
                const uint4 v = from.v[turn][n];
                multiply(d[n], low.x, high.x, low.y, high.y, v.x, v.y);
                multiply(d[n], low.z, high.z, low.w, high.w, v.z, v.w);
            }
        }
        #pragma unroll
        for (u32 n = 0; n < WIDE_TILES; n++) {
            float* to = partials + (warp * WIDE_TILES + n) * 128 + t * 2;
            *(float2*)(to + g * 8) = make_float2(d[n][0], d[n][1]);
            *(float2*)(to + (g + 8) * 8) = make_float2(d[n][2], d[n][3]);
        }
        __syncthreads();
        for (u32 e = threadIdx.x; e < 16 * (end - first); e += THREADS) {
            const u32 row = e % 16, token = first + e / 16;
            float sum = 0.0f;
            #pragma unroll
            for (u32 w = 0; w < WARPS; w++) sum += partials[(w * WIDE_TILES + token / 8) * 128 + row * 8 + token % 8];
            parts[((size_t)chunk * p.tokens + token) * p.ranks + rank16 + row] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counters) : "memory");
    };
    const u32 first_part = gridDim.x - 1 - blockIdx.x;
    Part own_part = {};
    if (first_part < num_parts) read_part(own_part, first_part);
#endif
    if (tile < tiles && step + column_warps < steps) load(odd, step + column_warps);

    for (u32 e = threadIdx.x; e < 256 * 8; e += THREADS) {
        const u32 byte = e / 8;
        auto entry = [&](u32 code) { return (p.codebook[code / 2] >> (code % 2 * 16)) & 0xffff; };
        const u32 pair = entry(byte / 16) | entry(byte % 16) << 16;
        ((uint4*)pairs)[e] = make_uint4(pair, pair, pair, pair);
    }
#if NESTED
    for (u32 e = threadIdx.x; e < 256; e += THREADS) map[e] = tables[p.map + e];
#endif
#if ADAPTERS == 2
    for (u32 part = first_part; part < num_parts; part += gridDim.x) {
        if (part != first_part) read_part(own_part, part);
        write_part(own_part, part);
    }
    bool parts_are_there = num_parts == 0;
    auto wait_for_parts = [&]() {
        if (parts_are_there) return;
        parts_are_there = true;
        u32 finished;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(finished) : "l"(counters) : "memory");
        while (finished < num_parts);
    };
    // A warp's first part of a tile's update: 16 ranks of a span, whose factors come with the tile's codes. A lane has four ranks that
    // lie side by side, of rows and tokens alike.
    auto read_factors = [&](uint2 (&to)[ROW_TILES][2], u32 tile, u32 turn) {
        const u32 i = matrix_of(tile), rows = p.matrices[i].rows, rank = p.matrices[i].rank, rank_tiles = rank / 16;
        if (turn >= num_spans * rank_tiles) return;
        const u32 slot = __ldg(spans + 3 + turn / rank_tiles * 3), k = turn % rank_tiles * 16 + 4 * t;
        const u16* factor = (const u16*)OF(i, b) + (size_t)slot * rows * rank + k;
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++)
            #pragma unroll
            for (u32 h = 0; h < 2; h++)
                to[m][h] = __ldg((const uint2*)(factor + (size_t)min(row_of(tile, m) + h * 8 + g, rows - 1) * rank));
    };
    uint2 own_factors[ROW_TILES][2] = {};
    if (tile < tiles) read_factors(own_factors, tile, column_warp);
#endif

#if ADAPTERS
    // The low-rank products of a tile: 16 ranks at a time, which the warps that share rows take in turn.
    auto add_update = [&](u32 m, u32 n, u32 v0, u32 v1, u32 f0, u32 f1, u32 f2, u32 f3) {
        float d[4] = {};
        multiply(d, f0, f1, f2, f3, v0, v1);
        #pragma unroll
        for (u32 e = 0; e < 4; e++) sums[m][n][e] = fmaf(p.scale, d[e], sums[m][n][e]);
    };
    auto add_low_rank = [&](u32 tile) {
        const u32 i = matrix_of(tile), rows = p.matrices[i].rows, rank = p.matrices[i].rank;
        auto row = [&](u32 m, u32 h) { return (size_t)min(row_of(tile, m) + h * 8 + g, rows - 1) * rank; };
        // Of 4 tokens, the upper columns of the fragment are zero.
        const bool in_tile = TILE == 8 || g < 4;
#if ADAPTERS == 1
        const float* factor = (const float*)OF(i, b);
        for (u32 first = column_warp * 16; first < rank; first += column_warps * 16) {
            const u32 k = first + 2 * t;
            u32 v[TOKEN_TILES][2];
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++) {
                const u32 token = token_of(n);
                auto value = [&](u32 k) -> u32 { return in_tile && token < p.tokens && k < rank ? u[token * rank + k] : 0; };
                v[n][0] = value(k) | value(k + 1) << 16, v[n][1] = value(k + 8) | value(k + 9) << 16;
            }
            #pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++) {
                auto value = [&](u32 h, u32 k) -> u32 { return k < rank ? narrow(factor[row(m, h) + k]) : 0; };
                auto both = [&](u32 h, u32 k) { return value(h, k) | value(h, k + 1) << 16; };
                const u32 f0 = both(0, k), f1 = both(1, k), f2 = both(0, k + 8), f3 = both(1, k + 8);
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++) add_update(m, n, v[n][0], v[n][1], f0, f1, f2, f3);
            }
        }
#else
        const u32 rank_tiles = rank / 16;
        for (u32 turn = column_warp; turn < num_spans * rank_tiles; turn += column_warps) {
            const u32 span = turn / rank_tiles, k = turn % rank_tiles * 16;
            const u32 first = __ldg(spans + 1 + span * 3), end = __ldg(spans + 2 + span * 3), slot = __ldg(spans + 3 + span * 3);
            const float scaling = __ldg(OF(i, scalings) + slot);
            if (turn != column_warp) read_factors(own_factors, tile, turn);
            u32 v[TOKEN_TILES][2];
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++) {
                const u32 token = token_of(n);
                float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (in_tile && token >= first && token < end) {
                    const float* from = parts + (size_t)token * p.ranks + p.matrices[i].first_rank + k + 4 * t;
                    #pragma unroll 4
                    for (u32 chunk = 0; chunk < chunks; chunk++) {
                        const float4 one = *(const float4*)(from + (size_t)chunk * p.tokens * p.ranks);
                        sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
                    }
                }
                v[n][0] = pack(scaling * sum.x, scaling * sum.y), v[n][1] = pack(scaling * sum.z, scaling * sum.w);
            }
            #pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++) {
                const uint2 low = own_factors[m][0], high = own_factors[m][1];
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++)
                    add_update(m, n, v[n][0], v[n][1], low.x, high.x, low.y, high.y);
            }
        }
#endif
    };
#endif

    // Adds up the warps' sums of a tile in a fixed order, and stores the result.
    auto finish = [&](u32 tile) {
        const u32 i = matrix_of(tile), rows = p.matrices[i].rows;
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            if (m > 0) __syncthreads();
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++) {
                float* to = partials + (warp * TOKEN_TILES + n) * (16 * TILE) + t * 2;
                #pragma unroll
                for (u32 e = 0; e < 4 && TILE == 4; e++) sums[m][n][e] += __shfl_xor_sync(0xffffffffu, sums[m][n][e], 2);
                if (TILE == 8 || t < 2) {
                    *(float2*)(to + g * TILE) = make_float2(sums[m][n][0], sums[m][n][1]);
                    *(float2*)(to + (g + 8) * TILE) = make_float2(sums[m][n][2], sums[m][n][3]);
                }
                #pragma unroll
                for (u32 e = 0; e < 4; e++) sums[m][n][e] = 0.0f;
            }
            __syncthreads();
            for (u32 e = threadIdx.x; e < 16 * row_warps * p.tokens; e += THREADS) {
                const u32 r = e % 16, w = e / 16 % row_warps, token = e / 16 / row_warps;
                const u32 row = row_of(tile, m) + (w - row_warp) * ROW_TILES * 16 + r;
                if (row >= rows) continue;
                float sum = 0.0f;
                #pragma unroll 4
                for (u32 c = 0; c < column_warps; c++) {
                    sum += partials[((c * row_warps + w) * TOKEN_TILES + token / TILE) * (16 * TILE) + r * TILE + token % TILE];
                }
                sum *= p.unscale;
                if (p.biases >> i & 1) {
#if HALF_BIAS
                    float bias, none;
                    unpack(((const u16*)OF(i, bias))[row], bias, none);
                    sum += bias;
#else
                    sum += ((const float*)OF(i, bias))[row];
#endif
                }
                const size_t to = (size_t)token * rows + row;
#if OUT_F32
                ((float*)OF(i, out))[to] = sum;
#else
                ((u16*)OF(i, out))[to] = narrow(sum);
#endif
            }
        }
    };

    __syncthreads();

    while (tile < tiles) {
        const bool at_end = step + 2 * column_warps >= steps;
        const u32 next_tile = at_end ? tile + gridDim.x : tile;
        const u32 next_step = at_end ? column_warp : step + 2 * column_warps;
        const bool more = next_tile < tiles;
        float offset = 0.0f;
#if NESTED
        const u32 i = matrix_of(tile);
        offset = __ldg(OF(i, nested) + p.matrices[i].offset);
#endif
        if (step < steps) compute(even, step, offset);
        if (at_end && more) seek(next_tile);
        if (more && next_step < steps) load(even, next_step);
        if (step + column_warps < steps) compute(odd, step + column_warps, offset);
        if (more && next_step + column_warps < steps) load(odd, next_step + column_warps);
        if (at_end) {
#if ADAPTERS == 2
            if (threadIdx.x == 0) wait_for_parts();
#endif
            __syncthreads();  // The last tile's sums have been read, and the parts are there.
#if ADAPTERS
            add_low_rank(tile);
#endif
#if ADAPTERS == 2
            if (more) read_factors(own_factors, next_tile, column_warp);
#endif
            finish(tile);
        }
        tile = next_tile;
        step = next_step;
    }

#if ADAPTERS == 2
    if (num_parts > 0 && threadIdx.x == 0 && atomicAdd(counters + 1, 1) == gridDim.x - 1) {
        counters[0] = 0;
        counters[1] = 0;
    }
#endif
}
