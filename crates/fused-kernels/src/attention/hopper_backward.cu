
// ------------------------------------------------------------------------------------- Hopper, backward
//
// The formulas are those of backward.cu.
//
//   TILE       rows of a tile of the other side

// P from a score, which is capped in its place: the softcap's derivative takes it from there. `lse` is in units of
// log2.
__device__ __forceinline__ float probability(float& score, float lse, const Params& p) {
    score = capped(score, p);
    return exp2_fast(fmaf(score, p.scale_log2, -lse));
}
__device__ __forceinline__ float with_slope(float gradient, float t) {
#if SOFTCAP
    return gradient * (1.0f - t * t);
#else
    return gradient;
#endif
}
