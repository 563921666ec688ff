// All other gradients, chunk by chunk: a head of keys with its heads of values one after the other.

#define THREADS 512
#define BYTES (163840 + 14 * CHUNK * 4 + 64)

// Sums over a row's 4 lanes.
__device__ __forceinline__ float over_lanes(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
// Sums over a column's 8 rows.
__device__ __forceinline__ float over_rows(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 4);
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 8);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 16);
}

extern "C" __global__ void __launch_bounds__(THREADS)
delta_gradient(const u16* q, const u16* k, const u16* v, const float* beta, const u16* t, const u16* u, const u16* d_u,
               const u16* states, const u16* d_states, const u16* d_out, const float* sums, const u32* bounds, u16* d_q, u16* d_k,
               u16* d_v, float* d_g, float* d_beta, const __grid_constant__ Params params) {
    __shared__ __align__(128) u8 memory[BYTES];
    u32 key_head = blockIdx.y, heads = params.heads, key_heads = heads / params.group;
    Span span = span_of(bounds, blockIdx.z, blockIdx.x);
    if (span.tokens == 0) return;
    u32 base = shared_address(memory), queries = base, keys = base + 16384, outs = base + 32768, own = base + 49152, rests = base + 65536;
    u32 state = base + 81920, behind = base + 114688, inverse = base + 147456, systems = inverse, attention = base + 155648;
    float* sum = (float*)(memory + 163840);
    float* strength = sum + CHUNK;
    float* of_sum = strength + CHUNK;        // [4][CHUNK]
    float* of_strength = of_sum + 4 * CHUNK; // [4][CHUNK]
    float* of_column = of_strength + 4 * CHUNK;  // [4][CHUNK]
    float* of_end = of_column + 4 * CHUNK;   // [16]
    u32 tid = threadIdx.x, warp = tid / 32, lane = tid % 32, quarter = warp / 4;
    u32 m = warp % 4 * 16, n = quarter * 32, row = m + lane / 4, column = lane % 4 * 2;

    load_tile<CHUNK, D, THREADS>(queries, q + (size_t)span.first * params.q_stride + key_head * D, params.q_stride, span.tokens);
    load_tile<CHUNK, D, THREADS>(keys, k + (size_t)span.first * params.k_stride + key_head * D, params.k_stride, span.tokens);
    float dq[4][4], dk[4][4];
    clear(dq), clear(dk);
    for (u32 head = key_head * params.group; head < (key_head + 1) * params.group; head++) {
        size_t at = (size_t)span.first * heads + head, matrix = ((size_t)span.slot * heads + head) * D * D;
        __syncthreads();
        load_tile<CHUNK, CHUNK, THREADS>(inverse, t + at * CHUNK, (size_t)heads * CHUNK, span.tokens);
        load_tile<CHUNK, D, THREADS>(rests, d_u + at * D, (size_t)heads * D, span.tokens);
        load_tile<D, D, THREADS>(state, states + matrix, D, D);
        commit();
        load_tile<CHUNK, D, THREADS>(own, u + at * D, (size_t)heads * D, span.tokens);
        load_tile<CHUNK, D, THREADS>(outs, d_out + (size_t)span.first * params.o_stride + head * D, params.o_stride, span.tokens);
        load_tile<D, D, THREADS>(behind, d_states + matrix, D, D);
        commit();
        if (tid < CHUNK) {
            sum[tid] = sums[at + (size_t)min(tid, span.tokens - 1) * heads];
            strength[tid] = tid < span.tokens ? beta[at + (size_t)tid * heads] : 0.0f;
        }
        wait_for_all_but<1>();
        __syncthreads();
        float end = sum[CHUNK - 1];
        float from_sum[2] = {0.0f, 0.0f}, from_strength[2] = {0.0f, 0.0f}, into_end = 0.0f;
        // R = Aᵀ dU; beta R is the gradient of V.
        {
            float r[4][4], known[4][4];
            clear(r), clear(known);
            product<32, true, true, CHUNK, D>(r, inverse, m, rests, n, m, CHUNK);
            product<32, false, true, D, D>(known, keys, m, state, n, 0, D);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 token = row + 8 * i;
                float kept = __expf(sum[token]), b = strength[token];
                bool valid = token < span.tokens;
                const u16* value = v + (size_t)(span.first + token) * params.v_stride + head * D + n + column;
                u16* to = d_v + (at + (size_t)token * heads) * D + n;
                u32 both[4];
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    float low, high, r0 = r[j][2 * i], r1 = r[j][2 * i + 1];
                    unpack(valid ? *(const u32*)(value + j * 8) : 0, low, high);
                    float known0 = known[j][2 * i] * kept, known1 = known[j][2 * i + 1] * kept;
                    from_strength[i] += r0 * (low - known0) + r1 * (high - known1);
                    from_sum[i] -= b * (r0 * known0 + r1 * known1);
                    both[j] = pack(r0 * b, r1 * b);
                }
                store_tiles(to, both[0], both[1], valid), store_tiles(to + 16, both[2], both[3], valid);
            }
            __syncthreads();
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) store_pair(rests + pair_at<D>(row + 8 * i, n + j * 8 + column), pack(r[j][2 * i], r[j][2 * i + 1]));
            wait_for_all_but<0>();
            __syncthreads();
        }
        // The gradients of K Kᵀ and Q Kᵀ.
        {
            u32 n = quarter * 16;
            float rest[2][4], kk[2][4], qk[2][4], score[2][4];
            clear(rest), clear(kk), clear(qk), clear(score);
            if (n < m + 16) {
                products<16, false, D, D>(rest, score, rests, outs, m, own, n, D);
                products<16, false, D, D>(kk, qk, keys, queries, m, keys, n, D);
            }
            float over[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 token = row + 8 * i;
                float b = strength[token];
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    float system[2], attend[2];
#pragma unroll
                    for (u32 c = 0; c < 2; c++) {
                        u32 earlier = n + j * 8 + column + c, e = 2 * i + c;
                        float decay = earlier <= token ? __expf(sum[token] - sum[earlier]) : 0.0f;
                        float strict = earlier < token ? -decay * rest[j][e] : 0.0f;
                        from_strength[i] += strict * kk[j][e];
                        system[c] = b * strict, attend[c] = decay * score[j][e];
                        float exponent = system[c] * kk[j][e] + attend[c] * qk[j][e];
                        from_sum[i] += exponent;
                        over[j][c] += exponent;
                    }
                    store_pair(systems + pair_at<CHUNK>(token, n + j * 8 + column), pack(system[0], system[1]));
                    store_pair(attention + pair_at<CHUNK>(token, n + j * 8 + column), pack(attend[0], attend[1]));
                }
            }
