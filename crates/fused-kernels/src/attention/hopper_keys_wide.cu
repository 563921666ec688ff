
// ------------------------------------------------------------------- Hopper, dK and dV of wide heads
//
// As in hopper_backward.cu, but the sums of 64 keys, 64 x D twice, take the registers of both groups: the first has
// dV, the second dK. The first computes P for both and passes it, times the softcap's derivative and in f32, through
// shared memory: each thread reads what its counterpart wrote.
//
//   TILE       queries of a tile
//   STAGES     such tiles in shared memory
//   PASSED     tiles of P there
//   HELD       how many times 16 columns of K, and of V, are held in registers, for which shared memory is read less

#define CUBE_KEYS 64
#define GROUP (CONSUMERS / 2)

// The first operand's columns 16 k to 16 k + 15 for the product of 64 rows, from a tile of 64.
__device__ __forceinline__ void hold_columns(u32 (&a)[4], const u8* tile, u32 k) {
    const u32 lane = threadIdx.x % LANES, row = threadIdx.x / LANES % 4 * 16 + lane % 16, chunk = k % 4 * 2 + lane / 16;
    load_matrices(a, shared_address(tile) + k / 4 * (64 * 128) + row * 128 + (chunk ^ row % 8) * 16);
}

struct Shared {
    alignas(1024) u8 k[TILE_BYTES(CUBE_KEYS)];
    u8 v[TILE_BYTES(CUBE_KEYS)];
    Stage ring[STAGES];
    float4 passed[PASSED][TILE / 8][GROUP];
    float lse[STAGES][TILE];     // in units of log2
    float delta[STAGES][TILE];
    u64 own_full, own_empty, q_full[STAGES], d_out_full[STAGES], empty[STAGES];
    u64 passed_full[PASSED][GROUP / LANES], passed_empty[PASSED][GROUP / LANES];   // of each pair of warps
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
            barrier_init(&s.q_full[i], 2), barrier_init(&s.d_out_full[i], 2);
            barrier_init(&s.empty[i], CONSUMERS / LANES);
        }
        for (u32 i = 0; i < PASSED; i++)
            for (u32 w = 0; w < GROUP / LANES; w++) barrier_init(&s.passed_full[i][w], 1), barrier_init(&s.passed_empty[i][w], 1);
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
            const KeySpan span(p, work, CUBE_KEYS);
            if (span.first < work.row.keys) {
                const u32 start = p.packed ? work.row.start : 0, row = p.packed ? 0 : work.row.index;
                barrier_wait(&s.own_empty, own_at.phase ^ 1);
                own_at.advance();
                if (lane == 0) {
                    s.ticket = ticket;
                    barrier_expect(&s.own_full, 2 * TILE_BYTES(CUBE_KEYS));
                    load_tile(s.k, &k_map, &s.own_full, CUBE_KEYS, start + span.first, work.head, row);
                    load_tile(s.v, &v_map, &s.own_full, CUBE_KEYS, start + span.first, work.head, row);
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
                        if (lane == 0) barrier_arrive(&s.q_full[at.stage]), barrier_arrive(&s.d_out_full[at.stage]);
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
    const u32 group = warp / 4, pair = warp % 4, thread = threadIdx.x % GROUP;
    Cursor<PASSED> passed_at;
#if TURNS
    if (group == 1) turn_pass(group);
#endif
    for (;;) {
        barrier_wait(&s.own_full, own_at.phase);
        own_at.advance();
        const u32 ticket = s.ticket;
        if (ticket == NONE) return;
        const Work work = work_of(p, bounds, kv_heads, ticket);
        const KeySpan span(p, work, CUBE_KEYS);
        const u32 key = span.first + pair * 16;
        // The first group multiplies K with Q, and P with dO; the second V with dO, and dS with Q.
        const u8* own_tile = group ? s.v : s.k;
        const u64 own = descriptor(own_tile);
        u32 held[HELD ? HELD : 1][4];
#pragma unroll
        for (u32 k = 0; k < HELD; k++) hold_columns(held[k], own_tile, k);
        // The next tile of keys and values can come then.
        constexpr bool ALL_HELD = HELD == D / 16;
        if (ALL_HELD) {
            __syncwarp();
            release(&s.own_empty);
        }

        float sums[D / 2], x[TILE / 2];
        u32 operand[TILE / 4];
#pragma unroll
        for (u32 i = 0; i < D / 2; i++) sums[i] = 0.0f;

        auto score = [&] {
            barrier_wait(group ? &s.d_out_full[at.stage] : &s.q_full[at.stage], at.phase);
            pin(sums);
            wgmma_fence();
            const u64 other = descriptor(group ? s.ring[at.stage].d_out : s.ring[at.stage].q);
#pragma unroll
            for (u32 k = 0; k < HELD; k++) multiply<0>(x, held[k], columns_on(other, TILE, k), k);
#pragma unroll
            for (u32 k = HELD; k < D / 16; k++) multiply<0>(x, columns_on(own, CUBE_KEYS, k), columns_on(other, TILE, k), k);
            wgmma_commit();
        };
        auto add = [&](u32 stage, u32 phase) {
            barrier_wait(group ? &s.q_full[stage] : &s.d_out_full[stage], phase);
            pin(sums);
            wgmma_fence();
            accumulate<TILE>(sums, operand, descriptor_turned(group ? s.ring[stage].q : s.ring[stage].d_out, TILE));
            wgmma_commit();
        };
        u32 j = span.begin;
        // The operand of dV or dK from a stage whose scores are there.
        auto finish = [&](u32 stage) {
            u64* full = &s.passed_full[passed_at.stage][pair];
            u64* empty = &s.passed_empty[passed_at.stage][pair];
            float4* passed = &s.passed[passed_at.stage][0][thread];
            if (group == 0) {
                const u32 query = j * TILE, position = query + span.past;
                const bool edge = position < key + 15 || position + TILE - 1 - key >= p.window || query + TILE > work.row.queries;
                if (++j == span.end) j = span.begin;
#if SOFTCAP
#pragma unroll
                for (u32 i = 0; i < TILE / 2; i++) x[i] = capped(x[i], p);
#endif
                if (edge) {
                    const u32 column = query + lane % 4 * 2, distance = column + span.past - (key + lane / 4);
#pragma unroll
                    for (u32 i = 0; i < TILE / 2; i++) {
                        const u32 on = i / 4 * 8 + i % 2;
                        if (column + on >= work.row.queries || distance + on - i / 2 % 2 * 8 >= p.window) x[i] = NEGATIVE_INFINITY;
                    }
                }
                // All before the stores: for all the compiler knows, those could change them.
                float2 row_lse[TILE / 8];
#pragma unroll
                for (u32 n = 0; n < TILE / 8; n++) row_lse[n] = *(const float2*)(s.lse[stage] + n * 8 + lane % 4 * 2);
                barrier_wait(empty, passed_at.phase ^ 1);
#pragma unroll
                for (u32 n = 0; n < TILE / 8; n++) {
                    const float2 l = row_lse[n];
                    float weight[4];
#pragma unroll
                    for (u32 c = 0; c < 4; c++) weight[c] = exp2_fast(fmaf(x[4 * n + c], p.scale_log2, c % 2 ? -l.y : -l.x));
                    operand[2 * n] = pack(weight[0], weight[1]), operand[2 * n + 1] = pack(weight[2], weight[3]);
#if SOFTCAP
#pragma unroll
                    // Not below 0 for a hidden score, which is infinite.
                    for (u32 c = 0; c < 4; c++) weight[c] *= fmaxf(1.0f - x[4 * n + c] * x[4 * n + c], 0.0f);
#endif
                    passed[n * GROUP] = make_float4(weight[0], weight[1], weight[2], weight[3]);
                }
                __syncwarp();
                release(full);
            } else {
                const float* row_delta = s.delta[stage] + lane % 4 * 2;
                barrier_wait(full, passed_at.phase);
#pragma unroll
                for (u32 n = 0; n < TILE / 8; n++) {
                    const float4 weight = passed[n * GROUP];
                    const float2 d = *(const float2*)(row_delta + n * 8);
                    operand[2 * n] = pack(weight.x * (x[4 * n] - d.x), weight.y * (x[4 * n + 1] - d.y));
                    operand[2 * n + 1] = pack(weight.z * (x[4 * n + 2] - d.x), weight.w * (x[4 * n + 3] - d.y));
                }
                __syncwarp();
                release(empty);
            }
            passed_at.advance();
        };

        if (const u32 steps = p.group * (span.end - span.begin)) {
#if TURNS
            turn_wait(group);
#endif
            score();
#if TURNS
            turn_pass(group);
#endif
            wgmma_wait<0>();
            pin(x);
            finish(at.stage);
#pragma unroll 1
            for (u32 i = 1; i < steps; i++) {
                const u32 stage = at.stage, phase = at.phase;
                at.advance();
#if TURNS
                turn_wait(group);
#endif
                add(stage, phase);
                score();
#if TURNS
                turn_pass(group);
#endif
                wgmma_wait<1>();
                pin(sums);
                release(&s.empty[stage]);
                wgmma_wait<0>();
                pin(x);
                finish(at.stage);
            }
            if (!ALL_HELD) release(&s.own_empty);
            add(at.stage, at.phase);
            wgmma_wait<0>();
            pin(sums);
            release(&s.empty[at.stage]);
            at.advance();
        } else {
            if (!ALL_HELD) release(&s.own_empty);
        }
        u16* to = group ? d_k + head_at(p, work.row, p.d_k, work.head) : d_v + head_at(p, work.row, p.d_v, work.head);
        const float factor = group ? p.scale : 1.0f;
        store_rows(to, sums, factor, factor, key, work.row.keys, group ? p.d_k.token : p.d_v.token, p.head_dim);
    }
}
