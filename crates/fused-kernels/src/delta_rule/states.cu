// The gradients of the states behind each chunk, from the last chunk to the first, and those of all corrections, for some of the
// columns of values.

#define THREADS 256
#define BYTES (57344 + D * COLUMNS * 2 + 3 * CHUNK * COLUMNS * 2 + 2 * CHUNK * 4)
// COLUMNS of values for a cube: 64 or 32

extern "C" __global__ void __launch_bounds__(THREADS, 2)
delta_states(const u16* q, const u16* k, const u16* w, const u16* p, const u16* d_out, const float* sums, const u32* bounds, u16* d_u,
             u16* d_states, const __grid_constant__ Params params) {
    __shared__ __align__(128) u8 memory[BYTES];
    u32 first_column = blockIdx.x * COLUMNS, head = blockIdx.y, key_head = head / params.group, heads = params.heads;
    u32 base = shared_address(memory), weights = base, queries = base + 16384, keys = base + 32768, scores = base + 49152;
    u32 state = base + 57344, given = state + D * COLUMNS * 2, scaled = given + CHUNK * COLUMNS * 2, negative = scaled + CHUNK * COLUMNS * 2;
    float* decay = (float*)(memory + 57344 + D * COLUMNS * 2 + 3 * CHUNK * COLUMNS * 2);
    u32 tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    u32 m = warp % 4 * 16, n = warp / 4 * (COLUMNS / 2), row = m + lane / 4, column = lane % 4 * 2;
    u32 chunks = (bounds[blockIdx.z + 1] - bounds[blockIdx.z] + CHUNK - 1) / CHUNK;

    auto load_first = [&](Span span, u32 stage) {
        size_t at = (size_t)span.first * heads + head;
        load_tile<CHUNK, D, THREADS>(keys, k + (size_t)span.first * params.k_stride + key_head * D, params.k_stride, span.tokens);
        load_tile<CHUNK, CHUNK, THREADS>(scores, p + at * CHUNK, (size_t)heads * CHUNK, span.tokens);
        load_tile<CHUNK, COLUMNS, THREADS>(given, d_out + (size_t)span.first * params.o_stride + head * D + first_column, params.o_stride, span.tokens);
        if (tid < CHUNK) copy_word(shared_address(decay + stage * CHUNK + tid), sums + at + (size_t)min(tid, span.tokens - 1) * heads);
        commit();
    };
    auto load_second = [&](Span span) {
        load_tile<CHUNK, D, THREADS>(weights, w + ((size_t)span.first * heads + head) * D, (size_t)heads * D, span.tokens);
        load_tile<CHUNK, D, THREADS>(queries, q + (size_t)span.first * params.q_stride + key_head * D, params.q_stride, span.tokens);
        commit();
    };

    float s[COLUMNS / 8][4];
    clear(s);
    for (u32 i = tid; i < D * COLUMNS / 2; i += THREADS) store_pair(state + i * 4, 0);
    if (chunks == 0) return;
    Span span = span_of(bounds, blockIdx.z, chunks - 1);
    load_first(span, 0);
    load_second(span);
    wait_for_all_but<1>();
    __syncthreads();
    for (u32 step = 0; step < chunks; step++) {
        u32 stage = step % 2;
        const float* sum = decay + stage * CHUNK;
        float end = sum[CHUNK - 1];
        bool more = step + 1 < chunks;
        Span next = more ? span_of(bounds, blockIdx.z, chunks - 2 - step) : span;
        store_tile<D, COLUMNS, THREADS>(d_states + ((size_t)span.slot * heads + head) * D * D + first_column, D, state);
        {
            float d[COLUMNS / 16][4];
            clear(d);
            product<COLUMNS / 2, false, true, D, COLUMNS>(d, keys, m, state, n, 0, D);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float left = __expf(end - sum[row + 8 * i]);
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 16; j++) d[j][2 * i] *= left, d[j][2 * i + 1] *= left;
            }
            // Earlier tokens have no part in later ones' scores.
            product<COLUMNS / 2, true, true, CHUNK, COLUMNS>(d, scores, m, given, n, m, CHUNK);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 r = row + 8 * i;
                float kept = __expf(sum[r]);
                u32 both[COLUMNS / 16];
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 16; j++) {
                    u32 at = pair_at<COLUMNS>(r, n + j * 8 + column);
                    float low, high;
                    unpack(load_pair(given + at), low, high);
                    store_pair(scaled + at, pack(low * kept, high * kept));
                    store_pair(negative + at, pack(-d[j][2 * i], -d[j][2 * i + 1]));
                    both[j] = pack(d[j][2 * i], d[j][2 * i + 1]);
                }
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 16; j += 2)
                    store_tiles(d_u + ((size_t)(span.first + r) * heads + head) * D + first_column + n + j * 8, both[j], both[j + 1],
                                r < span.tokens);
            }
        }
        wait_for_all_but<0>();
        __syncthreads();
        if (more) load_first(next, stage ^ 1);
        advance<COLUMNS>(s, __expf(end), queries, warp * 16, scaled);
        product<COLUMNS, true, true, D, COLUMNS>(s, weights, warp * 16, negative, 0, 0, CHUNK);
        store_state<COLUMNS>(state, warp * 16 + lane / 4, column, s);
        wait_for_all_but<0>();
        __syncthreads();
        if (more) load_second(next);
        span = next;
    }
}
