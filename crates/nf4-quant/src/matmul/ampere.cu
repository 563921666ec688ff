// y = x op(W) on tensor cores with mma.sync for a few tokens, with W in 4 bits. ampere.rs has the idea.
//
// The tile computed is transposed: Y^T[m, token] = A[m, k] X^T[k, token], A = W (forward) or W^T (input
// gradient). X goes through shared memory; a thread turns the codes of its own rows of A into fragments in
// registers.
//
// The order of k within a sum is free as long as A and X keep the same one: of each 32 columns a thread
// takes the eight neighbours 8 t to 8 t + 7, t = lane % 4. So one 16-byte load brings its part of X for two
// instructions, and a word of codes its part of A. Likewise the order of rows:
// the four that a thread holds are neighbours, 4 g to 4 g + 3, g = lane / 4, and results leave together.
//
// GROUPED, each tile's tokens are of one group, which has a weight and a low-rank factor of its own: one behind the
// other in memory, so that a group is a number of rows to skip. A table says which tokens a tile has.
//
// `tensor_cores!` comes before. Defined before this text: TRANSPOSED, F16, OUT_F32, BN (tokens per tile), STAGES, MIN_CUBES (per
// multiprocessor), GROUPED.

#define BM 128
#define BK 32
#define THREADS 128
#define X_BYTES (BN * BK * 2)
#define X_CHUNKS (BN * BK / 8)  // copies of 16 bytes
#define PAIRS (BN / 16)         // pairs of mma's eight columns
// Forward only: transposed, it needs one register more than a thread has.
#define INTERLEAVE (!TRANSPOSED && BN > 16)
// Forward, a stage of codes is two of X: 32 bytes of a row, what memory moves at least.
#define W_STAGES (!TRANSPOSED ? STAGES / 2 + 1 : STAGES)
#define W_PLANE 144             // 128 bytes and a shift by 16: planes begin in different banks
#define W_BYTES (!TRANSPOSED ? BM / 32 * 8 * W_PLANE : BM * BK / 2)

struct Shared {
    u8 x[STAGES][X_BYTES];
    u8 w[W_STAGES][W_BYTES];
    alignas(256) float codebook[16];
#if TRANSPOSED
    float absmax[2][THREADS];  // per warp, of 32 rows of W
#endif
    u32 last;
};

// `mma`, which stays where it is written among lookups.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if TURING
    mma(d, a, b0, b1);
