
// ----------------------------------------------------------------------------------------------- wgmma
//
// The products of 64 rows and 16 columns of the first operand, for every width of the second that the kernels have.

#if F16
#define FORMATS "f16.f16"
#else
#define FORMATS "bf16.bf16"
#endif
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_40 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_56 NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_64 NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_96 NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_128 NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EIGHT(d, i) FOUR(d, i), FOUR(d, i + 4)
#define SIXTEEN(d, i) EIGHT(d, i), EIGHT(d, i + 8)
#define SUMS_32(d) SIXTEEN(d, 0), SIXTEEN(d, 16)
#define SUMS_40(d) SUMS_32(d), EIGHT(d, 32)
#define SUMS_56(d) SUMS_40(d), SIXTEEN(d, 40)
#define SUMS_64(d) SUMS_56(d), EIGHT(d, 56)
#define SUMS_96(d) SUMS_64(d), SIXTEEN(d, 64), SIXTEEN(d, 80)
#define SUMS_128(d) SUMS_96(d), SIXTEEN(d, 96), SIXTEEN(d, 112)

// d = a b, or d += a b with `add`, over 16 columns of a and rows of b. TURNED: the contraction runs over the rows of
// b's tile instead of its columns. SUMS registers a thread hold COLUMNS of d; then come the numbers of the operands
// after them.
#define FROM_SHARED(SUMS, COLUMNS, A, B, ADD, TURN)                                                                          \
    template <int TURNED>                                                                                                    \
    __device__ __forceinline__ void multiply(float (&d)[SUMS], u64 a, u64 b, u32 add) {                                      \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." FORMATS \
                     " {" NAMES_##SUMS "}, %" #A ", %" #B ", p, 1, 1, 0, %" #TURN "; }"                                      \
                     : SUMS_##SUMS(d) : "l"(a), "l"(b), "r"(add), "n"(TURNED));                                              \
    }
#define FROM_REGISTERS(SUMS, COLUMNS, A0, A1, A2, A3, B, ADD, TURN)                                                          \
    template <int TURNED>                                                                                                    \
    __device__ __forceinline__ void multiply(float (&d)[SUMS], const u32* a, u64 b, u32 add) {                               \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." FORMATS \
                     " {" NAMES_##SUMS "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #TURN "; }"           \
                     : SUMS_##SUMS(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TURNED));          \
    }

FROM_SHARED(32, 64, 32, 33, 34, 35)
FROM_SHARED(40, 80, 40, 41, 42, 43)
FROM_SHARED(56, 112, 56, 57, 58, 59)
FROM_SHARED(64, 128, 64, 65, 66, 67)
FROM_REGISTERS(32, 64, 32, 33, 34, 35, 36, 37, 38)
FROM_REGISTERS(64, 128, 64, 65, 66, 67, 68, 69, 70)
FROM_REGISTERS(96, 192, 96, 97, 98, 99, 100, 101, 102)
FROM_REGISTERS(128, 256, 128, 129, 130, 131, 132, 133, 134)

// Keeps the compiler from moving uses of these registers across this point: it does not know that wgmma writes them
// later.
template <u32 N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
// Keeps the assembler from waiting for wgmma before `value` is computed: it assumes that a wait is long and moves it
// forward.
__device__ __forceinline__ void hold(float* scratch, float value) {
    asm volatile("st.volatile.shared.f32 [%0], %1;" ::"r"(shared_address(scratch)), "f"(value) : "memory");
}
// Before products of registers that were written, and after a row of them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N committed groups run.
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
