// Attention over a paged cache on tensor cores (mma.sync), bound by reading the keys and values once. mma.rs has the
// idea. These macros are defined before, beside those of the prelude:
//
//   D            dimensions of a head, padded to a multiple of 64
//   SOFTCAP      1: scores go through cap * tanh(score / cap)
//   QUERY_TILES  eights of queries that a cube takes
//   WARPS        warps of a cube, each with its own positions of a split
//   STAGES       units that a warp's ring holds
//   MIN_CUBES    cubes per multiprocessor that registers must leave room for
//   MAX_ROWS     rows of a launch at most

// n / d as (__umulhi(n, factor) + n) >> shift, for n below 2^31.
struct Divisor {
    u32 factor, shift;
};
struct Params {
    u32 first_row, rows;         // of this launch
    u32 all_rows, tokens;        // of the batch
    u32 max_blocks, block_tokens;
    u32 heads, kv_heads, group;  // group: query heads of a key head
    u32 head_dim;                // a multiple of 8
    u32 window;                  // keys that a query sees, itself counted
    u32 queries;                 // of a tile, for which there is room among the partial results
    u32 unit_log2;               // of a unit's splits: 0, or that of a section
    u32 units;                   // of all tiles and key heads, that there is room for
    Divisor by_group, by_block_tokens, by_streams;
    float scale_log2;            // of what exp2 gets: scale * log2(e), or cap * log2(e) after tanh
    float cap_scale;             // scale / cap
    u32 sinks;                   // 1: each query head has a logit that joins its softmax and has no value
};

#define THREADS (32 * WARPS)
#define ALL_LANES 0xffffffffu
#define SPAN 32                  // positions of a warp in a split: two tiles of 16
#define SPLIT (SPAN * WARPS)
#define SPLIT_LOG2 7
#define SECTION_LOG2 4           // of the splits that are joined before they are joined to others
#define QUERIES (8 * QUERY_TILES)
#define SLABS (D / 64)           // of a tile of keys or values: 16 positions by 64 dimensions, 64 bytes a lane
#define SLAB_BYTES 2048
#define STEPS (4 * SLABS)        // slabs of a warp in a split: two tiles of keys, then two of values
#define CHUNKS (QUERY_TILES * SLABS)
#define PITCH 68                 // f32 from one query's sums of a slab to the next
#define NOTHING 0xffffffffu

static_assert(STEPS % STAGES == 0, "a slab's place in the ring is known at compile time");
static_assert(SPLIT == 1 << SPLIT_LOG2, "four warps");

__device__ __forceinline__ u32 divided(u32 n, Divisor by) { return (__umulhi(n, by.factor) + n) >> by.shift; }

// The transpose of an 8 x 8 matrix of 16-bit elements, of which each lane has two neighbours in a row.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Adds behind what this thread's cube has written before its last barrier, and before what it reads after its next.
__device__ __forceinline__ u32 add_in_order(u32* to, u32 value) {
    u32 old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(to), "r"(value) : "memory");
    return old;
}

// A score as exp2 gets it, before scale_log2. The softcap's tanh comes from exp2: some 4e-7 of the cap.
__device__ __forceinline__ float capped(float s, const Params& p) {
#if SOFTCAP
    return 1.0f - 2.0f * reciprocal(1.0f + exp2_fast(2.0f * LOG2_E * p.cap_scale * s));
#else
    return s;
#endif
}

