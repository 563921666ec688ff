// y = x op(W) on Hopper's tensor cores (wgmma), with W in 4 bits or dense. hopper.rs has the idea.
//
// The tile computed is transposed: Y^T[m, token] = A[m, k] X^T[k, token], A = W (forward) or W^T (input
// gradient). X comes into shared memory through TMA. 4-bit codes become 16-bit floats in registers, which
// wgmma takes as they are; a dense W goes through shared memory.
//
// GROUPED, each tile's tokens are of one group, which has a weight and a low-rank factor of its own: one behind the
// other in memory, so that a group is a number of rows to skip. A table says which tokens a tile has. What a tile loads
// beyond its tokens and features is another group's, and is not stored.
//
// Defined before this text: TRANSPOSED, DENSE, F16, OUT_F32, BN, STAGES, CLUSTER (cubes that share X),
// STORE_TOKENS (tokens that leave through shared memory at a time; 0: straight from registers), GROUPED, and the
// instructions for that BN: WGMMA (A in registers) and WGMMA_SHARED.

#if CLUSTER > 1
#define CUBES __cluster_dims__(CLUSTER, 1, 1)
#else
#define CUBES
#endif
extern "C" __global__ void CUBES __launch_bounds__(THREADS, 1) matmul(
    const __grid_constant__ TensorMap x_map,         // [tokens, k]
    const __grid_constant__ TensorMap u_map,         // [tokens, rank]
    const __grid_constant__ TensorMap low_rank_map,  // [m, rank] forward, [rank, m] transposed; see low_rank_row
    const __grid_constant__ TensorMap w_map,         // codes or the dense weight, [m, k] forward, [k, m] transposed
#if !DENSE
    const void* __restrict__ absmax,
    const float* __restrict__ nested,
    const float* __restrict__ tables,
#endif
#if GROUPED
    const Tile* __restrict__ tiles,
    void* __restrict__ out,                          // [tokens, m]
    const __grid_constant__ GroupedParams grouped
) {
    const Params& p = grouped.p;
#else
    const float* __restrict__ bias,
    float* __restrict__ partial,                     // [slots, cubes of a cluster, parts - 1, BN / 2, CONSUMERS]
    u32* __restrict__ arrived,                       // per slot and cube, zero before the launch and after it
#if STORE_TOKENS
    const __grid_constant__ TensorMap out,           // [tokens, m]
#else
    void* __restrict__ out,
#endif
    const __grid_constant__ Params p
) {
#endif
    __shared__ alignas(1024) Shared s;
    const u32 thread = threadIdx.x;
    const u32 warp = thread / 32, lane = thread % 32;

    if (thread == 0) {
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], DENSE ? 1 : 2);
            barrier_init(&s.empty[i], 2 * CLUSTER);
#if !DENSE && !TRANSPOSED
            barrier_init(&s.loaded[i], 1);
#endif
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#if !DENSE
    if (thread < 256) s.map[thread] = tables[p.map + thread];
    if (thread < 16) s.codebook[thread] = tables[p.codebook + thread];
#endif
    const u32 member = blockIdx.x % CLUSTER;
#if CLUSTER > 1
    cluster_sync();
#else
    __syncthreads();
#endif

    const u32 k_steps = (p.k + BK - 1) / BK;
    const u32 rank_steps = (p.rank + BK - 1) / BK;
    const u32 m_tiles = (p.m + CLUSTER * BM - 1) / (CLUSTER * BM);
#if GROUPED
    const u32 items = p.whole;
#else
    const u32 n_tiles = (p.tokens + BN - 1) / BN;
    const u32 items = p.whole + (m_tiles * n_tiles - p.whole) * p.split;
