// y = x W^T for a few rows of x, with W in 4 bits, on tensor cores (mma.sync). gemv.rs has the idea.
//
// Defined before this text: F16 (x is f16, else bf16), OUT_F32, NESTED (double quantization), TAIL (the
// columns are no multiple of 256), and the variant: TOKEN_TILES (4 rows of x each), ROW_TILES (16 rows of W
// each, per warp), WARPS, CUBES (per multiprocessor).

struct Params {
    u32 rows;            // of W
    u32 columns;         // of W: a multiple of 64
    u32 tokens;
    u32 log2_blocksize;  // at least 6
    u32 log2_nested;     // log2 of the nested blocksize
    u32 offset;          // position of the mean of the absmax, behind the nested absmax
    u32 map;             // position of the 8-bit map in `tables`
    u32 log2_row_warps;  // warps of a cube that take different rows; the others split the columns
    u32 has_bias;
    u32 rank;            // columns of the low-rank operand, 0 without one
    float scale;         // what the codebook was multiplied by
    float unscale;       // 1 / scale
    u32 codebook[8];     // 16 entries of 16 bits in the format of x
};

#define THREADS (32 * WARPS)
#define STEP 256  // columns that a warp takes at once
// Pieces of x, 8 columns each, that a lane holds.
#define PIECES (TOKEN_TILES == 1 ? 8 : TOKEN_TILES == 2 ? 4 : 2)

// Codes are read once: they leave the first-level cache to x and the statistics.
__device__ __forceinline__ uint4 load_codes(const u8* p) {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
    return r;
}

__device__ __forceinline__ u32 lookup(u32 address) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address));
    return r;
}

// d += a * b on 16 x 8 x 16.
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if F16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What a lane reads for one step: 32 codes of each row and half of the step, and one block's statistics.
struct Load {
    uint4 codes[ROW_TILES][2][2];  // [tile][row g or g + 8][half]
    float absmax[ROW_TILES][2];
    u32 code[ROW_TILES][2];
};