// A row's new tokens and its part of the work: tiles of queries by units of positions, from `first` on.
struct Row {
    u32 token, count;  // the first in the batch, and how many
    u32 position;      // of the first in its sequence
    u32 tiles, first, units;
};
// The first position that the token at `position` sees.
__device__ __forceinline__ u32 first_seen(const Params& p, u32 position) {
    return position >= p.window ? position + 1 - p.window : 0;
}
// Units that hold the positions before `stop`.
__device__ __forceinline__ u32 units_until(const Params& p, u32 stop) {
    const u32 shift = SPLIT_LOG2 + p.unit_log2;
    return (stop + (1u << shift) - 1) >> shift;
}
__device__ __forceinline__ Row row_at(const Params& p, const u32* __restrict__ words, u32 index) {
    const u32* starts = words + p.tokens + p.first_row + index;
    const u32 len = words[p.tokens + p.all_rows + 1 + p.first_row + index];
    Row row;
    row.token = starts[0], row.count = starts[1] - starts[0];
    row.position = len - row.count;
    row.tiles = (row.count * p.group + QUERIES - 1) / QUERIES;
    row.first = first_seen(p, row.position) >> (SPLIT_LOG2 + p.unit_log2);
    row.units = units_until(p, len) - row.first;
    return row;
}

// Neighbouring units of a tile, within a section.
struct Run {
    u32 token, position;          // of the row's first new token
    u32 first_query, count;       // the tile's, among the row's queries of a key head
    u32 table;                    // the row's table of blocks, in words
    u32 seen, stop;               // what any of the tile's tokens sees
    u32 first_unit, end_unit;     // which hold that
    u32 place;                    // of the unit `first_unit`, among all of a key head
    u32 begin, end;               // the run's units
};
// Its splits: those of its units that hold anything seen.
__device__ __forceinline__ u32 first_split(const Params& p, const Run& r) { return max(r.begin << p.unit_log2, r.seen / SPLIT); }
__device__ __forceinline__ u32 end_split(const Params& p, const Run& r) {
    return min(r.end << p.unit_log2, (r.stop + SPLIT - 1) / SPLIT);
}

