// Weights packed for few rows, and the products with them.
//
// A matrix `[rows, cols]` is cut into panels of 16 rows. Inside a panel the columns run outermost, so that one vector holds
// the same columns of 16 outputs: a product streams the panel once, keeps one accumulator per (input row, panel), needs no
// horizontal sums, and adds in an order that depends on nothing but the number of columns. Hence *batch invariance*: a row
// gives the same bits whether it is alone, one of eight, or part of a prefill (tests/kernels/test_packed.py).
//
//   F32   panel [cols][16] float
//   BF16  panel [cols/2][16][2] bfloat16: also the operand layout of AMX tiles
//   I8    panel [cols/4][16][4] bytes, weight + 128; one float scale per row
//   I4    panel [cols/8][16][4] bytes, weight + 8, low nibbles first four columns, high nibbles the next four;
//         one bfloat16 scale per row and group of columns
//   FP8   panel [cols/2][16][2] E4M3 bytes; one float scale per panel and 128 columns
//
// Inputs ("operands") are float, bfloat16, or bytes with one scale per row and group of columns, quantised on the way in.

#pragma once

#include <vector>

#include "simd.h"

namespace shoal {

enum Format : int32_t { ABSENT = -1, F32 = 0, BF16 = 1, I8 = 2, I4 = 3, FP8 = 4 };

constexpr int64_t FP8_BLOCK = 128;

// `count` matrices of one shape, one after the other. Mirrors kernels/packed.py.
struct Matrix {
    int32_t format;
    int32_t group;  // columns that share a scale (I8: of the operand only)
    int64_t rows, cols, count;
    const uint8_t* data;
    const uint8_t* scale;

    int64_t padded_cols() const {
        switch (format) {
            case F32: return cols;
            case BF16: case FP8: return padded(cols, 2);
            default: return padded(cols, group);
        }
    }
    int64_t panels() const { return padded(rows) / LANES; }
    int64_t panel_bytes() const {
        switch (format) {
            case F32: return padded_cols() * LANES * 4;
            case BF16: return padded_cols() * LANES * 2;
            case I4: return padded_cols() * LANES / 2;
            default: return padded_cols() * LANES;
        }
    }
    int64_t panel_scale_bytes() const {
        switch (format) {
            case I8: return LANES * 4;
            case I4: return padded_cols() / group * LANES * 2;
            case FP8: return padded(cols, FP8_BLOCK) / FP8_BLOCK * 4;
            default: return 0;
        }
    }
    const uint8_t* panel(int64_t which, int64_t index) const { return data + (which * panels() + index) * panel_bytes(); }
    const uint8_t* panel_scale(int64_t which, int64_t index) const {
        return scale + (which * panels() + index) * panel_scale_bytes();
    }
};

// Rows of inputs in the form that a weight format multiplies. Storage is kept between calls.
struct Operand {
    int32_t format = ABSENT;  // F32, BF16 or I8
    int64_t group = 1, stride = 0, groups = 0;
    std::vector<float> floats, scales;
    std::vector<bf16> pairs;
    std::vector<int8_t> bytes;
    std::vector<int32_t> sums;

    // Make room for `rows` inputs of the matrices like `w`.
    void reserve(int64_t rows, const Matrix& w) {
        format = w.format == F32 ? F32 : (w.format == BF16 || w.format == FP8) ? BF16 : I8;
        stride = w.padded_cols();
        group = format == I8 ? w.group : 1;
        groups = format == I8 ? stride / group : 0;
        const size_t elements = static_cast<size_t>(rows) * stride + LANES;
        if (format == F32 && floats.size() < elements) floats.resize(elements);
        if (format == BF16 && pairs.size() < elements) pairs.resize(elements);
        if (format == I8) {
            if (bytes.size() < elements) bytes.resize(elements);
            if (scales.size() < static_cast<size_t>(rows) * groups) scales.resize(rows * groups), sums.resize(rows * groups);
        }
    }

    // Convert one input of `width` floats.
    void set(int64_t row, const float* x, int64_t width) {
        if (format == F32) {
            float* to = floats.data() + row * stride;
            std::memcpy(to, x, width * sizeof(float));
            std::fill(to + width, to + stride, 0.0f);
        } else if (format == BF16) {
            bf16* to = pairs.data() + row * stride;
            int64_t k = 0;
            for (; k + LANES <= width; k += LANES) put_bf16(to + k, lanes(x + k));
            for (; k < width; ++k) to[k] = to_bf16(x[k]);
            for (; k < stride; ++k) to[k] = 0;
        } else {
            for (int64_t g = 0; g < groups; ++g) set_group(row, g, x + g * group, std::max<int64_t>(0, std::min(group, width - g * group)));
        }
    }

