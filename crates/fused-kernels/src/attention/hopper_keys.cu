
// -------------------------------------------------------------------------------- Hopper, dK and dV

struct Shared {
    alignas(1024) u8 k[TILE_BYTES(CUBE_ROWS)];
    u8 v[TILE_BYTES(CUBE_ROWS)];
    Stage ring[STAGES];
    alignas(16) float lse[STAGES][TILE];     // in units of log2
    float delta[STAGES][TILE];
    u64 own_full, own_empty, q_full[STAGES], d_out_full[STAGES], empty[STAGES];
    u32 ticket;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_keys(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
               const __grid_constant__ TensorMap d_out_map, const u32* __restrict__ bounds, const float* __restrict__ lse,
               const float* __restrict__ delta, u32* __restrict__ counter, u16* __restrict__ d_k, u16* __restrict__ d_v,
               const __grid_constant__ Params p) {
    __shared__ Shared s;
    const u32 warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, kv_heads = p.heads / p.group;
    if (threadIdx.x == 0) {
        barrier_init(&s.own_full, 1), barrier_init(&s.own_empty, CONSUMERS / LANES);
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(&s.q_full[i], 1), barrier_init(&s.d_out_full[i], 2);
            barrier_init(&s.empty[i], CONSUMERS / LANES);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    Cursor<1> own_at;
    Cursor<STAGES> at;
    if (warp >= CONSUMERS / LANES) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp != CONSUMERS / LANES) return;
        // One lane loads tiles; all of the warp, lse and delta.
        const u32 tickets = p.tiles * kv_heads * p.rows;
        for (u32 ticket = blockIdx.x; ticket != NONE;) {
            const Work work = work_of(p, bounds, kv_heads, ticket);
            const KeySpan span(p, work, CUBE_ROWS);
            if (span.first < work.row.keys) {
                const u32 start = p.packed ? work.row.start : 0, row = p.packed ? 0 : work.row.index;
                barrier_wait(&s.own_empty, own_at.phase ^ 1);
                own_at.advance();
                if (lane == 0) {
                    s.ticket = ticket;
                    barrier_expect(&s.own_full, 2 * TILE_BYTES(CUBE_ROWS));
                    load_tile(s.k, &k_map, &s.own_full, CUBE_ROWS, start + span.first, work.head, row);
                    load_tile(s.v, &v_map, &s.own_full, CUBE_ROWS, start + span.first, work.head, row);
                }
                for (u32 head = work.head * p.group; head < (work.head + 1) * p.group; head++) {
                    const float* row_lse = lse + (size_t)head * p.tokens + work.row.start;
                    const float* row_delta = delta + (size_t)head * p.tokens + work.row.start;
                    for (u32 j = span.begin; j < span.end; j++, at.advance()) {
                        float a[TILE / LANES], b[TILE / LANES];
#pragma unroll
                        for (u32 i = 0; i < TILE / LANES; i++) {
                            const u32 query = min(j * TILE + i * LANES + lane, work.row.queries - 1);
                            a[i] = row_lse[query], b[i] = row_delta[query];
                        }
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
                        if (lane == 0) {
                            barrier_expect(&s.q_full[at.stage], TILE_BYTES(TILE));
                            load_tile(s.ring[at.stage].q, &q_map, &s.q_full[at.stage], TILE, start + j * TILE, head, row);
                            barrier_expect(&s.d_out_full[at.stage], TILE_BYTES(TILE));
                            load_tile(s.ring[at.stage].d_out, &d_out_map, &s.d_out_full[at.stage], TILE, start + j * TILE, head, row);
                        }
                        __syncwarp();
#pragma unroll
                        for (u32 i = 0; i < TILE / LANES; i++)
                            s.lse[at.stage][i * LANES + lane] = a[i] * LOG2_E, s.delta[at.stage][i * LANES + lane] = b[i];
                        __syncwarp();
                        if (lane == 0) barrier_arrive(&s.d_out_full[at.stage]);
                    }
                }
            }
            if (lane == 0) ticket = next_ticket(counter, tickets);
            ticket = __shfl_sync(0xffffffffu, ticket, 0);
        }
        barrier_wait(&s.own_empty, own_at.phase ^ 1);
        if (lane == 0) {
            s.ticket = NONE;
            barrier_arrive(&s.own_full);
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
        const Work work = work_of(p, bounds, kv_heads, ticket);
        const KeySpan span(p, work, CUBE_ROWS);
        const u32 key = span.first + warp * 16;
        const u64 k = descriptor(s.k + group * 64 * 128), v = descriptor(s.v + group * 64 * 128);

        float dk[D / 2], dv[D / 2], weights[TILE / 2], gradients[TILE / 2];
        u32 operand[TILE / 4], gradient_operand[TILE / 4];
#pragma unroll
        for (u32 i = 0; i < D / 2; i++) dk[i] = 0.0f, dv[i] = 0.0f;

        u32 j = span.begin;
        // The operands of dV and dK from a stage whose scores are on their way. Scores and dO V^T have keys as rows:
        // their transposes are operands as they are.
        auto finish = [&](u32 stage, u32 phase) {
            barrier_wait(&s.d_out_full[stage], phase);
            wgmma_fence();
            scores<TILE>(gradients, v, CUBE_ROWS, descriptor(s.ring[stage].d_out));
            wgmma_commit();
#if TURNS
            turn_pass(group);
#endif
            wgmma_wait<1>();
            pin(weights);

            const u32 query = j * TILE, position = query + span.past;
            const bool edge = position < key + 15 || position + TILE - 1 - key >= p.window || query + TILE > work.row.queries;
            if (++j == span.end) j = span.begin;
            const float* row_lse = s.lse[stage] + lane % 4 * 2;
            const float* row_delta = s.delta[stage] + lane % 4 * 2;
#if SOFTCAP
            float kept[TILE / 2];
#endif
#pragma unroll
            for (u32 n = 0; n < TILE / 2; n += 4) {
                const float2 l = *(const float2*)(row_lse + n * 2);
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    float t = weights[n + c];
                    weights[n + c] = probability(t, c % 2 ? l.y : l.x, p);
#if SOFTCAP
                    kept[n + c] = t;
#endif
                }
            }
            const u32 column = query + lane % 4 * 2, distance = column + span.past - (key + lane / 4);
            auto hidden = [&](u32 i) {
                const u32 on = i / 4 * 8 + i % 2;
                return column + on >= work.row.queries || distance + on - i / 2 % 2 * 8 >= p.window;
            };
            if (edge) {
#pragma unroll
                for (u32 i = 0; i < TILE / 2; i++)
                    if (hidden(i)) weights[i] = 0.0f;
            }
            as_operand(operand, weights);
            pin(weights);
            wgmma_wait<0>();
            pin(gradients);
#pragma unroll
            for (u32 n = 0; n < TILE / 2; n += 4) {
                const float2 d = *(const float2*)(row_delta + n * 2);
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    gradients[n + c] = weights[n + c] * (gradients[n + c] - (c % 2 ? d.y : d.x));
#if SOFTCAP
                    gradients[n + c] = with_slope(gradients[n + c], kept[n + c]);
#endif
                }
            }
            as_operand(gradient_operand, gradients);
        };
        auto add = [&](u32 stage) {
            pin(dk), pin(dv);
            wgmma_fence();
            accumulate<TILE>(dv, operand, descriptor_turned(s.ring[stage].d_out, TILE));
            accumulate<TILE>(dk, gradient_operand, descriptor_turned(s.ring[stage].q, TILE));
            wgmma_commit();
        };