// Some columns of a softmax so far: the largest score in units of log2, and the sums relative to it. Nothing at first.
struct Running {
    float peak, sum;
    float4 values;
};
__device__ __forceinline__ Running nothing() {
    return Running{NEGATIVE_INFINITY, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
}
// The same operations wherever splits meet: joining nothing to `a`, or `b` to nothing, changes no bit.
__device__ __forceinline__ void join(Running& a, const Running& b) {
    const float now = fmaxf(a.peak, b.peak), base = now == NEGATIVE_INFINITY ? 0.0f : now;
    const float old = exp2_fast(a.peak - base), own = exp2_fast(b.peak - base);
    a.peak = now;
    a.sum = __fmaf_rn(a.sum, old, __fmul_rn(b.sum, own));
    a.values.x = __fmaf_rn(a.values.x, old, __fmul_rn(b.values.x, own));
    a.values.y = __fmaf_rn(a.values.y, old, __fmul_rn(b.values.y, own));
    a.values.z = __fmaf_rn(a.values.z, old, __fmul_rn(b.values.z, own));
    a.values.w = __fmaf_rn(a.values.w, old, __fmul_rn(b.values.w, own));
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES)
paged_attention(const u16* __restrict__ q, const u16* __restrict__ keys, const u16* __restrict__ values, const u32* __restrict__ words,
                const float* __restrict__ sinks, u16* __restrict__ out, float* partial, u32* counters, const __grid_constant__ Params p) {
    __shared__ __align__(128) unsigned char ring[WARPS * STAGES * SLAB_BYTES];
    __shared__ __align__(16) float slabs[WARPS][8 * PITCH];
    __shared__ float2 statistics[WARPS][QUERIES];
    __shared__ u32 firsts[MAX_ROWS + 1];
    __shared__ u32 totals[WARPS];
    __shared__ u32 is_last;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 g = lane / 4, t = lane % 4;
    const u32 head = blockIdx.x, stream = blockIdx.y;
    const unsigned char* const own_ring = ring + warp * (STAGES * SLAB_BYTES);
    // A slab lies in shared memory as lanes read it, 512 bytes for each of a lane's four pieces of 16: the places of lanes
    // are permuted so that neither a row's eight pieces nor those of eight lanes meet in a bank. Keys: rows g and g + 8, by
    // halves of 32 dimensions. Values: rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
    const u32 key_places[2] = {lane * 16, (lane ^ 4) * 16}, value_place = (g * 4 + (t ^ g / 2)) * 16;
    // Eight lanes copy a row, whose number is this one's beside a multiple of four.
    const u32 copy_row = lane / 8, piece = lane % 8;
    // Of a chunk of results, 8 queries by 64 dimensions, each thread has four dimensions.
    const u32 own_query = threadIdx.x / 16, own_column = threadIdx.x % 16 * 4;

    // Where each row's units begin.
    u32 total = 0;
    if (threadIdx.x == 0) firsts[0] = 0;
    for (u32 base = 0; base < p.rows; base += THREADS) {
        const u32 index = base + threadIdx.x;
        u32 until = 0;
        if (index < p.rows) {
            const Row row = row_at(p, words, index);
            until = row.tiles * row.units;
        }
#pragma unroll
        for (u32 d = 1; d < 32; d *= 2) {
            const u32 before = __shfl_up_sync(ALL_LANES, until, d);
            if (lane >= d) until += before;
        }
        if (lane == 31) totals[warp] = until;
        __syncthreads();
        until += total;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            if (w < warp) until += totals[w];
            total += totals[w];
        }
        if (index < p.rows) firsts[index + 1] = until;
        __syncthreads();
    }

    // This stream's equal share of them all: `at` is the next one, by row, tile and position.
    const u32 share = divided(total, p.by_streams), more = total - share * gridDim.y;
    u32 at = stream * share + min(stream, more);
    const u32 at_end = at + share + (stream < more);
    const u32 section_log2 = SECTION_LOG2 - p.unit_log2;
    auto find = [&](Run& run) {
        while (at < at_end) {
            u32 index = 0;
            for (u32 end = p.rows; index + 1 < end;) {
                const u32 middle = (index + end) / 2;
                if (firsts[middle] <= at) index = middle;
                else end = middle;
            }
            const Row row = row_at(p, words, index);
            const u32 of_row = at - firsts[index];
            const u32 tile = row.tiles == 1 ? 0 : of_row / row.units, unit = row.first + of_row - tile * row.units;
            run.token = row.token, run.position = row.position;
            run.first_query = tile * QUERIES, run.count = min(row.count * p.group - run.first_query, (u32)QUERIES);
            run.table = p.tokens + 2 * p.all_rows + 1 + (p.first_row + index) * p.max_blocks;
            run.seen = first_seen(p, row.position + divided(run.first_query, p.by_group));
            run.stop = row.position + divided(run.first_query + run.count - 1, p.by_group) + 1;
            run.first_unit = run.seen >> (SPLIT_LOG2 + p.unit_log2), run.end_unit = units_until(p, run.stop);
            run.place = at + run.first_unit - unit;
            // A tile sees less than its row.
            if (unit < run.first_unit) at += run.first_unit - unit;
            else if (unit >= run.end_unit) at += row.first + row.units - unit;
            else {
                run.begin = unit;
                run.end = min(min(run.end_unit, ((unit >> section_log2) + 1) << section_log2), unit + at_end - at);
                at += run.end - unit;
                return true;
            }
        }
        return false;
    };
    // Lane i knows where the i-th of the warp's positions lies. What nobody sees is not read, but taken as zeros.
    auto locate = [&](const Run& run, u32 split) {
        const u32 position = split * SPLIT + warp * SPAN + lane;
        if (position < run.seen || position >= run.stop) return NOTHING;
        const u32 block = divided(position, p.by_block_tokens);
        const u32 slot = words[run.table + block] * p.block_tokens + position - block * p.block_tokens;
        return (slot * p.kv_heads + head) * p.head_dim;
    };
    auto issue = [&](u32 located, u32 step) {
        const bool is_key = step < 2 * SLABS;
        const u32 column = step % SLABS * 64 + piece * 8;
        const u16* from = is_key ? keys : values;
        const u32 to = shared_address(own_ring) + step % STAGES * SLAB_BYTES;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u32 r = j * 4 + copy_row, half = piece / 4;
            const u32 place = is_key ? (r / 8 * 2 + half) * 512 + ((r % 8 ^ half) * 4 + piece % 4) * 16
                                     : (r / 8 * 2 + r % 2) * 512 + (piece * 4 + (r % 8 / 2 ^ piece / 2)) * 16;
            const u32 first = __shfl_sync(ALL_LANES, located, step / SLABS % 2 * 16 + r);
            const bool valid = first != NOTHING && column < p.head_dim;
            copy_async(to + place, valid ? from + first + column : from, valid);
        }
    };

    Run next;
    bool more_runs = find(next);
    if (!more_runs) return;
    u32 located = locate(next, first_split(p, next));
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) issue(located, i), commit();

    while (more_runs) {
        const Run run = next;
        auto place_of = [&](u32 unit) { return (run.place + unit - run.first_unit) * p.kv_heads + head; };
        const u32 section = run.begin >> section_log2;
        const u32 section_begin = max(run.first_unit, section << section_log2);
        const u32 section_end = min(run.end_unit, (section + 1) << section_log2);
        const bool is_whole = run.begin == section_begin && run.end == section_end;

        // Queries as mma's second operand, and the position of those whose scores this lane gets.
        uint4 qf[QUERY_TILES][D / 32];
        u32 position[QUERY_TILES][2];
#pragma unroll
        for (u32 n = 0; n < QUERY_TILES; n++) {
            const u32 own = run.first_query + min(n * 8 + g, run.count - 1), token = divided(own, p.by_group);
            const u16* from = q + ((run.token + token) * p.heads + head * p.group + own - token * p.group) * p.head_dim;
#pragma unroll
            for (u32 k = 0; k < D / 32; k++) {
                const u32 column = k * 32 + t * 8;
                qf[n][k] = column < p.head_dim ? *(const uint4*)(from + column) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (u32 c = 0; c < 2; c++)
                position[n][c] = run.position + divided(run.first_query + min(n * 8 + 2 * t + c, run.count - 1), p.by_group);
        }

        Running running[CHUNKS];
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) running[c] = nothing();

        // Sums of a unit, and behind them the largest scores and the sums of exponentials.
        auto sums_of = [&](u32 unit, u32 c) {
            const u32 query = c / SLABS * 8 + own_query;
            return (float4*)(partial + ((size_t)place_of(unit) * p.queries + query) * (D + 4) + c % SLABS * 64 + own_column);
        };
        auto statistics_of = [&](u32 unit, u32 c) {
            const u32 query = c / SLABS * 8 + own_query;
            return (float2*)(partial + ((size_t)place_of(unit) * p.queries + query) * (D + 4) + D);
        };
        auto leave = [&](u32 unit, u32 c, const Running& result) {
            if (c / SLABS * 8 + own_query >= run.count) return;
            *sums_of(unit, c) = result.values;
            if (c % SLABS == 0 && own_column == 0) *statistics_of(unit, c) = make_float2(result.peak, result.sum);
        };

        const u32 splits_end = end_split(p, run);
        for (u32 split = first_split(p, run); split < splits_end; split++) {
            u32 following = NOTHING;
            if (split + 1 < splits_end) following = locate(run, split + 1);
            else {
                more_runs = find(next);
                if (more_runs) following = locate(next, first_split(p, next));
            }
            auto take = [&](uint4 (&slab)[4], u32 step) {
                wait_for_all_but<STAGES - 2>();
                // The warp's copies are there, and it is done with the place of the slab that is copied next.
                __syncwarp();
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const u32 place = step < 2 * SLABS ? key_places[j % 2] : value_place;
                    slab[j] = *(const uint4*)(own_ring + step % STAGES * SLAB_BYTES + j * 512 + place);
                }
                const u32 ahead = step + STAGES - 1;
                if (ahead < STEPS) issue(located, ahead);
                else if (more_runs) issue(following, ahead - STEPS);
                commit();
            };

            // Scores, positions as rows: a lane's are of positions g and g + 8 of each tile, and queries 2 t and 2 t + 1.
            float s[QUERY_TILES][2][4];
#pragma unroll
            for (u32 i = 0; i < QUERY_TILES * 8; i++) s[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
            for (u32 step = 0; step < 2 * SLABS; step++) {
                uint4 k[4];
                take(k, step);
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    const uint4 &low = k[half], &high = k[2 + half];
                    const u32 a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                    for (u32 n = 0; n < QUERY_TILES; n++) {
                        const uint4 own = qf[n][step % SLABS * 2 + half];
                        mma(s[n][step / SLABS], a, own.x, own.y);
                        mma(s[n][step / SLABS], b, own.z, own.w);
                    }
                }
            }

            // Exponentials relative to the warp's largest score, as mma's second operand: each in two parts of 16 bits,
            // which hold it to 2^-17 of itself.
            u32 weights[QUERY_TILES][2][4];
#pragma unroll
            for (u32 n = 0; n < QUERY_TILES; n++) {
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    float peak = NEGATIVE_INFINITY, sum = 0.0f;
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        float& score = s[n][i / 2][i % 2 * 2 + c];
                        // Wraps around for later positions, and a window is at most 2^31.
                        const u32 distance = position[n][c] - (split * SPLIT + warp * SPAN + i * 8 + g);
                        score = distance < p.window ? capped(score, p) : NEGATIVE_INFINITY;
                        peak = fmaxf(peak, score);
                    }
#pragma unroll
                    for (u32 d = 4; d < 32; d *= 2) peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, d));
                    peak = peak * p.scale_log2;
                    const float base = peak == NEGATIVE_INFINITY ? 0.0f : peak;
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        float& score = s[n][i / 2][i % 2 * 2 + c];
                        score = exp2_fast(fmaf(score, p.scale_log2, -base));
                        sum += score;
                    }
