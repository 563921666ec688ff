
// -------------------------------------------------------------------------------------------- backward
//
// With P = exp(S - lse) and delta = rowsum(dO * O), both per query:
//
//   dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q
//
// The order is that in which arithmetic hides under products: scores, dO V^T under which P is computed, dV under which dS
// is, dK.
//
//   KIND       1: delta, 2: dK and dV, a cube per tile of keys, 3: dQ, a cube per tile of queries
//   SLICES     warps that share 16 rows: each computes all of their scores, and its part of the head's dimensions of
//              the results, where all of it does not fit in registers
//   STEP       queries (kind 2) or keys between which products of scores and of results alternate
//   STAGES     tiles in the ring
//   VALUES_SHARED       kind 2: the values' fragments are in shared memory, not in registers
//   STATISTICS_SHARED   kind 2: lse and delta pass through shared memory with their tiles
//   MIN_CUBES  cubes per multiprocessor that registers must leave room for

#define CUBE_ROWS (WARPS / SLICES * 16)
#define RESULT_TILES (CHUNKS / SLICES)

#if KIND == 1

// Lanes of one (token, head), each with 16 bytes.
#define TEAM (CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32)

extern "C" __global__ void __launch_bounds__(THREADS)
attention_delta(const u16* __restrict__ o, const u16* __restrict__ d_out, const u32* __restrict__ bounds, float* __restrict__ delta,
                const __grid_constant__ Params p) {
    const u32 i = blockIdx.x * (THREADS / TEAM) + threadIdx.x / TEAM, member = threadIdx.x % TEAM;
    // Heads are neighbours in memory; a token's row in the batch is what its index says, or irrelevant when packed.
    const u32 token = i / p.heads, head = i % p.heads;
    float sum = 0.0f;
    if (token < p.tokens && member * 8 < p.head_dim) {
        Row row = p.packed ? Row{0, 0, 0, 0} : Row{token / p.q_len, 0, 0, 0};
        u32 within = p.packed ? token : token % p.q_len;
        uint4 a = *(const uint4*)(o + head_at(p, row, p.o, head) + (size_t)within * p.o.token + member * 8);
        uint4 b = *(const uint4*)(d_out + head_at(p, row, p.d_out, head) + (size_t)within * p.d_out.token + member * 8);
        u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            float x0, x1, y0, y1;
            unpack(x[n], x0, x1), unpack(y[n], y0, y1);
            sum = fmaf(x1, y1, fmaf(x0, y0, sum));
        }
    }
#pragma unroll
    for (u32 distance = TEAM / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (token < p.tokens && member == 0) delta[(size_t)head * p.tokens + token] = sum;
}

#else

// P out of scores; `lse` in units of log2. Element c of tile n has lse[index(n, c)].
template <class Index, class Visible>
__device__ __forceinline__ void weigh(float (&s)[STEP / 8][4], float (&t)[STEP / 8][4], const float* lse, bool edge, const Params& p,
                                      Index index, Visible visible) {
#pragma unroll
    for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            s[n][c] = capped(s[n][c], p);
#if SOFTCAP
            t[n][c] = s[n][c];
#endif
        }
    if (edge) {
#pragma unroll
        for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
            for (u32 c = 0; c < 4; c++)
                if (!visible(n, c)) s[n][c] = NEGATIVE_INFINITY;
    }
#pragma unroll
    for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) s[n][c] = exp2_fast(fmaf(s[n][c], p.scale_log2, -lse[index(n, c)]));
}
// dS out of P and dO V^T.
template <class Index>
__device__ __forceinline__ void differentiate(const float (&s)[STEP / 8][4], const float (&t)[STEP / 8][4], float (&ds)[STEP / 8][4],
                                              const float* delta, Index index) {
#pragma unroll
    for (u32 n = 0; n < STEP / 8; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            ds[n][c] = s[n][c] * (ds[n][c] - delta[index(n, c)]);
#if SOFTCAP
            ds[n][c] *= 1.0f - t[n][c] * t[n][c];
#endif
        }
}

#define STAGE_BYTES (2 * TILE_BYTES)

#if KIND == 2