#else
    asm volatile(
#if F16
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// A value of the codebook, given its address in shared memory. Volatile keeps lookups where they are
// written, between the tensor cores' instructions.
__device__ __forceinline__ float lookup(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
    return value;
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

// A for 32 columns: two instructions along k, two sets of 16 rows.
typedef u32 Fragments[2][2][4];

// A unit of X, at `at` in shared memory, against its fragments. `between` is called eight times, spread over the unit.
template <class Between>
__device__ __forceinline__ void multiply_unit(float (&d)[2][2 * PAIRS][4], u32 at, const Fragments& a, Between between) {
    uint4 b[2][2];
    b[0][0] = load_shared(at), b[0][1] = load_shared(at + 512);
    u32 next_at = at;
#pragma unroll
    for (u32 i = 0; i < PAIRS; i++) {
        if (i + 1 < PAIRS) {
            b[(i + 1) % 2][0] = load_shared(next_at + (2 * i + 2) * 512);
            b[(i + 1) % 2][1] = load_shared(next_at + (2 * i + 3) * 512);
        }
        const uint4 v = b[i % 2][0], w = b[i % 2][1];
        multiply(d[0][2 * i], a[0][0], v.x, v.y);
        multiply(d[1][2 * i], a[0][1], v.x, v.y);
        multiply(d[0][2 * i + 1], a[0][0], w.x, w.y);
        multiply(d[1][2 * i + 1], a[0][1], w.x, w.y);
        multiply(d[0][2 * i], a[1][0], v.z, v.w);
        multiply(d[1][2 * i], a[1][1], v.z, v.w);
        multiply(d[0][2 * i + 1], a[1][0], w.z, w.w);
        multiply(d[1][2 * i + 1], a[1][1], w.z, w.w);
#pragma unroll
        for (u32 j = 8 * i / PAIRS; j < 8 * (i + 1) / PAIRS; j++)
            next_at = at | between(j, i == 0 ? 0.0f : d[1][2 * i - 1][0]);
    }
}

// Volatile, like `thread_index`: the loop has no registers for what is needed again only after it.
__device__ __forceinline__ Share share(const Params& p, const Tile* tiles) {
    u32 cube;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(cube));
    return share_of<BM, BN>(cube, p, tiles);
}

__device__ __forceinline__ u32 thread_index() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES) matmul(
    const u16* __restrict__ x,           // [tokens, k]
    const u16* __restrict__ u,           // [tokens, rank]
    const float* __restrict__ low_rank,  // [m, rank] forward, [rank, m] transposed
    const void* __restrict__ weight,     // codes, [m, k] forward, [k, m] transposed
    const void* __restrict__ absmax,
    const float* __restrict__ nested,
    const float* __restrict__ tables,
#if GROUPED
    const Tile* __restrict__ tiles,
    void* __restrict__ out,              // [tokens, m]
    const __grid_constant__ GroupedParams grouped
) {
    const Params& p = grouped.p;
#else
    const float* __restrict__ bias,
    float* __restrict__ partial,         // [slots, parts, BM * BN]
    u32* __restrict__ arrived,           // per slot, zero before the launch and after it
    void* __restrict__ out,              // [tokens, m]
    const __grid_constant__ Params p
) {
    const Tile* tiles = nullptr;
#endif
    __shared__ alignas(1024) Shared s;
    const u32 thread = thread_index(), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const Share work = share(p, tiles);
#if GROUPED
    if (work.n0 >= work.end) return;
#endif
    const u32 skipped = work.part == 0 ? (p.rank + 63) / 64 * 2 : 0, total = skipped + work.units;
    const u32 origin = work.first - skipped;              // unit + origin is its place in k
    const u32 row_of_a = work.m0 + warp * 32 + 4 * g;     // the first of the thread's four
    const u32 row = row_of_a < p.m ? row_of_a : p.m - 4;  // one that exists

    // Copies of X, or of U, which comes first: chunk thread % 4 of rows thread / 4 + 32 i. Columns beyond the
    // end are zeros, so that A may hold anything finite there. Registers are short: positions are computed
    // when they are needed, in chunks of 16 bytes.
    const u32 x_row = work.n0 + thread / 4, x_to = shared_address(s.x[0]) + thread * 16;
    auto copy_x = [&](u32 unit) {
        if (unit >= total) return;
        const bool is_u = unit < skipped;
        const u32 width = (is_u ? p.rank : p.k) / 8, column = (is_u ? unit : unit + origin) * 4 + thread % 4;
        const int rows = column < width ? (int)(work.end - x_row) : 0;
        u32 chunk = x_row * width + column;
#pragma unroll
        for (int i = 0; i < (X_CHUNKS + THREADS - 1) / THREADS; i++, chunk += width * 32)
            if (X_CHUNKS >= THREADS || thread < X_CHUNKS)
                copy_async(x_to + unit % STAGES * X_BYTES + i * (THREADS * 16), (const uint4*)(is_u ? u : x) + chunk, 32 * i < rows);
    };

#if !TRANSPOSED
    // Codes: halves of 32 bytes, thread % 2, of rows thread / 2 and 64 more. A warp's 32 rows lie in eight
    // planes, of half and row % 4, in the order of row / 4: a quarter of a warp meets every bank once, here
    // and where it reads.
    const u32 w_to = shared_address(s.w[0]) + thread / 64 * (8 * W_PLANE) +
                     (thread % 2 * 4 + thread / 2 % 4) * W_PLANE + thread / 8 % 8 * 16;
    u32 w_from[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 m = work.m0 + thread / 2 + 64 * i;
        w_from[i] = (work.group * p.m + (m < p.m ? m : p.m - 1)) * (p.k / 32) + thread % 2 + origin;
    }
    auto copy_w = [&](u32 unit, u32 stage) {
        if (unit >= total) return;
#pragma unroll
        for (u32 i = 0; i < 2; i++)
            copy_async(w_to + stage * W_BYTES + i * (16 * W_PLANE), (const uint4*)weight + (w_from[i] + unit), true);
    };
    // The stage of the codes of the pair of units that is multiplied.
    u32 ring = (W_STAGES - skipped / 2 % W_STAGES) % W_STAGES;
    auto advance_ring = [&]() { ring = ring + 1 == W_STAGES ? 0 : ring + 1; };
#else
    // Codes: chunk thread % 4, 32 columns, of row thread / 4 of the unit. The chunk's place depends on the
    // row, so that the eight rows of ldmatrix meet every bank once.
    const u32 w_column =
        work.group * p.k * (p.m / 32) + work.m0 / 32 + (work.m0 / 32 + thread % 4 < p.m / 32 ? thread % 4 : 0);
    const u32 w_to = shared_address(s.w[0]) + thread / 4 * 64 + (thread % 4 ^ thread / 32) * 16;
    auto copy_w = [&](u32 unit, u32) {
        if (unit >= total) return;
        const u32 k = (unit + origin) * BK + thread / 4;
        copy_async(w_to + unit % STAGES * W_BYTES, (const uint4*)weight + (k * (p.m / 32) + w_column), k < p.k);
    };
#endif

    // A group of copies holds a unit of X and the next unit of codes, which is decoded while that of X is
    // multiplied. Where a stage of codes is two units it comes with the first.
    auto copy_group = [&](u32 unit, u32 w_stage) {
        copy_x(unit);
        if ((TRANSPOSED || unit % 2 == 1) && unit + 1 >= skipped) copy_w(unit + 1, w_stage);
        commit();
    };
    if (skipped == 0) copy_w(0, 0);
    if (thread < 16) s.codebook[thread] = tables[p.codebook + thread];
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) copy_group(i, (i + 1 - skipped) / 2);

    float d[2][2 * PAIRS][4] = {};
    u32 unit = 0;  // of all, the low-rank product's among them
    const u32 x_at = shared_address(s.x[0]) + g * (BK * 2) + t * 16;

    // The next unit of X is there, for all warps, and the stage of the one before is free.
    auto next_unit = [&]() {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();
#if !TRANSPOSED
        // One round, less a stage, ahead.
        copy_group(unit + STAGES - 1, ring == 0 ? W_STAGES - 1 : ring - 1);
#else
        copy_group(unit + STAGES - 1, 0);
#endif
    };
    auto x_of_unit = [&]() { return x_at + unit % STAGES * X_BYTES; };
    auto nothing = [](u32, float) { return 0u; };

    Fragments even, odd;
    [[maybe_unused]] const u32 zero = blockIdx.y;  // always, but the compiler can't know

    // The low-rank product: its factor comes from memory as it is and is rounded here. Beyond the rank U is 0.
    while (unit < skipped) {
        next_unit();
        const u32 k = unit * BK + 8 * t < p.rank ? unit * BK + 8 * t : 0;
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            float4 v[4];
#if TRANSPOSED
#pragma unroll
            for (u32 i = 0; i < 4; i++) v[i] = *(const float4*)(low_rank + (work.group * p.rank + k + 4 * j + i) * p.m + row);
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                even[j][0][2 * h] = pack(v[2 * h].x, v[2 * h + 1].x), even[j][0][2 * h + 1] = pack(v[2 * h].y, v[2 * h + 1].y);
                even[j][1][2 * h] = pack(v[2 * h].z, v[2 * h + 1].z), even[j][1][2 * h + 1] = pack(v[2 * h].w, v[2 * h + 1].w);
            }
