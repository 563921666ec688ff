// The PTX instructions of hopper.cu: cluster barriers, TMA, wgmma, byte permutations.
//
// Defined before this text: TRANSPOSED, BN, and the instructions for that BN: WGMMA (A in registers) and
// WGMMA_SHARED.

// Arrives at the barrier `bar` of another cube of the cluster, given by its rank.
__device__ __forceinline__ void barrier_arrive_at(u64* bar, u32 cube) {
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [a]; }"
                 ::"r"(shared_address(bar)), "r"(cube) : "memory");
}

// A tile from global to shared memory by TMA; `bar` counts its bytes.
__device__ __forceinline__ void load_tile(void* to, const TensorMap* map, u64* bar, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row) : "memory");
}

// Loads the tile to the same place in each of the cubes 0 to n - 1 of the cluster, and signals the barrier of each.
__device__ __forceinline__ void load_tile_for_all(void* to, const TensorMap* map, u64* bar, int column, int row, u32 n) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row), "h"((u16)((1 << n) - 1)) : "memory");
}

// A tile from shared to global memory. What falls outside the matrix is not written.
__device__ __forceinline__ void store_tile(const void* from, const TensorMap* map, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(map), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
}
// Groups the stores that this thread started. After `stores_read` the shared memory they come from may be overwritten;
// after `stores_done` they are in global memory.
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Makes what this thread wrote to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for all threads of the cluster that still run.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// One wgmma of 64 x BN x 16: accumulators = A * X^T, or += once `add` is set, with A in registers or in
// shared memory. The compiler must not see another write to the accumulators: it would serialize.
__device__ __forceinline__ void multiply(float (&d)[BN / 2], const u32 (&a)[4], u64 x, u32 add) { WGMMA(d, a, x, add); }
__device__ __forceinline__ void multiply(float (&d)[BN / 2], u64 a, u64 x, u32 add) {
    WGMMA_SHARED(d, a, x, TRANSPOSED, add);
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// The shared memory descriptor of a tile with rows of 128 bytes, swizzled over their width.
__device__ __forceinline__ u64 descriptor(const u8* tile) {
    return ((u64)((shared_address(tile) & 0x3FFFF) >> 4)) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
// What to add to the descriptor of A for the next 16 columns: 32 bytes along a row, or 16 rows.
#define NEXT_A (TRANSPOSED ? 128 : 2)
#define NEXT_X 2

// Any four of the eight bytes of a pair of words.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}
// Volatile keeps it where it is written, between the tensor cores' instructions.
__device__ __forceinline__ u32 lookup(u32 address) {
    u32 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}
