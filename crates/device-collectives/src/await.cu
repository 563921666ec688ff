// The other end of tell.cu.

struct Params {
    unsigned long long flag;    // u32 in device memory
    unsigned long long broken;  // u32 in the host's memory: not zero once operations were broken off
    unsigned value;
    unsigned pad;
};

/// Waits until the other stream has come to where it writes `value`. Results: 0, or NaN where operations were broken off; seconds
/// that were waited.
extern "C" __global__ void __launch_bounds__(32) await_side_stream(float* result, const __grid_constant__ Params p) {
    if (threadIdx.x != 0) return;
    unsigned long long start, end;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    const volatile unsigned* flag = (const volatile unsigned*)p.flag;
    while ((int)(*flag - p.value) < 0) __nanosleep(200);
    __threadfence_system();
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(end));
    const unsigned broken = *(const volatile unsigned*)p.broken;
    result[0] = broken != 0 ? __int_as_float(0x7fc00000) : 0.0f;
    result[1] = (float)(end - start) * 1e-9f;
}
