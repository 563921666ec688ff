
// ---------------------------------------------------------------------------------------------- Hopper
//
// What the kernels for compute capability 9.0 share: TMA, barriers, wgmma, and who computes what. hopper.rs tells the
// idea. A cube has two warp groups that compute, each with 64 rows of the cube's 128, and a third of which one warp
// loads. D is 64, 128, 192 or 256 here.
//
//   TURNS      1: the computing groups take turns at the tensor cores
//   STAGES     tiles of the other side in shared memory, or of keys
//   V_STAGES   tiles of values there

#define CONSUMERS 256
#define THREADS 384
#define CUBE_ROWS 128
#define PANELS (D / 64)                     // of a tile: 64 columns each, rows of 128 bytes, swizzled over their width
#define TILE_BYTES(rows) ((rows) * D * 2)
#define NONE 0xffffffffu

// A place in a ring of N stages, and the parity of the round.
template <u32 N>
struct Cursor {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == N) stage = 0, phase ^= 1;
    }
};

// `rows` tokens of a head, as many as the map's box has; zeros beyond the map.
__device__ __forceinline__ void load_tile(u8* to, const TensorMap* map, u64* bar, u32 rows, u32 token, u32 head, u32 row) {
#pragma unroll
    for (u32 panel = 0; panel < PANELS; panel++)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
            ::"r"(shared_address(to) + panel * rows * 128), "l"(map), "r"(shared_address(bar)), "r"(panel * 64), "r"(token), "r"(head), "r"(row)
            : "memory");
}

// -------------------------------------------------------------------------------------------- operands

