
// -------------------------------------------------------------------------------------- Hopper, forward
//
//   KEYS       keys of a tile
//   STAGES     tiles of keys, and of values, in shared memory

struct Shared {
    alignas(1024) u8 q[TILE_BYTES(CUBE_ROWS)];
    alignas(1024) u8 k[STAGES][TILE_BYTES(KEYS)];
    alignas(1024) u8 v[V_STAGES][TILE_BYTES(KEYS)];
    BARRIERS;
    u32 ticket;
    float scratch[CONSUMERS / LANES];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                  const u32* __restrict__ bounds, const float* __restrict__ sinks, u32* __restrict__ counter, u16* __restrict__ o,
                  float* __restrict__ lse, const __grid_constant__ Params p) {
    __shared__ Shared s;
    const u32 warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (threadIdx.x == 0) init_barriers(s);
    __syncthreads();

    Cursor<1> own_at;
    Place k_at;
    Cursor<V_STAGES> v_at;
    if (warp >= CONSUMERS / LANES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == CONSUMERS / LANES && lane == 0) {
            const u32 tickets = p.tiles * p.heads * p.rows;
            for (u32 ticket = blockIdx.x; ticket != NONE; ticket = next_ticket(counter, tickets)) {
                const Work work = work_of(p, bounds, p.heads, ticket);
                const QuerySpan span(p, work, KEYS);
                if (span.first >= work.row.queries) continue;
                const u32 start = p.packed ? work.row.start : 0, row = p.packed ? 0 : work.row.index, kv_head = work.head / p.group;
                barrier_wait(&s.own_empty, own_at.phase ^ 1);
                s.ticket = ticket;
                barrier_expect(&s.own_full, TILE_BYTES(CUBE_ROWS));
                load_tile(s.q, &q_map, &s.own_full, CUBE_ROWS, start + span.first, work.head, row);
                own_at.advance();
                for (u32 j = span.end; j-- > span.begin; k_at.advance())
                    load_keys_and_values(s, k_at, &k_map, &v_map, KEYS, start, j, kv_head, row);
            }
            end_of_work(s, own_at);
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const u32 group = warp / 4;
#if TURNS
    if (group == 1) turn_pass(group);
#endif
    for (;;) {
        barrier_wait(&s.own_full, own_at.phase);
        own_at.advance();
        const u32 ticket = s.ticket;
        if (ticket == NONE) return;
        const Work work = work_of(p, bounds, p.heads, ticket);
        const QuerySpan span(p, work, KEYS);
        const u32 query = span.first + warp * 16, position = query + span.past;
        const u64 q = descriptor(s.q + group * 64 * 128);

        float weights[KEYS / 2], sums[D / 2], most[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, sum[2] = {0.0f, 0.0f}, factor[2];
        u32 operand[KEYS / 4];
#pragma unroll
        for (u32 i = 0; i < D / 2; i++) sums[i] = 0.0f;

        // Online softmax (Milakov and Gimelshein, 2018, arXiv 1805.02867), in units of log2.
        auto softmax = [&](u32 j) {
            const u32 first_key = j * KEYS;
#if SOFTCAP
#pragma unroll
            for (u32 i = 0; i < KEYS / 2; i++) weights[i] = capped(weights[i], p);
#endif
            if (first_key + KEYS - 1 > position || position + 15 - first_key >= p.window) {
                const u32 distance = position + lane / 4 - first_key - lane % 4 * 2;
#pragma unroll
                for (u32 i = 0; i < KEYS / 2; i++)
                    // Wraps around for later keys, and a window is at most 2^31.
                    if (distance + i / 2 % 2 * 8 - (i / 4 * 8 + i % 2) >= p.window) weights[i] = NEGATIVE_INFINITY;
            }
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                float now = most[h];
#pragma unroll
                for (u32 i = 0; i < KEYS / 2; i += 4) now = fmaxf(now, fmaxf(weights[i + 2 * h], weights[i + 2 * h + 1]));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                // A row that has seen nothing yet stays at zero.
                const float base = now == NEGATIVE_INFINITY ? 0.0f : now * p.scale_log2;
                factor[h] = exp2_fast(most[h] * p.scale_log2 - base);
                most[h] = now;
                float tile_sum = 0.0f;
#pragma unroll
                for (u32 i = 0; i < KEYS / 2; i += 4)
#pragma unroll
                    for (u32 c = i + 2 * h; c < i + 2 * h + 2; c++) {
                        weights[c] = exp2_fast(fmaf(weights[c], p.scale_log2, -base));
                        tile_sum += weights[c];
                    }
                sum[h] = fmaf(sum[h], factor[h], tile_sum);
            }
        };

        barrier_wait(&s.k_full[k_at.stage], k_at.phase);
        wgmma_fence();
        scores<KEYS>(weights, q, CUBE_ROWS, descriptor(s.k[k_at.stage]));
        wgmma_commit();
        wgmma_wait<0>();
        pin(weights);
        release(&s.k_empty[k_at.stage]);
        k_at.advance();
        softmax(span.end - 1);
        as_operand(operand, weights);

        // The scores of a tile are on their way while the values of the one before are added up.
#pragma unroll 1
        for (u32 j = span.end - 1; j-- > span.begin;) {
            barrier_wait(&s.k_full[k_at.stage], k_at.phase);
#if TURNS
            turn_wait(group);
#endif
            pin(sums);
            wgmma_fence();
            scores<KEYS>(weights, q, CUBE_ROWS, descriptor(s.k[k_at.stage]));
            wgmma_commit();
            barrier_wait(&s.v_full[v_at.stage], v_at.phase);
            wgmma_fence();
            accumulate<KEYS>(sums, operand, descriptor_turned(s.v[v_at.stage], KEYS));
            wgmma_commit();
#if TURNS
            turn_pass(group);
#endif
            wgmma_wait<1>();
            pin(weights);
            release(&s.k_empty[k_at.stage]);
            k_at.advance();
            softmax(j);
            hold(&s.scratch[warp], sum[0] + sum[1]);
            wgmma_wait<0>();
            pin(sums);
            release(&s.v_empty[v_at.stage]);
            v_at.advance();
            as_operand(operand, weights);
            // After the first tiles, a larger score is rare.
            if (D <= 128 || __any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
                for (u32 i = 0; i < D / 2; i++) sums[i] *= factor[i / 2 % 2];
            }
        }
        release(&s.own_empty);
        barrier_wait(&s.v_full[v_at.stage], v_at.phase);
        pin(sums);
        wgmma_fence();
        accumulate<KEYS>(sums, operand, descriptor_turned(s.v[v_at.stage], KEYS));
        wgmma_commit();

        float inverse[2];
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
            sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
            const Ending end = ending(most[h], sum[h], sinks, work.head, p);
            inverse[h] = end.inverse;
            const u32 i = query + lane / 4 + h * 8;
            if (lane % 4 == 0 && i < work.row.queries) lse[(size_t)work.head * p.tokens + work.row.start + i] = end.lse;
        }
        wgmma_wait<0>();
        pin(sums);
        release(&s.v_empty[v_at.stage]);
        v_at.advance();
        store_rows(o + head_at(p, work.row, p.o, work.head), sums, inverse[0], inverse[1], query, work.row.queries, p.o.token, p.head_dim);
    }
}