#else
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                v[i] = *(const float4*)(low_rank + (work.group * p.m + row + i) * p.rank + k + 4 * j);
                even[j][i / 2][i % 2] = pack(v[i].x, v[i].y), even[j][i / 2][i % 2 + 2] = pack(v[i].z, v[i].w);
            }
#endif
        }
        multiply_unit(d, x_of_unit(), even, nothing);
        unit++;
#if !TRANSPOSED
        if (unit % 2 == 0) advance_ring();
#endif
    }
#if DROPOUT
    // The sums are those of the low-rank product alone now. Dropout's bits come in pairs of neighbouring features.
    if (skipped) {
#pragma unroll
        for (u32 i = 0; i < 2 * PAIRS; i++) {
#pragma unroll
            for (u32 c = 0; c < 2; c++) {
                const u32 pair = ((work.n0 + 8 * i + 2 * t + c) * p.m + row_of_a) / 2;
                const u32 first = dropout_bits(pair, p.seed_low, p.seed_high);
                const u32 second = dropout_bits(pair + 1, p.seed_low, p.seed_high);
                d[0][i][c] *= kept(first & 0xFFFF, p), d[0][i][c + 2] *= kept(first >> 16, p);
                d[1][i][c] *= kept(second & 0xFFFF, p), d[1][i][c + 2] *= kept(second >> 16, p);
            }
        }
    }
