// Weights packed for streaming, and the inputs they are multiplied with.
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
//   FP8   panel [cols/4][2][16][2] E4M3 bytes; one float scale per panel and 128 columns
//
// Four panels lie together line by line, a line being 64 bytes: first the first lines of all four, then the second ones.
// A product of few rows, which works on four panels to hide the latency of the multipliers, so reads one stream from
// beginning to end, and that is what the hardware's prefetching is made for: beside four streams of their own with the next
// ones asked for by instructions it reaches 1.3 times the bandwidth (docs/log.md). Scales are interleaved likewise. What is
// left of a matrix at its end, one to three panels, makes a narrower bundle.
//
// Inputs are float, bfloat16, or bytes with one scale per row and group of columns, quantised on the way in.

#pragma once

#include <vector>

#include "simd.h"

namespace shoal {

enum Format : int32_t { ABSENT = -1, F32 = 0, BF16 = 1, I8 = 2, I4 = 3, FP8 = 4 };

constexpr int64_t FP8_BLOCK = 128;
constexpr int64_t LINE = 64;    // bytes of a panel that lie together
constexpr int64_t BUNDLE = 4;  // panels that are interleaved

// Where a panel lies: its line k at `data + k * step`; its scales, a line of them for every group or block, likewise. The
// panels that follow it in the bundle lie LINE, or a line of scales, further on.
struct Panel {
    const uint8_t *data, *scale;
    int64_t step, scale_step;
};

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
            case BF16: return padded(cols, 2);
            case FP8: return padded(cols, 4);
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
    // Bytes of the scales of one panel that are used together: of 16 rows, or of an FP8 block.
    int64_t scale_line() const { return format == I8 ? LANES * 4 : format == I4 ? LANES * 2 : 4; }
    int64_t panel_scale_bytes() const {
        switch (format) {
            case I8: return scale_line();
            case I4: return padded_cols() / group * scale_line();
            case FP8: return padded(cols, FP8_BLOCK) / FP8_BLOCK * scale_line();
            default: return 0;
        }
    }
    Panel panel(int64_t which, int64_t index) const {
        const int64_t place = index % BUNDLE, first = which * panels() + index - place, width = std::min(BUNDLE, panels() - (index - place));
        return {data + first * panel_bytes() + place * LINE, scale + first * panel_scale_bytes() + place * scale_line(), width * LINE, width * scale_line()};
    }
};

// Rows of inputs in the form that a weight format multiplies: a view of memory that an `InputBuffer` owns.
struct Inputs {
    int32_t format = ABSENT;  // F32, BF16 or I8
    int64_t group = 1, groups = 0, cols = 0;
    int64_t stride = 0;        // elements from row to row: an odd number of cache lines, so that rows do not fight for one set
    float* floats = nullptr;
    bf16* pairs = nullptr;
    int8_t* bytes = nullptr;
    float* scales = nullptr;   // [row][group]
    int32_t* sums = nullptr;   // [row][group], of the bytes: what the weights' offset adds too much

    // Convert one input of `width` floats; columns beyond it become zero.
    void set(int64_t row, const float* x, int64_t width) const {
        if (format == F32) {
            float* to = floats + row * stride;
            std::memcpy(to, x, width * sizeof(float));
            std::fill(to + width, to + cols, 0.0f);
        } else if (format == BF16) {
            bf16* to = pairs + row * stride;
            int64_t k = 0;
            for (; k + LANES <= width; k += LANES) put_bf16(to + k, lanes(x + k));
            for (; k < width; ++k) to[k] = to_bf16(x[k]);
            for (; k < cols; ++k) to[k] = 0;
        } else {
            for (int64_t g = 0; g < groups; ++g) set_group(row, g, x + g * group, std::max<int64_t>(0, std::min(group, width - g * group)));
        }
    }

    // Symmetric: the largest magnitude becomes 127. A group with NaN or infinity gets the scale NaN, which spoils the output.
    void set_group(int64_t row, int64_t g, const float* x, int64_t width) const {
        const int64_t whole = width / LANES * LANES;
        Lanes tops = {};
        IntLanes spoilt = {};
        for (int64_t k = 0; k < whole; k += LANES) {
            const Lanes v = lanes(x + k), size = v < 0.0f ? -v : v;
            tops = max_lanes(tops, size);
            spoilt |= ~(size <= 3.4028234e38f);
        }
        float top = 0.0f;
        bool bad = false;
        for (int64_t i = 0; i < LANES; ++i) top = std::max(top, tops[i]), bad |= spoilt[i] != 0;
        for (int64_t k = whole; k < width; ++k) top = std::max(top, std::fabs(x[k])), bad |= !(std::fabs(x[k]) <= 3.4028234e38f);
        const float inverse = bad || top == 0.0f ? 0.0f : 127.0f / top;
        int8_t* to = bytes + row * stride + g * group;
        IntLanes totals = {};
        for (int64_t k = 0; k < whole; k += LANES) {
            const IntLanes code = nearest(lanes(x + k) * inverse);
            put_bytes(to + k, code);
            totals += code;
        }
        int32_t sum = 0;
        for (int64_t i = 0; i < LANES; ++i) sum += totals[i];
        for (int64_t k = whole; k < width; ++k) {
            const int32_t code = bad ? 0 : static_cast<int32_t>(std::nearbyint(x[k] * inverse));
            to[k] = static_cast<int8_t>(code);
            sum += code;
        }
        std::fill(to + width, to + group, static_cast<int8_t>(0));
        scales[row * groups + g] = bad ? NAN : top / 127.0f;
        sums[row * groups + g] = bad ? 0 : sum;  // codes of NaN are anything; the scale spoils the row
    }
};

// Memory for inputs, kept between passes. `reserve` is called before the threads start; `of` by any of them.
class InputBuffer {
  public:
    void reserve(int64_t rows, const Matrix& w) {
        if (w.format == ABSENT) return;
        const Inputs shape = shape_of(w);
        const int64_t elements = rows * shape.stride + LANES;
        if (shape.format == F32) grow(floats, elements);
        if (shape.format == BF16) grow(pairs, elements);
        if (shape.format == I8) grow(bytes, elements), grow(scales, rows * shape.groups), grow(sums, rows * shape.groups);
    }
    Inputs of(const Matrix& w) {
        Inputs view = shape_of(w);
        view.floats = floats.data(), view.pairs = pairs.data(), view.bytes = bytes.data();
        view.scales = scales.data(), view.sums = sums.data();
        return view;
    }

  private:
    static Inputs shape_of(const Matrix& w) {
        Inputs shape;
        shape.format = w.format == F32 ? F32 : (w.format == BF16 || w.format == FP8) ? BF16 : I8;
        const int64_t per_line = shape.format == F32 ? 16 : shape.format == BF16 ? 32 : 64;
        shape.cols = w.padded_cols();
        shape.stride = (padded(shape.cols, per_line) / per_line | 1) * per_line;
        if (shape.format == I8) shape.group = w.group, shape.groups = shape.cols / w.group;
        return shape;
    }
    std::vector<float> floats, scales;
    std::vector<bf16> pairs;
    std::vector<int8_t> bytes;
    std::vector<int32_t> sums;
};

}  // namespace shoal
