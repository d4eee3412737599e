// Causal attention over packed documents in float32, forward and backward.
//
// Every task is one head of one row, so each sum is taken by one thread in a fixed order.
//
// Reference: kernels/reference.py; compared in tests/kernels/test_dispatch.py. The form in bfloat16, where the processor
// multiplies that, is document_attention_bf16.cpp.

#include <vector>

#include "simd.h"

namespace {

using namespace shoal;

// Attention takes eight queries at a time: every key, value or gradient vector that is loaded serves all of them, and as
// many sums run side by side, which hides the latency of the multiply-add.
constexpr int64_t QUERIES = 8;
constexpr int64_t SPARE = 2 * LANES;  // columns beyond the last position that vectors may touch

// Scratch of one thread for one (row, head). Keys and values are copied with their width padded to whole lanes, and once
// more transposed with SPARE columns, so that no inner loop has a remainder; padding is zero and adds nothing.
struct Scratch {
    int64_t length, qk_width, v_width, pitch;
    std::vector<float> key, key_t, value, value_t, query, grad, grad_key, grad_value, score, grad_score;
    Scratch(int64_t length, int64_t qk, int64_t v) : length(length), qk_width(padded(qk)), v_width(padded(v)), pitch(length + SPARE) {
        key_t.assign(qk_width * pitch, 0.0f);
        value.assign(length * v_width, 0.0f);
        query.assign(QUERIES * qk_width, 0.0f);
        score.assign(QUERIES * pitch, 0.0f);
    }
    void for_backward() {
        key.assign(length * qk_width, 0.0f);
        value_t.assign(v_width * pitch, 0.0f);
        grad.assign(QUERIES * v_width, 0.0f);
        grad_key.assign(length * qk_width, 0.0f);
        grad_value.assign(length * v_width, 0.0f);
        grad_score.assign(QUERIES * pitch, 0.0f);
    }
};

void copy_rows(const float* source, int64_t step, int64_t count, int64_t width, float* out, int64_t out_step) {
    for (int64_t t = 0; t < count; ++t) std::memcpy(out + t * out_step, source + t * step, width * sizeof(float));
}

// The next up to eight rows from `source` into `out`; missing ones are zero.
void copy_block(const float* source, int64_t step, int64_t count, int64_t width, float* out, int64_t out_step) {
    copy_rows(source, step, count, width, out, out_step);
    for (int64_t q = count; q < QUERIES; ++q) std::fill(out + q * out_step, out + q * out_step + width, 0.0f);
}

void transpose(const float* source, int64_t step, int64_t count, int64_t width, float* out, int64_t pitch) {
    for (int64_t t0 = 0; t0 < count; t0 += LANES)
        for (int64_t d = 0; d < width; ++d)
            for (int64_t t = t0; t < std::min(count, t0 + LANES); ++t) out[d * pitch + t] = source[t * step + d];
}

// line[q][t] = sum_d x[q][d] * matrix_t[d][first + t] for t < count, rounded up to SPARE.
inline void scores(const float* x, int64_t width, const float* matrix_t, int64_t pitch, int64_t first, int64_t count, float* line) {
    for (int64_t t = 0; t < count; t += SPARE) {
        Lanes sum[QUERIES][2] = {};
        const float* column = matrix_t + first + t;
        for (int64_t d = 0; d < width; ++d) {
            const Lanes low = lanes(column + d * pitch), high = lanes(column + d * pitch + LANES);
            for (int64_t q = 0; q < QUERIES; ++q) {
                sum[q][0] += x[q * width + d] * low;
                sum[q][1] += x[q * width + d] * high;
            }
        }
        for (int64_t q = 0; q < QUERIES; ++q) put(line + q * pitch + t, sum[q][0]), put(line + q * pitch + t + LANES, sum[q][1]);
    }
}

// out[q][d .. d + 16 V) = sum_t weight[q][t] * matrix[t][d ..]
template <int V>
inline void weighted_columns(const float* weight, int64_t pitch, const float* matrix, int64_t count, int64_t width, Lanes (&sum)[QUERIES][V]) {
    for (int64_t q = 0; q < QUERIES; ++q)
        for (int v = 0; v < V; ++v) sum[q][v] = Lanes{};
    for (int64_t t = 0; t < count; ++t)
        for (int v = 0; v < V; ++v) {
            const Lanes row = lanes(matrix + t * width + v * LANES);
            for (int64_t q = 0; q < QUERIES; ++q) sum[q][v] += weight[q * pitch + t] * row;
        }
}

// The first `valid` of the sums into rows of `out`, whose width need not be whole lanes.
template <int V>
void put_columns(const Lanes (&sum)[QUERIES][V], int64_t valid, int64_t d, float* out, int64_t step, int64_t out_width) {
    for (int64_t q = 0; q < valid; ++q)
        for (int v = 0; v < V; ++v) {
            const int64_t at = d + v * LANES, count = std::min(LANES, out_width - at);
            float* to = out + q * step + at;
            if (count == LANES)
                put(to, sum[q][v]);
            else
                for (int64_t lane = 0; lane < count; ++lane) to[lane] = sum[q][v][lane];
        }
}

void weighted_rows(const float* weight, int64_t pitch, const float* matrix, int64_t count, int64_t width, int64_t valid, float* out,
                   int64_t step, int64_t out_width) {
    int64_t d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES) {
        Lanes sum[QUERIES][2];
        weighted_columns<2>(weight, pitch, matrix + d, count, width, sum);
        put_columns<2>(sum, valid, d, out, step, out_width);
    }
    for (; d < width; d += LANES) {
        Lanes sum[QUERIES][1];
        weighted_columns<1>(weight, pitch, matrix + d, count, width, sum);
        put_columns<1>(sum, valid, d, out, step, out_width);
    }
}

