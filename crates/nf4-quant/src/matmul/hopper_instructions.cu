// What hopper.cu says in PTX: barriers in shared memory, TMA, wgmma, byte permutations.
//
// Defined before this text: TRANSPOSED, BN, and the instructions for that BN: WGMMA (A in registers) and
// WGMMA_SHARED.

// Of a block of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u64* bar, u32 block) {
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [a]; }"
                 ::"r"(shared_address(bar)), "r"(block) : "memory");
}

__device__ __forceinline__ void load_tile(void* to, const TensorMap* map, u64* bar, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row) : "memory");
}

// The same to the same place in each of the blocks 0 to n - 1 of the cluster, and to the barrier there.
__device__ __forceinline__ void load_tile_for_all(void* to, const TensorMap* map, u64* bar, int column, int row, u32 n) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(bar)), "r"(column), "r"(row), "h"((u16)((1 << n) - 1)) : "memory");
}
// A tile from shared memory. What falls outside the matrix is not written.
__device__ __forceinline__ void store_tile(const void* from, const TensorMap* map, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(map), "r"(column), "r"(row), "r"(shared_address(from)) : "memory");
}
// What this thread stored so far is one group. Shared memory may change when its groups were read, and go when
// they are done.
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// What this thread wrote to shared memory, for TMA and wgmma to see.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All threads of the cluster that still run.
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