        if (const u32 steps = p.group * (span.end - span.begin)) {
            barrier_wait(&s.q_full[at.stage], at.phase);
#if TURNS
            turn_wait(group);
#endif
            wgmma_fence();
            scores<TILE>(weights, k, CUBE_ROWS, descriptor(s.ring[at.stage].q));
            wgmma_commit();
            finish(at.stage, at.phase);
#pragma unroll 1
            for (u32 i = 1; i < steps; i++) {
                const u32 stage = at.stage;
                at.advance();
                barrier_wait(&s.q_full[at.stage], at.phase);
#if TURNS
                turn_wait(group);
#endif
                add(stage);
                scores<TILE>(weights, k, CUBE_ROWS, descriptor(s.ring[at.stage].q));
                wgmma_commit();
                wgmma_wait<1>();
                pin(dk), pin(dv);
                release(&s.empty[stage]);
                finish(at.stage, at.phase);
            }
            release(&s.own_empty);
            add(at.stage);
            wgmma_wait<0>();
            pin(dk), pin(dv);
            release(&s.empty[at.stage]);
            at.advance();
        } else {
            release(&s.own_empty);
        }
        store_rows(d_k + head_at(p, work.row, p.d_k, work.head), dk, p.scale, p.scale, key, work.row.keys, p.d_k.token, p.head_dim);
        store_rows(d_v + head_at(p, work.row, p.d_v, work.head), dv, 1.0f, 1.0f, key, work.row.keys, p.d_v.token, p.head_dim);
    }
}