#define VALUE_BYTES (VALUES_SHARED * CUBE_ROWS * ROW_BYTES)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES)
attention_keys(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u32* __restrict__ bounds,
               const u16* __restrict__ d_out, const float* __restrict__ lse, const float* __restrict__ delta, u16* __restrict__ d_k,
               u16* __restrict__ d_v, const __grid_constant__ Params p) {
    __shared__ __align__(128) unsigned char shared[STAGES * STAGE_BYTES + VALUE_BYTES];
#if STATISTICS_SHARED
    __shared__ float statistics[STAGES][2][ROWS];  // lse and delta of a stage's queries
#endif
    const u32 ring = shared_address(shared);
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, slice = warp % SLICES;
    const u32 kv_heads = p.heads / p.group, kv_head = blockIdx.x % kv_heads;
    const Row row = row_of(p, bounds, blockIdx.x / kv_heads % p.rows);
    // The first keys are seen by the most queries.
    const u32 cube_key = blockIdx.x / kv_heads / p.rows * CUBE_ROWS, key = cube_key + warp / SLICES * 16;
    if (cube_key >= row.keys) return;
    const u32 past = row.keys - row.queries;
    // Queries that see any of the cube's keys.
    const u32 begin = (cube_key > past ? cube_key - past : 0) / ROWS;
    const u32 beyond = min(cube_key + CUBE_ROWS, row.keys) - 1 + p.window;
    const u32 end = (min(row.queries, beyond > past ? beyond - past : 0) + ROWS - 1) / ROWS;

    // Tiles of queries and their gradients, head by head, into the ring.
    u32 next_head = kv_head * p.group, next_tile = begin, slot = 0;
    auto issue = [&]() {
        if (next_tile < end && next_head < (kv_head + 1) * p.group) {
            const u32 to = ring + slot * STAGE_BYTES;
            load_tile(to, q + head_at(p, row, p.q, next_head), next_tile * ROWS, row.queries, p.q.token, p.head_dim);
            load_tile(to + TILE_BYTES, d_out + head_at(p, row, p.d_out, next_head), next_tile * ROWS, row.queries, p.d_out.token, p.head_dim);
#if STATISTICS_SHARED
            if (threadIdx.x < 2 * ROWS) {
                const u32 i = threadIdx.x % ROWS;
                const float* from = threadIdx.x < ROWS ? lse : delta;
                copy_word(shared_address(&statistics[slot][threadIdx.x / ROWS][i]),
                          from + (size_t)next_head * p.tokens + row.start + min(next_tile * ROWS + i, row.queries - 1));
            }
#endif
        }
        commit();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        if (++next_tile >= end) next_tile = begin, next_head++;
    };
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) issue();

    u32 kf[D / 16][4];
    load_fragments(kf, k + head_at(p, row, p.k, kv_head), key, row.keys, p.k.token, p.head_dim);
#if VALUES_SHARED
    // In the order in which lanes take them; warps that share rows share these.
    uint4* own = (uint4*)(shared + STAGES * STAGE_BYTES) + warp / SLICES * (D / 16) * LANES + lane;
    {
        u32 vf[D / 16][4];
        load_fragments(vf, v + head_at(p, row, p.v, kv_head), key, row.keys, p.v.token, p.head_dim);
#pragma unroll
        for (u32 kk = 0; kk < D / 16; kk++)
            if (kk % SLICES == slice) own[kk * LANES] = make_uint4(vf[kk][0], vf[kk][1], vf[kk][2], vf[kk][3]);
    }
#else
    u32 vf[D / 16][4];
    load_fragments(vf, v + head_at(p, row, p.v, kv_head), key, row.keys, p.v.token, p.head_dim);
#endif

    float dk[RESULT_TILES][4], dv[RESULT_TILES][4];
#pragma unroll
    for (u32 n = 0; n < RESULT_TILES; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) dk[n][c] = 0.0f, dv[n][c] = 0.0f;

    u32 used = 0;
