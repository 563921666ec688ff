//! The text that kernels with dropout share.

/// Dropout's mask, which is `fused_kernels::Dropout`'s: text for `concat!`. [`prelude!`](crate::prelude!) comes before it.
///
/// - `dropout_bits(pair, low, high)`: the bits of elements `2 pair` (the lower half) and `2 pair + 1` under a seed of two
///   words; an element is dropped whose bits are below the threshold
#[macro_export]
macro_rules! dropout {
    () => {
        r#"
__device__ __forceinline__ u32 dropout_round(u32 h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}
__device__ __forceinline__ u32 dropout_bits(u32 pair, u32 low, u32 high) {
    return dropout_round(pair * (high | 1) + low);
}
"#
    };
}
