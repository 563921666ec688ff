
// ----------------------------------------------------------------------------------------------- shape

// Elements from one row of the batch, token and head to the next.
struct Strides {
    u32 row, token, head;
};
struct Params {
    Strides q, k, v, o, d_out, d_q, d_k, d_v;
    u32 rows, heads;
    u32 group;              // query heads of a key head
    u32 head_dim;
    u32 q_len, kv_len;      // tokens per row; packed rows have as many as their bounds say
    u32 tokens;             // queries of all rows
    u32 window;             // keys that a query sees, itself counted
    u32 packed;             // 1: row r has tokens bounds[r] to bounds[r + 1]
    u32 tiles;              // tiles of the longest row
    float scale;            // of the scores
    float scale_log2;       // of what exp2 gets: scale * log2(e), or cap * log2(e) after tanh
    float cap_scale;        // scale / cap
    u32 section, light;     // hopper.cu: heads that are taken together; tiles of each that are left for the end
    u32 sinks;              // 1: each query head has a logit that joins its softmax and has no value
};

#define LANES 32

// One row of the batch.
struct Row {
    u32 index, start;       // its first query among all
    u32 queries, keys;
};
__device__ __forceinline__ Row row_of(const Params& p, const u32* __restrict__ bounds, u32 index) {
    if (!p.packed) return Row{index, index * p.q_len, p.q_len, p.kv_len};
    u32 start = bounds[index], length = bounds[index + 1] - start;
    return Row{index, start, length, length};
}
// The first element of a head.
__device__ __forceinline__ size_t head_at(const Params& p, const Row& row, Strides s, u32 head) {
    return (p.packed ? (size_t)row.start * s.token : (size_t)row.index * s.row) + (size_t)head * s.head;
}

// A score as exp2 gets it, before scale_log2. The softcap's tanh comes from exp2: some 4e-7 of the cap.
__device__ __forceinline__ float capped(float s, const Params& p) {
#if SOFTCAP
    return 1.0f - 2.0f * reciprocal(1.0f + exp2_fast(2.0f * LOG2_E * p.cap_scale * s));
#else
    return s;
#endif
}

// What a query's sums are multiplied by at the end, and its log-sum-exp. A sink joins both, and with that lse and the output
// that is left the backward pass is the one without sinks.
struct Ending {
    float inverse, lse;
};
__device__ __forceinline__ Ending ending(float most, float sum, const float* __restrict__ sinks, u32 head, const Params& p) {
    float peak = most * p.scale_log2, factor = 1.0f;
    if (p.sinks) {
        const float sink = sinks[head] * LOG2_E, now = fmaxf(peak, sink);
        factor = exp2_fast(peak - now);
        sum = fmaf(sum, factor, exp2_fast(sink - now));
        peak = now;
    }
    return Ending{factor / sum, peak * LN_2 + logf(sum)};
}
