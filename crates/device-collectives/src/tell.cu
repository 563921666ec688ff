// One end of the order between CubeCL's stream and another one: see side_stream.rs.

struct Params {
    unsigned long long flag;    // u32 in device memory
    unsigned long long broken;  // u32 in the host's memory: not zero once operations were broken off
    unsigned value;
    unsigned pad;
};

/// Tells the other stream that this one has come here.
extern "C" __global__ void __launch_bounds__(32) tell_side_stream(unsigned* told, const __grid_constant__ Params p) {
    if (threadIdx.x != 0) return;
    // What kernels before this one wrote is visible at the end of each of them; the fence is for the hosts's view of it.
    __threadfence_system();
    *(volatile unsigned*)p.flag = p.value;
    told[0] = p.value;
}
