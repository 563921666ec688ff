// Kernels of the integration test: every kind of argument, and what comes back when something is wrong.

// As cuda.h's CUtensorMap, which NVRTC has no header for.
struct __align__(64) TensorMap { unsigned long long opaque[16]; };

struct Scalars {
    unsigned long long n;
    float factor;
    int offset;
    double divisor;
    unsigned char flag;
    unsigned char padding[7];
};

// y = x * factor / divisor + offset where the flag says so, x elsewhere.
extern "C" __global__ void __launch_bounds__(64) affine(
    const float* __restrict__ x, float* __restrict__ y, const __grid_constant__ Scalars p) {
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.n) y[i] = p.flag ? (float)((double)(x[i] * p.factor) / p.divisor) + (float)p.offset : x[i];
}

// x += 1, without a parameter struct.
extern "C" __global__ void increment(float* x) { x[threadIdx.x] += 1.0f; }

struct Box { int row, col; };

// Loads one box with TMA and writes shared memory out as it is.
extern "C" __global__ void __launch_bounds__(128) load_box(
    const __grid_constant__ TensorMap map, uint4* out, const __grid_constant__ Box p) {
    __shared__ __align__(1024) uint4 tile[BOX_BYTES / 16];
    __shared__ __align__(8) unsigned long long barrier;
    unsigned bar = (unsigned)__cvta_generic_to_shared(&barrier);
    unsigned dst = (unsigned)__cvta_generic_to_shared(tile);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(BOX_BYTES) : "memory");
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
            ::"r"(dst), "l"(&map), "r"(p.col), "r"(p.row), "r"(bar) : "memory");
    }
    __syncthreads();
    unsigned done = 0;
    while (!done)
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(bar) : "memory");
    for (int i = threadIdx.x; i < BOX_BYTES / 16; i += 128) out[i] = tile[i];
}

// More static shared memory than the traditional 48 KB: reverses its input through all of it.
extern "C" __global__ void __launch_bounds__(256) large_tile(const unsigned* x, unsigned* y) {
    __shared__ unsigned tile[LARGE_WORDS];
    for (int i = threadIdx.x; i < LARGE_WORDS; i += 256) tile[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < LARGE_WORDS; i += 256) y[i] = tile[LARGE_WORDS - 1 - i];
}
