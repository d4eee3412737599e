// Products of bfloat16 blocks for training: forward, gradient of the input, gradient of the weight, all by one inner loop.
//
// A dot instruction multiplies pairs of bfloat16 and adds in float32, so whatever is summed over must lie in pairs. Three
// layouts are enough:
//
//   block    [rows][width + SPARE]: inputs of up to BLOCK rows, row-major; pairs run along a row
//   panels   [width / 16][pairs][16][2]: 16 outputs side by side, summed over the pairs; weights are packed like this twice,
//            along their columns (forward) and along their rows (gradient of the input)
//   columns  the same layout made of a block, with pairs of *rows*: what a weight gradient sums over
//
// The inner loop keeps 8 x 2 or 8 x 3 sums in registers and reaches 97 % of what the processor can multiply (docs/log.md);
// elementwise work is done where a tile of results is still in registers. Every sum is taken by one task in a fixed order,
// so results do not depend on the number of threads. Widths are multiples of 16 (the Python side sees to it).

#pragma once

#include <memory>

#include "simd.h"

namespace shoal {

constexpr int64_t BLOCK = 64;         // rows worked on together: their inputs stay in the cache of a core
constexpr int64_t TILE_ROWS = 8;      // divides BLOCK
constexpr int64_t ROW_SPARE = 32;     // keeps rows of a block from falling on the same lines of the cache
constexpr int64_t PAIR = 2 * LANES;   // bfloat16 in one vector of pairs

// Memory that is written before it is read: unlike std::vector it is not cleared first.
template <typename T>
struct Buffer {
    explicit Buffer(int64_t size) : data(new T[static_cast<size_t>(size)]) {}
    T* get() const { return data.get(); }
    std::unique_ptr<T[]> data;
};

// exp(x) to about 1e-6, for what comes from products in bfloat16 or is rounded to it: half of the operations of the exact one.
inline Lanes quick_exp(Lanes x) {
#if defined(__AVX512F__)
    const __m512 scaled = _mm512_max_ps(_mm512_set1_ps(-127.0f), _mm512_mul_ps((__m512)x, _mm512_set1_ps(1.44269504f)));  // NaN stays
    const __m512 whole = _mm512_roundscale_ps(scaled, 0), part = _mm512_sub_ps(scaled, whole);  // part in [-1/2, 1/2]
    __m512 power = _mm512_set1_ps(1.3333558e-3f);  // 2^part by its Taylor series
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(9.6181291e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.5504109e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.4022651e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.9314718e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.0f));
    return (Lanes)_mm512_scalef_ps(power, whole);
#else
    return exp_lanes(x);
#endif
}

// 1 / (1 + exp(-x)) likewise.
inline Lanes quick_sigmoid(Lanes x) {
#if defined(__AVX512F__)
    // Beyond 2^126 the reciprocal is 0 anyway, and its refinement would meet infinity times zero.
    const __m512 sum = _mm512_add_ps(_mm512_min_ps(_mm512_set1_ps(8.5e37f), (__m512)quick_exp(-x)), _mm512_set1_ps(1.0f));
    const __m512 guess = _mm512_rcp14_ps(sum);
    return (Lanes)_mm512_mul_ps(guess, _mm512_fnmadd_ps(sum, guess, _mm512_set1_ps(2.0f)));
#else
    return 1.0f / (1.0f + exp_lanes(-x));
#endif
}

inline int64_t row_stride(int64_t width) { return width + ROW_SPARE; }

// acc[r][p] += sum over pairs of a[r] * b[p]; `a` is read 32 bits at a time.
template <int R, int P>
__attribute__((always_inline)) inline void tile(const bf16* a, int64_t row_step, int64_t pair_step, const bf16* b, int64_t panel_step,
                                                int64_t pairs, Lanes (&acc)[R][P]) {
    for (int64_t k = 0; k < pairs; ++k) {
        IntLanes w[P];
        for (int p = 0; p < P; ++p) w[p] = int_lanes(b + p * panel_step + k * PAIR);
        for (int r = 0; r < R; ++r) {
            const int32_t x = pair_at(a + r * row_step + k * pair_step);
            for (int p = 0; p < P; ++p) acc[r][p] = dot_pairs(acc[r][p], w[p], x);
        }
    }
}

// use(first row, panel, sums of 8 rows and P panels) for a block of `width` and all `count` panels, P at a time, then singly.
template <int P, typename Use>
inline void block_times_panels(const bf16* block, int64_t width, int64_t rows, const bf16* panels, int64_t count, Use&& use) {
    const int64_t step = width * LANES, stride = row_stride(width);
    auto columns = [&](int64_t p, auto size) {
        constexpr int N = decltype(size)::value;
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            Lanes acc[TILE_ROWS][N] = {};
            tile<TILE_ROWS, N>(block + r * stride, stride, 2, panels + p * step, step, width / 2, acc);
            use(r, p, acc);
        }
    };
    int64_t p = 0;
    for (; p + P <= count; p += P) columns(p, std::integral_constant<int, P>{});
    for (; P > 2 && p + 2 <= count; p += 2) columns(p, std::integral_constant<int, 2>{});
    for (; p < count; ++p) columns(p, std::integral_constant<int, 1>{});
}