extern "C" __global__ void __launch_bounds__(THREADS, CUBES) gemv(
    const u8* __restrict__ codes,
    const void* __restrict__ absmax,
    const float* __restrict__ nested,
    const float* __restrict__ tables,
    const u16* __restrict__ x,       // [tokens, columns]
    const u16* __restrict__ u,       // [tokens, rank]
    const float* __restrict__ low_rank,  // [rows, rank]
    const float* __restrict__ bias,  // [rows]
    void* __restrict__ out,          // [tokens, rows]
    const __grid_constant__ Params p)
{
    // The pair of values of each byte of codes, once for each lane: every lane has a bank of its own.
    __shared__ alignas(16) u32 pairs[256 * 32];
#if NESTED
    __shared__ float map[256];
#endif
    __shared__ alignas(8) float partials[WARPS * TOKEN_TILES * 64];

    const u32 lane = threadIdx.x % 32;
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // so that branches on it are uniform
    const u32 g = lane / 4, t = lane % 4;
    const u32 bank = shared_address(pairs) + lane * 4;
    const u32 row_warps = 1u << p.log2_row_warps, column_warps = WARPS >> p.log2_row_warps;
    const u32 row_warp = warp & (row_warps - 1), column_warp = warp >> p.log2_row_warps;
    const u32 tile_rows = row_warps * (16 * ROW_TILES);
    const u32 tiles = (p.rows + tile_rows - 1) / tile_rows;
    const u32 steps = (p.columns + STEP - 1) / STEP;
#if NESTED
    const float offset = nested[p.offset];
#endif

    // Where the next load reads: its codes, and the element whose block's statistics this lane fetches.
    const u8* at[ROW_TILES][2];
    u32 element[ROW_TILES][2];
    auto seek = [&](u32 tile) {
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            #pragma unroll
            for (u32 h = 0; h < 2; h++) {
                // Rows beyond the last are computed, and not stored.
                const u32 row = min(tile * tile_rows + (row_warp * ROW_TILES + m) * 16 + h * 8 + g, p.rows - 1);
                const u32 first = row * p.columns + column_warp * STEP;
                at[m][h] = codes + first / 2 + t * 16;
                element[m][h] = first + (t % 2) * 128 + t / 2 * 64;
            }
        }
    };
    auto load = [&](Load& to, u32 step) {
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            #pragma unroll
            for (u32 h = 0; h < 2; h++) {
                #pragma unroll
                for (u32 q = 0; q < 2; q++) {
                    // Beyond the columns the last codes stay: they are finite, and are multiplied by zero.
                    if (!TAIL || step * STEP + q * 128 + t * 32 < p.columns) {
                        to.codes[m][h][q] = load_codes(at[m][h] + q * 64);
                    }
                }
                u32 own = element[m][h];
                if (TAIL) own = min(own, p.rows * p.columns - 1);
                const u32 block = own >> p.log2_blocksize;
#if NESTED
                to.code[m][h] = ((const u8*)absmax)[block];
                to.absmax[m][h] = nested[block >> p.log2_nested];
#else
                to.absmax[m][h] = ((const float*)absmax)[block];
#endif
                at[m][h] += column_warps * (STEP / 2);
                element[m][h] += column_warps * STEP;
            }
        }
    };

    // Columns g of the tile of x^T: 4 tokens for lanes t = 0 and 1, and the same 4 for t = 2 and 3, each zero
    // where the others' columns of W are. So each pair of lanes has sums of its own, of one block of W.
    const u16* x_at[TOKEN_TILES];
    bool x_mine[TOKEN_TILES];
    uint4 b[TOKEN_TILES][PIECES];
    #pragma unroll
    for (u32 n = 0; n < TOKEN_TILES; n++) {
        const u32 token = n * 4 + g % 4;
        x_mine[n] = g / 4 == t / 2 && token < p.tokens;
        x_at[n] = x + (size_t)min(token, p.tokens - 1) * p.columns + t * 32;
        #pragma unroll
        for (u32 i = 0; i < PIECES; i++) b[n][i] = make_uint4(0, 0, 0, 0);
    }

    float sums[ROW_TILES][TOKEN_TILES][4] = {};

    auto compute = [&](const Load& from, u32 step) {
        float scale[ROW_TILES][2][2];  // [tile][row][half]
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            #pragma unroll
            for (u32 h = 0; h < 2; h++) {
                float mine = from.absmax[m][h];
#if NESTED
                mine = __fadd_rn(__fmul_rn(map[from.code[m][h]], mine), offset);
#endif
                if (TAIL && step * STEP + (t % 2) * 128 + t / 2 * 64 >= p.columns) mine = 0.0f;
                const float other = __shfl_xor_sync(0xffffffffu, mine, 1);
                scale[m][h][0] = t % 2 ? other : mine;
                scale[m][h][1] = t % 2 ? mine : other;
            }
        }
        #pragma unroll
        for (u32 q = 0; q < 2; q++) {
            float d[ROW_TILES][TOKEN_TILES][4] = {};
            #pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 i = (q * 4 + j) % PIECES;
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++) {
                    if (x_mine[n] && (!TAIL || step * STEP + q * 128 + t * 32 < p.columns)) {
                        b[n][i] = __ldg((const uint4*)(x_at[n] + (size_t)step * STEP + q * 128 + j * 8));
                    }
                }
                #pragma unroll
                for (u32 m = 0; m < ROW_TILES; m++) {
                    const uint4 &low = from.codes[m][0][q], &high = from.codes[m][1][q];
                    const u32 a = j == 0 ? low.x : j == 1 ? low.y : j == 2 ? low.z : low.w;
                    const u32 c = j == 0 ? high.x : j == 1 ? high.y : j == 2 ? high.z : high.w;
                    auto pair = [&](u32 word, u32 byte) { return lookup(bank + __byte_perm(word, 0, 0x4440 + byte) * 128); };
                    const u32 a0 = pair(a, 0), a1 = pair(c, 0), a2 = pair(a, 1), a3 = pair(c, 1);
                    const u32 a4 = pair(a, 2), a5 = pair(c, 2), a6 = pair(a, 3), a7 = pair(c, 3);
                    #pragma unroll
                    for (u32 n = 0; n < TOKEN_TILES; n++) {
                        multiply(d[m][n], a0, a1, a2, a3, b[n][i].x, b[n][i].y);
                        multiply(d[m][n], a4, a5, a6, a7, b[n][i].z, b[n][i].w);
                    }
                }
            }
            #pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++)
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++)
                    #pragma unroll
                    for (u32 i = 0; i < 4; i++) sums[m][n][i] = fmaf(scale[m][i / 2][q], d[m][n][i], sums[m][n][i]);
        }
    };

    // The low-rank product of a tile: 16 ranks at a time, which the warps that share rows take in turn. Columns
    // 0 to 3 of the tile of u^T are the tokens, the others are zero.
    auto add_low_rank = [&](u32 tile) {
        for (u32 first = column_warp * 16; first < p.rank; first += column_warps * 16) {
            u32 v[TOKEN_TILES][2];
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++) {
                #pragma unroll
                for (u32 h = 0; h < 2; h++) {
                    const u32 token = n * 4 + g, k = first + h * 8 + 2 * t;
                    auto value = [&](u32 k) -> u32 { return g < 4 && token < p.tokens && k < p.rank ? u[token * p.rank + k] : 0; };
                    v[n][h] = value(k) | value(k + 1) << 16;
                }
            }
            #pragma unroll
            for (u32 m = 0; m < ROW_TILES; m++) {
                u32 a[4];
                #pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 row = min(tile * tile_rows + (row_warp * ROW_TILES + m) * 16 + i % 2 * 8 + g, p.rows - 1);
                    const u32 k = first + i / 2 * 8 + 2 * t;
                    auto value = [&](u32 k) -> u32 { return k < p.rank ? narrow(low_rank[row * p.rank + k]) : 0; };
                    a[i] = value(k) | value(k + 1) << 16;
                }
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++) {
                    float d[4] = {};
                    multiply(d, a[0], a[1], a[2], a[3], v[n][0], v[n][1]);
                    #pragma unroll
                    for (u32 i = 0; i < 4; i++) sums[m][n][i] = fmaf(p.scale, d[i], sums[m][n][i]);
                }
            }
        }
    };

    // Adds up the warps' sums of a tile in a fixed order, and stores the result.
    auto finish = [&](u32 tile) {
        #pragma unroll
        for (u32 m = 0; m < ROW_TILES; m++) {
            __syncthreads();  // The last tile's sums have been read.
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++) {
                float* to = partials + (warp * TOKEN_TILES + n) * 64;
                #pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    sums[m][n][i] += __shfl_xor_sync(0xffffffffu, sums[m][n][i], 2);
                }
                if (t < 2) {
                    *(float2*)(to + g * 4 + t * 2) = make_float2(sums[m][n][0], sums[m][n][1]);
                    *(float2*)(to + (g + 8) * 4 + t * 2) = make_float2(sums[m][n][2], sums[m][n][3]);
                }
                #pragma unroll
                for (u32 i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
            }
            __syncthreads();
            for (u32 i = threadIdx.x; i < 16 * row_warps * p.tokens; i += THREADS) {
                const u32 r = i % 16, w = i / 16 % row_warps, token = i / 16 / row_warps;
                const u32 row = tile * tile_rows + (w * ROW_TILES + m) * 16 + r;
                if (row >= p.rows) continue;
                float sum = 0.0f;
                #pragma unroll 4
                for (u32 c = 0; c < column_warps; c++) {
                    sum += partials[((c * row_warps + w) * TOKEN_TILES + token / 4) * 64 + r * 4 + token % 4];
                }
                sum *= p.unscale;
                if (p.has_bias) sum += bias[row];
                const size_t i_out = (size_t)token * p.rows + row;
#if OUT_F32
                ((float*)out)[i_out] = sum;
#else
                ((u16*)out)[i_out] = narrow(sum);
#endif
            }
        }
    };

    // A warp takes every `column_warps`th step, two at a time: while one is computed, the other's loads and
    // then its own next ones are under way, across tiles.
    u32 tile = blockIdx.x, step = column_warp;
    Load even = {}, odd = {};
    if (tile < tiles) {
        seek(tile);
        if (step < steps) load(even, step);
        if (step + column_warps < steps) load(odd, step + column_warps);
    }

    for (u32 i = threadIdx.x; i < 256 * 8; i += THREADS) {
        const u32 byte = i / 8;
        auto entry = [&](u32 code) { return (p.codebook[code / 2] >> (code % 2 * 16)) & 0xffff; };
        const u32 pair = entry(byte / 16) | entry(byte % 16) << 16;
        ((uint4*)pairs)[i] = make_uint4(pair, pair, pair, pair);
    }
#if NESTED
    for (u32 i = threadIdx.x; i < 256; i += THREADS) map[i] = tables[p.map + i];
#endif
    __syncthreads();

    while (tile < tiles) {
        const bool at_end = step + 2 * column_warps >= steps;
        const u32 next_tile = at_end ? tile + gridDim.x : tile;
        const u32 next_step = at_end ? column_warp : step + 2 * column_warps;
        const bool more = next_tile < tiles;
        if (step < steps) compute(even, step);
        if (at_end && more) seek(next_tile);
        if (more && next_step < steps) load(even, next_step);
        if (step + column_warps < steps) compute(odd, step + column_warps);
        if (more && next_step + column_warps < steps) load(odd, next_step + column_warps);
        if (at_end) {
            add_low_rank(tile);
            finish(tile);
        }
        tile = next_tile;
        step = next_step;
    }
}