#endif

    // A cube of the cluster loads its share of a tile of X for all of them.
    auto load_x = [&](u8* to, const TensorMap* map, u64* bar, int column, int row) {
#if CLUSTER > 1
        load_tile_for_all(to + member * (X_BYTES / CLUSTER), map, bar, column, row + member * (BN / CLUSTER), CLUSTER);
#else
        load_tile(to, map, bar, column, row);
#endif
    };
    auto work = [&](u32 item) {
        Work w = {0, 0, 0, k_steps, 0, 1, 0, p.tokens, 0};
#if GROUPED
        // The tiles of the same tokens run side by side, so that these are read from L2 for all but the first.
        const Tile t = tiles[item / m_tiles];
        w.m0 = item % m_tiles * BM, w.n0 = t.first, w.end = t.end, w.group = t.group;
#else
        u32 tile = item;
        if (item >= p.whole) {
            w.slot = (item - p.whole) / p.split, w.part = (item - p.whole) % p.split, w.parts = p.split;
            tile = p.whole + w.slot;
            w.first = k_steps * w.part / p.split;
            w.steps = k_steps * (w.part + 1) / p.split - w.first;
        }
        // Tokens are taken in bands, so that a band's activations stay in L2 while the weight streams by once
        // per band: as many tiles as need the fewest bytes for all that is computed at a time.
        const u32 band = tile / (m_tiles * BAND), band_first = band * BAND;
        const u32 width = n_tiles - band_first < BAND ? n_tiles - band_first : BAND;
        const u32 within = tile - band * m_tiles * BAND;
        w.m0 = (within / width * CLUSTER + member) * BM;
        w.n0 = (band_first + within % width) * BN;
#endif
        return w;
    };
    // The table of tiles may be longer than needed; behind the first without tokens there is none.
    auto is_there = [](const Work& w) { return !GROUPED || w.n0 < w.end; };

    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (warp == CONSUMERS / 32) {
            // One thread feeds the tiles.
            if (lane == 0) {
                Cursor at;
                for (u32 item = blockIdx.x / CLUSTER; item < items; item += gridDim.x / CLUSTER) {
                    const Work w = work(item);
                    if (!is_there(w)) break;
                    // The low-rank product takes two stages for its two operands.
                    for (u32 b = 0; b < (w.part == 0 ? rank_steps : 0); b++) {
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
                        barrier_expect(&s.full[at.stage], X_BYTES);
                        load_x(s.ring[at.stage].x, &u_map, &s.full[at.stage], b * BK, w.n0);
                        at.advance();
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
                        barrier_expect(&s.full[at.stage], LOW_RANK_BYTES);
#if TRANSPOSED
                        load_tile(s.ring[at.stage].x, &low_rank_map, &s.full[at.stage], w.m0, w.group * p.rank + b * BK);
                        load_tile(s.ring[at.stage].x + LOW_RANK_BYTES / 2, &low_rank_map, &s.full[at.stage], w.m0 + BM / 2, w.group * p.rank + b * BK);
#else
                        load_tile(s.ring[at.stage].x, &low_rank_map, &s.full[at.stage], b * BK, w.group * p.m + w.m0);
#endif
                        at.advance();
                    }
                    for (u32 b = 0; b < w.steps; b++, at.advance()) {
                        const int k = (w.first + b) * BK;
                        u64* full = &s.full[at.stage];
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
#if !DENSE && !TRANSPOSED
                        u64* loaded = &s.loaded[at.stage];
                        barrier_expect(loaded, W_BYTES);
                        load_tile(s.ring[at.stage].w, &w_map, loaded, k / 2, w.group * p.m + w.m0);
                        barrier_expect(full, X_BYTES);
#else
                        barrier_expect(full, X_BYTES + W_BYTES);
#if DENSE && TRANSPOSED
                        load_tile(s.ring[at.stage].w, &w_map, full, w.m0, k);
                        load_tile(s.ring[at.stage].w + W_BYTES / 2, &w_map, full, w.m0 + BM / 2, k);
#elif DENSE
                        load_tile(s.ring[at.stage].w, &w_map, full, k, w.m0);
#else
                        load_tile(s.ring[at.stage].w, &w_map, full, w.m0 / 2, w.group * p.k + k);
#endif
#endif
                        load_x(s.ring[at.stage].x, &x_map, full, k, w.n0);
                    }
                }
            }
        } else {
#if !DENSE
            // The other warps take steps in turn, decode the absmax of their blocks of W and make tables of finished
            // values: what a code means times absmax, rounded. Forward there is one for each row of A, and the codes
            // are brought into fragment order; transposed, one for each row of W and half tile.
            const u32 worker = warp - CONSUMERS / 32 - 1;
            const bool plain = p.log2_nested == 255;
#if !GROUPED
            const float offset = plain ? 0.0f : nested[p.offset];
#endif
            Cursor at;
            u32 turn = 0;
            float book[16];
#pragma unroll
            for (u32 i = 0; i < 16; i++) book[i] = s.codebook[i];
#if !TRANSPOSED
            u32 phases = 0;
#endif
            for (u32 item = blockIdx.x / CLUSTER; item < items; item += gridDim.x / CLUSTER) {
                const Work w = work(item);
                if (!is_there(w)) break;
#if GROUPED
                const float offset = plain ? 0.0f : nested[p.offset + w.group];
#endif
                for (u32 b = 0; b < (w.part == 0 ? 2 * rank_steps : 0); b++, at.advance()) {
                    if (turn == worker) {
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
                        __syncwarp();
                        if (lane == 0) barrier_arrive(&s.full[at.stage]);
                    }
                    turn = turn + 1 == DECODERS ? 0 : turn + 1;
                }
                for (u32 b = 0; b < w.steps; b++, at.advance()) {
                    const bool mine = turn == worker;
                    turn = turn + 1 == DECODERS ? 0 : turn + 1;
#if !TRANSPOSED
                    const u32 loaded_phase = phases >> at.stage & 1;
                    phases ^= 1 << at.stage;
#endif
                    if (!mine) continue;
                    const u32 k = (w.first + b) * BK;
                    float value[4];
                    u32 code[4];
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
#if TRANSPOSED
                        const u32 column = w.m0 + 64 * (i / 2) < p.m ? w.m0 + 64 * (i / 2) : p.m - 1;
                        const u32 row = k + lane + 32 * (i % 2) < p.k ? k + lane + 32 * (i % 2) : p.k - 1;
                        const u64 element = (u64)(w.group * p.k + row) * p.m + column;
#else
                        const u32 row = w.m0 + lane + 32 * i;
                        const u64 element = (u64)(w.group * p.m + (row < p.m ? row : p.m - 1)) * p.k + k;
#endif
                        const u32 block = element >> p.log2_blocksize;
                        value[i] = plain ? ((const float*)absmax)[block] : nested[block >> p.log2_nested];
                        code[i] = plain ? 0 : ((const u8*)absmax)[block];
                    }
                    barrier_wait(&s.empty[at.stage], at.phase ^ 1);
#if !TRANSPOSED
                    barrier_wait(&s.loaded[at.stage], loaded_phase);
                    order_codes(s.ring[at.stage].w, lane);
#endif
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        if (!plain) value[i] = __fadd_rn(__fmul_rn(s.map[code[i]], value[i]), offset);
                        write_table(s.ring[at.stage].table, lane + 32 * i, book, value[i]);
                    }
                    // TMA writes over what was written here.
                    publish();
                    __syncwarp();
                    if (lane == 0) barrier_arrive(&s.full[at.stage]);
                }
            }
