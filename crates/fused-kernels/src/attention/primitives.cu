// What the attention kernels compute with; `attention.rs` has the idea. `tensor_cores!` comes before, and these macros:
//
//   F16        1: the 16-bit dtype is f16, 0: bf16
//   D          dimensions of a head, padded to a multiple of 32
//   WARPS      warps of a cube
//   ROWS       queries, or keys, of a tile in shared memory
//   SOFTCAP    1: scores go through cap * tanh(score / cap)

#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
