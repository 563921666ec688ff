
// --------------------------------------------------------------------------------------------- forward
//
// A cube has 16 queries per warp and goes over the key tiles that any of them sees. Keys and values take turns in a
// ring of STAGES tiles, so that one barrier serves each tile: past it, all warps are done with the one before, and its
// place is filled with the one that comes STAGES - 1 later.
//
//   STAGES, MIN_CUBES   tiles in the ring; cubes per multiprocessor that registers must leave room for

extern "C" __global__ void __launch_bounds__(THREADS, MIN_CUBES)
attention_forward(const u16* __restrict__ q, const u16* __restrict__ k, const u16* __restrict__ v, const u32* __restrict__ bounds,
                  u16* __restrict__ o, float* __restrict__ lse, const __grid_constant__ Params p) {
    __shared__ __align__(128) unsigned char shared[STAGES * TILE_BYTES];
    const u32 ring = shared_address(shared);
    const u32 lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const u32 head = blockIdx.x % p.heads;
    const Row row = row_of(p, bounds, blockIdx.x / p.heads % p.rows);
    // The tiles with the most keys come first.
    const u32 query_tile = p.tiles - 1 - blockIdx.x / p.heads / p.rows;
    const u32 cube_query = query_tile * 16 * WARPS, query = cube_query + warp * 16;
    if (cube_query >= row.queries) return;
    // A query's position among the keys: queries are the last of their row.
    const u32 past = row.keys - row.queries;
    const u32 cube_end = min(cube_query + 16 * WARPS, row.queries) + past;  // one past the last visible key
    const u32 low_edge = cube_query + past + 1;
    const u32 begin = (low_edge > p.window ? low_edge - p.window : 0) / ROWS, end = (cube_end + ROWS - 1) / ROWS;
    const u16* keys = k + head_at(p, row, p.k, head / p.group);
    const u16* values = v + head_at(p, row, p.v, head / p.group);

    u32 issued = 0, slot = 0;
    auto issue = [&]() {
        u32 tile = begin + issued / 2;
        if (tile < end) {
            if (issued % 2 == 0) load_tile(ring + slot * TILE_BYTES, keys, tile * ROWS, row.keys, p.k.token, p.head_dim);
            else load_tile(ring + slot * TILE_BYTES, values, tile * ROWS, row.keys, p.v.token, p.head_dim);
        }
        commit();
        issued++, slot = slot + 1 == STAGES ? 0 : slot + 1;
    };
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; i++) issue();

    u32 qf[D / 16][4];
    load_fragments(qf, q + head_at(p, row, p.q, head), query, row.queries, p.q.token, p.head_dim);

    float acc[D / 8][4], most[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (u32 n = 0; n < D / 8; n++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) acc[n][c] = 0.0f;

    u32 used = 0;
    auto next = [&]() {
        wait_for_all_but<STAGES - 2>();
        __syncthreads();
        issue();
        u32 tile = ring + used * TILE_BYTES;
        used = used + 1 == STAGES ? 0 : used + 1;
        return tile;
    };

    const u32 position = query + past;
    for (u32 j = begin; j < end; j++) {
        float s[ROWS / 8][4];
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) s[n][c] = 0.0f;
        const u32 keys_at = next() + columns_lane();
#pragma unroll
        for (u32 kk = 0; kk < D / 16; kk++)
#pragma unroll
            for (u32 n = 0; n < ROWS / 16; n++) {
                u32 b[4];
                columns(b, keys_at + n * 16 * ROW_BYTES, kk);
                mma(s[2 * n], qf[kk], b[0], b[1]);
                mma(s[2 * n + 1], qf[kk], b[2], b[3]);
            }

        const u32 first_key = j * ROWS;
        bool edge = first_key + ROWS - 1 > position || position + 15 - first_key >= p.window;
#if SOFTCAP
#pragma unroll
        for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) s[n][c] = capped(s[n][c], p);
#endif
        if (edge) {
#pragma unroll
            for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    // Wraps around for later keys, and a window is at most 2^31.
                    u32 distance = position + lane / 4 + c / 2 * 8 - (first_key + n * 8 + lane % 4 * 2 + c % 2);
                    if (distance >= p.window) s[n][c] = NEGATIVE_INFINITY;
                }
        }

        // Online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867), in units of log2.
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            float tile_most = NEGATIVE_INFINITY;
#pragma unroll
            for (u32 n = 0; n < ROWS / 8; n++) tile_most = fmaxf(tile_most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
            tile_most = fmaxf(tile_most, __shfl_xor_sync(0xffffffffu, tile_most, 1));
            tile_most = fmaxf(tile_most, __shfl_xor_sync(0xffffffffu, tile_most, 2));
            float now = fmaxf(most[h], tile_most);
            // A row that has seen nothing yet stays at zero.
            float base = now == NEGATIVE_INFINITY ? 0.0f : now * p.scale_log2;
            float factor = exp2_fast(most[h] * p.scale_log2 - base), tile_sum = 0.0f;
            most[h] = now;
#pragma unroll
            for (u32 n = 0; n < ROWS / 8; n++)
#pragma unroll
                for (u32 c = 2 * h; c < 2 * h + 2; c++) {
                    s[n][c] = exp2_fast(fmaf(s[n][c], p.scale_log2, -base));
                    tile_sum += s[n][c];
                }
            sum[h] = sum[h] * factor + tile_sum;
#pragma unroll
            for (u32 n = 0; n < D / 8; n++) acc[n][2 * h] *= factor, acc[n][2 * h + 1] *= factor;
        }

        const u32 values_at = next() + contracted_lane();
#pragma unroll
        for (u32 n = 0; n < ROWS / 16; n++) {
            u32 a[4];
            as_operand(a, s[2 * n], s[2 * n + 1]);
#pragma unroll
            for (u32 c = 0; c < CHUNKS; c += 2) {
                u32 b[4];
                contracted(b, values_at + n * 16 * ROW_BYTES, c);
                mma(acc[c], a, b[0], b[1]);
                mma(acc[c + 1], a, b[2], b[3]);
            }
        }
    }

    float inverse[2];
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        inverse[h] = 1.0f / sum[h];
        u32 i = query + lane / 4 + h * 8;
        if (lane % 4 == 0 && i < row.queries)
            lse[(size_t)head * p.tokens + row.start + i] = most[h] * p.scale_log2 * LN_2 + logf(sum[h]);
    }
    store_rows<D / 8, 1>(o + head_at(p, row, p.o, head), acc, inverse[0], inverse[1], query, row.queries, p.o.token, 0, p.head_dim);
}