#endif
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        const u32 group = warp / 4, g = lane / 4, t = lane % 4;
        // The two rows of A that a thread's 4-bit fragments hold are neighbours, so that results leave in
        // pairs. Dense ones lie in shared memory in their own order.
#if DENSE
        const u32 row = group * 64 + warp % 4 * 16 + g;
#elif TRANSPOSED
        const u32 row = warp % 4 * 32 + g * 4 + group * 2;
        // ldmatrix: lane l gives the address of row l of half a step, in the 16 bytes of its warp.
        const u32 swizzled = lane * 64 + (warp % 4 ^ lane / 2 % 4) * 16;
        const u32 bytes = group ? 0x7531 : 0x6420;
#else
        const u32 row = group * 64 + warp % 4 * 16 + g * 2;
        // ldmatrix: lane l gives the address of a row of matrix l / 8.
        const u32 swizzled = warp * 512 + lane / 8 * 128 + (lane % 8 ^ lane / 8 * 2) * 16;
#endif
        Cursor at;
        auto ready = [&]() { barrier_wait(&s.full[at.stage], at.phase); };
        auto release = [&](u32 stage) {
#if CLUSTER > 1
            if (thread % 128 < CLUSTER) barrier_arrive_at(&s.empty[stage], thread % 128);
#else
            if (thread % 128 == 0) barrier_arrive(&s.empty[stage]);
#endif
        };

        for (u32 item = blockIdx.x / CLUSTER; item < items; item += gridDim.x / CLUSTER) {
            const Work w = work(item);
            if (!is_there(w)) break;
            float d[BN / 2];
            u32 add = 0;

            // The low-rank product, out of shared memory. Its last step still runs when the first codes are decoded.
            u32 pending = 0, u_stage, low_rank_stage;
            auto finish_low_rank = [&]() {
                if (!pending) return;
                wait<0>();
                release(u_stage);
                release(low_rank_stage);
                pending = 0;
            };
            for (u32 b = 0; b < (w.part == 0 ? rank_steps : 0); b++) {
                finish_low_rank();
                ready();
                u_stage = at.stage;
                at.advance();
                ready();
                low_rank_stage = at.stage;
                at.advance();
                const u64 x = descriptor(s.ring[u_stage].x), a = descriptor(s.ring[low_rank_stage].x + group * (LOW_RANK_BYTES / 2));
                fence();
#pragma unroll
                for (u32 j = 0; j < BK / 16; j++) multiply(d, a + NEXT_A * j, x + NEXT_X * j, add | j);
                commit();
                add = 1;
#if DROPOUT
                // The sums are read below: the assembler must see that they are complete on every way there, or it waits
                // after every instruction.
                wait<0>();
                release(u_stage);
                release(low_rank_stage);
#else
                pending = 1;
#endif
            }
#if DROPOUT
            // The sums are those of the low-rank product alone now; in parts that have none they are nothing yet, and the first
            // instruction of the main loop writes over them: a branch here would make the assembler wait, too. Dropout's bits
            // come in pairs of neighbouring features.
#pragma unroll
            for (u32 i = 0; i < BN / 8; i++) {
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    const u32 at = (w.n0 + 8 * i + 2 * t + c) * p.m + w.m0;
#if DENSE
                    // A thread holds rows eight apart: the lanes of two neighbouring rows draw one pair's bits each.
                    const u32 even = row - g % 2;
                    const u32 mine = dropout_bits((at + even + g % 2 * 8) / 2, p.seed_low, p.seed_high);
                    const u32 theirs = __shfl_xor_sync(0xFFFFFFFF, mine, 4);
                    const u32 near = g % 2 ? theirs : mine, far = g % 2 ? mine : theirs, shift = g % 2 * 16;
                    d[4 * i + c] *= kept(near >> shift & 0xFFFF, p);
                    d[4 * i + 2 + c] *= kept(far >> shift & 0xFFFF, p);
#else
                    const u32 bits = dropout_bits((at + row) / 2, p.seed_low, p.seed_high);
                    d[4 * i + c] *= kept(bits & 0xFFFF, p);
                    d[4 * i + 2 + c] *= kept(bits >> 16, p);
#endif
                }
            }
