// Linear layers of training in bfloat16: packing of weights, forward, both gradients. See products.h.
//
// Reference: model/layers.py (`LinearProduct` through PyTorch); compared in tests/kernels/test_products.py.

#include <type_traits>

#include "products.h"

namespace {

using namespace shoal;

// Panels of 16 rows of `w`, pairs along the columns.
void pack_forward(const float* w, int64_t cols, bf16* out) {
    alignas(64) bf16 line[LANES][PAIR];
    for (int64_t c = 0; c < cols; c += PAIR) {
        const int64_t width = std::min<int64_t>(PAIR, cols - c);
        for (int64_t i = 0; i < LANES; ++i)
            for (int64_t j = 0; j < width; j += LANES) put_bf16(line[i] + j, lanes(w + i * cols + c + j));
        for (int64_t k = 0; k < width / 2; ++k)
            for (int64_t i = 0; i < LANES; ++i) std::memcpy(out + (c + 2 * k) * LANES + 2 * i, line[i] + 2 * k, 2 * sizeof(bf16));
    }
}

// One panel of 16 columns of `w`, pairs along the rows.
void pack_backward(const float* w, int64_t rows, int64_t cols, bf16* out) {
    alignas(64) bf16 first[LANES], second[LANES];
    for (int64_t r = 0; r < rows; r += 2) {
        put_bf16(first, lanes(w + r * cols));
        put_bf16(second, lanes(w + (r + 1) * cols));
        put_pairs(out + r * LANES, first, second);
    }
}

}  // namespace

extern "C" {

// Whether this build multiplies bfloat16 pairs by an instruction of its own.
int32_t shoal_multiplies_bf16() {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

// `count` weights [rows][cols] into panels for the forward product and for the gradient of the input. With `gated`, panels
// of the first and the second half of the rows alternate in the former, so that a gate meets its up-projection. `backward`
// may be null.
void pack_weights(const float* weight, int64_t count, int64_t rows, int64_t cols, int32_t gated, bf16* forward, bf16* backward) {
    const int64_t size = rows * cols, out_panels = rows / LANES, in_panels = backward ? cols / LANES : 0, tasks = out_panels + in_panels;
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t task = 0; task < count * tasks; ++task) {
        const int64_t which = task / tasks, p = task % tasks;
        const float* w = weight + which * size;
        if (p >= out_panels) {
            const int64_t panel = p - out_panels;
            pack_backward(w + panel * LANES, rows, cols, backward + which * size + panel * rows * LANES);
        } else {
            const int64_t half = out_panels / 2, place = !gated ? p : p < half ? 2 * p : 2 * (p - half) + 1;
            pack_forward(w + p * LANES * cols, cols, forward + which * size + place * cols * LANES);
        }
    }
}

// y = x W^T; x [rows][cols], y [rows][outs].
void linear_forward(const float* x, const bf16* panels, float* y, int64_t rows, int64_t cols, int64_t outs) {
#pragma omp parallel
    {
        Buffer<bf16> block(BLOCK * row_stride(cols));
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < rows; first += BLOCK) {
            const int64_t count = std::min(BLOCK, rows - first);
            for (int64_t r = 0; r < count; ++r) put_row(block.get() + r * row_stride(cols), x + (first + r) * cols, cols);
            clear_rows(block.get(), cols, count);
            block_times_panels<3>(block.get(), cols, count, panels, outs / LANES, [&](int64_t r, int64_t p, auto& acc) {
                constexpr int N = std::extent<std::remove_reference_t<decltype(acc)>, 1>::value;
                for (int64_t i = 0; i < std::min(TILE_ROWS, count - r); ++i)
                    for (int j = 0; j < N; ++j) put(y + (first + r + i) * outs + (p + j) * LANES, acc[i][j]);
            });
        }
    }
}

// grad_x = grad W (skipped when null) and grad_weight = grad^T x.
void linear_backward(const float* grad, const float* x, const bf16* panels, float* grad_x, float* grad_weight, int64_t rows, int64_t cols,
                     int64_t outs) {
    const int64_t pairs = (rows + 1) / 2, step = pairs * PAIR;
    Buffer<bf16> left(outs * 2 * pairs), right(cols * 2 * pairs);
#pragma omp parallel
    {
        Buffer<bf16> grads(BLOCK * row_stride(outs)), inputs(BLOCK * row_stride(cols));
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < rows; first += BLOCK) {
            const int64_t count = std::min(BLOCK, rows - first);
            for (int64_t r = 0; r < count; ++r) {
                put_row(grads.get() + r * row_stride(outs), grad + (first + r) * outs, outs);
                put_row(inputs.get() + r * row_stride(cols), x + (first + r) * cols, cols);
            }
            clear_rows(grads.get(), outs, count);
            clear_rows(inputs.get(), cols, count);
            block_to_columns(grads.get(), outs, count, left.get() + first * LANES, step);
            block_to_columns(inputs.get(), cols, count, right.get() + first * LANES, step);
            if (!grad_x) continue;
            block_times_panels<3>(grads.get(), outs, count, panels, cols / LANES, [&](int64_t r, int64_t p, auto& acc) {
                constexpr int N = std::extent<std::remove_reference_t<decltype(acc)>, 1>::value;
                for (int64_t i = 0; i < std::min(TILE_ROWS, count - r); ++i)
                    for (int j = 0; j < N; ++j) put(grad_x + (first + r + i) * cols + (p + j) * LANES, acc[i][j]);
            });
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < outer_tasks(cols); ++task) {
            const int64_t p = task * OUTER_PANELS;
            outer_columns(left.get(), {0, outs}, right.get(), cols, {p, std::min(cols / LANES, p + OUTER_PANELS)}, pairs, false, grad_weight);
        }
    }
}

}  // extern "C"