#endif

    const bool plain = p.log2_nested == 255;
    const float offset = plain ? 0.0f : nested[p.offset + work.group];
    // absmax in two steps: what lies in memory, and the value.
    float absmax_value;
    u32 absmax_code;
    auto load_absmax = [&](u32 element) {
        const u32 block = element >> p.log2_blocksize;
        absmax_value = plain ? ((const float*)absmax)[block] : nested[block >> p.log2_nested];
        absmax_code = plain ? 0 : ((const u8*)absmax)[block];
    };
    auto decode_absmax = [&]() {
        return plain ? absmax_value : __fadd_rn(__fmul_rn(tables[p.map + absmax_code], absmax_value), offset);
    };

    const u32 codebook = shared_address(s.codebook);
    u32 table = codebook, words[4];
    float v[4];  // codebook values of the piece that is decoded
    auto value = [&](u32 offsets, u32 byte) { return lookup(__byte_perm(offsets, table, 0x7650 + byte)); };
#if !TRANSPOSED
    // One absmax per row and two units; a lane decodes that of row `lane` of its warp.
    const u32 row_of_lane = work.m0 + warp * 32 + lane;
    u32 element = (work.group * p.m + (row_of_lane < p.m ? row_of_lane : p.m - 1)) * p.k + work.first * BK;
    load_absmax(element);
    float my_scale = 0.0f, scales[4];
    // Decodes what was loaded and loads that of unit `next`.
    auto advance_absmax = [&](u32 next) {
        my_scale = decode_absmax();
        if (next < total) element += 64;
        load_absmax(element);
    };
    auto spread_absmax = [&]() {
#pragma unroll
        for (u32 i = 0; i < 4; i++) scales[i] = __shfl_sync(0xFFFFFFFF, my_scale, 4 * g + i);
    };
    // Eight codes of each of the thread's rows; a word's bytes are pairs of columns, the even one in the
    // high nibble.
    const u32 w_at = shared_address(s.w[0]) + warp * (8 * W_PLANE) + g * 16 + t * 4;
    auto open = [&](u32 half) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[i]) : "r"(w_at + ring * W_BYTES + (half * 4 + i) * W_PLANE));
    };
    // Piece 0 to 7: half a word, four values. An address is the codebook's, with four times the code as its
    // low byte.
    auto look_up = [&](u32 piece, u32) {
        const u32 word = words[piece / 2], byte = piece % 2 * 2;
        const u32 high = word >> 2 & 0x3C3C3C3C, low = word << 2 & 0x3C3C3C3C;
        v[0] = value(high, byte), v[1] = value(low, byte), v[2] = value(high, byte + 1), v[3] = value(low, byte + 1);
    };
    // Times absmax, rounded once.
    auto round = [&](u32 piece, Fragments& a) {
        u32 (&r)[4] = a[piece % 2][piece / 4];
        const u32 i = piece / 2;
        r[i % 2] = pack(v[0] * scales[i], v[1] * scales[i]);
        return r[i % 2 + 2] = pack(v[2] * scales[i], v[3] * scales[i]);
    };
