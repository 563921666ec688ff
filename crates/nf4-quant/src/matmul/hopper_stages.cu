// Sizes of hopper.cu's tiles, what lies in shared memory, and what a share of the work is.
//
// Defined before this text: DENSE, BN, STAGES, STORE_TOKENS.

#define BM 128
#define BK 64
#define CONSUMERS 256
#define THREADS 384
// A decoder must not be two rounds of the ring ahead of another: barriers tell only odd rounds from even.
#define DECODERS (STAGES < 3 ? STAGES : 3)
#define X_BYTES (BN * BK * 2)
#define W_BYTES (DENSE ? BM * BK * 2 : BM * BK / 2)
#define TABLE_BYTES (DENSE ? 0 : BM * 16 * 2)
#define LOW_RANK_BYTES (BM * BK * 2)
#define STORE_BYTES (STORE_TOKENS * BM * 2)
#define PRODUCER_REGISTERS 96
#define CONSUMER_REGISTERS 200
// Tiles of tokens in a band; see work().
#define BAND (DENSE ? 8 : 4)

// A stage of the ring. A low-rank tile lies over a stage from its start.
struct Stage {
    u8 x[X_BYTES];
    u8 w[W_BYTES];
#if TABLE_BYTES
    u8 table[TABLE_BYTES];  // per block of W: the 16 values that a code can mean
#endif
#if X_BYTES + W_BYTES + TABLE_BYTES < LOW_RANK_BYTES
    u8 rest[LOW_RANK_BYTES - X_BYTES - W_BYTES - TABLE_BYTES];
#endif
};

struct Shared {
    Stage ring[STAGES];
#if STORE_TOKENS
    u8 out[STORE_BYTES];
#endif
#if !DENSE
    float map[256];
    float codebook[16];
#if !TRANSPOSED
    u64 loaded[STAGES];  // w is there, but not yet in fragment order
#endif
#endif
    u64 full[STAGES];
    u64 empty[STAGES];
};

// The position in the ring of stages.
struct Cursor {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// A share of the work: a tile, or one part of its steps of BK columns. Part 0 also takes the low-rank product. A
// cluster has one share, with a tile for each of its cubes side by side.
struct Work {
    u32 m0, n0, first, steps, part, parts, slot, end, group;  // tokens are those from n0 up to `end`
};
