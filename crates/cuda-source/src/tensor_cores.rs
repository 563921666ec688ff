//! The text that kernels on tensor cores share.

/// Products of 16-bit matrices by `mma`, the loads of their operands from shared memory, and copies to it that overlap with
/// them: text for `concat!`, from compute capability 7.5 on. [`prelude!`](crate::prelude!) comes before it.
///
/// - `mma(d, a, b0, b1)`: `d += a b`, 16 rows by 8 columns by 16, sums in f32
/// - `load_matrices(d, from)`: four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8
/// - `load_matrices_transposed(d, from)`
/// - `copy_async(to, from, valid)`: 16 bytes to shared memory; zeros where `valid` is 0
/// - `copy_word(to, from)`: 4 bytes likewise
/// - `commit()`: the copies since the last one are a group
/// - `wait_for_all_but<N>()`: until at most N groups of this thread are on their way
///
/// Compute capability 7.5 (`TURING`) has neither asynchronous copies nor products of 16 columns, and no bf16: a copy is made
/// by the thread that asks for it, and a product is two.
#[macro_export]
macro_rules! tensor_cores {
    () => {
        r#"
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if TURING
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%8}, {%0,%1,%2,%3};\n"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%6,%7}, {%9}, {%0,%1,%2,%3};"
#elif F16
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_matrices(u32 (&d)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&d)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
#if TURING
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) v = *(const uint4*)from;
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#endif
}
__device__ __forceinline__ void copy_word(u32 to, const void* from) {
#if TURING
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(*(const u32*)from) : "memory");
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
#endif
}
__device__ __forceinline__ void commit() {
#if !TURING
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void wait_for_all_but() {
#if !TURING
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
"#
    };
}