// matrix[t][d] += sum_q weight[q][t] * x[q][d]
void add_outer(const float* weight, int64_t pitch, const float* x, int64_t count, int64_t width, float* matrix) {
    for (int64_t d = 0; d < width; d += LANES) {
        Lanes row[QUERIES];
        for (int64_t q = 0; q < QUERIES; ++q) row[q] = lanes(x + q * width + d);
        for (int64_t t = 0; t < count; ++t) {
            float* to = matrix + t * width + d;
            Lanes low = lanes(to), high = {};
            for (int64_t q = 0; q < QUERIES; q += 2) {
                low += weight[q * pitch + t] * row[q];
                high += weight[(q + 1) * pitch + t] * row[q + 1];
            }
            put(to, low + high);
        }
    }
}

// Which positions a block of queries sees together, and each alone.
struct Window {
    int64_t begin, count;
    int64_t from[QUERIES], to[QUERIES];  // inside the window; empty for missing queries
    Window(const int64_t* first, int64_t i, int64_t valid) {
        begin = first[i];
        for (int64_t q = 1; q < valid; ++q) begin = std::min(begin, first[i + q]);
        count = i + valid - begin;
        for (int64_t q = 0; q < QUERIES; ++q) {
            from[q] = q < valid ? first[i + q] - begin : 0;
            to[q] = q < valid ? i + q + 1 - begin : 0;
        }
    }
    void clear_outside(float* line, int64_t q) const {
        std::fill(line, line + from[q], 0.0f);
        std::fill(line + to[q], line + count, 0.0f);
    }
};

// Softmax of line[from .. to), in place, whole vectors at a time; returns the log of its normaliser. Up to 15 numbers
// beyond `to` become zero.
float softmax_line(float* line, int64_t from, int64_t to, float scale) {
    const int64_t end = from + padded(to - from);
    std::fill(line + to, line + end, -INFINITY);
    Lanes tops = lanes(line + from);
    for (int64_t t = from + LANES; t < end; t += LANES) tops = max_lanes(tops, lanes(line + t));
    float top = tops[0];
    for (int64_t i = 1; i < LANES; ++i) top = std::max(top, tops[i]);
    Lanes sums = {};
    for (int64_t t = from; t < end; t += LANES) {
        const Lanes weight = exp_lanes((lanes(line + t) - top) * scale);
        put(line + t, weight);
        sums += weight;
    }
    const float sum = sum_of(sums), norm = 1.0f / sum;
    for (int64_t t = from; t < end; t += LANES) put(line + t, lanes(line + t) * norm);
    return top * scale + std::log(sum);
}

// Weights and score gradients of one query from its scores and the products of its gradient with the values.
void softmax_backward_line(float* p, float* ds, int64_t from, int64_t to, float scale, float log_sum, float delta) {
    for (int64_t t = from; t < to; t += LANES) {
        const Lanes weight = exp_lanes(lanes(p + t) * scale - log_sum);
        put(p + t, weight);
        put(ds + t, weight * (lanes(ds + t) - delta) * scale);
    }
}

}  // namespace

