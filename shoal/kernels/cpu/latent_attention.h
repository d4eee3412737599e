// Absorbed latent attention of one token over a paged cache, all heads at once.
//
// In the absorbed form every head attends to the same cached entries, so heads take the place of weight rows: queries are
// packed as a panel [W][16 heads], cached entries are the inputs, and one vector holds the scores of 16 heads for one
// position. Softmax then runs lane by lane with no reductions. Positions are taken in chunks whose results are merged in
// order; the chunk size is fixed, so that a long context may be split over threads and still give the same bits.

#pragma once

#include "simd.h"

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
        for (int64_t h = 0; h < heads; ++h) std::memcpy(&row[h], query + h * width + k * PACK<T>, valid * 4);
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

// Scores of positions [start, start + count) into scratch.score; `panel` is [W / PACK][16][PACK], already scaled.
template <typename T>
inline void chunk_scores(const PagedEntries<T>& cache, const T* panel, int64_t start, int64_t count, ChunkScratch<T>& s) {
    for (int64_t t = 0; t < count; t += TILE) {
        const int64_t tile = std::min(TILE, count - t);
        const T* entry[TILE];
        for (int64_t i = 0; i < TILE; ++i) entry[i] = cache.at(start + t + std::min(i, tile - 1));
        // Entries lie apart in rows of about a kilobyte: too short for the hardware to notice, so the next ones are asked for.
        for (int64_t i = TILE; t + i < count && i < 2 * TILE; ++i)
            for (int64_t k = 0; k < cache.width; k += 64 / static_cast<int64_t>(sizeof(T))) prefetch(cache.at(start + t + i) + k);
        Lanes acc[TILE] = {};
        for (int64_t k = 0; k < cache.width; k += PACK<T>)
            for (int64_t i = 0; i < TILE; ++i) acc[i] = dot_step(acc[i], panel + k * LANES, entry[i] + k);
        for (int64_t i = 0; i < tile; ++i) put(s.score[t + i], acc[i]);
    }
}

// mixed[h][c] = sum over t of weight[t][h] * entry[t][c], for HEADS heads and 16 columns at a time.
template <typename T, int HEADS>
inline void mix_columns(const PagedEntries<T>& cache, const T* weight, int64_t start, int64_t count, int64_t latent, float* mixed) {
    const T* entry[CHUNK + 1];
    for (int64_t t = 0; t < padded(count, PACK<T>); ++t) entry[t] = cache.at(start + std::min(t, count - 1));
    for (int64_t c = 0; c < latent; c += LANES) {
        Lanes acc[HEADS] = {};
        for (int64_t t = 0; t < count; t += PACK<T>) {
            if constexpr (sizeof(T) == 2) {
                // Interleave two positions, so that a pair holds one column of both.
                typedef uint16_t Half __attribute__((vector_size(32)));
                typedef uint32_t Wide __attribute__((vector_size(64)));
                Half first, second;
                std::memcpy(&first, entry[t] + c, sizeof first);
                std::memcpy(&second, entry[t + 1] + c, sizeof second);
                const Wide joined = __builtin_convertvector(first, Wide) | (__builtin_convertvector(second, Wide) << 16);
                IntLanes pairs;
                std::memcpy(&pairs, &joined, sizeof pairs);
                for (int h = 0; h < HEADS; ++h) acc[h] = dot_pairs(acc[h], pairs, pair_at(weight + t * LANES + 2 * h));
            } else {
                const Lanes column = lanes(entry[t] + c);
                for (int h = 0; h < HEADS; ++h) acc[h] += column * weight[t * LANES + h];
            }
        }
        for (int h = 0; h < HEADS; ++h) put(mixed + h * latent + c, acc[h]);
    }
}

// Attend to one chunk; fills `out`, whose `mixed` has room for [16][latent].
template <typename T>
inline void attend_chunk(const PagedEntries<T>& cache, const T* panel, int64_t start, int64_t count, int64_t latent, int64_t heads,
                         ChunkScratch<T>& s, Partial& out) {
    chunk_scores(cache, panel, start, count, s);
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