#endif

#if DENSE
            finish_low_rank();
            u32 previous = STAGES;
            for (u32 b = 0; b < w.steps; b++, at.advance()) {
                ready();
                const u64 x = descriptor(s.ring[at.stage].x), a = descriptor(s.ring[at.stage].w + group * (W_BYTES / 2));
                fence();
#pragma unroll
                for (u32 j = 0; j < BK / 16; j++) multiply(d, a + NEXT_A * j, x + NEXT_X * j, add | j);
                commit();
                add = 1;
                wait<1>();
                if (previous < STAGES) release(previous);
                previous = at.stage;
            }
#else
            // Codes of the step that was opened last, four words of eight, and the tables of their values.
            u32 words[4], stage, opened;
            u32 fragments[BK / 16][4];  // wgmma's layout: (row, k), (row + 1, k), (row, k + 8), (row + 1, k + 8)
            u32 previous = STAGES;
            auto done_with = [&](u32 now) {
                if (previous < STAGES) release(previous);
                previous = now;
            };
            if (STAGES == 2) finish_low_rank();
#if TRANSPOSED
            u32 values[2][8], tables_at;
            auto open = [&]() {
                ready();
                opened = at.stage;
                at.advance();
#pragma unroll
                for (u32 i = 0; i < BK / 32; i++) {
                    // Words of two rows of W and four columns, of which a warp group takes two: a byte of each half.
                    u32 v[4];
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                                 : "r"(shared_address(s.ring[opened].w) + i * 32 * 64 + swizzled));
                    words[2 * i] = __byte_perm(v[0], v[1], bytes), words[2 * i + 1] = __byte_perm(v[2], v[3], bytes);
                }
                tables_at = shared_address(s.ring[opened].table) + warp % 4 / 2 * 2048;
            };
            // Looks up the eight values of fragment j of the opened step. An address is the tables', with an offset
            // that follows from the code as its low byte.
            auto look_up = [&](u32 j, u32 slot) {
                u32 (&v)[8] = values[slot];
                // Bytes are rows of W: k, k + 1, k + 8, k + 9; the high nibble is column m, the low one m + 1.
                const u32 even = (words[j] >> 3 & 0x1E1E1E1E) | t * 0x20202020, odd = (words[j] << 1 & 0x1E1E1E1E) | t * 0x20202020;
                auto value = [&](u32 offsets, u32 byte) {
                    return lookup(__byte_perm(offsets, tables_at, 0x7650 + byte) + j * 512 + byte * 128);
                };
                v[0] = value(even, 0), v[1] = value(even, 1), v[2] = value(odd, 0), v[3] = value(odd, 1);
                v[4] = value(even, 2), v[5] = value(even, 3), v[6] = value(odd, 2), v[7] = value(odd, 3);
            };
            auto join = [&](u32 slot, u32 (&a)[4]) {
                const u32 (&v)[8] = values[slot];
                a[0] = __byte_perm(v[0], v[1], 0x5410), a[1] = __byte_perm(v[2], v[3], 0x5410);
                a[2] = __byte_perm(v[4], v[5], 0x5410), a[3] = __byte_perm(v[6], v[7], 0x5410);
            };
            // Round j of a step multiplies fragment j, looks up the values of the fragment three rounds ahead and joins
            // those of the one two rounds ahead. Only the last step has no successor.
            auto multiply_step = [&](bool more) {
                const u64 x = descriptor(s.ring[stage].x);
#pragma unroll
                for (u32 j = 0; j < BK / 16; j++) {
                    fence();
                    multiply(d, fragments[j], x + NEXT_X * j, add);
                    commit();
                    add = 1;
                    // With two stages a step can be opened only after the one before it is released.
                    const bool late = STAGES == 2 && j == 1;
                    if ((j == 0 || more) && !late) look_up((j + 3) % 4, j % 2);
                    // The product that read the fragment two rounds ahead, in the step before, is done.
                    wait<2>();
                    if (j == 1) done_with(stage);
                    if (late && more) open();
                    if (j == 2 && more) stage = opened;
                    if (j < 2 || more) join((j + 1) % 2, fragments[(j + 2) % 4]);
                    if (late && more) look_up(0, 1);
                    if (STAGES > 2 && j == 0 && more) open();
                }
            };
            open();
            stage = opened;
            look_up(0, 0);
            look_up(1, 1);
            join(0, fragments[0]);
            join(1, fragments[1]);
            look_up(2, 1);
