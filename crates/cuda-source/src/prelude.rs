//! The text that every kernel starts with.

/// Names of integers, addresses in shared memory, and conversions between f32 and the 16-bit format of a kernel: text
/// for `concat!`, in front of everything else.
///
/// `F16` is defined before it: 1 where the 16-bit format is f16, 0 where it is bf16.
///
/// - `TURING`: 1 where the kernel is for a compute capability below 8.0, which has no bf16
/// - `u8`, `u16`, `u32`, `u64`
/// - `u32 shared_address(p)`: where in shared memory `p` points
/// - `u16 narrow(value)`: an f32 in 16 bits, rounded to nearest
/// - `u32 pack(low, high)`: two of them, the first in the low half
/// - `void unpack(pair, low, high)`: the inverse of `pack`, exact
#[macro_export]
macro_rules! prelude {
    () => {
        r#"
#ifndef TURING
#define TURING (__CUDA_ARCH__ < 800)
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u16 narrow(float value) {
    u16 r;
#if F16
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(value));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(value));
#endif
    return r;
}

__device__ __forceinline__ u32 pack(float low, float high) {
#if TURING
    return narrow(low) | (u32)narrow(high) << 16;
#else
    u32 r;
#if F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
#endif
}

__device__ __forceinline__ void unpack(u32 pair, float& low, float& high) {
#if F16
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(low), "=f"(high) : "r"(pair));
#else
    low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000u);
#endif
}
"#
    };
}