#else
    // One absmax per row of W and half tile; a lane decodes that of row `lane` of the unit.
    const u32 column = work.group * p.k * p.m + (work.m0 + warp * 32 < p.m ? work.m0 + warp * 32 : work.m0);
    const u32 absmax_at = shared_address(s.absmax[0] + warp * 32 + 8 * t);
    float scales[2];
    auto load_unit_absmax = [&](u32 unit) {
        const u32 k = (unit + origin) * BK + lane;
        load_absmax((k < p.k ? k : p.k - 1) * p.m + column);
    };
    load_unit_absmax(unit);
    auto advance_absmax = [&](u32 parity, u32 next) {
        s.absmax[parity][thread] = decode_absmax();
        load_unit_absmax(next);
    };
    // ldmatrix: lane l gives the address of row l % 8 of matrix l / 8, and thread (g, t) gets column g of rows
    // 2 t and 2 t + 1. A column is four codes of a row of W; rows are such that t has its eight.
    const u32 w_k = lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
    const u32 w_at = shared_address(s.w[0]) + w_k * 64 + (warp ^ w_k / 8) * 16;
    auto open = [&](u32 unit) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(w_at + unit % STAGES * W_BYTES));
    };
    // Piece 0 to 7: of one word, two rows of W, the codes of two rows of A; the even one is in the high
    // nibble. An address is the codebook's, with four times the code as its low byte.
    auto look_up = [&](u32 piece, u32 parity) {
        const u32 word = words[piece / 2], byte = piece % 2;
        const u32 high = word >> 2 & 0x3C3C3C3C, low = word << 2 & 0x3C3C3C3C;
        v[0] = value(high, byte), v[1] = value(high, byte + 2), v[2] = value(low, byte), v[3] = value(low, byte + 2);
        if (piece % 2 == 0)
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(scales[0]), "=f"(scales[1])
                         : "r"(absmax_at + parity * (THREADS * 4) + piece * 4));
    };
    // Times absmax, rounded once.
    auto round = [&](u32 piece, Fragments& a) {
        u32 (&r)[4] = a[piece / 4][piece % 2];
        const u32 h = piece / 2 % 2 * 2;
        r[h] = pack(v[0] * scales[0], v[1] * scales[1]);
        return r[h + 1] = pack(v[2] * scales[0], v[3] * scales[1]);
    };
#endif
    // Multiplies a unit and decodes the next one: a piece is looked up and, some products later, rounded.
    auto multiply_and_decode = [&](const Fragments& a, Fragments& following, u32 parity) {
        look_up(0, parity);
        multiply_unit(d, x_of_unit(), a, [&](u32 piece, float product) {
            const u32 rounded = round(piece, following);
            if (piece == 7) return 0u;
#if INTERLEAVE
            // The assembler would gather all products and put the decoding behind them. To prevent that, a lookup's
            // address depends on a product, and that of X on a lookup, by added bits that are always 0.
            table = codebook | (__float_as_uint(product) & zero) | (rounded & zero);
            look_up(piece + 1, parity);
            return __float_as_uint(v[0]) & zero;
#else
            look_up(piece + 1, parity);
            return 0u;
#endif
        });
        unit++;
    };

    // The first unit of codes is decoded before the loop.
    wait_for_all_but<STAGES - 2>();
    __syncthreads();
