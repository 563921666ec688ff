// Of each chunk what needs no state: running sums of g, the inverse A of the triangular system, P = D ∘ Q Kᵀ,
// W = A beta exp(G) K and A beta V.

#define THREADS 256
#define PITCH 68
#define BYTES (32768 + 2 * CHUNK * PITCH * 4 + 2 * CHUNK * 4)

// [row, 4 columns] of a product of f32 matrices in shared memory.
__device__ __forceinline__ float4 row_product(const float* a, const float* b, u32 n) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (u32 k = 0; k < n; k++) {
        float x = a[k];
        float4 y = *(const float4*)(b + k * PITCH);
        sum.x += x * y.x, sum.y += x * y.y, sum.z += x * y.z, sum.w += x * y.w;
    }
    return sum;
}

// The inverse of a block of `2 n` rows out of those of its two diagonal blocks.
__device__ __forceinline__ void join_blocks(float* system, float* inverse, u32 n, u32 i) {
    u32 per_block = n * n / 4, block = i / per_block, row = i % per_block / (n / 4), column = i % (n / 4) * 4;
    u32 at = block * 2 * n;
    bool busy = block < CHUNK / (2 * n);
    // What lies above the diagonal of the system is room for the first product.
    if (busy)
        *(float4*)(system + (at + row) * PITCH + at + n + column) =
            row_product(system + (at + n + row) * PITCH + at, inverse + at * PITCH + at + column, n);
    __syncthreads();
    if (busy) {
        float4 x = row_product(inverse + (at + n + row) * PITCH + at + n, system + at * PITCH + at + n + column, n);
        *(float4*)(inverse + (at + n + row) * PITCH + at + column) = make_float4(-x.x, -x.y, -x.z, -x.w);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
delta_chunks(const u16* q, const u16* k, const u16* v, const float* g, const float* beta, const u32* bounds, u16* w, u16* u, u16* p,
             u16* t, float* sums, const __grid_constant__ Params params) {
    __shared__ __align__(128) u8 memory[BYTES];
    u32 head = blockIdx.y, key_head = head / params.group, heads = params.heads;
    Span span = span_of(bounds, blockIdx.z, blockIdx.x);
    if (span.tokens == 0) return;
    u32 base = shared_address(memory), keys = base, queries = base + 16384, values = queries;
    float* system = (float*)(memory + 32768);
    float* inverse = system + CHUNK * PITCH;
    float* sum = inverse + CHUNK * PITCH;
    float* strength = sum + CHUNK;
    // The system is done with when these are written.
    u32 of_keys = base + 32768, of_values = of_keys + 8192;
    u32 tid = threadIdx.x, warp = tid / 32, lane = tid % 32;

    load_tile<CHUNK, D, THREADS>(keys, k + (size_t)span.first * params.k_stride + key_head * D, params.k_stride, span.tokens);
    load_tile<CHUNK, D, THREADS>(queries, q + (size_t)span.first * params.q_stride + key_head * D, params.q_stride, span.tokens);
    commit();
    for (u32 i = tid; i < CHUNK * PITCH; i += THREADS) inverse[i] = 0.0f;
    if (warp == 0) {
        float low = 0.0f, high = 0.0f;
        u32 token = 2 * lane;
        size_t at = (size_t)(span.first + token) * heads + head;
        if (token < span.tokens) low = g[at];
        if (token + 1 < span.tokens) high = g[at + heads];
        float total = low + high;
#pragma unroll
        for (u32 d = 1; d < 32; d *= 2) {
            float other = __shfl_up_sync(0xFFFFFFFFu, total, d);
            if (lane >= d) total += other;
        }
        sum[token] = total - high, sum[token + 1] = total;
        if (token < span.tokens) sums[at] = total - high;
        if (token + 1 < span.tokens) sums[at + heads] = total;
    } else if (warp == 1 || warp == 2) {
        u32 token = tid - 32;
        strength[token] = token < span.tokens ? beta[(size_t)(span.first + token) * heads + head] : 0.0f;
    }
    wait_for_all_but<0>();
    __syncthreads();

    u32 m = warp % 4 * 16, row = m + lane / 4, column = lane % 4 * 2;
    {
        float kk[4][4], qk[4][4];
        clear(kk), clear(qk);
        u32 n = warp / 4 * 32;
        product<32, false, false, D, D>(kk, keys, m, keys, n, 0, D);
        product<32, false, false, D, D>(qk, queries, m, keys, n, 0, D);
        u32 scores[4][2];
#pragma unroll
        for (u32 j = 0; j < 4; j++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 r = row + 8 * i, c = n + j * 8 + column;
                float d0 = c <= r ? __expf(sum[r] - sum[c]) : 0.0f, d1 = c + 1 <= r ? __expf(sum[r] - sum[c + 1]) : 0.0f;
                system[r * PITCH + c] = c < r ? strength[r] * d0 * kk[j][2 * i] : 0.0f;
                system[r * PITCH + c + 1] = c + 1 < r ? strength[r] * d1 * kk[j][2 * i + 1] : 0.0f;
                scores[j][i] = pack(qk[j][2 * i] * d0, qk[j][2 * i + 1] * d1);
            }
#pragma unroll
        for (u32 j = 0; j < 4; j += 2)
#pragma unroll
            for (u32 i = 0; i < 2; i++)
                store_tiles(p + ((size_t)(span.first + row + 8 * i) * heads + head) * CHUNK + n + j * 8, scores[j][i], scores[j + 1][i],
                            row + 8 * i < span.tokens);
    }
    __syncthreads();
    // Values take the place of queries.
    load_tile<CHUNK, D, THREADS>(values, v + (size_t)span.first * params.v_stride + head * D, params.v_stride, span.tokens);
    commit();
    if (warp < 4 && lane < 16) {
        const float* block = system + warp * 16 * (PITCH + 1);
        float x[16];
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            float s = i == lane ? 1.0f : 0.0f;
#pragma unroll
            for (u32 j = 0; j < i; j++) s -= block[i * PITCH + j] * x[j];
            x[i] = s;
        }
#pragma unroll
        for (u32 i = 0; i < 16; i++) inverse[(warp * 16 + i) * PITCH + warp * 16 + lane] = x[i];
    }
    __syncthreads();
    join_blocks(system, inverse, 16, tid);
    join_blocks(system, inverse, 32, tid);

    // A's columns carry what the rows of keys and values are multiplied by.
#pragma unroll
    for (u32 i = tid; i < CHUNK * CHUNK / 2; i += THREADS) {
        u32 r = i / (CHUNK / 2), c = i % (CHUNK / 2) * 2;
        float a0 = c <= r ? inverse[r * PITCH + c] : 0.0f, a1 = c + 1 <= r ? inverse[r * PITCH + c + 1] : 0.0f;
        if (r < span.tokens) *(u32*)(t + ((size_t)(span.first + r) * heads + head) * CHUNK + c) = pack(a0, a1);
        a0 *= strength[c], a1 *= strength[c + 1];
        store_pair(of_values + pair_at<CHUNK>(r, c), pack(a0, a1));
        store_pair(of_keys + pair_at<CHUNK>(r, c), pack(a0 * __expf(sum[c]), a1 * __expf(sum[c + 1])));
    }
    wait_for_all_but<0>();
    __syncthreads();
#pragma unroll
    for (u32 which = 0; which < 2; which++) {
        float acc[8][4];
        clear(acc);
        u32 n = warp / 4 * 64;
        // What lies above the diagonal is zero.
        product<64, false, true, CHUNK, D>(acc, which ? of_values : of_keys, m, which ? values : keys, n, 0, m + 16);
        u16* to = which ? u : w;
#pragma unroll
        for (u32 j = 0; j < 8; j += 2)
#pragma unroll
            for (u32 i = 0; i < 2; i++)
                store_tiles(to + ((size_t)(span.first + row + 8 * i) * heads + head) * D + n + j * 8, pack(acc[j][2 * i], acc[j][2 * i + 1]),
                            pack(acc[j + 1][2 * i], acc[j + 1][2 * i + 1]), row + 8 * i < span.tokens);
    }
}