#else
            u32 tables[2][8];  // of both rows: low bytes, high bytes
            u32 low[2], high[2];
            auto open = [&]() {
                ready();
                opened = at.stage;
                at.advance();
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                             : "r"(shared_address(s.ring[opened].w) + swizzled));
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32* v = tables[i / 2] + i % 2 * 4;
                    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                                 : "r"(shared_address(s.ring[opened].table) + warp * 512 + i * 128 + (g ^ i / 2 * 4) * 16));
                }
            };
            // Decodes fragment j of the opened step. A byte permutation takes four codes at once, of which it sees
            // three bits, in each half of a table; another picks halves by the fourth bit. They read the low 16 bits of
            // a selector. Bytes are pairs of columns, the even one in the high nibble.
            auto decode = [&](u32 j, u32 (&a)[4]) {
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    if (j % 2 == 0) {
                        const u32 word = words[2 * i + j / 2];
                        low[i] = word & 0x77777777, high[i] = (word >> 1 & 0x44444444) | 0x32103210;
                        // Nothing is to be computed twice to save a register.
                        asm volatile("" : "+r"(low[i]), "+r"(high[i]));
                    } else {
                        low[i] >>= 16, high[i] >>= 16;
                    }
                    auto byte = [&](const u32* v) { return permute(permute(v[0], v[1], low[i]), permute(v[2], v[3], low[i]), high[i]); };
                    const u32 lows = byte(tables[i]), highs = byte(tables[i] + 4);
                    a[i] = permute(lows, highs, 0x4051), a[2 + i] = permute(lows, highs, 0x6273);
                }
            };
            // Round j of a step multiplies fragment j and decodes that of two rounds ahead. Only the last step has no
            // successor.
            auto multiply_step = [&](bool more) {
                stage = opened;
                const u64 x = descriptor(s.ring[stage].x);
#pragma unroll
                for (u32 j = 0; j < BK / 16; j++) {
                    fence();
                    multiply(d, fragments[j], x + NEXT_X * j, add);
                    commit();
                    add = 1;
                    // The product that read the fragment two rounds ahead, in the step before, is done.
                    wait<2>();
                    if (j == 1) done_with(stage);
                    if (j < 2 || more) decode((j + 2) % 4, fragments[(j + 2) % 4]);
                    if (j == 1 && more) open();
                }
            };
            open();
            decode(0, fragments[0]);
            decode(1, fragments[1]);
