// The state goes from chunk to chunk, for some of the columns of values. KEEP 0: the outputs. KEEP 1: the states before each
// chunk, and the corrections of all tokens, for the backward pass.

#define THREADS 256
#define BYTES (57344 + D * COLUMNS * 2 + 3 * CHUNK * COLUMNS * 2 + 2 * CHUNK * 4)
// COLUMNS of values for a cube: 64 or 32

extern "C" __global__ void __launch_bounds__(THREADS, 2)
delta_forward(const u16* q, const u16* k, const u16* w, u16* u, const u16* p, const float* sums, const u32* bounds, u16* o, u16* states,
              const __grid_constant__ Params params) {
    __shared__ __align__(128) u8 memory[BYTES];
    u32 first_column = blockIdx.x * COLUMNS, head = blockIdx.y, key_head = head / params.group, heads = params.heads;
    u32 base = shared_address(memory), weights = base, queries = base + 16384, keys = base + 32768, scores = base + 49152;
    u32 state = base + 57344, own = state + D * COLUMNS * 2, scaled = own + 2 * CHUNK * COLUMNS * 2;
    float* decay = (float*)(memory + 57344 + D * COLUMNS * 2 + 3 * CHUNK * COLUMNS * 2);
    u32 tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    u32 m = warp % 4 * 16, n = warp / 4 * (COLUMNS / 2), row = m + lane / 4, column = lane % 4 * 2;
    u32 chunks = (bounds[blockIdx.z + 1] - bounds[blockIdx.z] + CHUNK - 1) / CHUNK;

    auto load_first = [&](Span span, u32 stage) {
        size_t at = (size_t)span.first * heads + head;
        load_tile<CHUNK, D, THREADS>(weights, w + at * D, (size_t)heads * D, span.tokens);
        if (!KEEP)
            load_tile<CHUNK, D, THREADS>(queries, q + (size_t)span.first * params.q_stride + key_head * D, params.q_stride, span.tokens);
        load_tile<CHUNK, COLUMNS, THREADS>(own + stage * CHUNK * COLUMNS * 2, u + at * D + first_column, (size_t)heads * D, span.tokens);
        if (tid < CHUNK) copy_word(shared_address(decay + stage * CHUNK + tid), sums + at + (size_t)min(tid, span.tokens - 1) * heads);
        commit();
    };
    auto load_second = [&](Span span) {
        load_tile<CHUNK, D, THREADS>(keys, k + (size_t)span.first * params.k_stride + key_head * D, params.k_stride, span.tokens);
        if (!KEEP) load_tile<CHUNK, CHUNK, THREADS>(scores, p + ((size_t)span.first * heads + head) * CHUNK, (size_t)heads * CHUNK, span.tokens);
        commit();
    };

    float s[COLUMNS / 8][4];
    clear(s);
    for (u32 i = tid; i < D * COLUMNS / 2; i += THREADS) store_pair(state + i * 4, 0);
    if (chunks == 0) return;
    Span span = span_of(bounds, blockIdx.z, 0);
    load_first(span, 0);
    load_second(span);
    wait_for_all_but<1>();
    __syncthreads();
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        u32 stage = chunk % 2;
        u32 mine = own + stage * CHUNK * COLUMNS * 2;
        const float* sum = decay + stage * CHUNK;
        float end = sum[CHUNK - 1];
        Span next = span_of(bounds, blockIdx.z, chunk + 1);
        if (KEEP) {
            store_tile<D, COLUMNS, THREADS>(states + ((size_t)span.slot * heads + head) * D * D + first_column, D, state);
        }
        float out[COLUMNS / 16][4];
        {
            float known[COLUMNS / 16][4];
            clear(known), clear(out);
            if (KEEP) product<COLUMNS / 2, false, true, D, COLUMNS>(known, weights, m, state, n, 0, D);
            else products<COLUMNS / 2, true, D, COLUMNS>(known, out, weights, queries, m, state, n, D);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 r = row + 8 * i;
                float left = __expf(end - sum[r]), kept = __expf(sum[r]);
                u32 both[COLUMNS / 16];
#pragma unroll
                for (u32 j = 0; j < COLUMNS / 16; j++) {
                    u32 at = pair_at<COLUMNS>(r, n + j * 8 + column);
                    float low, high;
                    unpack(load_pair(mine + at), low, high);
                    low -= known[j][2 * i], high -= known[j][2 * i + 1];
                    store_pair(scaled + at, pack(low * left, high * left));
                    both[j] = pack(low, high);
                    if (!KEEP) {
                        store_pair(mine + at, both[j]);
                        out[j][2 * i] *= kept, out[j][2 * i + 1] *= kept;
                    }
                }
                if (KEEP)
#pragma unroll
                    for (u32 j = 0; j < COLUMNS / 16; j += 2)
                        store_tiles(u + ((size_t)(span.first + r) * heads + head) * D + first_column + n + j * 8, both[j], both[j + 1],
                                    r < span.tokens);
            }
        }
        wait_for_all_but<0>();
        __syncthreads();
        if (next.tokens) load_first(next, stage ^ 1);
        if (!KEEP) {
            product<COLUMNS / 2, false, true, CHUNK, COLUMNS>(out, scores, m, mine, n, 0, m + 16);
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 16; j += 2)
#pragma unroll
                for (u32 i = 0; i < 2; i++)
                    store_tiles(o + (size_t)(span.first + row + 8 * i) * params.o_stride + head * D + first_column + n + j * 8,
                                pack(out[j][2 * i], out[j][2 * i + 1]), pack(out[j + 1][2 * i], out[j + 1][2 * i + 1]),
                                row + 8 * i < span.tokens);
        }
        advance<COLUMNS>(s, __expf(end), keys, warp * 16, scaled);
        store_state<COLUMNS>(state, warp * 16 + lane / 4, column, s);
        wait_for_all_but<0>();
        __syncthreads();
        if (next.tokens) load_second(next);
        span = next;
    }
}
