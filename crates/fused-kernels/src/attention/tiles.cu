
// ----------------------------------------------------------------------------------------------- tiles

#define THREADS (LANES * WARPS)
#define CHUNKS (D / 8)  // of 16 bytes, per row
#define ROW_BYTES (D * 2)
#define TILE_BYTES (ROWS * ROW_BYTES)

// Byte of a chunk in a tile: eight neighbouring rows of one chunk lie in eight different groups of banks.
#define SWIZZLED (CHUNKS % 8 == 0 ? 8 : 4)  // chunks that change places within a row
__device__ __forceinline__ u32 chunk_at(u32 row, u32 chunk) {
    return row * ROW_BYTES + (chunk ^ (SWIZZLED == 8 ? row % 8 : row / 2 % 4)) * 16;
}
// `chunk` chunks on, an even constant, from the address of chunk 0 or 1 of a row.
__device__ __forceinline__ u32 later_chunk(u32 address, u32 chunk) {
    return (address ^ chunk % SWIZZLED * 16) + chunk / SWIZZLED * SWIZZLED * 16;
}

// ROWS rows from `first` on of a head with `rows` of them; zeros beyond. The caller commits.
__device__ __forceinline__ void load_tile(u32 to, const u16* from, u32 first, u32 rows, u32 stride, u32 head_dim) {
#pragma unroll
    for (u32 n = 0; n < ROWS * CHUNKS / THREADS; n++) {
        u32 i = n * THREADS + threadIdx.x, r = i / CHUNKS, c = i % CHUNKS;
        bool valid = first + r < rows && c * 8 < head_dim;
        copy_async(to + chunk_at(r, c), valid ? from + (size_t)(first + r) * stride + c * 8 : from, valid);
    }
}

// mma's first operand, 16 rows from `first` on by D, straight from memory; zeros beyond.
__device__ __forceinline__ void load_fragments(u32 (&f)[D / 16][4], const u16* from, u32 first, u32 rows, u32 stride, u32 head_dim) {
    u32 lane = threadIdx.x % LANES;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 r = first + lane / 4 + 8 * i;
        const u16* at = from + (size_t)(r < rows ? r : 0) * stride;
#pragma unroll
        for (u32 k = 0; k < D / 16; k++)
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 c = k * 16 + j * 8 + lane % 4 * 2;
                f[k][2 * j + i] = r < rows && c < head_dim ? *(const u32*)(at + c) : 0;
            }
    }
}

// mma's second operand from 16 rows of a tile, whose address comes with the lane's part of it.
// Rows as columns of the product, contraction over dimensions 16 k to 16 k + 15: registers 0, 1 belong to rows 0 to 7,
// registers 2, 3 to rows 8 to 15.
__device__ __forceinline__ u32 columns_lane() {
    u32 lane = threadIdx.x % LANES;
    return chunk_at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
__device__ __forceinline__ void columns(u32 (&b)[4], u32 rows, u32 k) { load_matrices(b, later_chunk(rows, 2 * k)); }
// Contraction over the 16 rows, dimensions as columns: registers 0, 1 belong to chunk c, registers 2, 3 to c + 1.
__device__ __forceinline__ u32 contracted_lane() {
    u32 lane = threadIdx.x % LANES;
    return chunk_at(lane % 16, lane / 16);
}
__device__ __forceinline__ void contracted(u32 (&b)[4], u32 rows, u32 c) { load_matrices_transposed(b, later_chunk(rows, c)); }

// Two tiles of 8 columns of a product, rounded, as mma's first operand.
__device__ __forceinline__ void as_operand(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack(left[0], left[1]), a[1] = pack(left[2], left[3]);
    a[2] = pack(right[0], right[1]), a[3] = pack(right[2], right[3]);
}

// 16 rows of results, as mma leaves them. Warps that share rows take turns with pairs of chunks.
template <u32 TILES, u32 TURNS>
__device__ __forceinline__ void store_rows(u16* to, const float (&x)[TILES][4], float low_scale, float high_scale, u32 first, u32 rows,
                                           u32 stride, u32 turn, u32 head_dim) {
    u32 lane = threadIdx.x % LANES, low = first + lane / 4, high = low + 8;
#pragma unroll
    for (u32 n = 0; n < TILES; n++) {
        u32 c = (n / 2 * 2 * TURNS + 2 * turn + n % 2) * 8 + lane % 4 * 2;
        if (c >= head_dim) return;
        if (low < rows) *(u32*)(to + (size_t)low * stride + c) = pack(x[n][0] * low_scale, x[n][1] * low_scale);
        if (high < rows) *(u32*)(to + (size_t)high * stride + c) = pack(x[n][2] * high_scale, x[n][3] * high_scale);
    }
}
