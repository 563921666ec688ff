// What the kernels of the delta rule compute with; `delta_rule.rs` has the idea. `tensor_cores!` comes before.

#define CHUNK 64  // tokens
#define D 128     // dimensions of keys and of values

struct Params {
    u32 heads;       // of values
    u32 group;       // heads of values that share one of keys
    u32 q_stride, k_stride, v_stride, o_stride;  // elements from token to token
    u32 pad[2];
};

// A chunk of a row: its first token and how many there are.
struct Span {
    u32 first, tokens, slot;
};
// The chunk `chunk` of a row, with no tokens where the row is shorter. No two chunks have one slot.
__device__ __forceinline__ Span span_of(const u32* bounds, u32 row, u32 chunk) {
    u32 start = bounds[row], end = bounds[row + 1], first = start + chunk * CHUNK;
    return {first, first < end ? (end - first < CHUNK ? end - first : CHUNK) : 0, start / CHUNK + row + chunk};
}

// ----------------------------------------------------------------------------------------------- tiles

// Byte of a run of eight elements in a tile with rows of `WIDTH`: neighbouring rows lie in different groups of banks.
template <u32 WIDTH>
__device__ __forceinline__ u32 run_at(u32 row, u32 run) {
    return row * WIDTH * 2 + (run ^ (WIDTH >= 64 ? row % 8 : row / 2 % 4)) * 16;
}
// Byte of an even column.
template <u32 WIDTH>
__device__ __forceinline__ u32 pair_at(u32 row, u32 column) {
    return run_at<WIDTH>(row, column / 8) + column % 8 * 2;
}

// A tile of `HEIGHT` rows, zeros from `rows` on. The caller commits.
template <u32 HEIGHT, u32 WIDTH, u32 TEAM>
__device__ __forceinline__ void load_tile(u32 to, const u16* from, size_t stride, u32 rows) {
#pragma unroll
    for (u32 n = 0; n < HEIGHT * (WIDTH / 8) / TEAM; n++) {
        u32 i = n * TEAM + threadIdx.x, row = i / (WIDTH / 8), run = i % (WIDTH / 8);
        copy_async(to + run_at<WIDTH>(row, run), row < rows ? from + row * stride + run * 8 : from, row < rows);
    }
}