#pragma unroll
                    for (u32 d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, d);
                    if (g == 0) statistics[warp][n * 8 + 2 * t + c] = make_float2(peak, sum);
                }
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const float even = s[n][i / 2][i % 2 * 2], odd = s[n][i / 2][i % 2 * 2 + 1];
                    const u32 rounded = pack(even, odd);
                    float low, high;
                    unpack(rounded, low, high);
                    weights[n][i / 2][i % 2] = transposed(rounded);
                    weights[n][i / 2][2 + i % 2] = transposed(pack(even - low, odd - high));
                }
            }

            // Sums of values, dimensions as rows: of queries 2 t and 2 t + 1, a lane gets dimensions 8 g to 8 g + 7 of each
            // slab. A word of a value's 16 bytes has two of them, which are rows g and g + 8.
            float sums[QUERY_TILES][4 * SLABS][4];
#pragma unroll
            for (u32 i = 0; i < QUERY_TILES * 16 * SLABS; i++) sums[i / (16 * SLABS)][i / 4 % (4 * SLABS)][i % 4] = 0.0f;
#pragma unroll
            for (u32 step = 2 * SLABS; step < STEPS; step++) {
                uint4 v[4];
                take(v, step);
                const u32 of_tile = step / SLABS - 2;
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    u32 w[4];
#pragma unroll
                    for (u32 i = 0; i < 4; i++) w[i] = j == 0 ? v[i].x : j == 1 ? v[i].y : j == 2 ? v[i].z : v[i].w;
                    const u32 a[4] = {__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632),
                                      __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[2], w[3], 0x7632)};
