// Products of inputs with packed weights: R rows of inputs times P panels of 16 outputs at a time.
//
// Few rows: the weights come from memory and are used R times; what counts is that they stream. Four panels side by side hide
// the latency of the multipliers, and the block that comes next is asked for while this one is used. Many rows: R x P = 24
// accumulators live in registers, two vectors of weights serve twelve rows, and the panels stay in the cache from one block
// of rows to the next. Both add in the same order, so that their bits agree.

#pragma once

#include "tiles.h"

namespace shoal {

constexpr int64_t MAX_AHEAD_BYTES = 256 << 10;  // a block larger than this would push itself out of the cache

// Asks for the block that comes next, one cache line for each that is used. With nothing to ask for it repeats a line.
struct Ahead {
    const uint8_t* at;
    int64_t step;
    void line() {
        prefetch(at);
        at += step;
    }
};

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
__attribute__((noinline)) void product_f32(const Matrix& w, const uint8_t* data, const uint8_t*, const Inputs& x, const int32_t* rows, Ahead ahead, Outputs<R, P>& out) {
    const float *panel[P], *input[R];
    for (int p = 0; p < P; ++p) panel[p] = reinterpret_cast<const float*>(data + p * w.panel_bytes());
    for (int r = 0; r < R; ++r) input[r] = x.floats + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    for (int64_t k = 0; k < w.cols; ++k) {
        Lanes weight[P];
        for (int p = 0; p < P; ++p) weight[p] = lanes(panel[p] + k * LANES), ahead.line();
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] += weight[p] * input[r][k];
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
__attribute__((noinline)) void product_bf16(const Matrix& w, const uint8_t* data, const uint8_t*, const Inputs& x, const int32_t* rows, Ahead ahead, Outputs<R, P>& out) {
    const uint8_t* panel[P];
    const bf16* input[R];
    for (int p = 0; p < P; ++p) panel[p] = data + p * w.panel_bytes();
    for (int r = 0; r < R; ++r) input[r] = x.pairs + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    for (int64_t k = 0; k < x.cols / 2; ++k) {
        IntLanes weight[P];
        for (int p = 0; p < P; ++p) weight[p] = int_lanes(panel[p] + k * 64), ahead.line();
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] = dot_pairs(acc[r][p], weight[p], pair_at(input[r] + 2 * k));
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
__attribute__((noinline)) void product_fp8(const Matrix& w, const uint8_t* data, const uint8_t* scales, const Inputs& x, const int32_t* rows, Ahead ahead, Outputs<R, P>& out) {
    const bf16* input[R];
    for (int r = 0; r < R; ++r) input[r] = x.pairs + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const int64_t pairs = x.cols / 2;
    for (int64_t start = 0, block = 0; start < pairs; start += FP8_BLOCK / 2, ++block) {
        const int64_t stop = std::min(pairs, start + FP8_BLOCK / 2);
        Lanes part[R][P] = {};
        for (int64_t k = start; k < stop; ++k) {
            IntLanes weight[P];
            for (int p = 0; p < P; ++p) weight[p] = e4m3_pairs(data + p * w.panel_bytes() + k * 32);
            for (int p = 0; p < P && k & 1; ++p) ahead.line();
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) part[r][p] = dot_pairs(part[r][p], weight[p], pair_at(input[r] + 2 * k));
        }
        for (int p = 0; p < P; ++p) {
            const float scale = reinterpret_cast<const float*>(scales + p * w.panel_scale_bytes())[block];
            for (int r = 0; r < R; ++r) acc[r][p] += part[r][p] * scale;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
__attribute__((noinline)) void product_i8(const Matrix& w, const uint8_t* data, const uint8_t* scales, const Inputs& x, const int32_t* rows, Ahead ahead, Outputs<R, P>& out) {
    const uint8_t* panel[P];
    const int8_t* input[R];
    for (int p = 0; p < P; ++p) panel[p] = data + p * w.panel_bytes();
    for (int r = 0; r < R; ++r) input[r] = x.bytes + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const int64_t quads = x.group / 4;
    for (int64_t g = 0; g < x.groups; ++g) {
        IntLanes part[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) part[r][p] = IntLanes{} - 128 * x.sums[rows[r] * x.groups + g];
        for (int64_t k = g * quads; k < (g + 1) * quads; ++k) {
            IntLanes weight[P];
            for (int p = 0; p < P; ++p) weight[p] = int_lanes(panel[p] + k * 64), ahead.line();
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) part[r][p] = dot_bytes(part[r][p], weight[p], pair_at(input[r] + 4 * k));
        }
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] += to_lanes(part[r][p]) * x.scales[rows[r] * x.groups + g];
    }
    for (int p = 0; p < P; ++p) {
        const Lanes scale = lanes(reinterpret_cast<const float*>(scales + p * w.panel_scale_bytes()));
        for (int r = 0; r < R; ++r) out[r][p] = acc[r][p] * scale;
    }
}

template <int R, int P>
__attribute__((noinline)) void product_i4(const Matrix& w, const uint8_t* data, const uint8_t* scales, const Inputs& x, const int32_t* rows, Ahead ahead, Outputs<R, P>& out) {
    const uint8_t* panel[P];
    const bf16* scale[P];
    const int8_t* input[R];
    for (int p = 0; p < P; ++p) panel[p] = data + p * w.panel_bytes();
    for (int p = 0; p < P; ++p) scale[p] = reinterpret_cast<const bf16*>(scales + p * w.panel_scale_bytes());
    for (int r = 0; r < R; ++r) input[r] = x.bytes + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const int64_t octets = x.group / 8;
    for (int64_t g = 0; g < x.groups; ++g) {
        IntLanes part[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) part[r][p] = IntLanes{} - 8 * x.sums[rows[r] * x.groups + g];
        for (int64_t k = g * octets; k < (g + 1) * octets; ++k) {
            IntLanes both[P];
            for (int p = 0; p < P; ++p) both[p] = int_lanes(panel[p] + k * 64), ahead.line();
            for (int half = 0; half < 2; ++half)
                for (int r = 0; r < R; ++r)
                    for (int p = 0; p < P; ++p)
                        part[r][p] = dot_bytes(part[r][p], (both[p] >> 4 * half) & 0x0F0F0F0F, pair_at(input[r] + 8 * k + 4 * half));
        }
        for (int p = 0; p < P; ++p) {
            const Lanes weight_scale = lanes(scale[p] + g * LANES);
            for (int r = 0; r < R; ++r) acc[r][p] += to_lanes(part[r][p]) * (weight_scale * x.scales[rows[r] * x.groups + g]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
inline void panel_product(const Matrix& w, int64_t which, int64_t first, const Inputs& x, const int32_t* rows, Ahead ahead, Outputs<R, P>& out) {
    const uint8_t *data = w.panel(which, first), *scales = w.panel_scale(which, first);
    switch (w.format) {
        case F32: return product_f32<R, P>(w, data, scales, x, rows, ahead, out);
        case BF16: return product_bf16<R, P>(w, data, scales, x, rows, ahead, out);
        case I8: return product_i8<R, P>(w, data, scales, x, rows, ahead, out);
        case I4: return product_i4<R, P>(w, data, scales, x, rows, ahead, out);
        default: return product_fp8<R, P>(w, data, scales, x, rows, ahead, out);
    }
}

// Call `use(row_number, panel, sixteen outputs)` for P panels from `first` on and every one of `num_rows` inputs; panels of
// one row ascend; `done` inputs are left out. Only the first block of rows asks for what comes next: later ones find their weights in the cache.
template <int P, typename Use>
inline void for_rows(const Matrix& w, int64_t which, int64_t first, const Inputs& x, const int32_t* rows, int64_t num_rows, Ahead ahead, Use&& use,
                     int64_t done = 0) {
    auto block = [&](auto size) {
        constexpr int R = decltype(size)::value;
        for (; done + R <= num_rows; done += R) {
            Outputs<R, P> out;
            panel_product<R, P>(w, which, first, x, rows + done, ahead, out);
            ahead = {w.panel(which, first), 0};
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) use(done + r, first + p, out[r][p]);
        }
    };
    if constexpr (P <= 2) block(std::integral_constant<int, 12>{});
    if constexpr (P == 2) block(std::integral_constant<int, 8>{});
    block(std::integral_constant<int, 4>{});
    block(std::integral_constant<int, 2>{});
    block(std::integral_constant<int, 1>{});
}

// The same for all panels of [first, last): two at a time, or four when rows are so few that the multipliers would wait.
// `after` is where the caller goes next; null: to the panels that follow these.
template <typename Use>
inline void for_panels(const Matrix& w, int64_t which, int64_t first, int64_t last, const Inputs& x, const int32_t* rows, int64_t num_rows,
                       const uint8_t* after, Use&& use) {
    auto ahead = [&](int64_t panel, int64_t count) -> Ahead {
        const uint8_t* here = w.panel(which, panel);
        const int64_t next = panel + count, bytes = count * w.panel_bytes();
        if (bytes > MAX_AHEAD_BYTES) return {here, 0};
        if (next >= last && after) return {after, 64};
        return which * w.panels() + next + count > w.count * w.panels() ? Ahead{here, 0} : Ahead{here + bytes, 64};
    };
    int64_t panel = first;
        for (; num_rows <= 4 && panel + 4 <= last; panel += 4) for_rows<4>(w, which, panel, x, rows, num_rows, ahead(panel, 4), use);
    const int64_t by_tiles = inputs_by_tiles(w, num_rows);
    for (; panel + 2 <= last; panel += 2) {
        if (by_tiles) for_tiles(w, which, panel, x, rows, by_tiles, use);
        for_rows<2>(w, which, panel, x, rows, num_rows, ahead(panel, 2), use, by_tiles);
    }
    if (panel < last) for_rows<1>(w, which, panel, x, rows, num_rows, ahead(panel, 1), use);
}

}  // namespace shoal
