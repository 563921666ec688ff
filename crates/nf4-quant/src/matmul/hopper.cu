// y = x op(W) on Hopper's tensor cores (wgmma), with W in 4 bits or dense. hopper.rs has the idea.
//
// The tile computed is transposed: Y^T[m, token] = A[m, k] X^T[k, token], A = W (forward) or W^T (input
// gradient). X comes into shared memory through TMA. 4-bit codes become 16-bit floats in registers, which
// wgmma takes as they are; a dense W goes through shared memory.
//
// Defined before this text: TRANSPOSED, DENSE, HALF, OUT_F32, BN, STAGES, and the instructions for that
// BN: WGMMA (A in registers) and WGMMA_SHARED.

struct alignas(64) TensorMap { u64 words[16]; };

#define BM 128
#define BK 64
#define CONSUMERS 256
#define THREADS 384
// A decoder must not be two rounds of the ring ahead of another: barriers tell only odd rounds from even.
#define DECODERS (STAGES < 3 ? STAGES : 3)
#define X_BYTES (BN * BK * 2)
#define W_BYTES (DENSE ? BM * BK * 2 : BM * BK / 2)
#define TABLE_BYTES (DENSE || !TRANSPOSED ? 0 : BK * 2 * 16 * 2)
#define LOW_RANK_BYTES (BM * BK * 2)
#define PRODUCER_REGISTERS 72
#define CONSUMER_REGISTERS 216

// A stage of the ring. A low-rank tile lies over a stage from its start.
struct Stage {
    u8 x[X_BYTES];
    u8 w[W_BYTES];
#if TABLE_BYTES
    u8 table[TABLE_BYTES];  // per row of W and half tile: the 16 values that a code can mean
#endif
#if X_BYTES + W_BYTES + TABLE_BYTES < LOW_RANK_BYTES
    u8 rest[LOW_RANK_BYTES - X_BYTES - W_BYTES - TABLE_BYTES];
#endif
};

struct Shared {
    Stage ring[STAGES];
#if !DENSE
    float map[256];
#if !TRANSPOSED
    float absmax[STAGES][BM];
    u64 loaded[STAGES];  // w is there, but not yet in fragment order
#endif
    alignas(256) float codebook[16];
#endif
    u64 full[STAGES];
    u64 empty[STAGES];
};

__device__ __forceinline__ void barrier_init(u64* bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* bar, u32 parity) {
    asm volatile(
        "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra WAIT; DONE: }"
        ::"r"(shared_address(bar)), "r"(parity) : "memory");
}

__device__ __forceinline__ void load_tile(void* to, const TensorMap* map, u64* bar, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row) : "memory");
}

