// Products of inputs with packed weights: R rows of inputs times P panels of 16 outputs at a time.
//
// Few rows: the weights come from memory and are used R times; what counts is that they stream. Four panels side by side,
// which is how they lie, hide the latency of the multipliers. Many rows: the panels stay in the cache from one block of rows to
// the next, and R x P accumulators in registers: 6 x 4, or 3 x 4 for bytes, which have a second set for sums in floating point
// and lose more by spilling it than by loading weights oftener. All add in the same order, so that their bits agree.

#pragma once

#include "tiles.h"

namespace shoal {

// How far before its use a line of int8 is asked for. The hardware's own prefetching is the best for the other formats; for
// this one, whose lines are used up fastest after bfloat16's, it comes a little late (92 against 100 % of the bandwidth).
constexpr int64_t I8_AHEAD = 4096;

template <int R, int P>
using Outputs = Lanes[R][P];  // out[r][p] = 16 outputs of panel `first + p` for input row `rows[r]`

#if defined(__AVX512BW__)
// 32 E4M3 bytes to 32 bfloat16, exactly. A table of the 128 magnitudes, because bfloat16 dot products flush the subnormals
// that a shift of the bits would make of the small codes.
struct E4M3Table {
    alignas(64) bf16 magnitude[128];
    E4M3Table() {
        for (int code = 0; code < 128; ++code) {
            const int exponent = code >> 3, mantissa = code & 7;
            const float value = exponent == 0 ? std::ldexp(mantissa / 8.0f, -6) : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
            magnitude[code] = code == 127 ? 0x7FC0 : to_bf16(value);
        }
    }
};
inline const E4M3Table E4M3;
inline IntLanes e4m3_pairs(const uint8_t* p) {
    const bf16* table = E4M3.magnitude;
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i low = _mm512_permutex2var_epi16(_mm512_load_si512(table), code, _mm512_load_si512(table + 32));
    const __m512i high = _mm512_permutex2var_epi16(_mm512_load_si512(table + 64), code, _mm512_load_si512(table + 96));
    const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(128)), 8);
    return (IntLanes)_mm512_or_si512(_mm512_mask_blend_epi16(upper, low, high), sign);
}
#else
inline float e4m3_value(uint8_t code) {
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    if ((code & 127) == 127) return NAN;
    const float value = exponent == 0 ? std::ldexp(mantissa / 8.0f, -6) : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
    return code & 128 ? -value : value;
}
inline IntLanes e4m3_pairs(const uint8_t* p) {
    bf16 values[2 * LANES];
    for (int64_t i = 0; i < 2 * LANES; ++i) values[i] = to_bf16(e4m3_value(p[i]));
    IntLanes out;
    std::memcpy(&out, values, sizeof out);
    return out;
}
#endif