#pragma unroll
            for (u32 j = 0; j < 2; j++)
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    float x = over_rows(over[j][c]);
                    if (lane < 4) of_column[warp % 4 * CHUNK + n + j * 8 + column + c] = x;
                }
        }
        __syncthreads();
        {
            float x[4][4], y[4][4];
            clear(x), clear(y);
            products<32, false, D, D>(x, y, outs, rests, m, state, n, D);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float kept = __expf(sum[row + 8 * i]), factor = kept * strength[row + 8 * i];
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    float low, high, x0 = x[j][2 * i] * kept, x1 = x[j][2 * i + 1] * kept;
                    unpack(load_pair(queries + pair_at<D>(row + 8 * i, n + j * 8 + column)), low, high);
                    from_sum[i] += x0 * low + x1 * high;
                    dq[j][2 * i] += x0, dq[j][2 * i + 1] += x1;
                    dk[j][2 * i] -= y[j][2 * i] * factor, dk[j][2 * i + 1] -= y[j][2 * i + 1] * factor;
                }
            }
            products<32, true, CHUNK, D>(dq, dk, attention, systems, m, keys, n, m + 16);
            clear(x);
            product<32, false, false, D, D>(x, own, m, behind, n, 0, D);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                float left = __expf(end - sum[row + 8 * i]);
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    float low, high, x0 = x[j][2 * i] * left, x1 = x[j][2 * i + 1] * left;
                    unpack(load_pair(keys + pair_at<D>(row + 8 * i, n + j * 8 + column)), low, high);
                    float share = x0 * low + x1 * high;
                    from_sum[i] -= share, into_end += share;
                    dk[j][2 * i] += x0, dk[j][2 * i + 1] += x1;
                }
            }
            product<32, true, true, CHUNK, D>(dk, systems, m, keys, n, m, CHUNK);
            product<32, true, true, CHUNK, D>(dk, attention, m, queries, n, m, CHUNK);
        }
        // exp(G[c]) takes the state with it.
        float held = 0.0f;
#pragma unroll
        for (u32 i = tid; i < D * D / 2; i += THREADS) {
            float a, b, c, d;
            unpack(load_pair(state + i * 4), a, b), unpack(load_pair(behind + i * 4), c, d);
            held += a * c + b * d;
        }
        into_end += held * __expf(end);
        into_end = over_rows(over_lanes(into_end));
        if (lane == 0) of_end[warp] = into_end;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float a = over_lanes(from_sum[i]), b = over_lanes(from_strength[i]);
            if (lane % 4 == 0) of_sum[quarter * CHUNK + row + 8 * i] = a, of_strength[quarter * CHUNK + row + 8 * i] = b;
        }
        __syncthreads();
        if (warp == 0) {
            float total = 0.0f, part[2];
#pragma unroll
            for (u32 i = 0; i < 16; i++) total += of_end[i];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 token = 2 * lane + i;
                float a = 0.0f, b = 0.0f;
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    a += of_sum[j * CHUNK + token] - of_column[j * CHUNK + token];
                    b += of_strength[j * CHUNK + token];
                }
                part[i] = a;
                if (token < span.tokens) d_beta[at + (size_t)token * heads] = b;
            }
            // g of a token is in the running sums of it and of all later tokens.
            float later = part[0] + part[1];
#pragma unroll
            for (u32 d = 1; d < 32; d *= 2) {
                float other = __shfl_down_sync(0xFFFFFFFFu, later, d);
                if (lane + d < 32) later += other;
            }
            if (2 * lane < span.tokens) d_g[at + (size_t)(2 * lane) * heads] = later + total;
            if (2 * lane + 1 < span.tokens) d_g[at + (size_t)(2 * lane + 1) * heads] = later - part[0] + total;
        }
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 token = row + 8 * i;
        size_t at = ((size_t)(span.first + token) * key_heads + key_head) * D + n;
        bool valid = token < span.tokens;
#pragma unroll
        for (u32 j = 0; j < 4; j += 2) {
            store_tiles(d_q + at + j * 8, pack(dq[j][2 * i], dq[j][2 * i + 1]), pack(dq[j + 1][2 * i], dq[j + 1][2 * i + 1]), valid);
            store_tiles(d_k + at + j * 8, pack(dk[j][2 * i], dk[j][2 * i + 1]), pack(dk[j + 1][2 * i], dk[j + 1][2 * i + 1]), valid);
        }
    }
}