#endif
            finish_low_rank();
            for (u32 left = w.steps; left > 1; left--) multiply_step(true);
            multiply_step(false);
#endif
            wait<0>();
            release(previous);

#if !GROUPED
            if (w.parts > 1) {
                const u32 slot = w.slot * CLUSTER + member, last = w.parts - 1;
                float* theirs = partial + (u64)slot * last * (BN / 2 * CONSUMERS) + thread;
                if (w.part < last) {
                    float* to = theirs + (u64)w.part * (BN / 2 * CONSUMERS);
#pragma unroll
                    for (u32 i = 0; i < BN / 2; i++) __stcg(to + i * CONSUMERS, d[i]);
                    __threadfence();
                    asm volatile("bar.sync 1, 256;" ::: "memory");
                    if (thread == 0) atomicAdd(arrived + slot, 1);
                    continue;
                }
                // The last part adds the others in their order, so that the sum does not depend on their arrival.
                if (thread == 0) {
                    while (*(volatile u32*)(arrived + slot) != last) __nanosleep(100);
                    *(volatile u32*)(arrived + slot) = 0;
                    __threadfence();
                }
                asm volatile("bar.sync 1, 256;" ::: "memory");
                for (u32 part = 0; part < last; part++, theirs += BN / 2 * CONSUMERS)
#pragma unroll
                    for (u32 i = 0; i < BN / 2; i++) d[i] += __ldcg(theirs + i * CONSUMERS);
            }