#pragma unroll
                    for (u32 n = 0; n < QUERY_TILES; n++) {
                        float(&to)[4] = sums[n][step % SLABS * 4 + j];
                        mma(to, a, weights[n][of_tile][0], weights[n][of_tile][1]);
                        mma(to, a, weights[n][of_tile][2], weights[n][of_tile][3]);
                    }
                }
            }
            located = following;

            // The warps' sums are joined, a chunk at a time.
#pragma unroll
            for (u32 c = 0; c < CHUNKS; c++) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    if (c / SLABS * 8 + 2 * t + i < run.count) {
                        const float(&x)[4 * SLABS][4] = sums[c / SLABS];
                        const u32 j = c % SLABS * 4;
                        float4* to = (float4*)(slabs[warp] + (2 * t + i) * PITCH + g * 8);
                        to[0] = make_float4(x[j][i], x[j][2 + i], x[j + 1][i], x[j + 1][2 + i]);
                        to[1] = make_float4(x[j + 2][i], x[j + 2][2 + i], x[j + 3][i], x[j + 3][2 + i]);
                    }
                }
                __syncthreads();
                const u32 query = c / SLABS * 8 + own_query;
                if (query < run.count) {
                    Running whole = nothing();
#pragma unroll
                    for (u32 w = 0; w < WARPS; w++) {
                        const float2 own = statistics[w][query];
                        join(whole, Running{own.x, own.y, *(const float4*)(slabs[w] + own_query * PITCH + own_column)});
                    }
                    if (is_whole) join(running[c], whole);
                    else leave(split, c, whole);
                }
                __syncthreads();
            }
        }

        // Whoever arrives last joins a section's splits in order, and then the sections.
        const u32 first_section = run.first_unit >> section_log2;
        const u32 sections = ((run.end_unit - 1) >> section_log2) + 1 - first_section;
        bool is_done = true;