// One wgmma of 64 x BN x 16: accumulators = A * X^T, or += once `add` is set, with A in registers or in
// shared memory. The compiler must not see another write to the accumulators: it would serialize.
__device__ __forceinline__ void multiply(float (&d)[BN / 2], const u32 (&a)[4], u64 x, u32 add) { WGMMA(d, a, x, add); }
__device__ __forceinline__ void multiply(float (&d)[BN / 2], u64 a, u64 x, u32 add) {
    WGMMA_SHARED(d, a, x, TRANSPOSED, add);
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// The shared memory descriptor of a tile with rows of 128 bytes, swizzled over their width.
__device__ __forceinline__ u64 descriptor(const u8* tile) {
    return ((u64)((shared_address(tile) & 0x3FFFF) >> 4)) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
// What to add to the descriptor of A for the next 16 columns: 32 bytes along a row, or 16 rows.
#define NEXT_A (TRANSPOSED ? 128 : 2)
#define NEXT_X 2

#if !DENSE
// What a code means, given the address in shared memory: forward a value of the codebook; transposed one of
// the table, already times absmax and rounded. Volatile keeps lookups where they are written, between the
// tensor cores' instructions.
#if TRANSPOSED
typedef u32 Value;
#define LOAD_VALUE "ld.shared.u16 %0, [%1];" : "=r"(value)
#else
typedef float Value;
#define LOAD_VALUE "ld.shared.f32 %0, [%1];" : "=f"(value)
#endif
__device__ __forceinline__ Value lookup(u32 address) {
    Value value;
    asm volatile(LOAD_VALUE : "r"(address));
    return value;
}
#endif

// The position in the ring of stages.
struct Cursor {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// A share of the work: a tile, or one part of its K blocks. Part 0 also takes the low-rank product.
struct Work {
    u32 m0, n0, first, blocks, part, parts, slot;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul(
    const __grid_constant__ TensorMap x_map,         // [tokens, k]
    const __grid_constant__ TensorMap u_map,         // [tokens, rank]
    const __grid_constant__ TensorMap low_rank_map,  // [m, rank] forward, [rank, m] transposed; see low_rank_row
    const __grid_constant__ TensorMap w_map,         // codes or the dense weight, [m, k] forward, [k, m] transposed
#if !DENSE
    const void* __restrict__ absmax,
    const float* __restrict__ nested,
    const float* __restrict__ tables,
#endif
    const float* __restrict__ bias,
    float* __restrict__ partial,                     // [slots, parts - 1, BN / 2, CONSUMERS]
    u32* __restrict__ arrived,                       // per slot, zero before the launch and after it
    void* __restrict__ out,                          // [tokens, m]
    const __grid_constant__ Params p
) {
    __shared__ alignas(1024) Shared s;
    const u32 thread = threadIdx.x;
    const u32 warp = thread / 32, lane = thread % 32;

    if (thread == 0) {
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], DENSE ? 1 : 2);
            barrier_init(&s.empty[i], 2);
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
    __syncthreads();

    const u32 k_blocks = (p.k + BK - 1) / BK;
    const u32 rank_blocks = (p.rank + BK - 1) / BK;
    const u32 m_tiles = (p.m + BM - 1) / BM;
    const u32 n_tiles = (p.tokens + BN - 1) / BN;
    const u32 items = p.whole + (m_tiles * n_tiles - p.whole) * p.split;

    auto work = [&](u32 item) {
        Work w = {0, 0, 0, k_blocks, 0, 1, 0};
        u32 tile = item;
        if (item >= p.whole) {
            w.slot = (item - p.whole) / p.split, w.part = (item - p.whole) % p.split, w.parts = p.split;
            tile = p.whole + w.slot;
            w.first = k_blocks * w.part / p.split;
            w.blocks = k_blocks * (w.part + 1) / p.split - w.first;
        }
        // Tokens are taken in bands of eight tiles, so that a band's activations stay in L2 while the
        // weight streams by once per band.
        const u32 band = tile / (m_tiles * 8), band_first = band * 8;
        const u32 width = n_tiles - band_first < 8 ? n_tiles - band_first : 8;
        const u32 within = tile - band * m_tiles * 8;
        w.m0 = within / width * BM;
        w.n0 = (band_first + within % width) * BN;
        return w;
    };

    if (warp >= CONSUMERS / 32) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
        if (warp == CONSUMERS / 32) {
            // One thread feeds the tiles.
            if (lane == 0) {
                Cursor at;
                for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
                    const Work w = work(item);
                    // The low-rank product takes two stages for its two operands.
                    for (u32 b = 0; b < (w.part == 0 ? rank_blocks : 0); b++) {
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
                        barrier_expect(&s.full[at.stage], X_BYTES);
                        load_tile(s.ring[at.stage].x, &u_map, &s.full[at.stage], b * BK, w.n0);
                        at.advance();
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
                        barrier_expect(&s.full[at.stage], LOW_RANK_BYTES);
#if TRANSPOSED
                        load_tile(s.ring[at.stage].x, &low_rank_map, &s.full[at.stage], w.m0, b * BK);
                        load_tile(s.ring[at.stage].x + LOW_RANK_BYTES / 2, &low_rank_map, &s.full[at.stage], w.m0 + BM / 2, b * BK);
#else
                        load_tile(s.ring[at.stage].x, &low_rank_map, &s.full[at.stage], b * BK, w.m0);
#endif
                        at.advance();
                    }
                    for (u32 b = 0; b < w.blocks; b++, at.advance()) {
                        const int k = (w.first + b) * BK;
                        u64* full = &s.full[at.stage];
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
#if !DENSE && !TRANSPOSED
                        u64* loaded = &s.loaded[at.stage];
                        barrier_expect(loaded, W_BYTES);
                        load_tile(s.ring[at.stage].w, &w_map, loaded, k / 2, w.m0);
                        barrier_expect(full, X_BYTES);
#else
                        barrier_expect(full, X_BYTES + W_BYTES);
#if DENSE && TRANSPOSED
                        load_tile(s.ring[at.stage].w, &w_map, full, w.m0, k);
                        load_tile(s.ring[at.stage].w + W_BYTES / 2, &w_map, full, w.m0 + BM / 2, k);
#elif DENSE
                        load_tile(s.ring[at.stage].w, &w_map, full, k, w.m0);
#else
                        load_tile(s.ring[at.stage].w, &w_map, full, w.m0 / 2, k);
#endif
#endif
                        load_tile(s.ring[at.stage].x, &x_map, full, k, w.n0);
                    }
                }
            }
        } else {
#if !DENSE
            // The other warps take K blocks in turn and decode their absmax. Forward, that is one per row of A,
            // and the codes are brought into fragment order. Transposed, it is one per row of W and half tile,
            // too many for the computing warps to load: they find tables of finished values instead.
            const u32 worker = warp - CONSUMERS / 32 - 1;
            const bool plain = p.log2_nested == 255;
            const float offset = plain ? 0.0f : nested[p.offset];
            Cursor at;
            u32 turn = 0;
#if TRANSPOSED
            float book[16];
#pragma unroll
            for (u32 i = 0; i < 16; i++) book[i] = s.codebook[i];
#else
            u32 phases = 0;
#endif
            for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
                const Work w = work(item);
                for (u32 b = 0; b < (w.part == 0 ? 2 * rank_blocks : 0); b++, at.advance()) {
                    if (turn == worker && lane == 0) {
                        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
                        barrier_arrive(&s.full[at.stage]);
                    }
                    turn = turn + 1 == DECODERS ? 0 : turn + 1;
                }
                for (u32 b = 0; b < w.blocks; b++, at.advance()) {
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
                        const u64 element = (u64)row * p.m + column;
#else
                        const u32 row = w.m0 + lane + 32 * i;
                        const u64 element = (u64)(row < p.m ? row : p.m - 1) * p.k + k;
#endif
                        const u32 block = element >> p.log2_blocksize;
                        value[i] = plain ? ((const float*)absmax)[block] : nested[block >> p.log2_nested];
                        code[i] = plain ? 0 : ((const u8*)absmax)[block];
                    }
                    barrier_wait(&s.empty[at.stage], at.phase ^ 1);
#if !TRANSPOSED
                    // Of each group of 32 codes a consumer thread takes byte t of every word. A 4 x 4
                    // transposition of the bytes puts them into one word, and ldmatrix hands out words.
                    barrier_wait(&s.loaded[at.stage], loaded_phase);
#pragma unroll
                    for (u32 i = 0; i < W_BYTES / 16; i += 4 * 32) {
                        u8* tile = s.ring[at.stage].w;
                        uint4 v[4];
#pragma unroll
                        for (u32 h = 0; h < 4; h++) v[h] = *(const uint4*)(tile + (i + 32 * h + lane) * 16);
                        __syncwarp();
#pragma unroll
                        for (u32 h = 0; h < 4; h++) {
                            // 16 rows are a warp's; their even and odd rows and halves make four matrices.
                            const u32 unit = i + 32 * h + lane, row = unit / 2, matrix = row % 2 * 2 + unit % 2;
                            const u32 a = __byte_perm(v[h].x, v[h].y, 0x5140), b = __byte_perm(v[h].z, v[h].w, 0x5140);
                            const u32 c = __byte_perm(v[h].x, v[h].y, 0x7362), d = __byte_perm(v[h].z, v[h].w, 0x7362);
                            *(uint4*)(tile + row / 16 * 512 + matrix * 128 + (row % 16 / 2 ^ matrix * 2) * 16) =
                                make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                                           __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632));
                        }
                    }
#endif
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        if (!plain) value[i] = __fadd_rn(__fmul_rn(s.map[code[i]], value[i]), offset);
#if TRANSPOSED
                        // 32 bytes a table. Those that the threads of a fragment's row of four read together
                        // lie side by side, so that they never meet in a bank.
                        const u32 row = lane + 32 * (i % 2);
                        uint4* table = (uint4*)(s.ring[at.stage].table + i / 2 * 2048 + row / 16 * 512 +
                                                (row % 16 / 8 * 2 + row % 2) * 128 + row % 8 / 2 * 32);
#pragma unroll
                        for (u32 h = 0; h < 16; h += 8)
                            table[h / 8] = make_uint4(
                                pack(book[h] * value[i], book[h + 1] * value[i]), pack(book[h + 2] * value[i], book[h + 3] * value[i]),
                                pack(book[h + 4] * value[i], book[h + 5] * value[i]), pack(book[h + 6] * value[i], book[h + 7] * value[i]));
#else
                        s.absmax[at.stage][lane + 32 * i] = value[i];
#endif
                    }
                    // TMA writes over what was written here.
                    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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
        // ldmatrix: lane l gives the address of row l of half a block, in the 16 bytes of its warp.
        const u32 swizzled = lane * 64 + (warp % 4 ^ lane / 2 % 4) * 16;
        const u32 bytes = group ? 0x7531 : 0x6420;
#else
        const u32 row = group * 64 + warp % 4 * 16 + g * 2;
        // ldmatrix: lane l gives the address of a row of matrix l / 8.
        const u32 swizzled = warp * 512 + lane / 8 * 128 + (lane % 8 ^ lane / 8 * 2) * 16;
#endif
#if !DENSE && !TRANSPOSED
        const u32 codebook = shared_address(s.codebook);
#endif
        Cursor at;
        auto ready = [&]() { barrier_wait(&s.full[at.stage], at.phase); };
        auto release = [&](u32 stage) {
            if (thread % 128 == 0) barrier_arrive(&s.empty[stage]);
        };

        for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
            const Work w = work(item);
            float d[BN / 2];
            u32 add = 0;

            // The low-rank product, out of shared memory. Its last block still runs when the first codes are decoded.
            u32 pending = 0, u_stage, low_rank_stage;
            auto settle = [&]() {
                if (!pending) return;
                wait<0>();
                release(u_stage);
                release(low_rank_stage);
                pending = 0;
            };
            for (u32 b = 0; b < (w.part == 0 ? rank_blocks : 0); b++) {
                settle();
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
                pending = 1;
            }

#if DENSE
            settle();
            u32 previous = STAGES;
            for (u32 b = 0; b < w.blocks; b++, at.advance()) {
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
            // Codes of the block that was opened last, four words of eight, and the absmax or tables they need.
            u32 words[4], stage, opened;
            u32 fragments[BK / 16][4];  // wgmma's layout: (row, k), (row + 1, k), (row, k + 8), (row + 1, k + 8)
            Value values[2][8];
#if TRANSPOSED
            u32 tables_at;
#else
            float scales[2] = {}, opened_scales[2];
#endif
            auto open = [&]() {
                ready();
                opened = at.stage;
                at.advance();
#if TRANSPOSED
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
#else
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                             : "r"(shared_address(s.ring[opened].w) + swizzled));
                opened_scales[0] = s.absmax[opened][row], opened_scales[1] = s.absmax[opened][row + 1];
#endif
            };
            // The eight values of fragment j of the opened block. An address is the codebook's or the tables',
            // with an offset that follows from the code as its low byte.
            auto look = [&](u32 j, u32 slot) {
                Value (&v)[8] = values[slot];
#if TRANSPOSED
                // Bytes are rows of W: k, k + 1, k + 8, k + 9; the high nibble is column m, the low one m + 1.
                const u32 even = (words[j] >> 3 & 0x1E1E1E1E) | t * 0x20202020, odd = (words[j] << 1 & 0x1E1E1E1E) | t * 0x20202020;
                auto value = [&](u32 offsets, u32 byte) {
                    return lookup(__byte_perm(offsets, tables_at, 0x7650 + byte) + j * 512 + byte * 128);
                };
                v[0] = value(even, 0), v[1] = value(even, 1), v[2] = value(odd, 0), v[3] = value(odd, 1);
                v[4] = value(even, 2), v[5] = value(even, 3), v[6] = value(odd, 2), v[7] = value(odd, 3);
#else
                // Bytes are pairs of columns, the even one in the high nibble; half a word per fragment.
                const u32 w0 = words[j / 2], w1 = words[2 + j / 2], byte = 2 * (j % 2);
                const u32 even0 = w0 >> 2 & 0x3C3C3C3C, odd0 = w0 << 2 & 0x3C3C3C3C;
                const u32 even1 = w1 >> 2 & 0x3C3C3C3C, odd1 = w1 << 2 & 0x3C3C3C3C;
                auto value = [&](u32 offsets, u32 byte) { return lookup(__byte_perm(offsets, codebook, 0x7650 + byte)); };
                v[0] = value(even0, byte), v[1] = value(odd0, byte), v[2] = value(even1, byte), v[3] = value(odd1, byte);
                v[4] = value(even0, byte + 1), v[5] = value(odd0, byte + 1), v[6] = value(even1, byte + 1), v[7] = value(odd1, byte + 1);
#endif
            };
            // Forward: times absmax, rounded once.
            auto round = [&](u32 slot, u32 (&a)[4]) {
                const Value (&v)[8] = values[slot];
#if TRANSPOSED
                a[0] = __byte_perm(v[0], v[1], 0x5410), a[1] = __byte_perm(v[2], v[3], 0x5410);
                a[2] = __byte_perm(v[4], v[5], 0x5410), a[3] = __byte_perm(v[6], v[7], 0x5410);
#else
                a[0] = pack(v[0] * scales[0], v[1] * scales[0]), a[1] = pack(v[2] * scales[1], v[3] * scales[1]);
                a[2] = pack(v[4] * scales[0], v[5] * scales[0]), a[3] = pack(v[6] * scales[1], v[7] * scales[1]);
#endif
            };
            auto use_opened = [&]() {
                stage = opened;
#if !TRANSPOSED
                scales[0] = opened_scales[0], scales[1] = opened_scales[1];
#endif
            };
            u32 previous = STAGES;
            auto done_with = [&](u32 now) {
                if (previous < STAGES) release(previous);
                previous = now;
            };
            // Step j of a block multiplies fragment j, looks up values three steps ahead and rounds those
            // of two steps ahead. Only the last block has no successor.
            auto multiply_block = [&](bool more) {
                const u64 x = descriptor(s.ring[stage].x);
#pragma unroll
                for (u32 j = 0; j < BK / 16; j++) {
                    fence();
                    multiply(d, fragments[j], x + NEXT_X * j, add);
                    commit();
                    add = 1;
                    // With two stages a block can be opened only after the one before it is released.
                    const bool late = STAGES == 2 && j == 1;
                    if ((j == 0 || more) && !late) look((j + 3) % 4, j % 2);
                    // The product that read the fragment two steps ahead, one block ago, is done.
                    wait<2>();
                    if (j == 1) done_with(stage);
                    if (late && more) open();
                    if (j == 2 && more) use_opened();
                    if (j < 2 || more) round((j + 1) % 2, fragments[(j + 2) % 4]);
                    if (late && more) look(0, 1);
                    if (STAGES > 2 && j == 0 && more) open();
                }
            };
            if (STAGES == 2) settle();
            open();
            use_opened();
            look(0, 0);
            look(1, 1);
            round(0, fragments[0]);
            round(1, fragments[1]);
            look(2, 1);
            settle();
            for (u32 left = w.blocks; left > 1; left--) multiply_block(true);
            multiply_block(false);
#endif
            wait<0>();
            release(previous);

            if (w.parts > 1) {
                float* mine = partial + ((u64)w.slot * (w.parts - 1)) * (BN / 2 * CONSUMERS) + thread;
                u32* count = arrived + w.slot;
                if (w.part > 0) {
                    float* to = mine + (u64)(w.part - 1) * (BN / 2 * CONSUMERS);
#pragma unroll
                    for (u32 i = 0; i < BN / 2; i++) __stcg(to + i * CONSUMERS, d[i]);
                    __threadfence();
                    asm volatile("bar.sync 1, 256;" ::: "memory");
                    if (thread == 0) atomicAdd(count, 1);
                    continue;
                }
                // Part 0 adds the others in their order, so that the sum does not depend on their arrival.
                if (thread == 0) {
                    while (*(volatile u32*)count != w.parts - 1) __nanosleep(100);
                    *(volatile u32*)count = 0;
                    __threadfence();
                }
                asm volatile("bar.sync 1, 256;" ::: "memory");
                for (u32 part = 1; part < w.parts; part++, mine += BN / 2 * CONSUMERS)
#pragma unroll
                    for (u32 i = 0; i < BN / 2; i++) d[i] += __ldcg(mine + i * CONSUMERS);
            }

            // Neighbouring features leave in pairs; eight lanes fill a 32-byte sector.
#if DENSE
            // Here a thread holds rows eight apart: even and odd lanes of a column swap one each.
            const u32 m = w.m0 + row + (g % 2 ? 7 : 0);
#else
            const u32 m = w.m0 + row;
#endif
            const float b0 = p.has_bias && m < p.m ? bias[m] : 0.0f, b1 = p.has_bias && m + 1 < p.m ? bias[m + 1] : 0.0f;
            const u32 first = w.n0 + 2 * t;
            const u32 tokens = m < p.m && first < p.tokens ? p.tokens - first : 0;
            const u64 stride = (u64)p.m * (OUT_F32 ? 4 : 2);
            u8* to = (u8*)out + first * stride + (u64)m * (OUT_F32 ? 4 : 2);
#pragma unroll
            for (u32 i = 0; i < BN / 8; i++, to += 8 * stride) {
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    float y0 = d[4 * i + c], y1 = d[4 * i + 2 + c];
#if DENSE
                    const float swapped = __shfl_xor_sync(0xFFFFFFFF, g % 2 ? y0 : y1, 4);
                    if (g % 2) y0 = swapped; else y1 = swapped;
#endif
                    y0 += b0, y1 += b1;
                    if (8 * i + c < tokens) {
#if OUT_F32
                        *(float2*)(to + c * stride) = make_float2(y0, y1);
#else
                        *(u32*)(to + c * stride) = pack(y0, y1);
#endif
                    }
                }
            }
        }
    }
}
