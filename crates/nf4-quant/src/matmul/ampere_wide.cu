// y = x op(W) on tensor cores with mma.sync, with W in 4 bits or dense. ampere.rs has the idea.
//
// A tile is Y[token, m] = X[token, k] A[m, k]^T, A = W (forward) or W^T (input gradient). Both operands pass through shared
// memory in units of 32 columns k: X as it is, by asynchronous copies; A dense likewise, or decoded by the cube's threads,
// a unit ahead of its products. Transposed, A lies in shared memory as W does, k by m, and ldmatrix turns it around.
//
// GROUPED, each tile's tokens are of one group, which has a weight and a low-rank factor of its own: one behind the
// other in memory, so that a group is a number of rows to skip. A table says which tokens a tile has.
//
// `tensor_cores!` comes before. Defined before this text: TRANSPOSED, DENSE, F16, OUT_F32, BT (tokens per tile), STAGES,
// WARPS_T (of four warps, those that lie along tokens), MIN_CUBES (per multiprocessor), GROUPED, DROPOUT.

#define BM 128
#define BK 32
#define THREADS 128
#define WARP_TOKENS (BT / WARPS_T)
#define WARP_M (BM * WARPS_T / 4)
#define ROWS (WARP_TOKENS / 16)  // sets of 16 rows of a warp
#define PAIRS (WARP_M / 16)      // pairs of mma's eight columns
#define X_BYTES (BT * BK * 2)
#define X_CHUNKS (BT * BK / 8)   // copies of 16 bytes
#define W_BYTES (BM * BK * 2)
#define W_STAGES (DENSE ? STAGES : 2)
#define WORDS 4                  // of codes, for a thread and unit
#define SLOTS (2 * ROWS)         // places between a unit's products

struct Shared {
    u8 x[STAGES][X_BYTES];
    u8 w[W_STAGES][W_BYTES];
};

__device__ __forceinline__ void store_shared(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Bytes of `low` (0 to 3) and `high` (4 to 7), picked by the four lowest digits of `selector`, none of them above 7.
__device__ __forceinline__ u32 bytes(u32 low, u32 high, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(selector));
    return r;
}

// Where chunk `chunk` of a row of X lies, or of A forward: 64 bytes a row, eight neighbouring rows in all banks.
__device__ __forceinline__ u32 chunk_at(u32 row, u32 chunk) { return row * 64 + (chunk ^ row / 2 % 4) * 16; }
// The same for a row of W, transposed: 256 bytes.
__device__ __forceinline__ u32 wide_chunk_at(u32 row, u32 chunk) { return row * 256 + (chunk ^ row % 8) * 16; }

// A unit: X at `x_at` and A at `w_at`, the lane's places in shared memory. `copy` is called behind the first loads,
// `between` SLOTS times.
template <class Copy, class Between>
__device__ __forceinline__ void multiply_unit(float (&d)[ROWS][2 * PAIRS][4], u32 x_at, u32 w_at, Copy copy, Between between) {
    u32 a[2][ROWS][4], b[2][PAIRS][4];
    auto load = [&](u32 k) {
#pragma unroll
        for (u32 j = 0; j < PAIRS; j++) {
#if TRANSPOSED
            load_matrices_transposed(b[k][j], (w_at ^ j * 32) + k * (16 * 256));
#else
            load_matrices(b[k][j], (w_at ^ k * 32) + j * (16 * 64));
#endif
        }
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) load_matrices(a[k][i], (x_at ^ k * 32) + i * (16 * 64));
    };
    load(0);
    copy();
    load(1);
