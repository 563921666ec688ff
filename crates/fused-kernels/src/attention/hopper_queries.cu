
// ---------------------------------------------------------------------------------------- Hopper, dQ

struct Shared {
    alignas(1024) u8 q[TILE_BYTES(CUBE_ROWS)];
    u8 d_out[TILE_BYTES(CUBE_ROWS)];
    alignas(1024) u8 k[STAGES][TILE_BYTES(TILE)];
    alignas(1024) u8 v[V_STAGES][TILE_BYTES(TILE)];
    BARRIERS;
    u32 ticket;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_queries(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                  const __grid_constant__ TensorMap d_out_map, const u32* __restrict__ bounds, const float* __restrict__ lse,
                  const float* __restrict__ delta, u32* __restrict__ counter, u16* __restrict__ d_q, const __grid_constant__ Params p) {
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
                const QuerySpan span(p, work, TILE);
                if (span.first >= work.row.queries) continue;
                const u32 start = p.packed ? work.row.start : 0, row = p.packed ? 0 : work.row.index, kv_head = work.head / p.group;
                barrier_wait(&s.own_empty, own_at.phase ^ 1);
                s.ticket = ticket;
                barrier_expect(&s.own_full, 2 * TILE_BYTES(CUBE_ROWS));
                load_tile(s.q, &q_map, &s.own_full, CUBE_ROWS, start + span.first, work.head, row);
                load_tile(s.d_out, &d_out_map, &s.own_full, CUBE_ROWS, start + span.first, work.head, row);
                own_at.advance();
                for (u32 j = span.begin; j < span.end; j++, k_at.advance())
                    load_keys_and_values(s, k_at, &k_map, &v_map, TILE, start, j, kv_head, row);
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
        const QuerySpan span(p, work, TILE);
        const u32 query = span.first + warp * 16, position = query + span.past;
        const u64 q = descriptor(s.q + group * 64 * 128), d_out = descriptor(s.d_out + group * 64 * 128);

        float row_lse[2], row_delta[2], dq[D / 2], weights[TILE / 2], gradients[TILE / 2];
        u32 operand[TILE / 4];
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            const size_t i = (size_t)work.head * p.tokens + work.row.start + min(query + lane / 4 + h * 8, work.row.queries - 1);
            row_lse[h] = lse[i] * LOG2_E, row_delta[h] = delta[i];
        }
#pragma unroll
        for (u32 i = 0; i < D / 2; i++) dq[i] = 0.0f;

        // The operand of dQ from a tile whose scores are on their way.
        auto finish = [&](u32 j) {
            barrier_wait(&s.v_full[v_at.stage], v_at.phase);
            wgmma_fence();
            scores<TILE>(gradients, d_out, CUBE_ROWS, descriptor(s.v[v_at.stage]));
            wgmma_commit();
#if TURNS
            turn_pass(group);
#endif
            wgmma_wait<1>();
            pin(weights);
#if SOFTCAP
            // Registers hold no capped scores of wide heads: P becomes P times the derivative at once.
            constexpr bool KEEP = D <= 128;
            float kept[KEEP ? TILE / 2 : 1];
#endif
#pragma unroll
            for (u32 i = 0; i < TILE / 2; i++) {
                float t = weights[i];
                weights[i] = probability(t, row_lse[i / 2 % 2], p);
#if SOFTCAP
                if (KEEP) kept[i] = t; else weights[i] = with_slope(weights[i], t);
#endif
            }
            // Before the wait: across a branch the assembler does not start it early.
            const u32 first_key = j * TILE;
            if (first_key + TILE - 1 > position || position + 15 - first_key >= p.window) {
                const u32 distance = position + lane / 4 - first_key - lane % 4 * 2;
#pragma unroll
                for (u32 i = 0; i < TILE / 2; i++)
                    if (distance + i / 2 % 2 * 8 - (i / 4 * 8 + i % 2) >= p.window) weights[i] = 0.0f;
            }
            wgmma_wait<0>();
            pin(gradients);
            release(&s.v_empty[v_at.stage]);
            v_at.advance();
#pragma unroll
            for (u32 i = 0; i < TILE / 2; i++) {
                gradients[i] = weights[i] * (gradients[i] - row_delta[i / 2 % 2]);
#if SOFTCAP
                if (KEEP) gradients[i] = with_slope(gradients[i], kept[i]);
#endif
            }
            as_operand(operand, gradients);
        };
        auto add = [&](u32 stage) {
            pin(dq);
            wgmma_fence();
            accumulate<TILE>(dq, operand, descriptor_turned(s.k[stage], TILE));
            wgmma_commit();
        };

        barrier_wait(&s.k_full[k_at.stage], k_at.phase);
#if TURNS
        turn_wait(group);
#endif
        wgmma_fence();
        scores<TILE>(weights, q, CUBE_ROWS, descriptor(s.k[k_at.stage]));
        wgmma_commit();
        finish(span.begin);
#pragma unroll 1
        for (u32 j = span.begin + 1; j < span.end; j++) {
            const u32 stage = k_at.stage;
            k_at.advance();
            barrier_wait(&s.k_full[k_at.stage], k_at.phase);
#if TURNS
            turn_wait(group);
#endif
            add(stage);
            scores<TILE>(weights, q, CUBE_ROWS, descriptor(s.k[k_at.stage]));
            wgmma_commit();
            wgmma_wait<1>();
            pin(dq);
            release(&s.k_empty[stage]);
            finish(j);
        }
        release(&s.own_empty);
        add(k_at.stage);
        wgmma_wait<0>();
        pin(dq);
        release(&s.k_empty[k_at.stage]);
        k_at.advance();
        store_rows(d_q + head_at(p, work.row, p.d_q, work.head), dq, p.scale, p.scale, query, work.row.queries, p.d_q.token, p.head_dim);
    }
}
