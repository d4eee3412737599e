// Absorbed latent attention of one token over a paged cache, all heads at once.
//
// In the absorbed form every head attends to the same cached entries, so heads take the place of weight rows: queries are
// packed as a panel [W][16 heads], cached entries are the inputs, and one vector holds the scores of 16 heads for one
// position. Softmax then runs lane by lane with no reductions. Positions are taken in chunks whose results are merged in
// order; the chunk size is fixed, so that a long context may be split over threads and still give the same bits.
//
// With tiles (tiles.h) sixteen positions or columns go at once: entries are the inputs of the scores as they lie, the panel of
// queries their weights; for the mixture the weights of the softmax are turned, and entries are paired by positions.

#pragma once

#include "tiles.h"

namespace shoal {

constexpr int64_t CHUNK = 64;  // positions whose scores, weights and entries stay near the core
constexpr int64_t TILE = 8;     // positions scored together

// Where the entries of one layer lie: position t of a sequence is on page table[t / page_tokens].
template <typename T>
struct PagedEntries {
    const T* entries;
    const int32_t* table;
    int64_t page_tokens, page_stride, width;
    const T* at(int64_t t) const { return entries + table[t / page_tokens] * page_stride + t % page_tokens * width; }
    // Sixteen positions from a multiple of sixteen on lie together, and whole tiles make an entry.
    bool by_tiles() const { return sizeof(T) == 2 && page_tokens % TILE_INPUTS == 0 && width % TILE_PAIRS == 0 && tiles_allowed(); }
};

// Numbers per 32 bits of an operand: a pair of bfloat16, or one float.
template <typename T> constexpr int64_t PACK = sizeof(T) == 2 ? 2 : 1;

template <typename T>
inline Lanes dot_step(Lanes acc, const T* panel, const T* x) {
    if constexpr (sizeof(T) == 2)
        return dot_pairs(acc, int_lanes(panel), pair_at(x));
    else
        return acc + lanes(panel) * x[0];
}

// Queries of up to 16 heads, `heads` rows of `width` numbers, as a panel [width / PACK][16][PACK]; missing heads are zero.
template <typename T>
inline void pack_queries(const T* query, int64_t heads, int64_t width, T* panel) {
    const int64_t words = width / PACK<T>;
    for (int64_t k = 0; k < words; k += LANES) {
        IntLanes row[LANES] = {};
        const int64_t valid = std::min(LANES, words - k);
        for (int64_t h = 0; h < heads; ++h) {
            const T* from = query + h * width + k * PACK<T>;
            if (valid == LANES) row[h] = int_lanes(from);
            else std::memcpy(&row[h], from, valid * 4);
        }
        transpose(row);
        std::memcpy(panel + k * LANES * PACK<T>, row, valid * sizeof(IntLanes));
    }
}

// Softmax numerator of 16 heads over part of the context.
struct Partial {
    Lanes top, sum;
    float* mixed;  // [16][latent]
};

template <typename T>
struct ChunkScratch {
    alignas(64) float score[CHUNK][LANES];
    alignas(64) T weight[CHUNK * LANES];
};

// Asks for the entries of positions [next, stop), a cache line at a time. Entries lie apart in rows of about a kilobyte: too
// short for the hardware to notice, and asked for all at once they would hold up the computing that they are to hide behind.
template <typename T>
struct Ahead {
    const PagedEntries<T>& cache;
    int64_t next, stop;
    const T *at = nullptr, *end = nullptr;
    void line() {
        if (at >= end) {
            if (next >= stop) return;
            at = cache.at(next++), end = at + cache.width;
        }
        prefetch(at);
        at += 64 / static_cast<int64_t>(sizeof(T));
    }
};

// Scores of positions [start, start + count) into scratch.score; `panel` is [W / PACK][16][PACK], already scaled.
template <typename T>
inline void chunk_scores(const PagedEntries<T>& cache, const T* panel, int64_t start, int64_t count, Ahead<T> ahead, ChunkScratch<T>& s) {
    for (int64_t t = 0; t < count; t += TILE) {
        const int64_t tile = std::min(TILE, count - t);
        const T* entry[TILE];
        for (int64_t i = 0; i < TILE; ++i) entry[i] = cache.at(start + t + std::min(i, tile - 1));
        Lanes acc[TILE] = {};
        for (int64_t k = 0; k < cache.width; k += PACK<T>) {
            for (int64_t i = 0; i < TILE; ++i) acc[i] = dot_step(acc[i], panel + k * LANES, entry[i] + k);
            if (k / PACK<T> % 2) ahead.line();
        }
        for (int64_t i = 0; i < tile; ++i) put(s.score[t + i], acc[i]);
    }
}

// Columns [c, c + 16) of two entries, so that a pair of numbers holds one column of both.
inline IntLanes paired_columns(const bf16* first, const bf16* second, int64_t c) {
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Half low, high;
    std::memcpy(&low, first + c, sizeof low);
    std::memcpy(&high, second + c, sizeof high);
    const Wide joined = __builtin_convertvector(low, Wide) | (__builtin_convertvector(high, Wide) << 16);
    IntLanes pairs;
    std::memcpy(&pairs, &joined, sizeof pairs);
    return pairs;
}

#if defined(SHOAL_TILES)

// chunk_scores through tiles: 16 positions are a block of inputs, the queries' panel is the weights. What is scored behind the
// last position, to the end of its sixteen, is never read.
inline void chunk_scores_by_tiles(const PagedEntries<bf16>& cache, const bf16* panel, int64_t start, int64_t count, Ahead<bf16> ahead,
                                  ChunkScratch<bf16>& s) {
    static_assert(CHUNK == 4 * TILE_INPUTS, "four tiles of sums take a chunk");
    const bf16* entry[4];
    for (int64_t i = 0; i < 4; ++i) entry[i] = cache.at(start + std::min(i * TILE_INPUTS, (count - 1) / TILE_INPUTS * TILE_INPUTS));
    configure_tiles(TILE_INPUTS);
    clear_four();
    for (int64_t k = 0; k < cache.width; k += TILE_PAIRS) {
        for (int64_t line = 0; line < CHUNK; ++line) ahead.line();
        _tile_loadd(6, panel + k * LANES, TILE_BYTES);
        _tile_loadd(4, entry[0] + k, cache.width * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (count <= TILE_INPUTS) continue;
        _tile_loadd(5, entry[1] + k, cache.width * 2);
        _tile_dpbf16ps(1, 5, 6);
        if (count <= 2 * TILE_INPUTS) continue;
        _tile_loadd(4, entry[2] + k, cache.width * 2);
        _tile_dpbf16ps(2, 4, 6);
        if (count <= 3 * TILE_INPUTS) continue;
        _tile_loadd(5, entry[3] + k, cache.width * 2);
        _tile_dpbf16ps(3, 5, 6);
    }
    store_four(s.score[0]);
}

// mix_columns through tiles, always for 16 heads. Positions behind the last one weigh nothing.
inline void mix_columns_by_tiles(const PagedEntries<bf16>& cache, const bf16* weight, int64_t start, int64_t count, int64_t latent, float* mixed) {
    constexpr int64_t PAIRS = CHUNK / 2;
    alignas(64) IntLanes turned[PAIRS], paired[PAIRS];  // [half of the chunk][head][pair of positions]; [pair][column]
    const bf16* entry[CHUNK];
    for (int64_t t = 0; t < CHUNK; ++t) entry[t] = cache.at(start + std::min(t, count - 1));
    for (int64_t pair = 0; pair < PAIRS; ++pair) turned[pair] = 2 * pair < count ? int_lanes(weight + pair * 2 * LANES) : IntLanes{};
    transpose(*reinterpret_cast<IntLanes(*)[LANES]>(turned));
    transpose(*reinterpret_cast<IntLanes(*)[LANES]>(turned + LANES));
    _tile_loadd(4, turned, TILE_BYTES);
    _tile_loadd(5, turned + LANES, TILE_BYTES);
    const int64_t pairs = count <= TILE_PAIRS ? LANES : PAIRS;
    for (int64_t c = 0; c < latent; c += LANES) {
        for (int64_t pair = 0; pair < pairs; ++pair) paired[pair] = paired_columns(entry[2 * pair], entry[2 * pair + 1], c);
        _tile_zero(0);
        _tile_loadd(6, paired, TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        if (pairs == PAIRS) {
            _tile_loadd(7, paired + LANES, TILE_BYTES);
            _tile_dpbf16ps(0, 5, 7);
        }
        _tile_stored(0, mixed + c, latent * sizeof(float));
    }
}

#else

inline void chunk_scores_by_tiles(const PagedEntries<bf16>&, const bf16*, int64_t, int64_t, Ahead<bf16>, ChunkScratch<bf16>&) {}
inline void mix_columns_by_tiles(const PagedEntries<bf16>&, const bf16*, int64_t, int64_t, int64_t, float*) {}

#endif

// mixed[h][c] = sum over t of weight[t][h] * entry[t][c], for HEADS heads and 16 columns at a time.
template <typename T, int HEADS>
inline void mix_columns(const PagedEntries<T>& cache, const T* weight, int64_t start, int64_t count, int64_t latent, float* mixed) {
    const T* entry[CHUNK + 1];
    for (int64_t t = 0; t < padded(count, PACK<T>); ++t) entry[t] = cache.at(start + std::min(t, count - 1));
    for (int64_t c = 0; c < latent; c += LANES) {
        Lanes acc[HEADS] = {};
        for (int64_t t = 0; t < count; t += PACK<T>) {
            if constexpr (sizeof(T) == 2) {
                const IntLanes pairs = paired_columns(entry[t], entry[t + 1], c);
                for (int h = 0; h < HEADS; ++h) acc[h] = dot_pairs(acc[h], pairs, pair_at(weight + t * LANES + 2 * h));
            } else {
                const Lanes column = lanes(entry[t] + c);
                for (int h = 0; h < HEADS; ++h) acc[h] += column * weight[t * LANES + h];
            }
        }
        for (int h = 0; h < HEADS; ++h) put(mixed + h * latent + c, acc[h]);
    }
}

// Attend to one chunk, of which and of what follows there are `seen` positions; fills `out`, whose `mixed` has room for
// [16][latent].
template <typename T>
inline void attend_chunk(const PagedEntries<T>& cache, const T* panel, int64_t start, int64_t seen, int64_t latent, int64_t heads,
                         ChunkScratch<T>& s, Partial& out) {
    const int64_t count = std::min(CHUNK, seen - start);
    const Ahead<T> ahead{cache, start + CHUNK, std::min(start + 2 * CHUNK, seen)};
    const bool by_tiles = cache.by_tiles();
    if (!by_tiles)
        chunk_scores(cache, panel, start, count, ahead, s);
    else if constexpr (sizeof(T) == 2)
        chunk_scores_by_tiles(cache, panel, start, count, ahead, s);
    Lanes top = lanes(s.score[0]);
    for (int64_t t = 1; t < count; ++t) top = max_lanes(top, lanes(s.score[t]));
    Lanes sum = {};
    for (int64_t t = 0; t < count; t += PACK<T>) {
        const Lanes first = exp_lanes(lanes(s.score[t]) - top);
        sum += first;
        if constexpr (sizeof(T) == 2) {
            const Lanes second = t + 1 < count ? exp_lanes(lanes(s.score[t + 1]) - top) : Lanes{};
            sum += second;
            const IntLanes both = paired(first, second);
            std::memcpy(s.weight + t * LANES, &both, sizeof both);
        } else {
            put(s.weight + t * LANES, first);
        }
    }
    out.top = top;
    out.sum = sum;
    if constexpr (sizeof(T) == 2)
        if (by_tiles) return mix_columns_by_tiles(cache, s.weight, start, count, latent, out.mixed);
    if (heads <= 4)
        mix_columns<T, 4>(cache, s.weight, start, count, latent, out.mixed);
    else if (heads <= 8)
        mix_columns<T, 8>(cache, s.weight, start, count, latent, out.mixed);
    else
        mix_columns<T, 16>(cache, s.weight, start, count, latent, out.mixed);
}

// Fold heads [first, last) of `part` into `total`.
inline void merge(Partial& total, const Partial& part, int64_t latent, int64_t first, int64_t last) {
    const Lanes top = max_lanes(total.top, part.top);
    const Lanes keep = exp_lanes(total.top - top), add = exp_lanes(part.top - top);
    for (int64_t h = first; h < last; ++h) {
        float* to = total.mixed + h * latent;
        const float* from = part.mixed + h * latent;
        for (int64_t c = 0; c < latent; c += LANES) put(to + c, lanes(to + c) * keep[h] + lanes(from + c) * add[h]);
    }
    total.sum = total.sum * keep + part.sum * add;
    total.top = top;
}

}  // namespace shoal