#pragma unroll
    for (u32 k = 0; k < 2; k++) {
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
#pragma unroll
            for (u32 j = 0; j < PAIRS; j++) {
                // There and back, so that neighbours share an operand.
                const u32 c = i % 2 == 0 ? j : PAIRS - 1 - j;
                mma(d[i][2 * c], a[k][i], b[k][c][0], b[k][c][1]);
                mma(d[i][2 * c + 1], a[k][i], b[k][c][2], b[k][c][3]);
            }
            between(k * ROWS + i);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES) matmul(
    const u16* __restrict__ x,           // [tokens, k]
    const u16* __restrict__ u,           // [tokens, rank]
    const float* __restrict__ low_rank,  // [m, rank] forward, [rank, m] transposed
    const void* __restrict__ weight,     // codes or the dense weight, [m, k] forward, [k, m] transposed
#if !DENSE
    const void* __restrict__ absmax,
    const float* __restrict__ nested,
    const float* __restrict__ tables,
#endif
#if GROUPED
    const Tile* __restrict__ tiles,
    void* __restrict__ out,              // [tokens, m]
    const __grid_constant__ GroupedParams grouped
) {
    const Params& p = grouped.p;
#else
    const float* __restrict__ bias,
    float* __restrict__ partial,         // [slots, parts, BT * BM]
    u32* __restrict__ arrived,           // per slot, zero before the launch and after it
    void* __restrict__ out,              // [tokens, m]
    const __grid_constant__ Params p
) {
    const Tile* tiles = nullptr;
#endif
    __shared__ alignas(1024) Shared s;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const u32 warp_token = warp % WARPS_T * WARP_TOKENS, warp_m = warp / WARPS_T * WARP_M;
    const Share work = share_of<BM, BT>(blockIdx.x, p, tiles);
#if GROUPED
    if (work.n0 >= work.end) return;
#endif
    const u32 skipped = work.part == 0 ? (p.rank + 63) / 64 * 2 : 0, total = skipped + work.units;
    const u32 origin = work.first - skipped;  // unit + origin is its place in k

    // Copies of X, or of U, which comes first: chunk thread % 4 of rows thread / 4 and every THREADS / 4 on. Columns
    // beyond the end are zeros, so that A may hold anything finite there.
    const u32 x_row = work.n0 + thread / 4, x_to = shared_address(s.x[0]) + chunk_at(thread / 4, thread % 4);
    auto copy_x = [&](u32 unit, u32 stage) {
        const bool is_u = unit < skipped;
        const u32 width = (is_u ? p.rank : p.k) / 8, column = (is_u ? unit : unit + origin) * 4 + thread % 4;
        const int rows = column < width ? (int)(work.end - x_row) : 0;
        u32 chunk = x_row * width + column;
#pragma unroll
        for (int i = 0; i < (X_CHUNKS + THREADS - 1) / THREADS; i++, chunk += width * (THREADS / 4))
            if (X_CHUNKS >= THREADS || thread < X_CHUNKS)
                copy_async(x_to + stage * X_BYTES + i * (THREADS * 16), (const uint4*)(is_u ? u : x) + chunk, (THREADS / 4) * i < rows);
    };

    // A thread's part of a unit of A, where it decodes. Forward a row's columns from `w_chunk` on; transposed a row's of W
    // likewise, whose columns are rows of A.
    const u32 w_row = TRANSPOSED ? lane : thread, w_chunk = TRANSPOSED ? warp * WORDS : 0;
    const u32 w_to = shared_address(s.w[0]);
    auto put = [&](u32 stage, u32 i, u32 a, u32 b, u32 c, u32 e) {
        store_shared(w_to + stage * W_BYTES + (TRANSPOSED ? wide_chunk_at(w_row, w_chunk + i) : chunk_at(w_row, w_chunk + i)),
                     a, b, c, e);
    };
    // A unit of the low-rank factor, rounded. Beyond the rank U is 0.
    auto put_low_rank = [&](u32 unit, u32 stage) {
#pragma unroll 1
        for (u32 i = 0; i < WORDS; i++) {
#if TRANSPOSED
            const u32 k = unit * BK + w_row, m = work.m0 + (w_chunk + i) * 8;
            const float* from = low_rank + (work.group * p.rank + (k < p.rank ? k : 0)) * p.m + (m < p.m ? m : 0);
#else
            const u32 k = unit * BK + (w_chunk + i) * 8, m = work.m0 + w_row;
            const float* from = low_rank + (work.group * p.m + (m < p.m ? m : 0)) * p.rank + (k < p.rank ? k : 0);
#endif
            const float4 v = *(const float4*)from, w = *(const float4*)(from + 4);
            put(stage, i, pack(v.x, v.y), pack(v.z, v.w), pack(w.x, w.y), pack(w.z, w.w));
        }
    };

#if DENSE
    // Rows of W in chunks of 16 bytes: 4 of 32 columns forward, 16 of 128 transposed.
#define ROW_CHUNKS (TRANSPOSED ? 16 : 4)
    auto copy_w = [&](u32 unit, u32 stage) {
        const u32 row = thread / ROW_CHUNKS, chunk = thread % ROW_CHUNKS;
#if TRANSPOSED
        const u32 k = (unit + origin) * BK + row, m = work.m0 / 8 + chunk;
        u32 from = (work.group * p.k + k) * (p.m / 8) + m;
#pragma unroll
        for (u32 i = 0; i < 4; i++, from += THREADS / ROW_CHUNKS * (p.m / 8))
            copy_async(w_to + stage * W_BYTES + wide_chunk_at(row + i * (THREADS / ROW_CHUNKS), chunk), (const uint4*)weight + from,
                       k + i * (THREADS / ROW_CHUNKS) < p.k && m < p.m / 8);
#else
        const u32 k = (unit + origin) * 4 + chunk, m = work.m0 + row;
        u32 from = (work.group * p.m + m) * (p.k / 8) + k;
#pragma unroll
        for (u32 i = 0; i < 4; i++, from += THREADS / ROW_CHUNKS * (p.k / 8))
            copy_async(w_to + stage * W_BYTES + chunk_at(row, chunk) + i * (THREADS * 16), (const uint4*)weight + from,
                       k < p.k / 8 && m + i * (THREADS / ROW_CHUNKS) < p.m);
#endif
    };
#endif
    auto fill = [&](u32 unit, u32 stage) {
        if (unit < total) {
            copy_x(unit, stage);
#if DENSE
            if (unit < skipped) put_low_rank(unit, stage);
            else copy_w(unit, stage);
#endif
        }
        commit();
    };

    float d[ROWS][2 * PAIRS][4] = {};
    u32 unit = 0, stage = 0;  // of all, the low-rank product's among them
    const u32 x_at = shared_address(s.x[0]) + chunk_at(warp_token + lane % 16, lane / 16);
#if TRANSPOSED
    const u32 w_at = w_to + wide_chunk_at(lane % 16, warp_m / 8 + lane / 16);
#else
    const u32 w_at = w_to + chunk_at(warp_m + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#endif
    // The next unit of X is there, for all warps, and the stage of the one before is free: `fill_free` fills it.
    auto next_unit = [&]() {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();
    };
    auto fill_free = [&]() { fill(unit + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1); };
    auto advance = [&]() { unit++, stage = stage + 1 == STAGES ? 0 : stage + 1; };
    auto x_of_unit = [&]() { return x_at + stage * X_BYTES; };
    auto nothing = [](u32) {};

#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) fill(i, i);

#if DROPOUT
    // The sums are those of the low-rank product alone. Dropout's bits come in pairs of neighbouring features.
    auto drop = [&]() {
#pragma unroll
        for (u32 i = 0; i < 2 * ROWS * PAIRS; i++) {
            float (&sums)[4] = d[i / (2 * PAIRS)][i % (2 * PAIRS)];
            const u32 token = work.n0 + warp_token + i / (2 * PAIRS) * 16 + lane / 4;
            const u32 m = work.m0 + warp_m + i % (2 * PAIRS) * 8 + lane % 4 * 2;
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 bits = dropout_bits(((token + 8 * h) * p.m + m) / 2, p.seed_low, p.seed_high);
                sums[2 * h] *= kept(bits & 0xFFFF, p), sums[2 * h + 1] *= kept(bits >> 16, p);
            }
        }
    };
#endif

#if DENSE
    auto step = [&]() {
        next_unit();
        multiply_unit(d, x_of_unit(), w_at + stage * W_BYTES, fill_free, nothing);
        advance();
    };
#pragma unroll 1
    while (unit < skipped) step();
#if DROPOUT
    if (skipped) drop();
#endif
#pragma unroll 1
    while (unit < total) step();
#else
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

    // The thread's codes: WORDS words of a unit, eight codes each.
    struct Words { u32 v[WORDS]; };
#if TRANSPOSED
    const u32 w_m = work.m0 + w_chunk * 8 < p.m ? work.m0 + w_chunk * 8 : 0;
    auto first_element = [&](u32 unit) {
        const u32 k = (unit + origin) * BK + w_row;
        return (work.group * p.k + (k < p.k ? k : p.k - 1)) * p.m + w_m;
    };
#else
    const u32 w_m = work.m0 + w_row < p.m ? work.m0 + w_row : p.m - 1;
    auto first_element = [&](u32 unit) {
        const u32 k = (unit < total ? unit + origin : origin + skipped) * BK;
        return (work.group * p.m + w_m) * p.k + k + w_chunk * 8;
    };
#endif
    auto load_codes = [&](u32 unit) {
        Words words;
        const u32 word = first_element(unit) / 8;
        const uint4 v = ((const uint4*)weight)[word / 4];
        words.v[0] = v.x, words.v[1] = v.y, words.v[2] = v.z, words.v[3] = v.w;
        return words;
    };

    // The 16 values that a code of a block can mean: times absmax, rounded once; low bytes, then high bytes.
    u32 table[8];
    auto make_table = [&](float scale) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            // Volatile, or the compiler would keep all of them in registers.
            float4 v;
            asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(tables + p.codebook + 4 * i));
            const u32 a = pack(v.x * scale, v.y * scale), b = pack(v.z * scale, v.w * scale);
            table[i] = bytes(a, b, 0x6420), table[4 + i] = bytes(a, b, 0x7531);
        }
    };
    // Four values of the table, by the four lowest digits of `code`, and by `half` whether each is of its upper half. A byte of
    // codes has the even column in its high digit.
    auto look_up = [&](u32 code, u32 half, u32& first, u32& second) {
        const u32 low = bytes(bytes(table[0], table[1], code), bytes(table[2], table[3], code), half);
        const u32 high = bytes(bytes(table[4], table[5], code), bytes(table[6], table[7], code), half);
        first = bytes(low, high, 0x4051), second = bytes(low, high, 0x6273);
    };
    // Eight codes into a chunk.
    auto decode = [&](u32 stage, u32 i, u32 word) {
        const u32 code = word & 0x77777777, half = (word >> 1 & 0x44444444) | 0x32103210;
        u32 v[4];
        look_up(code, half, v[0], v[1]);
        look_up(code >> 16, half >> 16, v[2], v[3]);
        put(stage, i, v[0], v[1], v[2], v[3]);
    };

    // absmax: forward one for a pair of units. `scale` is that of the next table.
    float scale;
    auto advance_absmax = [&](u32 next) {
        scale = decode_absmax();
        load_absmax(first_element(next));
    };
    load_absmax(first_element(skipped));
    Words even = load_codes(skipped), odd = load_codes(skipped + 1);
    advance_absmax(skipped + (TRANSPOSED ? 1 : 2));
    // Unit `skipped` is in the buffer of even units when the loop of units begins.
    auto decode_all = [&](u32 stage, const Words& words) {
        make_table(scale);
#pragma unroll
        for (u32 i = 0; i < WORDS; i++) decode(stage, i, words.v[i]);
    };
    if (skipped) {
        put_low_rank(0, 0);
#pragma unroll 1
        while (unit < skipped) {
            next_unit();
            multiply_unit(d, x_of_unit(), w_at + unit % 2 * W_BYTES, fill_free, nothing);
            advance();
            if (unit < skipped) put_low_rank(unit, unit % 2);
        }
#if DROPOUT
        drop();
#endif
    }
    decode_all(0, even);
    // Multiplies a unit and decodes the next one.
    auto multiply_and_decode = [&](u32 parity, const Words& words, bool with_table) {
        multiply_unit(d, x_of_unit(), w_at + parity * W_BYTES, fill_free, [&](u32 slot) {
            if (slot == 0 && with_table) make_table(scale);
#pragma unroll
            for (u32 i = 0; i < WORDS; i++)
                if (slot == (i + 1) * SLOTS / (WORDS + 1)) decode(1 - parity, i, words.v[i]);
        });
        advance();
    };
