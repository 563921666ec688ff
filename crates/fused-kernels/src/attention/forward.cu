
// --------------------------------------------------------------------------------------------- forward
//
// A cube has 16 SETS queries per warp and goes over the key tiles that any of them sees. Keys and values take turns in a
// ring of STAGES tiles, or PAIRED share a stage of it. One barrier serves each stage: past it, all warps are done with the
// one before, and its place is filled with the one that comes STAGES - 1 later.
//
//   SETS                of 16 queries of a warp
//   STAGES, MIN_CUBES   of the ring; cubes per multiprocessor that registers must leave room for

#define STAGE_BYTES ((1 + PAIRED) * TILE_BYTES)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES)
attention_forward(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u32* __restrict__ bounds,
                  const float* __restrict__ sinks, u16* __restrict__ o, float* __restrict__ lse, const __grid_constant__ Params p) {
    __shared__ __align__(128) unsigned char shared[STAGES * STAGE_BYTES];
    const u32 ring = shared_address(shared);
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const u32 head = blockIdx.x % p.heads;
    const Row row = row_of(p, bounds, blockIdx.x / p.heads % p.rows);
    // The tiles with the most keys come first.
    const u32 query_tile = p.tiles - 1 - blockIdx.x / p.heads / p.rows;
    const u32 cube_query = query_tile * 16 * SETS * WARPS, query = cube_query + warp * 16 * SETS;
    if (cube_query >= row.queries) return;
    // A query's position among the keys: queries are the last of their row.
    const u32 past = row.keys - row.queries;
    const u32 cube_end = min(cube_query + 16 * SETS * WARPS, row.queries) + past;  // one past the last visible key
    const u32 low_edge = cube_query + past + 1;
    const u32 begin = (low_edge > p.window ? low_edge - p.window : 0) / ROWS, end = (cube_end + ROWS - 1) / ROWS;
    const u16* keys = k + head_at(p, row, p.k, head / p.group);
    const u16* values = v + head_at(p, row, p.v, head / p.group);

    u32 issued = 0, slot = 0;
    auto issue = [&]() {
        const u32 tile = begin + (PAIRED ? issued : issued / 2), to = ring + slot * STAGE_BYTES;
        if (tile < end) {
            if (PAIRED || issued % 2 == 0) load_tile(to, keys, tile * ROWS, row.keys, p.k.token, p.head_dim);
            if (PAIRED || issued % 2 == 1)
                load_tile(to + STAGE_BYTES - TILE_BYTES, values, tile * ROWS, row.keys, p.v.token, p.head_dim);
        }
        commit();
        issued++, slot = slot + 1 == STAGES ? 0 : slot + 1;
    };
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) issue();

    u32 qf[SETS][D / 16][4];
#pragma unroll
    for (u32 m = 0; m < SETS; m++)
        load_fragments(qf[m], q + head_at(p, row, p.q, head), query + 16 * m, row.queries, p.q.token, p.head_dim);

    float acc[SETS][D / 8][4] = {}, most[SETS][2], sum[SETS][2] = {};
#pragma unroll
    for (u32 m = 0; m < SETS; m++) most[m][0] = most[m][1] = NEGATIVE_INFINITY;

    u32 used = 0;
    auto next = [&]() {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();
        issue();
        const u32 at = ring + used * STAGE_BYTES;
        used = used + 1 == STAGES ? 0 : used + 1;
        return at;
    };

    const u32 position = query + past;
#pragma unroll 1
    for (u32 j = begin; j < end; j++) {
        const u32 first_key = j * ROWS;
        float s[SETS][ROWS / 8][4] = {};
        const u32 stage = next(), keys_at = stage + columns_lane();
#pragma unroll
        for (u32 kk = 0; kk < D / 16; kk++)
#pragma unroll
            for (u32 n = 0; n < ROWS / 16; n++) {
                u32 b[4];
                columns(b, keys_at + n * 16 * ROW_BYTES, kk);
#pragma unroll
                for (u32 m = 0; m < SETS; m++) {
                    mma(s[m][2 * n], qf[m][kk], b[0], b[1]);
                    mma(s[m][2 * n + 1], qf[m][kk], b[2], b[3]);
                }
            }

        const bool edge = first_key + ROWS - 1 > position || position + 16 * SETS - 1 - first_key >= p.window;
#if SOFTCAP
#pragma unroll
        for (u32 m = 0; m < SETS; m++)
#pragma unroll
            for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) s[m][n][c] = capped(s[m][n][c], p);
