// y_i = x W_i^T for up to 16 rows of x, which stay in registers, and up to three W_i in 4 bits, on tensor cores (mma.sync),
// with the low-rank updates of LoRA. resident.rs has the idea. few_tokens.cu comes before.
//
// Defined before this text: F16 (x is f16, else bf16), OUT_F32, NESTED (double quantization), TAIL (the columns are no
// multiple of 256), HALF_BIAS (biases are in the format of x), ADAPTERS (each row of x has one of a stack, or none),
// TOKEN_TILES (8 rows of x each), MAX_TILES (16 rows of W each, of a cube).

#define WARPS 16
#define THREADS (32 * WARPS)
#define STEP 256                              // columns of a warp
#define PIECES 8                              // of 8 columns each, that a lane has of them
#define WARP_SUMS (160 * TOKEN_TILES + 2)     // a token's 16 rows lie together; all lanes write, and read, other banks
#define READERS (THREADS / (128 * TOKEN_TILES))  // threads that add up one result
// Registers do not suffice for two tiles of x and updates: the last pieces of x are in shared memory then, and second factors are
// loaded when they are needed. (What the assembler would put aside instead are statistics that are on their way, for which it waits.)
#define SHORT (ADAPTERS && TOKEN_TILES == 2)
#define ASIDE (SHORT ? 2 : 0)