    void set_group(int64_t row, int64_t g, const float* x, int64_t width) {
        float top = 0.0f;
        int32_t spoilt = 0;  // a maximum would forget NaN
#pragma omp simd reduction(max : top) reduction(| : spoilt)
        for (int64_t k = 0; k < width; ++k) {
            const float size = std::fabs(x[k]);
            top = std::max(top, size);
            spoilt |= !(size <= 3.4028234e38f);
        }
        const float scale = top / 127.0f, inverse = top > 0.0f ? 127.0f / top : 0.0f;
        int8_t* to = bytes.data() + row * stride + g * group;
        int32_t sum = 0;
        for (int64_t k = 0; k < width; ++k) {
            const int32_t q = static_cast<int32_t>(std::nearbyint(x[k] * inverse));
            to[k] = static_cast<int8_t>(q);
            sum += q;
        }
        std::fill(to + width, to + group, static_cast<int8_t>(0));
        scales[row * groups + g] = spoilt ? NAN : scale;
        sums[row * groups + g] = sum;
    }
};

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

// out[r][p] = 16 outputs of panel `first + p` for input row `rows[r]`.
template <int R, int P>
inline void panel_product_f32(const Matrix& w, int64_t which, int64_t first, const Operand& x, const int32_t* rows, Lanes (&out)[R][P]) {
    const float* panel[P];
    const float* input[R];
    for (int p = 0; p < P; ++p) panel[p] = reinterpret_cast<const float*>(w.panel(which, first + p));
    for (int r = 0; r < R; ++r) input[r] = x.floats.data() + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    for (int64_t k = 0; k < w.cols; ++k)
        for (int p = 0; p < P; ++p) {
            const Lanes weight = lanes(panel[p] + k * LANES);
            for (int r = 0; r < R; ++r) acc[r][p] += weight * input[r][k];
        }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
inline void panel_product_bf16(const Matrix& w, int64_t which, int64_t first, const Operand& x, const int32_t* rows, Lanes (&out)[R][P]) {
    const uint8_t* panel[P];
    const bf16* input[R];
    for (int p = 0; p < P; ++p) panel[p] = w.panel(which, first + p);
    for (int r = 0; r < R; ++r) input[r] = x.pairs.data() + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const int64_t pairs = x.stride / 2;
    for (int64_t k = 0; k < pairs; ++k)
        for (int p = 0; p < P; ++p) {
            const IntLanes weight = int_lanes(panel[p] + k * 64);
            for (int r = 0; r < R; ++r) acc[r][p] = dot_pairs(acc[r][p], weight, pair_at(input[r] + 2 * k));
        }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
inline void panel_product_fp8(const Matrix& w, int64_t which, int64_t first, const Operand& x, const int32_t* rows, Lanes (&out)[R][P]) {
    const bf16* input[R];
    for (int r = 0; r < R; ++r) input[r] = x.pairs.data() + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const int64_t pairs = x.stride / 2;
    for (int64_t start = 0, block = 0; start < pairs; start += FP8_BLOCK / 2, ++block) {
        const int64_t stop = std::min(pairs, start + FP8_BLOCK / 2);
        for (int p = 0; p < P; ++p) {
            const uint8_t* panel = w.panel(which, first + p);
            const float scale = reinterpret_cast<const float*>(w.panel_scale(which, first + p))[block];
            Lanes part[R] = {};
            for (int64_t k = start; k < stop; ++k) {
                const IntLanes weight = e4m3_pairs(panel + k * 32);
                for (int r = 0; r < R; ++r) part[r] = dot_pairs(part[r], weight, pair_at(input[r] + 2 * k));
            }
            for (int r = 0; r < R; ++r) acc[r][p] += part[r] * scale;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p];
}

template <int R, int P>
inline void panel_product_i8(const Matrix& w, int64_t which, int64_t first, const Operand& x, const int32_t* rows, Lanes (&out)[R][P]) {
    const uint8_t* panel[P];
    const int8_t* input[R];
    for (int p = 0; p < P; ++p) panel[p] = w.panel(which, first + p);
    for (int r = 0; r < R; ++r) input[r] = x.bytes.data() + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const int64_t quads = x.group / 4;
    for (int64_t g = 0; g < x.groups; ++g) {
        IntLanes part[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) part[r][p] = IntLanes{} - 128 * x.sums[rows[r] * x.groups + g];
        for (int64_t k = g * quads; k < (g + 1) * quads; ++k)
            for (int p = 0; p < P; ++p) {
                const IntLanes weight = int_lanes(panel[p] + k * 64);
                for (int r = 0; r < R; ++r) part[r][p] = dot_bytes(part[r][p], weight, pair_at(input[r] + 4 * k));
            }
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) acc[r][p] += to_lanes(part[r][p]) * x.scales[rows[r] * x.groups + g];
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) out[r][p] = acc[r][p] * lanes(reinterpret_cast<const float*>(w.panel_scale(which, first + p)));
}

template <int R, int P>
inline void panel_product_i4(const Matrix& w, int64_t which, int64_t first, const Operand& x, const int32_t* rows, Lanes (&out)[R][P]) {
    const uint8_t* panel[P];
    const bf16* scale[P];
    const int8_t* input[R];
    for (int p = 0; p < P; ++p) panel[p] = w.panel(which, first + p);
    for (int p = 0; p < P; ++p) scale[p] = reinterpret_cast<const bf16*>(w.panel_scale(which, first + p));
    for (int r = 0; r < R; ++r) input[r] = x.bytes.data() + rows[r] * x.stride;
    Lanes acc[R][P] = {};
    const int64_t octets = x.group / 8;
    for (int64_t g = 0; g < x.groups; ++g) {
        IntLanes part[R][P];
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < P; ++p) part[r][p] = IntLanes{} - 8 * x.sums[rows[r] * x.groups + g];
        for (int64_t k = g * octets; k < (g + 1) * octets; ++k)
            for (int p = 0; p < P; ++p) {
                const IntLanes both = int_lanes(panel[p] + k * 64);
                const IntLanes low = both & 0x0F0F0F0F, high = (both >> 4) & 0x0F0F0F0F;
                for (int r = 0; r < R; ++r) {
                    part[r][p] = dot_bytes(part[r][p], low, pair_at(input[r] + 8 * k));
                    part[r][p] = dot_bytes(part[r][p], high, pair_at(input[r] + 8 * k + 4));
                }
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
inline void panel_product(const Matrix& w, int64_t which, int64_t first, const Operand& x, const int32_t* rows, Lanes (&out)[R][P]) {
    switch (w.format) {
        case F32: return panel_product_f32<R, P>(w, which, first, x, rows, out);
        case BF16: return panel_product_bf16<R, P>(w, which, first, x, rows, out);
        case I8: return panel_product_i8<R, P>(w, which, first, x, rows, out);
        case I4: return panel_product_i4<R, P>(w, which, first, x, rows, out);
        default: return panel_product_fp8<R, P>(w, which, first, x, rows, out);
    }
}

// Call `use(row_number, panel_offset, sixteen outputs)` for P panels and every one of `num_rows` inputs.
template <int P, typename Use>
inline void for_rows(const Matrix& w, int64_t which, int64_t first, const Operand& x, const int32_t* rows, int64_t num_rows, Use&& use) {
    int64_t done = 0;
    auto block = [&](auto size) {
        constexpr int R = decltype(size)::value;
        for (; done + R <= num_rows; done += R) {
            Lanes out[R][P];
            panel_product<R, P>(w, which, first, x, rows + done, out);
            for (int r = 0; r < R; ++r)
                for (int p = 0; p < P; ++p) use(done + r, p, out[r][p]);
        }
    };
    if constexpr (P <= 2) block(std::integral_constant<int, P == 1 ? 12 : 8>{});
    if constexpr (P <= 2) block(std::integral_constant<int, 4>{});
    block(std::integral_constant<int, 2>{});
    block(std::integral_constant<int, 1>{});
}

// The same for all panels of [first, last): two at a time, or four when so few rows would leave the multipliers waiting.
template <typename Use>
inline void for_panels(const Matrix& w, int64_t which, int64_t first, int64_t last, const Operand& x, const int32_t* rows, int64_t num_rows, Use&& use) {
    int64_t panel = first;
    for (; num_rows <= 2 && panel + 4 <= last; panel += 4)
        for_rows<4>(w, which, panel, x, rows, num_rows, [&](int64_t r, int p, Lanes v) { use(r, panel + p, v); });
    for (; panel + 2 <= last; panel += 2)
        for_rows<2>(w, which, panel, x, rows, num_rows, [&](int64_t r, int p, Lanes v) { use(r, panel + p, v); });
    if (panel < last)
        for_rows<1>(w, which, panel, x, rows, num_rows, [&](int64_t r, int, Lanes v) { use(r, panel, v); });
}

}  // namespace shoal