#if TRANSPOSED
    advance_absmax(0, unit + 1);
    __syncwarp();
    open(unit);
#else
    advance_absmax(unit + 2);
    spread_absmax();
    open(0);
#endif
#pragma unroll
    for (u32 piece = 0; piece < 8; piece++) {
        look_up(piece, 0);
        round(piece, even);
    }
#if TRANSPOSED
    advance_absmax(1, unit + 2);
#endif
    while (unit < total) {
        next_unit();
#if TRANSPOSED
        open(unit + 1);
        advance_absmax(0, unit + 3);
#else
        open(1);
        advance_absmax(unit + 4);
#endif
        multiply_and_decode(even, odd, 1);
        next_unit();
#if TRANSPOSED
        open(unit + 1);
        advance_absmax(1, unit + 3);
#else
        advance_ring();
        open(0);
        spread_absmax();
#endif
        multiply_and_decode(odd, even, 0);
    }

    const Share w = share(p, tiles);
    const u32 id = thread_index();
#if !GROUPED
    if (w.parts > 1) {
        // The cube that finishes last adds all parts in their order, so that the sum does not depend on which one it
        // is.
        float4* mine = (float4*)partial + (u64)w.slot * w.parts * (BM * BN / 4) + id;
        float4* to = mine + w.part * (BM * BN / 4);
#pragma unroll
        for (u32 i = 0; i < 4 * PAIRS; i++, to += THREADS) {
            const float (&v)[4] = d[i % 2][i / 2];
            __stcg(to, make_float4(v[0], v[1], v[2], v[3]));
        }
        __threadfence();
        __syncthreads();
        if (id == 0) s.last = atomicAdd(arrived + w.slot, 1) == w.parts - 1;
        __syncthreads();
        if (!s.last) return;
        __threadfence();
        if (id == 0) arrived[w.slot] = 0;
#pragma unroll
        for (u32 i = 0; i < 4 * PAIRS; i++) {
            const float4 v = __ldcg(mine + i * THREADS);
            float (&sum)[4] = d[i % 2][i / 2];
            sum[0] = v.x, sum[1] = v.y, sum[2] = v.z, sum[3] = v.w;
        }
        for (u32 other = 1; other < w.parts; other++) {
            mine += BM * BN / 4;
#pragma unroll
            for (u32 i = 0; i < 4 * PAIRS; i++) {
                const float4 v = __ldcg(mine + i * THREADS);
                float (&sum)[4] = d[i % 2][i / 2];
                sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
            }
        }
    }

#endif

    // Four features leave together, and eight lanes fill two sectors.
    const u32 m = w.m0 + id / 4 * 4;
    if (m >= p.m) return;
#if GROUPED
    const float scale = grouped.scale;
    auto finished = [&](float sum, float) { return sum * scale; };
    const float4 b = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#else
    auto finished = [](float sum, float bias) { return sum + bias; };
    const float4 b = p.has_bias ? *(const float4*)(bias + m) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#endif
    const u32 token = w.n0 + id % 4 * 2;
    const u64 stride = (u64)p.m * (OUT_F32 ? 4 : 2);
    u8* to = (u8*)out + token * stride + (u64)m * (OUT_F32 ? 4 : 2);
#pragma unroll
    for (u32 i = 0; i < 2 * PAIRS; i++, to += 8 * stride) {
#pragma unroll
        for (u32 c = 0; c < 2; c++) {
            if (token + 8 * i + c >= w.end) continue;
            const float y0 = finished(d[0][i][c], b.x), y1 = finished(d[0][i][c + 2], b.y);
            const float y2 = finished(d[1][i][c], b.z), y3 = finished(d[1][i][c + 2], b.w);
#if OUT_F32
            *(float4*)(to + c * stride) = make_float4(y0, y1, y2, y3);
#else
            *(uint2*)(to + c * stride) = make_uint2(pack(y0, y1), pack(y2, y3));
#endif
        }
    }
}