// Codes are read once: they leave the first-level cache to others.
__device__ __forceinline__ uint2 load_codes(const u8* p) {
    uint2 r;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
    return r;
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ bool has_arrived(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    return done;
}

__device__ __forceinline__ void make_barrier(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

// 16 rows of a W.
struct alignas(64) Tile {
    const u8* codes;
    const void* absmax;  // of all rows
    const float* nested;
    u8* out;             // of the first token
    const u8* bias;      // null without one
    u32 element;         // the first one's position in W
    u32 left;            // rows of W from the first on
    u32 rows;            // of W
    float offset;
#if ADAPTERS
    const u16* factor;   // of the first row and slot
    u32 slot_size;       // of a stack's second factors
    u32 rank;
    u32 first_rank;
    u32 turns;           // of 16 ranks of a span each
    u32 per_rank_tile;   // 2^16 / (rank / 16), rounded up: divides turns
#endif
};

// The statistics of one block of two rows.
struct Statistics {
    float absmax[2];
    u32 code[2];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) resident(
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
    const u16* __restrict__ b0,       // a stack: [slots, rows, rank]
    const u16* __restrict__ b1,
    const u16* __restrict__ b2,
    const float* __restrict__ scalings0,  // of each slot
    const float* __restrict__ scalings1,
    const float* __restrict__ scalings2,
    const float* __restrict__ tables,
    const u16* __restrict__ x,        // [tokens, columns]
    const u32* __restrict__ spans,    // their number, then first token, end and slot of each
    u16* u,                           // [tokens, ranks]: scaled products with the stacks' first factors
    u32* counters,                    // finished parts of u, cubes that have left
    void* __restrict__ out0,          // [tokens, rows]
    void* __restrict__ out1,
    void* __restrict__ out2,
    const __grid_constant__ Params p)
{
    // The pair of values of each byte of codes, once for each lane: every lane has a bank of its own. Pairs are 256 bytes apart, so
    // that one instruction makes an address of a byte and a lane.
    __shared__ alignas(256) u32 pairs[256 * 64];
    __shared__ alignas(16) float partials[2 * WARPS * WARP_SUMS];
    __shared__ float map[256];
    __shared__ Tile list[MAX_TILES];
    __shared__ alignas(8) u64 written[2];
#if ADAPTERS
    __shared__ alignas(8) u64 u_is_there;
#endif
#if SHORT
    __shared__ uint4 aside[TOKEN_TILES * ASIDE * THREADS];
#endif

    const u32 thread = threadIdx.x, lane = thread % 32;
    const u32 warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // so that branches on it are uniform
    const u32 g = lane / 4, t = lane % 4;
    const u32 first_column = warp * STEP;
    // Tiles of the first matrix come first.
    const u32 end0 = (p.matrices[0].rows + 15) / 16;
    const u32 end1 = end0 + (p.matrices[1].rows + 15) / 16;
    const u32 tiles = end1 + (p.matrices[2].rows + 15) / 16;

#if ADAPTERS
    const u32 num_spans = __ldg(spans);
#endif
    const u32 own_tiles = (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
    for (u32 e = thread; e < own_tiles; e += THREADS) {
        const u32 number = blockIdx.x + e * gridDim.x, i = number < end0 ? 0 : number < end1 ? 1 : 2;
        Tile tile;
        const u32 first = (number - (i == 0 ? 0 : i == 1 ? end0 : end1)) * 16;
        tile.rows = p.matrices[i].rows;
        tile.left = tile.rows - first;
        tile.element = first * p.columns;
        tile.codes = OF(i, codes) + tile.element / 2;
        tile.absmax = OF(i, absmax);
        tile.nested = OF(i, nested);
        tile.offset = 0.0f;
#if NESTED
        tile.offset = __ldg(tile.nested + p.matrices[i].offset);
#endif
        tile.out = (u8*)OF(i, out) + first * (OUT_F32 ? 4 : 2);
        tile.bias = p.biases >> i & 1 ? (const u8*)OF(i, bias) + first * (HALF_BIAS ? 2 : 4) : 0;
#if ADAPTERS
        tile.rank = p.matrices[i].rank;
        tile.first_rank = p.matrices[i].first_rank;
        tile.slot_size = tile.rows * tile.rank;
        tile.factor = OF(i, b) + first * tile.rank;
        tile.turns = num_spans * (tile.rank / 16);
        tile.per_rank_tile = tile.rank == 0 ? 0 : (0xffff + tile.rank / 16) / (tile.rank / 16);
#endif
        list[e] = tile;
    }
    __syncthreads();

    // Codes of rows g and g + 8, of a lane's 16 columns of each block.
    uint2 codes[PIECES / 2][2] = {};
    const u32 own_bytes = (g * p.columns + first_column + t * 16) / 2;
    struct From {
        const u8* low;
        bool has_low, has_high;
    };
    auto from_of = [&](u32 number) -> From {
        const bool has = number < own_tiles && first_column < p.columns;
        const Tile& tile = list[has ? number : 0];
        // Beyond rows and columns codes stay what they are: they are not stored, and multiplied by zero.
        return {tile.codes + own_bytes, has && g < tile.left, has && g + 8 < tile.left};
    };
    auto fetch = [&](const From& from, u32 q) {
        if (TAIL && first_column + q * 64 >= p.columns) return;
        if (from.has_low) codes[q][0] = load_codes(from.low + q * 32);
        if (from.has_high) codes[q][1] = load_codes(from.low + p.columns * 4 + q * 32);
    };
    const u32 own_element = g * p.columns + first_column + t * 64;
    auto statistics = [&](u32 number) -> Statistics {
        Statistics to = {};
        if (number < own_tiles && first_column + t * 64 < p.columns) {
            const Tile& tile = list[number];
            const u32 element = tile.element + own_element;
            #pragma unroll
            for (u32 h = 0; h < 2; h++) {
                if (h * 8 + g >= tile.left) continue;
                const u32 block = (element + h * 8 * p.columns) >> p.log2_blocksize;
#if NESTED
                to.code[h] = __ldg((const u8*)tile.absmax + block);
                to.absmax[h] = __ldg(tile.nested + (block >> p.log2_nested));
#else
                to.absmax[h] = __ldg((const float*)tile.absmax + block);
#endif
            }
        }
        return to;
    };

#if ADAPTERS
    // Products with the stacks' first factors, one part for 8 ranks and a span of tokens. All cubes are on the device at once, so those
    // that wait for parts keep none from being made. Cubes with fewer tiles come first. Everything waits for the parts in the end: what
    // the first one of a cube reads goes before its codes.
    const u32 num_parts = p.ranks / 8 * num_spans, first_part = gridDim.x - 1 - blockIdx.x;
    uint4 a[PIECES] = {};
    auto matrix_of_rank = [&](u32 rank) -> u32 {
        return rank < p.matrices[1].first_rank ? 0 : rank < p.matrices[2].first_rank ? 1 : 2;
    };
    auto read_part = [&](u32 part) {
        const u32 rank = part / num_spans * 8, i = matrix_of_rank(rank), slot = __ldg(spans + 3 + part % num_spans * 3);
        const size_t row = (size_t)slot * p.matrices[i].rank + rank - p.matrices[i].first_rank + g;
        const uint4* from = (const uint4*)(OF(i, a) + row * p.columns + first_column + t * 16);
        #pragma unroll
        for (u32 q = 0; q < PIECES / 2; q++) {
            if (first_column + q * 64 < p.columns) a[2 * q] = __ldg(from + q * 8), a[2 * q + 1] = __ldg(from + q * 8 + 1);
        }
    };
    if (first_part < num_parts) read_part(first_part);
#endif
    const From first = from_of(0);
    #pragma unroll
    for (u32 q = 0; q < PIECES / 2; q++) fetch(first, q);
    Statistics coming = statistics(0);

    // A lane's columns of x: 16 that lie side by side of each block of 64.
    uint4 b[TOKEN_TILES][PIECES] = {};
    #pragma unroll
    for (u32 n = 0; n < TOKEN_TILES; n++)
        #pragma unroll
        for (u32 q = 0; q < PIECES / 2; q++) {
            const u32 token = n * 8 + g, column = first_column + q * 64 + t * 16;
            if (token >= p.tokens || column >= p.columns) continue;
            const uint4* from = (const uint4*)(x + (size_t)token * p.columns + column);
            b[n][2 * q] = __ldg(from), b[n][2 * q + 1] = __ldg(from + 1);
        }

#if SHORT
    #pragma unroll
    for (u32 n = 0; n < TOKEN_TILES; n++)
        #pragma unroll
        for (u32 k = 0; k < ASIDE; k++) aside[(n * ASIDE + k) * THREADS + thread] = b[n][PIECES - ASIDE + k];
#endif
    auto own_x = [&](u32 n, u32 k) -> uint4 {
#if SHORT
        if (k >= PIECES - ASIDE) return aside[(n * ASIDE + k - (PIECES - ASIDE)) * THREADS + thread];
#endif
        return b[n][k];
    };

    const u32 written_at = shared_address(written);
    if (thread == 0) make_barrier(written_at, WARPS), make_barrier(written_at + 8, WARPS);
#if ADAPTERS
    const u32 u_is_there_at = shared_address(&u_is_there);
    if (thread == 0) make_barrier(u_is_there_at, 1);
#endif
    for (u32 e = thread; e < 256 * 8; e += THREADS) {
        const u32 byte = e / 8;
        auto entry = [&](u32 code) { return (p.codebook[code / 2] >> (code % 2 * 16)) & 0xffff; };
        const u32 pair = entry(byte / 16) | entry(byte % 16) << 16;
        ((uint4*)pairs)[byte * 16 + e % 8] = make_uint4(pair, pair, pair, pair);
    }
#if NESTED
    for (u32 e = thread; e < 256; e += THREADS) map[e] = tables[p.map + e];
#endif
#if ADAPTERS
    for (u32 part = first_part; part < num_parts; part += gridDim.x) {
        if (part != first_part) read_part(part);
        float d[TOKEN_TILES][4] = {};
        #pragma unroll
        for (u32 k = 0; k < PIECES; k++) {
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++) {
                const uint4 v = own_x(n, k);
                multiply(d[n], a[k].x, 0, a[k].y, 0, v.x, v.y);
                multiply(d[n], a[k].z, 0, a[k].w, 0, v.z, v.w);
            }
        }
        #pragma unroll
        for (u32 n = 0; n < TOKEN_TILES; n++) {
            float* to = partials + ((warp * TOKEN_TILES + n) * 8 + 2 * t) * 8 + g;
            to[0] = d[n][0], to[8] = d[n][1];
        }
        __syncthreads();
        const u32 first_rank = part / num_spans * 8, i = matrix_of_rank(first_rank), token = thread / 8, rank = thread % 8;
        const u32* span = spans + 1 + part % num_spans * 3;
        if (token < 8 * TOKEN_TILES && token >= __ldg(span) && token < __ldg(span + 1)) {
            float sum = 0.0f;
            #pragma unroll
            for (u32 w = 0; w < WARPS; w++) sum += partials[(w * TOKEN_TILES * 8 + token) * 8 + rank];
            u[(size_t)token * p.ranks + first_rank + rank] = narrow(__ldg(OF(i, scalings) + __ldg(span + 2)) * sum);
        }
        __syncthreads();
        if (thread == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counters) : "memory");
    }
#endif
    __syncthreads();

    // Tiles whose sums were written: those of the last are not read yet.
    u32 count = 0;
    const u32 reader = thread % READERS, own_row = thread / READERS % 16, own_token = thread / READERS / 16;
    auto store = [&]() {
        if (count == 0) return;
        const Tile& tile = list[count - 1];
        const u32 buffer = (count - 1) % 2;
        while (!has_arrived(written_at + buffer * 8, (count - 1) / 2 % 2)) {}
        if (own_token >= p.tokens) return;  // a whole warp
        const float* from = partials + (buffer * WARPS + reader * (WARPS / READERS)) * WARP_SUMS + own_token * 20 + own_row;
        float sum = 0.0f;
        #pragma unroll
        for (u32 w = 0; w < WARPS / READERS; w++) sum += from[w * WARP_SUMS];
        #pragma unroll
        for (u32 d = 1; d < READERS; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (reader > 0 || own_row >= tile.left || own_token >= p.tokens) return;
        sum *= p.unscale;
        if (tile.bias) {
#if HALF_BIAS
            float bias, none;
            unpack(((const u16*)tile.bias)[own_row], bias, none);
            sum += bias;
#else
            sum += ((const float*)tile.bias)[own_row];
#endif
        }
        const size_t to = (size_t)own_token * tile.rows + own_row;
#if OUT_F32
        ((float*)tile.out)[to] = sum;
#else
        ((u16*)tile.out)[to] = narrow(sum);
#endif
    };

#if ADAPTERS
    // The low-rank products of a tile: 16 ranks of a span at a time, which the warps take in turn. A lane has four ranks that lie
    // side by side, of rows and tokens alike.
    auto factors = [&](const Tile& tile, u32 turn, uint2 (&f)[2]) {
        if (turn >= tile.turns) return;
        const u32 span = turn * tile.per_rank_tile >> 16, k = (turn - span * (tile.rank / 16)) * 16 + 4 * t;
        const u16* from = tile.factor + (size_t)__ldg(spans + 3 + span * 3) * tile.slot_size + k;
        #pragma unroll
        for (u32 h = 0; h < 2; h++) f[h] = __ldg((const uint2*)(from + min(h * 8 + g, tile.left - 1) * tile.rank));
    };
    auto add_update = [&](const Tile& tile, u32 turn, const uint2 (&f)[2], float (&sums)[TOKEN_TILES][4]) {
        const u32 span = turn * tile.per_rank_tile >> 16, k = (turn - span * (tile.rank / 16)) * 16 + 4 * t;
        const u32 first = __ldg(spans + 1 + span * 3), end = __ldg(spans + 2 + span * 3);
        #pragma unroll
        for (u32 n = 0; n < TOKEN_TILES; n++) {
            const u32 token = n * 8 + g;
            uint2 v = make_uint2(0, 0);
            if (token >= first && token < end) v = *(const uint2*)(u + (token * p.ranks + tile.first_rank + k));
            float d[4] = {};
            multiply(d, f[0].x, f[1].x, f[0].y, f[1].y, v.x, v.y);
            #pragma unroll
            for (u32 e = 0; e < 4; e++) sums[n][e] = fmaf(p.scale, d[e], sums[n][e]);
        }
    };
#endif

    const u32 own_pairs = lane * 4;
    #pragma unroll 1
    for (u32 number = 0; number < own_tiles; number++) {
        const Tile& tile = list[number];
        float sums[TOKEN_TILES][4] = {};
        const Statistics now = coming;
        coming = statistics(number + 1);
#if ADAPTERS
        uint2 f[2] = {};
        // Tiles begin with other warps, so that all have as much to do.
        const u32 own_turn = (warp + 4 * (WARPS - 1) * number) % WARPS;
#endif
        const From next = from_of(number + 1);
        float own[2];
        #pragma unroll
        for (u32 h = 0; h < 2; h++) {
            own[h] = now.absmax[h];
#if NESTED
            own[h] = __fadd_rn(__fmul_rn(map[now.code[h]], own[h]), tile.offset);
#endif
            if (TAIL && first_column + t * 64 >= p.columns) own[h] = 0.0f;
        }
        #pragma unroll
        for (u32 q = 0; q < PIECES / 2; q++) {
            if (q == PIECES / 4) {
                store();
#if ADAPTERS && !SHORT
                factors(tile, own_turn, f);
#endif
            }
            const uint2 low = codes[q][0], high = codes[q][1];
            float d[TOKEN_TILES][4] = {};
            #pragma unroll
            for (u32 j = 0; j < 2; j++) {
                auto pair = [&](u32 word, u32 byte) -> u32 {
                    return *(const u32*)((const u8*)pairs + __byte_perm(word, own_pairs, 0x5504 + byte * 16));
                };
                const u32 l = j == 0 ? low.x : low.y, h = j == 0 ? high.x : high.y;
                const u32 f0 = pair(l, 0), f1 = pair(h, 0), f2 = pair(l, 1), f3 = pair(h, 1);
                const u32 f4 = pair(l, 2), f5 = pair(h, 2), f6 = pair(l, 3), f7 = pair(h, 3);
                #pragma unroll
                for (u32 n = 0; n < TOKEN_TILES; n++) {
                    const uint4 v = own_x(n, q * 2 + j);
                    multiply(d[n], f0, f1, f2, f3, v.x, v.y);
                    multiply(d[n], f4, f5, f6, f7, v.z, v.w);
                }
            }
            fetch(next, q);
            // The block's statistics are with lane q of the row.
            const float absmax_low = __shfl_sync(0xffffffffu, own[0], g * 4 + q);
            const float absmax_high = __shfl_sync(0xffffffffu, own[1], g * 4 + q);
            #pragma unroll
            for (u32 n = 0; n < TOKEN_TILES; n++)
                #pragma unroll
                for (u32 e = 0; e < 4; e++) sums[n][e] = fmaf(e < 2 ? absmax_low : absmax_high, d[n][e], sums[n][e]);
        }
#if ADAPTERS
        if (number == 0 && thread == 0 && num_parts > 0) {
            u32 finished;
            do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(finished) : "l"(counters) : "memory");
            while (finished < num_parts);
            arrive(u_is_there_at);
        }
        __syncwarp();
        for (u32 turn = own_turn; turn < tile.turns; turn += WARPS) {
            if (SHORT || turn != own_turn) factors(tile, turn, f);
            while (!has_arrived(u_is_there_at, 0)) {}
            add_update(tile, turn, f, sums);
        }
#endif
        // The sums before the last have been read: all who wrote the last ones have read these before.
        float* to = partials + (count % 2 * WARPS + warp) * WARP_SUMS + 2 * t * 20 + g;
        #pragma unroll
        for (u32 n = 0; n < TOKEN_TILES; n++) {
            to[n * 160] = sums[n][0], to[n * 160 + 20] = sums[n][1];
            to[n * 160 + 8] = sums[n][2], to[n * 160 + 28] = sums[n][3];
        }
        __syncwarp();
        if (lane == 0) arrive(written_at + count % 2 * 8);
        count++;
    }
    store();
#if ADAPTERS
    if (num_parts > 0 && thread == 0 && atomicAdd(counters + 1, 1) == gridDim.x - 1) {
        counters[0] = 0;
        counters[1] = 0;
    }
#endif
}
