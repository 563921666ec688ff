// What comes before hopper.cu and ampere.cu: schedule.rs has the Rust side of it.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Params {
    u32 m;             // rows of A: features of the result
    u32 tokens;
    u32 k;             // columns of A
    u32 rank;          // columns of the low-rank operand, 0 without one
    u32 whole;         // tiles that one block computes alone; the others are split along k
    u32 split;         // parts of each other tile
    u32 has_bias;
    u32 log2_blocksize;
    u32 log2_nested;   // log2 of the nested blocksize; 255: absmax is plain f32
    u32 codebook;      // position of the codebook in `tables`
    u32 map;           // position of the 8-bit map in `tables`
    u32 offset;        // position of the mean of the absmax in `nested`, under double quantization
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Two floats, rounded to 16 bits each, the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}

