// What gemv.cu and resident.cu, which compute y_i = x W_i^T for a few rows of x, have in common. Defined before: F16.

struct Matrix {
    u32 rows;
    u32 offset;      // position of the mean of the absmax, behind the nested absmax
    u32 rank;        // columns of the low-rank operand; 0 without one, a multiple of 16 in a stack
    u32 first_rank;  // where they begin among those of all matrices
};

struct Params {
    u32 columns;         // of every W: a multiple of 64; 4,096 at most in resident.cu
    u32 tokens;
    u32 log2_blocksize;  // at least 6
    u32 log2_nested;     // log2 of the nested blocksize
    u32 map;             // position of the 8-bit map in `tables`
    u32 log2_row_warps;  // of gemv.cu: warps of a cube that take different rows; the others split the columns
    u32 biases;          // bit i: W_i has a bias
    u32 ranks;           // low-rank columns of all matrices
    float scale;         // what the codebook was multiplied by
    float unscale;       // 1 / scale
    u32 codebook[8];     // 16 entries of 16 bits in the format of x
    Matrix matrices[3];  // those that there are first; the others have no rows
};

// Of a kernel's arguments of three matrices, that of matrix i.
#define OF(i, name) ((i) == 0 ? name##0 : (i) == 1 ? name##1 : name##2)

// d += a * b on 16 x 8 x 16.
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if F16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