#if TRANSPOSED
    advance_absmax(unit + 2);
#endif
#pragma unroll 1
    while (unit < total) {
        next_unit();
        even = load_codes(unit + 2);
        multiply_and_decode(0, odd, TRANSPOSED);
        advance_absmax(unit + (TRANSPOSED ? 2 : 3));
        next_unit();
        odd = load_codes(unit + 2);
        multiply_and_decode(1, even, true);
#if TRANSPOSED
        advance_absmax(unit + 2);
#endif
    }
#endif

#if !GROUPED
    if (work.parts > 1) {
        // The cube that finishes last adds all parts in their order, so that the sum does not depend on which one it
        // is.
        u32& last = *(u32*)s.x[0];
        float4* mine = (float4*)partial + (u64)work.slot * work.parts * (BT * BM / 4) + thread;
        float4* to = mine + work.part * (BT * BM / 4);
#pragma unroll
        for (u32 i = 0; i < 2 * ROWS * PAIRS; i++, to += THREADS) {
            const float (&v)[4] = d[i / (2 * PAIRS)][i % (2 * PAIRS)];
            __stcg(to, make_float4(v[0], v[1], v[2], v[3]));
        }
        __threadfence();
        __syncthreads();
        if (thread == 0) last = atomicAdd(arrived + work.slot, 1) == work.parts - 1;
        __syncthreads();
        if (!last) return;
        __threadfence();
        if (thread == 0) arrived[work.slot] = 0;
        for (u32 part = 0; part < work.parts; part++, mine += BT * BM / 4) {
#pragma unroll
            for (u32 i = 0; i < 2 * ROWS * PAIRS; i++) {
                const float4 v = __ldcg(mine + i * THREADS);
                float (&sum)[4] = d[i / (2 * PAIRS)][i % (2 * PAIRS)];
                if (part == 0) sum[0] = 0.0f, sum[1] = 0.0f, sum[2] = 0.0f, sum[3] = 0.0f;
                sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
            }
        }
    }
