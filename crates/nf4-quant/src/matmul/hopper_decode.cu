// What hopper.cu's decoding warps write to shared memory, in the order in which its computing warps read it.
//
// Defined before this text: TRANSPOSED, DENSE.

#if !DENSE
#if !TRANSPOSED
// Brings a tile of codes, 128 rows of 64, into fragment order; by one warp. Of each group of 32 codes a computing
// thread takes byte t of every word. A 4 x 4 transposition of the bytes puts them into one word, and ldmatrix hands
// out words.
__device__ __forceinline__ void order_codes(u8* tile, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < 256; i += 4 * 32) {
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
}
#endif

// The 16 values that a code of a block can mean: times absmax, rounded once. Blocks are the 128 rows of A forward,
// and for the gradient 64 rows of W in each half of the tile.
__device__ __forceinline__ void write_table(u8* tables, u32 block, const float (&book)[16], float absmax) {
    u32 v[8];
#pragma unroll
    for (u32 i = 0; i < 8; i++) v[i] = pack(book[2 * i] * absmax, book[2 * i + 1] * absmax);
#if TRANSPOSED
    // Tables that the threads of a fragment's row of four read together lie side by side, so that they never meet in
    // a bank.
    const u32 row = block % 64;
    uint4* to = (uint4*)(tables + block / 64 * 2048 + row / 16 * 512 + (row % 16 / 8 * 2 + row % 2) * 128 + row % 8 / 2 * 32);
    to[0] = make_uint4(v[0], v[1], v[2], v[3]);
    to[1] = make_uint4(v[4], v[5], v[6], v[7]);
#else
    // 16 low bytes and 16 high bytes, each where a warp that reads its even rows or its odd rows finds all banks.
    const u32 odd = block % 2;
    u8* to = tables + block / 16 * 512 + odd * 256 + (block % 16 / 2 ^ odd * 4) * 16;
    *(uint4*)to = make_uint4(__byte_perm(v[0], v[1], 0x6420), __byte_perm(v[2], v[3], 0x6420),
                             __byte_perm(v[4], v[5], 0x6420), __byte_perm(v[6], v[7], 0x6420));
    *(uint4*)(to + 128) = make_uint4(__byte_perm(v[0], v[1], 0x7531), __byte_perm(v[2], v[3], 0x7531),
                                     __byte_perm(v[4], v[5], 0x7531), __byte_perm(v[6], v[7], 0x7531));
#endif
}
#endif