// A tile in shared memory as an operand whose contraction runs over columns, from a multiple of 8 rows on.
__device__ __forceinline__ u64 descriptor(const u8* tile) {
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// 16 columns further; the tile has `rows` of them.
__device__ __forceinline__ u64 columns_on(u64 descriptor, u32 rows, u32 k) { return descriptor + k / 4 * (rows * 8) + k % 4 * 2; }
// The same tile with the contraction over its rows: the stride to the next panel comes in.
__device__ __forceinline__ u64 descriptor_turned(const u8* tile, u32 rows) {
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | (u64)(rows * 8) << 16 | 64ull << 32 | 1ull << 62;
}
// 16 rows further.
__device__ __forceinline__ u64 rows_on(u64 descriptor, u32 k) { return descriptor + k * 128; }

// d = a b^T over D columns: a's tile has `a_rows` rows, b's has N.
template <u32 N>
__device__ __forceinline__ void scores(float (&d)[N / 2], u64 a, u32 a_rows, u64 b) {
#pragma unroll
    for (u32 k = 0; k < D / 16; k++) multiply<0>(d, columns_on(a, a_rows, k), columns_on(b, N, k), k);
}
// d += a b with a in registers and N rows of b.
template <u32 N>
__device__ __forceinline__ void accumulate(float (&d)[D / 2], const u32 (&a)[N / 4], u64 b) {
#pragma unroll
    for (u32 k = 0; k < N / 16; k++) multiply<1>(d, a + 4 * k, rows_on(b, k), 1);
}
// Sums as the first operand of the next product, rounded.
template <u32 N>
__device__ __forceinline__ void as_operand(u32 (&a)[N / 2], const float (&x)[N]) {
#pragma unroll
    for (u32 i = 0; i < N / 2; i++) a[i] = pack(x[2 * i], x[2 * i + 1]);
}

// ------------------------------------------------------------------------------------------------ work

// A tile of a head of a row.
struct Work {
    u32 rank, head;
    Row row;
};
// Tickets go through the heads in sections, whose operands stay in the second-level cache, and there by rank, the most
// work first. The last ranks of all heads, the least work, come at the end and fill what is left of the
// multiprocessors.
__device__ __forceinline__ Work work_of(const Params& p, const u32* __restrict__ bounds, u32 heads, u32 ticket) {
    const u32 pairs = heads * p.rows, early = p.tiles - p.light;
    u32 pair, rank;
    if (ticket < early * pairs) {
        const u32 first = ticket / (early * p.section) * p.section, within = ticket % (early * p.section);
        const u32 width = min(p.section, pairs - first);
        pair = first + within % width, rank = within / width;
    } else {
        const u32 within = ticket - early * pairs;
        pair = within % pairs, rank = early + within / pairs;
    }
    return Work{rank, pair % heads, row_of(p, bounds, pair / heads)};
}
// Where a tile of queries is among its row's keys, and the tiles of `keys` keys that any of them sees.
struct QuerySpan {
    u32 first, past, begin, end;
    __device__ __forceinline__ QuerySpan(const Params& p, const Work& work, u32 keys) {
        first = (p.tiles - 1 - work.rank) * CUBE_ROWS;
        // Queries are the last of their row.
        past = work.row.keys - work.row.queries;
        const u32 low_edge = first + past + 1;
        begin = (low_edge > p.window ? low_edge - p.window : 0) / keys;
        end = (min(first + CUBE_ROWS, work.row.queries) + past + keys - 1) / keys;
    }
};
// The next ticket of a cube, or NONE. A cube's first ticket is its index. The last cube to get NONE resets the counter.
__device__ __forceinline__ u32 next_ticket(u32* counter, u32 tickets) {
    const u32 drawn = atomicAdd(counter, 1);
    if (drawn == tickets - 1) *counter = 0;
    return drawn + gridDim.x < tickets ? drawn + gridDim.x : NONE;
}

// 64 rows of results as wgmma leaves them, times a factor for each of a thread's two rows. Four threads hold pairs of
// columns of a row; they swap, so that each has 16 bytes.
__device__ __forceinline__ void store_rows(u16* to, const float (&x)[D / 2], float low_scale, float high_scale, u32 first, u32 rows, u32 stride,
                                           u32 head_dim) {
    const u32 lane = threadIdx.x % LANES, t = lane % 4;
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const u32 r = first + lane / 4 + 8 * h;
        const float factor = h ? high_scale : low_scale;
        u16* at = to + (size_t)r * stride;
#pragma unroll
        for (u32 n = 0; n < D / 8; n += 4) {
            u32 w[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) w[i] = pack(x[4 * (n + i) + 2 * h] * factor, x[4 * (n + i) + 2 * h + 1] * factor);
#pragma unroll
            for (u32 i = 0; i < 4; i += 2) {
                const u32 other = __shfl_xor_sync(0xffffffffu, t & 1 ? w[i] : w[i + 1], 1);
                if (t & 1) w[i] = other; else w[i + 1] = other;
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 other = __shfl_xor_sync(0xffffffffu, t & 2 ? w[i] : w[i + 2], 2);
                if (t & 2) w[i] = other; else w[i + 2] = other;
            }
            const u32 c = (n + t) * 8;
            if (r < rows && c < head_dim) *(uint4*)(at + c) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

// -------------------------------------------------------------------------------- a tile of queries
//
// What the kernels share that have a tile of queries and stream tiles of keys and values past it: the forward pass and
// dQ.

// Their barriers, for the tile of queries (`own`) and the rings. Members of `Shared` itself: the compiler orders loads
// and stores otherwise around those of a nested struct.
#define BARRIERS u64 own_full, own_empty, k_full[STAGES], k_empty[STAGES], v_full[V_STAGES], v_empty[V_STAGES]
// Called by one thread.
template <class Shared>
__device__ __forceinline__ void init_barriers(Shared& s) {
    barrier_init(&s.own_full, 1);
    barrier_init(&s.own_empty, CONSUMERS / LANES);
    for (u32 i = 0; i < (STAGES > V_STAGES ? STAGES : V_STAGES); i++) {
        if (i < STAGES) barrier_init(&s.k_full[i], 1);
        if (i < V_STAGES) barrier_init(&s.v_full[i], 1);
        if (i < STAGES) barrier_init(&s.k_empty[i], CONSUMERS / LANES);
        if (i < V_STAGES) barrier_init(&s.v_empty[i], CONSUMERS / LANES);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// A place in the ring of keys, and where its values are.
#if V_STAGES == STAGES
typedef Cursor<STAGES> Place;
#define VALUES_OF(at) at
#else
struct Place : Cursor<STAGES> {
    Cursor<V_STAGES> values;
    __device__ __forceinline__ void advance() { Cursor<STAGES>::advance(), values.advance(); }
};
#define VALUES_OF(at) at.values
#endif
// Loads a tile of `rows` keys and values to the place `at` of the rings, as soon as it is free.
template <class Shared>
__device__ __forceinline__ void load_keys_and_values(Shared& s, const Place& at, const TensorMap* k_map, const TensorMap* v_map, u32 rows,
                                                     u32 start, u32 tile, u32 head, u32 row) {
    u64* full = &s.k_full[at.stage];
    barrier_wait(&s.k_empty[at.stage], at.phase ^ 1);
    barrier_expect(full, TILE_BYTES(rows));
    load_tile(s.k[at.stage], k_map, full, rows, start + tile * rows, head, row);
    full = &s.v_full[VALUES_OF(at).stage];
    barrier_wait(&s.v_empty[VALUES_OF(at).stage], VALUES_OF(at).phase ^ 1);
    barrier_expect(full, TILE_BYTES(rows));
    load_tile(s.v[VALUES_OF(at).stage], v_map, full, rows, start + tile * rows, head, row);
}
// Tells the computing groups that there is no further tile.
template <class Shared>
__device__ __forceinline__ void end_of_work(Shared& s, const Cursor<1>& own_at) {
    barrier_wait(&s.own_empty, own_at.phase ^ 1);
    s.ticket = NONE;
    barrier_arrive(&s.own_full);
}

// -------------------------------------------------------------------------------------------- groups

// Lets the loading warp fill again what `bar` guards. Called by every computing warp.
__device__ __forceinline__ void release(u64* bar) {
    if (threadIdx.x % LANES == 0) barrier_arrive(bar);
}
// The computing groups take turns at the tensor cores: while one computes exponentials, the other's products run.
__device__ __forceinline__ void turn_wait(u32 group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
__device__ __forceinline__ void turn_pass(u32 group) { asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory"); }
