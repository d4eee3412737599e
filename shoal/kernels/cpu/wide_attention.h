// Attention with keys and values of their own for every head, products in bfloat16: of training over packed documents, and of
// prompts that are read fast. Scores of eight queries are taken together against panels of sixteen positions. See products.h.

#pragma once

#include "products.h"

namespace shoal {

// Positions [begin, end) in whole panels, and inside them what each of eight queries sees.
struct Window {
    int64_t begin, end, from[TILE_ROWS] = {}, to[TILE_ROWS] = {};

    // Queries at positions i, i + 1, ... that see what lies before them, from `first[...]` on; null: from the beginning.
    Window(const int64_t* first, int64_t i, int64_t valid) {
        int64_t lowest = first ? first[i] : 0;
        for (int64_t q = 0; q < valid; ++q) {
            from[q] = first ? first[i + q] : 0;
            to[q] = i + q + 1;
            lowest = std::min(lowest, from[q]);
        }
        begin = lowest / LANES * LANES;
        end = padded(i + valid);
    }
    int64_t panels() const { return (end - begin) / LANES; }
};

// Keys or values of one head, as the inner loops want them.
struct Side {
    int64_t width, positions;
    Buffer<bf16> rows, panels, columns;
    Side(int64_t width, int64_t positions)
        : width(width), positions(positions), rows(positions * row_stride(width)), panels(positions * width), columns(positions * width) {}

    int64_t column_step() const { return positions * LANES; }

    void read(const float* from, int64_t step, int64_t length) {
        const int64_t stride = row_stride(width);
        for (int64_t t = 0; t < length; ++t) put_row(rows.get() + t * stride, from + t * step, width);
        clear(length, positions);
    }

    void clear(int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) std::memset(rows.get() + t * row_stride(width), 0, width * sizeof(bf16));
    }

    // [positions / 16][width / 2][16][2]: what rows are multiplied with; of the first `used`. Pairs beyond the width are read
    // and dropped.
    void make_panels(int64_t used) {
        const int64_t stride = row_stride(width), pairs = width / 2;
        for (int64_t t = 0; t < used; t += LANES)
            for (int64_t k = 0; k < pairs; k += LANES) {
                IntLanes row[LANES];
                for (int64_t i = 0; i < LANES; ++i) row[i] = int_lanes(rows.get() + (t + i) * stride + 2 * k);
                transpose(row);
                bf16* to = panels.get() + t * width + k * PAIR;
                for (int64_t i = 0; i < std::min(LANES, pairs - k); ++i) std::memcpy(to + i * PAIR, &row[i], sizeof row[i]);
            }
    }

    // [width / 16][positions / 2][16][2]: what weights over positions are multiplied with.
    void make_columns(int64_t used) { block_to_columns(rows.get(), row_stride(width), width, used, columns.get(), column_step()); }
};

// use(panel, sums of 8 rows and P panels): rows times `count` panels that lie `step` apart.
template <typename Use>
inline void rows_times_panels(const bf16* row, int64_t row_step, const bf16* panels, int64_t step, int64_t pairs, int64_t count, Use&& use) {
    auto some = [&](int64_t p, auto size) {
        constexpr int N = decltype(size)::value;
        Lanes acc[TILE_ROWS][N] = {};
        tile<TILE_ROWS, N>(row, row_step, 2, panels + p * step, step, pairs, acc);
        for (int64_t q = 0; q < TILE_ROWS; ++q)
            for (int64_t j = 0; j < N; ++j) use(q, p + j, acc[q][j]);
    };
    int64_t p = 0;
    for (; count - p > 4 || count - p == 3; p += 3) some(p, std::integral_constant<int, 3>{});
    for (; count - p >= 2; p += 2) some(p, std::integral_constant<int, 2>{});
    if (p < count) some(p, std::integral_constant<int, 1>{});
}

// Products of eight rows, `step` apart, with the positions of a window: line[q * pitch + t - begin].
inline void scores(const bf16* row, int64_t step, const Side& side, const Window& w, float* line, int64_t pitch) {
    rows_times_panels(row, step, side.panels.get() + w.begin * side.width, side.width * LANES, side.width / 2, w.panels(),
                      [&](int64_t q, int64_t p, Lanes sum) { put(line + q * pitch + p * LANES, sum); });
}

// Sums over the positions of a window, weighted: rows of `out`, times one factor each.
inline void weighted_sum(const bf16* weight, int64_t pitch, const Side& side, const Window& w, const float* factor, int64_t valid, float* out,
                         int64_t step) {
    rows_times_panels(weight, pitch, side.columns.get() + w.begin * LANES, side.column_step(), (w.end - w.begin) / 2, side.width / LANES,
                      [&](int64_t q, int64_t p, Lanes sum) {
                          if (q < valid) put(out + q * step + p * LANES, sum * factor[q]);
                      });
}

// exp(score * scale - top * scale) of what query q sees, as bfloat16 (zero for the rest of the window); `top` and the sum.
inline float weigh(float* line, const Window& w, int64_t q, float scale, bf16* weight, float* top) {
    const int64_t from = w.from[q] - w.begin, to = w.to[q] - w.begin, end = w.end - w.begin;
    std::fill(line, line + from, -INFINITY);
    std::fill(line + to, line + end, -INFINITY);
    Lanes tops = lanes(line);
    for (int64_t t = LANES; t < end; t += LANES) tops = max_lanes(tops, lanes(line + t));
    *top = tops[0];
    for (int64_t i = 1; i < LANES; ++i) *top = std::max(*top, tops[i]);
    Lanes sums = {};
    for (int64_t t = 0; t < end; t += LANES) {
        const Lanes e = exp_lanes((lanes(line + t) - *top) * scale);
        put(weight + t, e);
        sums += e;
    }
    return sum_of(sums);
}

}  // namespace shoal