template <int R, int P>
__attribute__((noinline)) void product_f32(const Matrix& w, const Panel& panel, const Inputs& x, const int32_t* rows, Outputs<R, P>& out) {
    const float* input[R];
    for (int r = 0; r < R; ++r) input[r] = x.floats + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const uint8_t* line = panel.data;
    for (int64_t k = 0; k < w.cols; ++k, line += panel.step) {
        Lanes weight[P];
        for (int p = 0; p < P; ++p) weight[p] = lanes(reinterpret_cast<const float*>(line + p * LINE));
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] += weight[p] * input[r][k];
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
__attribute__((noinline)) void product_bf16(const Matrix&, const Panel& panel, const Inputs& x, const int32_t* rows, Outputs<R, P>& out) {
    const bf16* input[R];
    for (int r = 0; r < R; ++r) input[r] = x.pairs + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const uint8_t* line = panel.data;
    for (int64_t k = 0; k < x.cols / 2; ++k, line += panel.step) {
        IntLanes weight[P];
        for (int p = 0; p < P; ++p) weight[p] = int_lanes(line + p * LINE);
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] = dot_pairs(acc[r][p], weight[p], pair_at(input[r] + 2 * k));
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
__attribute__((noinline)) void product_fp8(const Matrix& w, const Panel& panel, const Inputs& x, const int32_t* rows, Outputs<R, P>& out) {
    const bf16* input[R];
    for (int r = 0; r < R; ++r) input[r] = x.pairs + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const uint8_t *line = panel.data, *scale = panel.scale;
    for (int64_t start = 0; start < x.cols; start += FP8_BLOCK, scale += panel.scale_step) {
        Lanes part[R][P] = {};
        for (int64_t k = start; k < std::min(x.cols, start + FP8_BLOCK); k += 4, line += panel.step)
            for (int half = 0; half < 2; ++half) {
                IntLanes weight[P];
                for (int p = 0; p < P; ++p) weight[p] = e4m3_pairs(line + p * LINE + half * 32);
                for (int r = 0; r < R; ++r)
                    for (int p = 0; p < P; ++p) part[r][p] = dot_pairs(part[r][p], weight[p], pair_at(input[r] + k + 2 * half));
            }
        for (int p = 0; p < P; ++p) {
            float block_scale;
            std::memcpy(&block_scale, scale + p * w.scale_line(), sizeof block_scale);
            for (int r = 0; r < R; ++r) acc[r][p] += part[r][p] * block_scale;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
__attribute__((noinline)) void product_i8(const Matrix& w, const Panel& panel, const Inputs& x, const int32_t* rows, Outputs<R, P>& out) {
    const int8_t* input[R];
    for (int r = 0; r < R; ++r) input[r] = x.bytes + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const uint8_t* line = panel.data;
    for (int64_t g = 0; g < x.groups; ++g) {
        IntLanes part[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) part[r][p] = IntLanes{} - 128 * x.sums[rows[r] * x.groups + g];
        for (int64_t k = g * x.group; k < (g + 1) * x.group; k += 4, line += panel.step) {
            IntLanes weight[P];
            for (int p = 0; p < P; ++p) weight[p] = int_lanes(line + p * LINE), prefetch(line + I8_AHEAD + p * LINE);
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) part[r][p] = dot_bytes(part[r][p], weight[p], pair_at(input[r] + k));
        }
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] += to_lanes(part[r][p]) * x.scales[rows[r] * x.groups + g];
    }
    for (int p = 0; p < P; ++p) {
        const Lanes scale = lanes(reinterpret_cast<const float*>(panel.scale + p * w.scale_line()));
        for (int r = 0; r < R; ++r) out[r][p] = acc[r][p] * scale;
    }
}

template <int R, int P>
__attribute__((noinline)) void product_i4(const Matrix& w, const Panel& panel, const Inputs& x, const int32_t* rows, Outputs<R, P>& out) {
    const int8_t* input[R];
    for (int r = 0; r < R; ++r) input[r] = x.bytes + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const uint8_t *line = panel.data, *scale = panel.scale;
    for (int64_t g = 0; g < x.groups; ++g, scale += panel.scale_step) {
        IntLanes part[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) part[r][p] = IntLanes{} - 8 * x.sums[rows[r] * x.groups + g];
        for (int64_t k = g * x.group; k < (g + 1) * x.group; k += 8, line += panel.step) {
            IntLanes both[P];
            for (int p = 0; p < P; ++p) both[p] = int_lanes(line + p * LINE);
            for (int half = 0; half < 2; ++half)
                for (int r = 0; r < R; ++r)
                    for (int p = 0; p < P; ++p)
                        part[r][p] = dot_bytes(part[r][p], (both[p] >> 4 * half) & 0x0F0F0F0F, pair_at(input[r] + k + 4 * half));
        }
        for (int p = 0; p < P; ++p) {
            const Lanes weight_scale = lanes(reinterpret_cast<const bf16*>(scale + p * w.scale_line()));
            for (int r = 0; r < R; ++r) acc[r][p] += to_lanes(part[r][p]) * (weight_scale * x.scales[rows[r] * x.groups + g]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
inline void panel_product(const Matrix& w, const Panel& panel, const Inputs& x, const int32_t* rows, Outputs<R, P>& out) {
    switch (w.format) {
        case F32: return product_f32<R, P>(w, panel, x, rows, out);
        case BF16: return product_bf16<R, P>(w, panel, x, rows, out);
        case I8: return product_i8<R, P>(w, panel, x, rows, out);
        case I4: return product_i4<R, P>(w, panel, x, rows, out);
        default: return product_fp8<R, P>(w, panel, x, rows, out);
    }
}

// Call `use(row number, panel, sixteen outputs)` for P panels of one bundle, from `first` on, and every one of `num_rows`
// inputs but the first `done`; panels of one row ascend.
template <int P, typename Use>
inline void for_rows(const Matrix& w, int64_t which, int64_t first, const Inputs& x, const int32_t* rows, int64_t num_rows, Use&& use, int64_t done) {
    const Panel panel = w.panel(which, first);
    auto block = [&](auto size, int64_t least) {
        constexpr int R = decltype(size)::value;
        for (; num_rows - done >= least; done += R) {
            Outputs<R, P> out;
            panel_product<R, P>(w, panel, x, rows + done, out);
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) use(done + r, first + p, out[r][p]);
        }
    };
    const bool bytes = w.format == I8 || w.format == I4;
    if constexpr (P <= 2) block(std::integral_constant<int, 8>{}, 8);
    else if (bytes) block(std::integral_constant<int, 3>{}, 5);
    else block(std::integral_constant<int, 6>{}, 6);
    block(std::integral_constant<int, 4>{}, 4);
    if constexpr (P == BUNDLE) block(std::integral_constant<int, 3>{}, 3);
    block(std::integral_constant<int, 2>{}, 2);
    block(std::integral_constant<int, 1>{}, 1);
}

// The same for all panels of [first, last), `first` even: bundles where they are whole, else two panels or one.
template <typename Use>
inline void for_panels(const Matrix& w, int64_t which, int64_t first, int64_t last, const Inputs& x, const int32_t* rows, int64_t num_rows, Use&& use) {
    if (pairs_by_tiles(w)) return for_pair_tiles(w, which, first, last, x, rows, num_rows, use);
    const int64_t by_tiles = inputs_by_tiles(w, num_rows);
    for (int64_t panel = first; panel < last;) {
        const int64_t width = panel % BUNDLE == 0 && panel + BUNDLE <= last ? BUNDLE : panel + 2 <= last ? 2 : 1, done = width > 1 ? by_tiles : 0;
        for (int64_t pair = 0; done && pair < width; pair += 2) for_tiles(w, which, panel + pair, x, rows, done, use);
        if (width == BUNDLE) for_rows<BUNDLE>(w, which, panel, x, rows, num_rows, use, done);
        else if (width == 2) for_rows<2>(w, which, panel, x, rows, num_rows, use, done);
        else for_rows<1>(w, which, panel, x, rows, num_rows, use, done);
        panel += width;
    }
}

}  // namespace shoal