#endif

            // Neighbouring features leave in pairs; eight lanes fill a 32-byte sector.
#if DENSE
            // Here a thread holds rows eight apart: even and odd lanes of a column swap one each.
            const u32 feature = row + (g % 2 ? 7 : 0);
#else
            const u32 feature = row;
#endif
            const u32 m = w.m0 + feature;
#if GROUPED
            const float scale = grouped.scale;
            auto finished = [&](float sum, float) { return sum * scale; };
            const float b0 = 0.0f, b1 = 0.0f;
#else
            auto finished = [](float sum, float bias) { return sum + bias; };
            const float b0 = p.has_bias && m < p.m ? bias[m] : 0.0f, b1 = p.has_bias && m + 1 < p.m ? bias[m + 1] : 0.0f;
#endif
            // Of token 8 i + 2 t + c.
            auto pair = [&](u32 i, u32 c) {
                float y0 = d[4 * i + c], y1 = d[4 * i + 2 + c];
#if DENSE
                const float swapped = __shfl_xor_sync(0xFFFFFFFF, g % 2 ? y0 : y1, 4);
                if (g % 2) y0 = swapped; else y1 = swapped;
#endif
                return make_float2(finished(y0, b0), finished(y1, b1));
            };
#if STORE_TOKENS
            // Through shared memory, in rows of 64 features, swizzled so that a warp's pairs meet in no bank, and
            // from there by TMA while the next tile is computed. Transposed 4-bit, a warp group has features of both
            // halves of the tile, else of one.
#define BOTH (TRANSPOSED && !DENSE)
            auto join_writers = [&]() {
                if (BOTH) asm volatile("bar.sync 1, 256;" ::: "memory");
                else asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
            };
            const bool sends = thread % (BOTH ? 256 : 128) == 0;
            u8* half = s.out + feature / 64 * (STORE_BYTES / 2) + feature % 8 * 2;
#pragma unroll
            for (u32 first = 0; first < BN; first += STORE_TOKENS) {
                if (sends) stores_read();
                join_writers();
#pragma unroll
                for (u32 i = 0; i < STORE_TOKENS / 8; i++) {
#pragma unroll
                    for (u32 c = 0; c < 2; c++) {
                        const float2 y = pair(first / 8 + i, c);
                        *(u32*)(half + (8 * i + 2 * t + c) * 128 + (feature % 64 / 8 ^ (2 * t + c)) * 16) = pack(y.x, y.y);
                    }
                }
                publish();
                join_writers();
                if (sends) {
                    for (u32 h = BOTH ? 0 : group; h < (BOTH ? 2 : group + 1); h++)
                        store_tile(s.out + h * (STORE_BYTES / 2), &out, w.m0 + 64 * h, w.n0 + first);
                    stores_commit();
                }
            }
#else
            const u32 first = w.n0 + 2 * t;
            const u32 tokens = m < p.m && first < w.end ? w.end - first : 0;
            const u64 stride = (u64)p.m * (OUT_F32 ? 4 : 2);
            u8* to = (u8*)out + first * stride + (u64)m * (OUT_F32 ? 4 : 2);
#pragma unroll
            for (u32 i = 0; i < BN / 8; i++, to += 8 * stride) {
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    const float2 y = pair(i, c);
                    if (8 * i + c < tokens) {
#if OUT_F32
                        *(float2*)(to + c * stride) = y;
#else
                        *(u32*)(to + c * stride) = pack(y.x, y.y);
#endif
                    }
                }
            }
#endif
        }
#if STORE_TOKENS
        // Shared memory outlives the stores that read it.
        stores_done();
#endif
#if CLUSTER > 1
        // Shared memory also outlives the loads and arrivals of the other cube.
        cluster_sync();
#endif
    }
}
