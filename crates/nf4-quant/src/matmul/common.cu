// The parameters of hopper.cu and ampere.cu; schedule.rs has the Rust side.

struct Params {
    u32 m;             // rows of A: features of the result
    u32 tokens;
    u32 k;             // columns of A
    u32 rank;          // columns of the low-rank operand, 0 without one
    u32 whole;         // tiles that one cube (or cluster) computes alone; the others are split along k
    u32 split;         // parts of each other tile
    u32 has_bias;
    u32 log2_blocksize;
    u32 log2_nested;   // log2 of the nested blocksize; 255: absmax is plain f32
    u32 codebook;      // position of the codebook in `tables`
    u32 map;           // position of the 8-bit map in `tables`
    u32 offset;        // position of the mean of the absmax in `nested`, under double quantization
    u32 seed_low, seed_high;  // dropout of the low-rank part, where DROPOUT is 1
    u32 threshold;     // of the 16 bits of an element: below, it is zero
    float dropout_scale;  // of the others
};

#if DROPOUT
__device__ __forceinline__ float kept(u32 bits, const Params& p) { return bits >= p.threshold ? p.dropout_scale : 0.0f; }
#endif

// The parameters of a product of groups; grouped.rs has the Rust side.
struct GroupedParams {
    Params p;          // `tokens` are those of all groups; weights, of `m` and `k` each, lie one behind the other
    float scale;       // factor of the sums
    u32 pad;
};

// A tile of such a product: its group, its first token, and the token behind its last; none where the table is longer
// than needed.
struct Tile {
    u32 group, first, end;
};