#pragma unroll 1
        for (u32 of_sections = is_whole; of_sections < 2 && (!of_sections || sections > 1); of_sections++) {
            // Everyone has read what the section takes the place of.
            __syncthreads();
            if (of_sections) {
#pragma unroll
                for (u32 c = 0; c < CHUNKS; c++) leave(section_begin, c, running[c]);
                __syncthreads();
            }
            const u32 count = of_sections ? sections : section_end - section_begin;
            if (threadIdx.x == 0) {
                u32* counter = counters + (of_sections ? p.units + place_of(run.first_unit) : place_of(section_begin));
                const u32 with = of_sections ? 1 : run.end - run.begin;
                is_last = add_in_order(counter, with) + with == count;
                if (is_last) *counter = 0;
            }
            __syncthreads();
            is_done = is_last;
            if (!is_done) break;
#pragma unroll
            for (u32 c = 0; c < CHUNKS; c++) running[c] = nothing();
#pragma unroll 1
            for (u32 base = 0; base < count; base += 4) {
                Running parts[4][CHUNKS];
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 of = base + i;
                    const u32 unit = !of_sections ? section_begin + of : of == 0 ? run.first_unit : (first_section + of) << section_log2;
#pragma unroll
                    for (u32 c = 0; c < CHUNKS; c++) {
                        parts[i][c] = nothing();
                        if (of < count && c / SLABS * 8 + own_query < run.count) {
                            const float2 own = __ldcg((const float2*)statistics_of(unit, c));
                            parts[i][c] = Running{own.x, own.y, __ldcg((const float4*)sums_of(unit, c))};
                        }
                    }
                }
#pragma unroll
                for (u32 i = 0; i < 4 * CHUNKS; i++) join(running[i % CHUNKS], parts[i / CHUNKS][i % CHUNKS]);
            }
        }
        if (!is_done) continue;
#pragma unroll
        for (u32 c = 0; c < CHUNKS; c++) {
            const u32 query = c / SLABS * 8 + own_query, column = c % SLABS * 64 + own_column;
            if (query < run.count && column < p.head_dim) {
                const u32 own = run.first_query + query, token = divided(own, p.by_group);
                const u32 to = (run.token + token) * p.heads + head * p.group + own - token * p.group;
                const float4 v = running[c].values;
                float by = 1.0f / running[c].sum;
                if (p.sinks) {
                    const float sink = sinks[to % p.heads] * LOG2_E, now = fmaxf(running[c].peak, sink);
                    const float factor = exp2_fast(running[c].peak - now);
                    by = factor / fmaf(running[c].sum, factor, exp2_fast(sink - now));
                }
                *(uint2*)(out + (size_t)to * p.head_dim + column) = make_uint2(pack(v.x * by, v.y * by), pack(v.z * by, v.w * by));
            }
        }
    }
}