__device__ __forceinline__ u32 load_pair(u32 from) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    return x;
}
__device__ __forceinline__ void store_pair(u32 to, u32 x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory"); }

__device__ __forceinline__ uint4 load_run(u32 from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
    return x;
}

// acc += A B, 16 rows from `m` on by N columns from `n` on, contraction over `k_first` to `k_last`. A lies as [m, k], or with
// A_TURNED as [k, m]; B as [n, k], or with B_TURNED as [k, n].
template <u32 N, bool A_TURNED, bool B_TURNED, u32 A_COLUMNS, u32 B_COLUMNS>
__device__ __forceinline__ void product(float (&acc)[N / 8][4], u32 a, u32 m, u32 b, u32 n, u32 k_first, u32 k_last) {
    u32 lane = threadIdx.x % 32, eighth = lane / 8 % 2, half = lane / 16;
#pragma unroll
    for (u32 k = k_first; k < k_last; k += 16) {
        u32 fa[4];
        if (A_TURNED) load_matrices_transposed(fa, a + run_at<A_COLUMNS>(k + half * 8 + lane % 8, m / 8 + eighth));
        else load_matrices(fa, a + run_at<A_COLUMNS>(m + lane % 16, k / 8 + half));
#pragma unroll
        for (u32 j = 0; j < N; j += 16) {
            u32 fb[4];
            if (B_TURNED) load_matrices_transposed(fb, b + run_at<B_COLUMNS>(k + lane % 16, (n + j) / 8 + half));
            else load_matrices(fb, b + run_at<B_COLUMNS>(n + j + half * 8 + lane % 8, k / 8 + eighth));
            mma(acc[j / 8], fa, fb[0], fb[1]);
            mma(acc[j / 8 + 1], fa, fb[2], fb[3]);
        }
    }
}

// Two products with one B, whose fragments are loaded once; the As lie as [m, k].
template <u32 N, bool B_TURNED, u32 A_COLUMNS, u32 B_COLUMNS>
__device__ __forceinline__ void products(float (&first)[N / 8][4], float (&second)[N / 8][4], u32 a, u32 other_a, u32 m, u32 b, u32 n,
                                         u32 k_last) {
    u32 lane = threadIdx.x % 32, eighth = lane / 8 % 2, half = lane / 16;
#pragma unroll
    for (u32 k = 0; k < k_last; k += 16) {
        u32 fa[4], ga[4], at = run_at<A_COLUMNS>(m + lane % 16, k / 8 + half);
        load_matrices(fa, a + at);
        load_matrices(ga, other_a + at);
#pragma unroll
        for (u32 j = 0; j < N; j += 16) {
            u32 fb[4];
            if (B_TURNED) load_matrices_transposed(fb, b + run_at<B_COLUMNS>(k + lane % 16, (n + j) / 8 + half));
            else load_matrices(fb, b + run_at<B_COLUMNS>(n + j + half * 8 + lane % 8, k / 8 + eighth));
            mma(first[j / 8], fa, fb[0], fb[1]);
            mma(first[j / 8 + 1], fa, fb[2], fb[3]);
            mma(second[j / 8], ga, fb[0], fb[1]);
            mma(second[j / 8 + 1], ga, fb[2], fb[3]);
        }
    }
}

// Pairs of two neighbouring tiles of 8 columns of a product, from the first column on: lanes change halves, so that a row's 32 bytes go
// at once.
__device__ __forceinline__ void store_tiles(u16* to, u32 left, u32 right, bool valid) {
    u32 lane = threadIdx.x % 32, odd = lane % 2;
    u32 other = __shfl_xor_sync(0xFFFFFFFFu, odd ? left : right, 1);
    if (valid) *(uint2*)(to + odd * 8 + lane % 4 / 2 * 4) = odd ? make_uint2(other, right) : make_uint2(left, other);
}

// A tile as it lies in shared memory, in whole runs.
template <u32 HEIGHT, u32 WIDTH, u32 TEAM>
__device__ __forceinline__ void store_tile(u16* to, size_t stride, u32 from) {
#pragma unroll
    for (u32 n = 0; n < HEIGHT * (WIDTH / 8) / TEAM; n++) {
        u32 i = n * TEAM + threadIdx.x, row = i / (WIDTH / 8), run = i % (WIDTH / 8);
        *(uint4*)(to + row * stride + run * 8) = load_run(from + run_at<WIDTH>(row, run));
    }
}

template <u32 TILES>
__device__ __forceinline__ void clear(float (&acc)[TILES][4]) {
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 j = 0; j < 4; j++) acc[i][j] = 0.0f;
}

// ----------------------------------------------------------------------------------------------- states

// s = kept s + A B over a chunk's tokens: 16 of a state's rows, from `m` on, and all N columns. A lies as [token, row].
template <u32 N>
__device__ __forceinline__ void advance(float (&s)[N / 8][4], float kept, u32 a, u32 m, u32 b) {
#pragma unroll
    for (u32 j = 0; j < N / 8; j++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) s[j][i] *= kept;
    product<N, true, true, D, N>(s, a, m, b, 0, 0, CHUNK);
}

// The copy of 16 bits for the products with it. A lane's first sums are at `row` and `column`.
template <u32 N>
__device__ __forceinline__ void store_state(u32 to, u32 row, u32 column, const float (&s)[N / 8][4]) {
#pragma unroll
    for (u32 j = 0; j < N / 8; j++)
#pragma unroll
        for (u32 i = 0; i < 2; i++) store_pair(to + pair_at<N>(row + 8 * i, j * 8 + column), pack(s[j][2 * i], s[j][2 * i + 1]));
}
