//! The text that kernels for TMA share.

/// A tensor map's type, and barriers in shared memory that count threads and the bytes of TMA: text for `concat!`, from
/// compute capability 9.0 on.
///
/// [`prelude!`](crate::prelude!) comes before it.
///
/// - `barrier_init(bar, count)`: one thread, before any other use
/// - `barrier_expect(bar, bytes)`: arrives, and lets the phase wait for so many bytes of copies
/// - `barrier_arrive(bar)`
/// - `barrier_wait(bar, parity)`: until the phase of that parity has ended
#[macro_export]
macro_rules! tma_barriers {
    () => {
        r#"
struct alignas(64) TensorMap { u64 words[16]; };

__device__ __forceinline__ void barrier_init(u64* bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* bar, u32 parity) {
    asm volatile(
        "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra WAIT; DONE: }"
        ::"r"(shared_address(bar)), "r"(parity) : "memory");
}
"#
    };
}