extern "C" {

// Attention of position s to positions first[b][s] .. s of its own row: causal, inside one packed document.
// query, key: [B, S, H, Q]; value: [B, S, H, U] with `value_step` floats between heads (so that a slice of a wider array
// needs no copy; between positions it is H * value_step). out: [B, S, H, U]; log_sum: [B, H, S].
void document_attention_forward(const float* query, const float* key, const float* value, const int64_t* first, float* out,
                                float* log_sum, int64_t batch, int64_t length, int64_t heads, int64_t qk_width, int64_t v_width,
                                int64_t value_step, float scale) {
#pragma omp parallel
    {
        Scratch s(length, qk_width, v_width);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t qk_step = heads * qk_width, v_stride = heads * value_step, base = b * length * qk_step + h * qk_width;
                transpose(key + base, qk_step, length, qk_width, s.key_t.data(), s.pitch);
                copy_rows(value + b * length * v_stride + h * value_step, v_stride, length, v_width, s.value.data(), s.v_width);
                for (int64_t i = 0; i < length; i += QUERIES) {
                    const int64_t valid = std::min(QUERIES, length - i);
                    const Window w(first + b * length, i, valid);
                    copy_block(query + base + i * qk_step, qk_step, valid, qk_width, s.query.data(), s.qk_width);
                    scores(s.query.data(), s.qk_width, s.key_t.data(), s.pitch, w.begin, w.count, s.score.data());
                    for (int64_t q = 0; q < QUERIES; ++q) {
                        float* line = s.score.data() + q * s.pitch;
                        if (q < valid) log_sum[(b * heads + h) * length + i + q] = softmax_line(line, w.from[q], w.to[q], scale);
                        w.clear_outside(line, q);
                    }
                    weighted_rows(s.score.data(), s.pitch, s.value.data() + w.begin * s.v_width, w.count, s.v_width, valid,
                                  out + ((b * length + i) * heads + h) * v_width, heads * v_width, v_width);
                }
            }
    }
}

// Gradients; grad_query, grad_key [B, S, H, Q] and grad_value [B, S, H, U] are contiguous and need not be zeroed.
void document_attention_backward(const float* grad_out, const float* query, const float* key, const float* value, const int64_t* first,
                                 const float* out, const float* log_sum, float* grad_query, float* grad_key, float* grad_value,
                                 int64_t batch, int64_t length, int64_t heads, int64_t qk_width, int64_t v_width, int64_t value_step,
                                 float scale) {
#pragma omp parallel
    {
        Scratch s(length, qk_width, v_width);
        s.for_backward();
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t qk_step = heads * qk_width, v_stride = heads * value_step, out_step = heads * v_width;
                const int64_t qk_base = b * length * qk_step + h * qk_width, out_base = b * length * out_step + h * v_width;
                const float* v0 = value + b * length * v_stride + h * value_step;
                transpose(key + qk_base, qk_step, length, qk_width, s.key_t.data(), s.pitch);
                transpose(v0, v_stride, length, v_width, s.value_t.data(), s.pitch);
                copy_rows(key + qk_base, qk_step, length, qk_width, s.key.data(), s.qk_width);
                std::fill(s.grad_key.begin(), s.grad_key.end(), 0.0f);
                std::fill(s.grad_value.begin(), s.grad_value.end(), 0.0f);
                for (int64_t i = 0; i < length; i += QUERIES) {
                    const int64_t valid = std::min(QUERIES, length - i);
                    const Window w(first + b * length, i, valid);
                    copy_block(query + qk_base + i * qk_step, qk_step, valid, qk_width, s.query.data(), s.qk_width);
                    copy_block(grad_out + out_base + i * out_step, out_step, valid, v_width, s.grad.data(), s.v_width);
                    scores(s.query.data(), s.qk_width, s.key_t.data(), s.pitch, w.begin, w.count, s.score.data());
                    scores(s.grad.data(), s.v_width, s.value_t.data(), s.pitch, w.begin, w.count, s.grad_score.data());
                    for (int64_t q = 0; q < QUERIES; ++q) {
                        float *p = s.score.data() + q * s.pitch, *ds = s.grad_score.data() + q * s.pitch;
                        if (q < valid) {
                            const float offset = log_sum[(b * heads + h) * length + i + q];
                            const float *o = out + out_base + (i + q) * out_step, *go = s.grad.data() + q * s.v_width;
                            float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
                            for (int64_t u = 0; u < v_width; ++u) delta += go[u] * o[u];
                            softmax_backward_line(p, ds, w.from[q], w.to[q], scale, offset, delta);
                        }
                        w.clear_outside(p, q);
                        w.clear_outside(ds, q);
                    }
                    weighted_rows(s.grad_score.data(), s.pitch, s.key.data() + w.begin * s.qk_width, w.count, s.qk_width, valid,
                                  grad_query + qk_base + i * qk_step, qk_step, qk_width);
                    add_outer(s.grad_score.data(), s.pitch, s.query.data(), w.count, s.qk_width, s.grad_key.data() + w.begin * s.qk_width);
                    add_outer(s.score.data(), s.pitch, s.grad.data(), w.count, s.v_width, s.grad_value.data() + w.begin * s.v_width);
                }
                for (int64_t t = 0; t < length; ++t) {
                    std::memcpy(grad_key + qk_base + t * qk_step, s.grad_key.data() + t * s.qk_width, qk_width * sizeof(float));
                    std::memcpy(grad_value + out_base + t * out_step, s.grad_value.data() + t * s.v_width, v_width * sizeof(float));
                }
            }
    }
}

}  // extern "C"
