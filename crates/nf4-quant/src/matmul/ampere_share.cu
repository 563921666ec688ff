// How ampere.cu and ampere_wide.cu divide a product among cubes; schedule.rs has the Rust side. Defined before: GROUPED.

// The share of the work: a tile, or one part of its k. Part 0 also takes the low-rank product. A unit is 32
// columns; units come in pairs. Tokens are those from n0 up to `end`.
struct Share {
    u32 m0, n0, end, group, first, units, slot, part, parts;
};

template <u32 ROWS, u32 TOKENS>
__device__ __forceinline__ Share share_of(u32 cube, const Params& p, const Tile* tiles) {
    const u32 m_tiles = (p.m + ROWS - 1) / ROWS, n_tiles = (p.tokens + TOKENS - 1) / TOKENS, k_pairs = (p.k + 63) / 64;
    Share w = {0, 0, p.tokens, 0, 0, 2 * k_pairs, 0, 0, 1};
#if GROUPED
    // The tiles of the same tokens run side by side, so that these are read from L2 for all but the first.
    const Tile t = tiles[cube / m_tiles];
    w.m0 = cube % m_tiles * ROWS, w.n0 = t.first, w.end = t.end, w.group = t.group;
    return w;
#endif
    u32 tile = cube;
    if (cube >= p.whole) {
        w.slot = (cube - p.whole) / p.split, w.part = (cube - p.whole) % p.split, w.parts = p.split;
        tile = p.whole + w.slot;
        const u32 first = k_pairs * w.part / w.parts;
        w.first = 2 * first;
        w.units = 2 * (k_pairs * (w.part + 1) / w.parts - first);
    }
    // Tokens are taken in bands of tiles, so that a band's activations stay in L2 while the weight streams by once per
    // band.
    const u32 band = tile / (m_tiles * 8), band_first = band * 8;
    const u32 width = n_tiles - band_first < 8 ? n_tiles - band_first : 8;
    const u32 within = tile - band * m_tiles * 8;
    w.m0 = within / width * ROWS, w.n0 = (band_first + within % width) * TOKENS;
    return w;
}