#endif
        if (edge) {
#pragma unroll
            for (u32 m = 0; m < SETS; m++)
#pragma unroll
                for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
                    for (u32 c = 0; c < 4; c++) {
                        // Wraps around for later keys, and a window is at most 2^31.
                        u32 distance = position + 16 * m + lane / 4 + c / 2 * 8 - (first_key + n * 8 + lane % 4 * 2 + c % 2);
                        if (distance >= p.window) s[m][n][c] = NEGATIVE_INFINITY;
                    }
        }

        // Online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867), in units of log2.
        float factor[SETS][2];
        bool grown = false;
#pragma unroll
        for (u32 m = 0; m < SETS; m++)
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                float tile_most = NEGATIVE_INFINITY;
#pragma unroll
                for (u32 n = 0; n < ROWS / 8; n++) tile_most = fmaxf(tile_most, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                tile_most = fmaxf(tile_most, __shfl_xor_sync(0xffffffffu, tile_most, 1));
                tile_most = fmaxf(tile_most, __shfl_xor_sync(0xffffffffu, tile_most, 2));
                float now = fmaxf(most[m][h], tile_most);
                // A row that has seen nothing yet stays at zero.
                float base = now == NEGATIVE_INFINITY ? 0.0f : now * p.scale_log2;
                factor[m][h] = exp2_fast(most[m][h] * p.scale_log2 - base);
                grown = grown || now > most[m][h];
                float tile_sum = 0.0f;
                most[m][h] = now;
#pragma unroll
                for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
                    for (u32 c = 2 * h; c < 2 * h + 2; c++) {
                        s[m][n][c] = exp2_fast(fmaf(s[m][n][c], p.scale_log2, -base));
                        tile_sum += s[m][n][c];
                    }
                sum[m][h] = sum[m][h] * factor[m][h] + tile_sum;
            }
        // Where no maximum has grown all factors are 1. For one set, asking costs more than it saves.
        if (SETS == 1 || __any_sync(0xffffffffu, grown)) {
#pragma unroll
            for (u32 m = 0; m < SETS; m++)
#pragma unroll
                for (u32 n = 0; n < D / 8; n++)
#pragma unroll
                    for (u32 c = 0; c < 4; c++) acc[m][n][c] *= factor[m][c / 2];
        }

        const u32 values_at = (PAIRED ? stage + TILE_BYTES : next()) + contracted_lane();
#pragma unroll
        for (u32 n = 0; n < ROWS / 16; n++) {
            u32 a[SETS][4];
#pragma unroll
            for (u32 m = 0; m < SETS; m++) as_operand(a[m], s[m][2 * n], s[m][2 * n + 1]);
#pragma unroll
            for (u32 c = 0; c < CHUNKS; c += 2) {
                u32 b[4];
                contracted(b, values_at + n * 16 * ROW_BYTES, c);
#pragma unroll
                for (u32 m = 0; m < SETS; m++) {
                    mma(acc[m][c], a[m], b[0], b[1]);
                    mma(acc[m][c + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (u32 m = 0; m < SETS; m++) {
        float inverse[2];
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 1);
            sum[m][h] += __shfl_xor_sync(0xffffffffu, sum[m][h], 2);
            const Ending end = ending(most[m][h], sum[m][h], sinks, head, p);
            inverse[h] = end.inverse;
            u32 i = query + 16 * m + lane / 4 + h * 8;
            if (lane % 4 == 0 && i < row.queries) lse[(size_t)head * p.tokens + row.start + i] = end.lse;
        }
        store_rows<D / 8, 1>(o + head_at(p, row, p.o, head), acc[m], inverse[0], inverse[1], query + 16 * m, row.queries, p.o.token, 0, p.head_dim);
    }
}