#pragma unroll 1
    for (u32 head = kv_head * p.group; head < (kv_head + 1) * p.group; head++) {
#pragma unroll 1
        for (u32 j = begin; j < end; j++) {
            wait_for_all_but<STAGES - 2>();
            __syncthreads();
            issue();
            const u32 tile = ring + used * STAGE_BYTES, stage = used;
            used = used + 1 == STAGES ? 0 : used + 1;
#pragma unroll 1
            for (u32 part = 0; part < ROWS; part += STEP) {
                const u32 query = j * ROWS + part, position = query + past;
                // None of these queries sees any of these keys: they come before the keys, or after their window or the
                // row's end.
                if (query >= row.queries || position + STEP - 1 < key || (position > key + 15 && position - key - 15 >= p.window)) continue;
                float row_lse[STEP / 4], row_delta[STEP / 4];
#pragma unroll
                for (u32 c = 0; c < STEP / 4; c++) {
                    const u32 i = c / 2 * 8 + lane % 4 * 2 + c % 2;
#if STATISTICS_SHARED
                    row_lse[c] = statistics[stage][0][part + i] * LOG2_E, row_delta[c] = statistics[stage][1][part + i];
#else
                    const size_t at = (size_t)head * p.tokens + row.start + min(query + i, row.queries - 1);
                    row_lse[c] = lse[at] * LOG2_E, row_delta[c] = delta[at];
#endif
                }
                const u32 rows = tile + part * ROW_BYTES;
                // Scores and dO V^T with keys as rows, so that their transposes need no exchange.
                float s[STEP / 8][4] = {}, t[STEP / 8][4], ds[STEP / 8][4] = {};
#pragma unroll
                for (u32 kk = 0; kk < D / 16; kk++)
#pragma unroll
                    for (u32 n = 0; n < STEP / 16; n++) {
                        u32 b[4];
                        columns(b, rows + n * 16 * ROW_BYTES + columns_lane(), kk);
                        mma(s[2 * n], kf[kk], b[0], b[1]);
                        mma(s[2 * n + 1], kf[kk], b[2], b[3]);
                    }
                bool edge = position < key + 15 || position + STEP - 1 - key >= p.window || query + STEP > row.queries;
                auto index = [](u32 n, u32 c) { return 2 * n + c % 2; };
                weigh(s, t, row_lse, edge, p, index, [&](u32 n, u32 c) {
                    u32 i = query + n * 8 + lane % 4 * 2 + c % 2;
                    return i < row.queries && i + past - (key + lane / 4 + c / 2 * 8) < p.window;
                });
#pragma unroll
                for (u32 kk = 0; kk < D / 16; kk++) {
#if VALUES_SHARED
                    const uint4 four = own[kk * LANES];
                    const u32 a[4] = {four.x, four.y, four.z, four.w};
#else
                    const u32 (&a)[4] = vf[kk];
#endif
#pragma unroll
                    for (u32 n = 0; n < STEP / 16; n++) {
                        u32 b[4];
                        columns(b, rows + n * 16 * ROW_BYTES + TILE_BYTES + columns_lane(), kk);
                        mma(ds[2 * n], a, b[0], b[1]);
                        mma(ds[2 * n + 1], a, b[2], b[3]);
                    }
                }
                const u32 results = rows + (contracted_lane() ^ slice * 32);
#pragma unroll
                for (u32 n = 0; n < STEP / 16; n++) {
                    u32 weights[4];
                    as_operand(weights, s[2 * n], s[2 * n + 1]);
#pragma unroll
                    for (u32 c = 0; c < RESULT_TILES; c += 2) {
                        u32 b[4];
                        contracted(b, results + n * 16 * ROW_BYTES + TILE_BYTES, c * SLICES);
                        mma(dv[c], weights, b[0], b[1]);
                        mma(dv[c + 1], weights, b[2], b[3]);
                    }
                }
                differentiate(s, t, ds, row_delta, index);
#pragma unroll
                for (u32 n = 0; n < STEP / 16; n++) {
                    u32 gradients[4];
                    as_operand(gradients, ds[2 * n], ds[2 * n + 1]);
#pragma unroll
                    for (u32 c = 0; c < RESULT_TILES; c += 2) {
                        u32 b[4];
                        contracted(b, results + n * 16 * ROW_BYTES, c * SLICES);
                        mma(dk[c], gradients, b[0], b[1]);
                        mma(dk[c + 1], gradients, b[2], b[3]);
                    }
                }
            }
        }
    }
    store_rows<RESULT_TILES, SLICES>(d_k + head_at(p, row, p.d_k, kv_head), dk, p.scale, p.scale, key, row.keys, p.d_k.token, slice, p.head_dim);
    store_rows<RESULT_TILES, SLICES>(d_v + head_at(p, row, p.d_v, kv_head), dv, 1.0f, 1.0f, key, row.keys, p.d_v.token, slice, p.head_dim);
}

