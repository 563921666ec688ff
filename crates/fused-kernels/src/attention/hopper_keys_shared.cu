
// -------------------------------------------- Hopper, dK and dV: what hopper_keys.cu and hopper_keys_wide.cu share

struct Stage {
    alignas(1024) u8 q[TILE_BYTES(TILE)];
    u8 d_out[TILE_BYTES(TILE)];
};

// Where a cube's keys are, and the tiles of queries that see any of them.
struct KeySpan {
    u32 first, past, begin, end;
    __device__ __forceinline__ KeySpan(const Params& p, const Work& work, u32 keys) {
        first = work.rank * keys;
        past = work.row.keys - work.row.queries;
        begin = (first > past ? first - past : 0) / TILE;
        const u32 beyond = min(first + keys, work.row.keys) - 1 + p.window;
        end = (min(work.row.queries, beyond > past ? beyond - past : 0) + TILE - 1) / TILE;
        end = max(begin, end);
    }
};