#endif

    const u32 t = lane % 4, token = work.n0 + warp_token + lane / 4, m = work.m0 + warp_m;
#pragma unroll
    for (u32 j = 0; j < PAIRS; j++) {
#if OUT_F32
        // Two features of each column of tiles.
        const u32 at[2] = {m + j * 16 + 2 * t, m + j * 16 + 8 + 2 * t};
#else
        // Neighbouring lanes exchange, so that each has four features of one tile of two: the first where `t` is even.
        const u32 at[1] = {m + j * 16 + t % 2 * 8 + t / 2 * 4};
#endif
#if GROUPED
        auto finished = [&](float sum, float) { return sum * grouped.scale; };
        const float4 b = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#else
        auto finished = [](float sum, float bias) { return sum + bias; };
        float4 b = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const u32 first = m + j * 16 + 2 * t;
        if (p.has_bias && first < p.m) b.x = bias[first], b.y = bias[first + 1];
        if (p.has_bias && first + 8 < p.m) b.z = bias[first + 8], b.w = bias[first + 9];
#endif
#pragma unroll
        for (u32 i = 0; i < 2 * ROWS; i++) {
            const float (&left)[4] = d[i / 2][2 * j], (&right)[4] = d[i / 2][2 * j + 1];
            const u32 h = i % 2 * 2, row = token + i * 8;
            const float y0 = finished(left[h], b.x), y1 = finished(left[h + 1], b.y);
            const float y2 = finished(right[h], b.z), y3 = finished(right[h + 1], b.w);
#if OUT_F32
            if (row >= work.end) continue;
            float* to = (float*)out + (u64)row * p.m;
            if (at[0] < p.m) *(float2*)(to + at[0]) = make_float2(y0, y1);
            if (at[1] < p.m) *(float2*)(to + at[1]) = make_float2(y2, y3);
#else
            const u32 v = pack(y0, y1), w = pack(y2, y3);
            const u32 other = __shfl_xor_sync(0xFFFFFFFF, t % 2 ? v : w, 1);
            if (row < work.end && at[0] < p.m)
                *(uint2*)((u16*)out + (u64)row * p.m + at[0]) = t % 2 ? make_uint2(other, w) : make_uint2(v, other);
#endif
        }
    }
}