#else

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES)
attention_queries(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u32* __restrict__ bounds,
                  const u16* __restrict__ d_out, const float* __restrict__ lse, const float* __restrict__ delta, u16* __restrict__ d_q,
                  const __grid_constant__ Params p) {
    __shared__ __align__(128) unsigned char shared[STAGES * STAGE_BYTES];
    const u32 ring = shared_address(shared);
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, slice = warp % SLICES;
    const u32 head = blockIdx.x % p.heads;
    const Row row = row_of(p, bounds, blockIdx.x / p.heads % p.rows);
    const u32 query_tile = p.tiles - 1 - blockIdx.x / p.heads / p.rows;
    const u32 cube_query = query_tile * CUBE_ROWS, query = cube_query + warp / SLICES * 16;
    if (cube_query >= row.queries) return;
    const u32 past = row.keys - row.queries, position = query + past;
    const u32 low_edge = cube_query + past + 1;
    const u32 begin = (low_edge > p.window ? low_edge - p.window : 0) / ROWS;
    const u32 end = (min(cube_query + CUBE_ROWS, row.queries) + past + ROWS - 1) / ROWS;
    const u16* keys = k + head_at(p, row, p.k, head / p.group);
    const u16* values = v + head_at(p, row, p.v, head / p.group);

    u32 next_tile = begin;
    auto issue = [&]() {
        if (next_tile < end) {
            u32 to = ring + (next_tile - begin) % STAGES * STAGE_BYTES;
            load_tile(to, keys, next_tile * ROWS, row.keys, p.k.token, p.head_dim);
            load_tile(to + TILE_BYTES, values, next_tile * ROWS, row.keys, p.v.token, p.head_dim);
        }
        commit();
        next_tile++;
    };
#pragma unroll 1
    for (u32 i = 0; i < STAGES - 1; i++) issue();

    u32 qf[D / 16][4], of[D / 16][4];
    load_fragments(qf, q + head_at(p, row, p.q, head), query, row.queries, p.q.token, p.head_dim);
    load_fragments(of, d_out + head_at(p, row, p.d_out, head), query, row.queries, p.d_out.token, p.head_dim);
    float row_lse[2], row_delta[2];
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        size_t i = (size_t)head * p.tokens + row.start + min(query + lane / 4 + h * 8, row.queries - 1);
        row_lse[h] = lse[i] * LOG2_E, row_delta[h] = delta[i];
    }
    float dq[RESULT_TILES][4];
#pragma unroll
    for (u32 n = 0; n < RESULT_TILES; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) dq[n][c] = 0.0f;

#pragma unroll 1
    for (u32 j = begin; j < end; j++) {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();
        issue();
        const u32 tile = ring + (j - begin) % STAGES * STAGE_BYTES;
#pragma unroll 1
        for (u32 part = 0; part < ROWS; part += STEP) {
            const u32 key = j * ROWS + part;
            if (key > position + 15 || (position > key + STEP - 1 && position - key - (STEP - 1) >= p.window)) continue;
            const u32 rows = tile + part * ROW_BYTES;
            float s[STEP / 8][4] = {}, t[STEP / 8][4], ds[STEP / 8][4] = {};
#pragma unroll
            for (u32 kk = 0; kk < D / 16; kk++)
#pragma unroll
                for (u32 n = 0; n < STEP / 16; n++) {
                    u32 b[4];
                    columns(b, rows + n * 16 * ROW_BYTES + columns_lane(), kk);
                    mma(s[2 * n], qf[kk], b[0], b[1]);
                    mma(s[2 * n + 1], qf[kk], b[2], b[3]);
                }
            bool edge = key + STEP - 1 > position || position + 15 - key >= p.window;
            auto index = [](u32, u32 c) { return c / 2; };
            weigh(s, t, row_lse, edge, p, index,
                  [&](u32 n, u32 c) { return position + lane / 4 + c / 2 * 8 - (key + n * 8 + lane % 4 * 2 + c % 2) < p.window; });
#pragma unroll
            for (u32 kk = 0; kk < D / 16; kk++)
#pragma unroll
                for (u32 n = 0; n < STEP / 16; n++) {
                    u32 b[4];
                    columns(b, rows + n * 16 * ROW_BYTES + TILE_BYTES + columns_lane(), kk);
                    mma(ds[2 * n], of[kk], b[0], b[1]);
                    mma(ds[2 * n + 1], of[kk], b[2], b[3]);
                }
            differentiate(s, t, ds, row_delta, index);
#pragma unroll
            for (u32 n = 0; n < STEP / 16; n++) {
                u32 gradients[4];
                as_operand(gradients, ds[2 * n], ds[2 * n + 1]);
                const u32 results = rows + n * 16 * ROW_BYTES + (contracted_lane() ^ slice * 32);
#pragma unroll
                for (u32 c = 0; c < RESULT_TILES; c += 2) {
                    u32 b[4];
                    contracted(b, results, c * SLICES);
                    mma(dq[c], gradients, b[0], b[1]);
                    mma(dq[c + 1], gradients, b[2], b[3]);
                }
            }
        }
    }
    store_rows<RESULT_TILES, SLICES>(d_q + head_at(p, row, p.d_q, head), dq, p.scale, p.scale, query, row.queries, p.d_q.token, slice, p.head_dim);
}

#endif
#endif