// out [rows][width] gains, or from `first` = 0 on becomes, a block of rows times columns [first, last) of the panels that lie
// along them: `block` points at its column `first`, rows are `stride` apart, `depth` columns make a panel.
inline void add_block_times_panels(const bf16* block, int64_t stride, int64_t rows, const bf16* panels, int64_t depth, int64_t first, int64_t last,
                                   int64_t width, float* out) {
    const int64_t step = depth * LANES;
    auto columns = [&](int64_t p, auto size) {
        constexpr int N = decltype(size)::value;
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            Lanes acc[TILE_ROWS][N] = {};
            tile<TILE_ROWS, N>(block + r * stride, stride, 2, panels + p * step + first * LANES, step, (last - first) / 2, acc);
            for (int64_t i = 0; i < std::min(TILE_ROWS, rows - r); ++i)
                for (int j = 0; j < N; ++j) {
                    float* to = out + (r + i) * width + (p + j) * LANES;
                    put(to, first ? lanes(to) + acc[i][j] : acc[i][j]);
                }
        }
    };
    int64_t p = 0;
    for (; p + 2 <= width / LANES; p += 2) columns(p, std::integral_constant<int, 2>{});
    for (; p < width / LANES; ++p) columns(p, std::integral_constant<int, 1>{});
}

// One row of floats into a block.
inline void put_row(bf16* to, const float* from, int64_t width) {
    for (int64_t d = 0; d < width; d += LANES) put_bf16(to + d, lanes(from + d));
}

// Rows that complete the last tile of a block.
inline void clear_rows(bf16* block, int64_t width, int64_t from) {
    for (int64_t r = from; r % TILE_ROWS; ++r) std::memset(block + r * row_stride(width), 0, width * sizeof(bf16));
}

// Sixteen bfloat16 of two rows, alternating.
inline void put_pairs(bf16* to, const bf16* first, const bf16* second) {
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Half a, b;
    std::memcpy(&a, first, sizeof a);
    std::memcpy(&b, second, sizeof b);
    const Wide joined = __builtin_convertvector(a, Wide) | (__builtin_convertvector(b, Wide) << 16);
    std::memcpy(to, &joined, sizeof joined);
}

// Rows, `stride` apart, as columns: `columns` points at its first pair, panels lie `panel_step` apart. Rows beyond `rows` up to
// an even number must be clear.
inline void block_to_columns(const bf16* block, int64_t stride, int64_t width, int64_t rows, bf16* columns, int64_t panel_step) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t d = 0; d < width; d += LANES)
            put_pairs(columns + d / LANES * panel_step + r / 2 * PAIR, block + r * stride + d, block + (r + 1) * stride + d);
}

inline void block_to_columns(const bf16* block, int64_t width, int64_t rows, bf16* columns, int64_t panel_step) {
    block_to_columns(block, row_stride(width), width, rows, columns, panel_step);
}

struct Range {
    int64_t first, last;
};

// Gradient of a weight [outs][in_width], some outs and some in-panels of it: out[n][k] = sum over pairs of left[n] * right[k].
// `left` and `right` are columns of `pairs` pairs. With `accumulate` the sums are added to what is there.
inline void outer_columns(const bf16* left, Range outs, const bf16* right, int64_t in_width, Range in_panels, int64_t pairs, bool accumulate,
                          float* out) {
    const int64_t step = pairs * PAIR;
    auto panels = [&](int64_t p, auto size) {
        constexpr int N = decltype(size)::value;
        for (int64_t n = outs.first; n < outs.last; n += TILE_ROWS) {
            Lanes acc[TILE_ROWS][N] = {};
            tile<TILE_ROWS, N>(left + n / LANES * step + n % LANES * 2, 2, PAIR, right + p * step, step, pairs, acc);
            for (int64_t r = 0; r < TILE_ROWS; ++r)
                for (int j = 0; j < N; ++j) {
                    float* to = out + (n + r) * in_width + (p + j) * LANES;
                    put(to, accumulate ? lanes(to) + acc[r][j] : acc[r][j]);
                }
        }
    };
    int64_t p = in_panels.first;
    for (; p + 3 <= in_panels.last; p += 3) panels(p, std::integral_constant<int, 3>{});
    for (; p + 2 <= in_panels.last; p += 2) panels(p, std::integral_constant<int, 2>{});
    for (; p < in_panels.last; ++p) panels(p, std::integral_constant<int, 1>{});
}

constexpr int64_t OUTER_PANELS = 3;  // in-panels per task of a weight gradient
inline int64_t outer_tasks(int64_t in_width) { return (in_width / LANES + OUTER_PANELS - 1) / OUTER_PANELS; }

}  // namespace shoal
