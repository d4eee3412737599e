// Causal attention over packed documents with its products in bfloat16: inputs are rounded, sums, softmax and gradients of
// the softmax stay in float32, as in the published mixed precision. See products.h for the layouts.
//
// A task is one head of one row. Scores of eight queries are taken together against panels of sixteen positions; weights and
// score gradients of GROUP queries are kept in bfloat16 until they have been multiplied into the gradients of keys and values.
//
// Reference: kernels/reference.py; compared in tests/kernels/test_dispatch.py.

#include <vector>

#include "wide_attention.h"

namespace {

using namespace shoal;

constexpr int64_t GROUP = BLOCK;  // queries

struct Shape {
    int64_t batch, length, heads, qk_width, v_width, value_step;
    float scale;

    int64_t positions() const { return padded(length); }
    int64_t qk_step() const { return heads * qk_width; }
    int64_t v_stride() const { return heads * value_step; }
    int64_t out_step() const { return heads * v_width; }
    int64_t qk_base(int64_t b, int64_t h) const { return b * length * qk_step() + h * qk_width; }
    int64_t value_base(int64_t b, int64_t h) const { return b * length * v_stride() + h * value_step; }
    int64_t out_base(int64_t b, int64_t h) const { return b * length * out_step() + h * v_width; }
};

struct Forward {
    const float *query, *key, *value;
    const int64_t* first;
    float *out, *log_sum;
    Shape n;

    void head(int64_t b, int64_t h, Side& k, Side& v, bf16* queries, float* line, bf16* weight) const {
        const int64_t pitch = n.positions();
        k.read(key + n.qk_base(b, h), n.qk_step(), n.length), k.make_panels(pitch);
        v.read(value + n.value_base(b, h), n.v_stride(), n.length), v.make_columns(pitch);
        for (int64_t i = 0; i < n.length; i += TILE_ROWS) {
            const int64_t valid = std::min(TILE_ROWS, n.length - i);
            const Window w(first + b * n.length, i, valid);
            for (int64_t q = 0; q < valid; ++q) put_row(queries + q * row_stride(n.qk_width), query + n.qk_base(b, h) + (i + q) * n.qk_step(), n.qk_width);
            scores(queries, row_stride(n.qk_width), k, w, line, pitch);
            float norm[TILE_ROWS] = {};
            for (int64_t q = 0; q < valid; ++q) {
                float top;
                const float sum = weigh(line + q * pitch, w, q, n.scale, weight + q * row_stride(pitch), &top);
                norm[q] = 1.0f / sum;
                log_sum[(b * n.heads + h) * n.length + i + q] = top * n.scale + std::log(sum);
            }
            weighted_sum(weight, row_stride(pitch), v, w, norm, valid, out + n.out_base(b, h) + i * n.out_step(), n.out_step());
        }
    }

    void run() const {
#pragma omp parallel
        {
            const int64_t positions = n.positions();
            Side k(n.qk_width, positions), v(n.v_width, positions);
            // Rows of missing queries are multiplied like the others and dropped: they must be numbers.
            std::vector<bf16> queries(TILE_ROWS * row_stride(n.qk_width)), weight(TILE_ROWS * row_stride(positions));
            std::vector<float> line(TILE_ROWS * positions);
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t b = 0; b < n.batch; ++b)
                for (int64_t h = 0; h < n.heads; ++h) head(b, h, k, v, queries.data(), line.data(), weight.data());
        }
    }
};

// Memory of one thread for the backward pass. `weight` and `grad_score`: [GROUP][positions]; columns: pairs of queries.
struct Scratch {
    Side key, value;
    Buffer<bf16> query, grad, weight, grad_score, weight_columns, grad_score_columns, query_columns, grad_columns;
    std::vector<float> line, grad_line, grad_key, grad_value;
    float delta[GROUP];  // of each query, <out, grad_out>
    explicit Scratch(const Shape& n)
        : key(n.qk_width, n.positions()),
          value(n.v_width, n.positions()),
          query(GROUP * row_stride(n.qk_width)),
          grad(GROUP * row_stride(n.v_width)),
          weight(GROUP * row_stride(n.positions())),
          grad_score(GROUP * row_stride(n.positions())),
          weight_columns(GROUP * n.positions()),
          grad_score_columns(GROUP * n.positions()),
          query_columns(GROUP * n.qk_width),
          grad_columns(GROUP * n.v_width),
          line(TILE_ROWS * n.positions()),
          grad_line(TILE_ROWS * n.positions()),
          grad_key(n.positions() * n.qk_width),
          grad_value(n.positions() * n.v_width) {}
};

struct Backward {
    const float *grad_out, *query, *key, *value, *out, *log_sum;
    const int64_t* first;
    float *grad_query, *grad_key, *grad_value;
    Shape n;

    // Eight queries from i on, which are number `at` of their group: their weights and score gradients, and grad_query.
    void tile_of_queries(int64_t b, int64_t h, int64_t i, int64_t at, Scratch& s) const {
        const int64_t pitch = n.positions(), valid = std::min(TILE_ROWS, n.length - i);
        const Window w(first + b * n.length, i, valid);
        scores(s.query.get() + at * row_stride(n.qk_width), row_stride(n.qk_width), s.key, w, s.line.data(), pitch);
        scores(s.grad.get() + at * row_stride(n.v_width), row_stride(n.v_width), s.value, w, s.grad_line.data(), pitch);
        for (int64_t q = 0; q < valid; ++q) {
            const float delta = s.delta[at + q], offset = log_sum[(b * n.heads + h) * n.length + i + q];
            float *line = s.line.data() + q * pitch, *grad_line = s.grad_line.data() + q * pitch;
            std::fill(line, line + w.from[q] - w.begin, -INFINITY);
            std::fill(line + w.to[q] - w.begin, line + w.end - w.begin, -INFINITY);
            bf16* weight = s.weight.get() + (at + q) * row_stride(pitch) + w.begin;
            bf16* grad_score = s.grad_score.get() + (at + q) * row_stride(pitch) + w.begin;
            for (int64_t t = 0; t < w.end - w.begin; t += LANES) {
                const Lanes p = exp_lanes(lanes(line + t) * n.scale - offset);
                put(weight + t, p);
                put(grad_score + t, p * (lanes(grad_line + t) - delta) * n.scale);
            }
        }
        const float ones[TILE_ROWS] = {1, 1, 1, 1, 1, 1, 1, 1};
        weighted_sum(s.grad_score.get() + at * row_stride(pitch) + w.begin, row_stride(pitch), s.key, w, ones, valid,
                     grad_query + n.qk_base(b, h) + i * n.qk_step(), n.qk_step());
    }

    // Up to GROUP queries from `start` on.
    void group(int64_t b, int64_t h, int64_t start, Scratch& s) const {
        const int64_t count = std::min(GROUP, n.length - start), rows = padded(count, TILE_ROWS), stride = row_stride(n.positions());
        const int64_t* firsts = first + b * n.length + start;
        const int64_t begin = *std::min_element(firsts, firsts + count) / LANES * LANES, seen = padded(start + count) - begin;
        for (int64_t q = 0; q < count; ++q) {
            put_row(s.query.get() + q * row_stride(n.qk_width), query + n.qk_base(b, h) + (start + q) * n.qk_step(), n.qk_width);
            const int64_t at = n.out_base(b, h) + (start + q) * n.out_step();
            put_row(s.grad.get() + q * row_stride(n.v_width), grad_out + at, n.v_width);
            Lanes products = {};
            for (int64_t u = 0; u < n.v_width; u += LANES) products += lanes(out + at + u) * lanes(grad_out + at + u);
            s.delta[q] = sum_of(products);
        }
        clear_rows(s.query.get(), n.qk_width, count), clear_rows(s.grad.get(), n.v_width, count);
        for (int64_t q = 0; q < rows; ++q) {
            std::memset(s.weight.get() + q * stride + begin, 0, seen * sizeof(bf16));
            std::memset(s.grad_score.get() + q * stride + begin, 0, seen * sizeof(bf16));
        }
        for (int64_t q = 0; q < count; q += TILE_ROWS) tile_of_queries(b, h, start + q, q, s);
        const int64_t step = rows * LANES;
        block_to_columns(s.weight.get() + begin, stride, seen, rows, s.weight_columns.get(), step);
        block_to_columns(s.grad_score.get() + begin, stride, seen, rows, s.grad_score_columns.get(), step);
        block_to_columns(s.query.get(), row_stride(n.qk_width), n.qk_width, rows, s.query_columns.get(), step);
        block_to_columns(s.grad.get(), row_stride(n.v_width), n.v_width, rows, s.grad_columns.get(), step);
        outer_columns(s.grad_score_columns.get(), {0, seen}, s.query_columns.get(), n.qk_width, {0, n.qk_width / LANES}, rows / 2, true,
                      s.grad_key.data() + begin * n.qk_width);
        outer_columns(s.weight_columns.get(), {0, seen}, s.grad_columns.get(), n.v_width, {0, n.v_width / LANES}, rows / 2, true,
                      s.grad_value.data() + begin * n.v_width);
    }

    void head(int64_t b, int64_t h, Scratch& s) const {
        s.key.read(key + n.qk_base(b, h), n.qk_step(), n.length), s.key.make_panels(n.positions()), s.key.make_columns(n.positions());
        s.value.read(value + n.value_base(b, h), n.v_stride(), n.length), s.value.make_panels(n.positions());
        std::fill(s.grad_key.begin(), s.grad_key.end(), 0.0f);
        std::fill(s.grad_value.begin(), s.grad_value.end(), 0.0f);
        for (int64_t start = 0; start < n.length; start += GROUP) group(b, h, start, s);
        for (int64_t t = 0; t < n.length; ++t) {
            std::memcpy(grad_key + n.qk_base(b, h) + t * n.qk_step(), s.grad_key.data() + t * n.qk_width, n.qk_width * sizeof(float));
            std::memcpy(grad_value + n.out_base(b, h) + t * n.out_step(), s.grad_value.data() + t * n.v_width, n.v_width * sizeof(float));
        }
    }

    void run() const {
#pragma omp parallel
        {
            Scratch scratch(n);
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t b = 0; b < n.batch; ++b)
                for (int64_t h = 0; h < n.heads; ++h) head(b, h, scratch);
        }
    }
};

}  // namespace

extern "C" {

// As document_attention_forward and _backward (document_attention.cpp); widths are multiples of 16.
void document_attention_forward_bf16(const float* query, const float* key, const float* value, const int64_t* first, float* out, float* log_sum,
                                     int64_t batch, int64_t length, int64_t heads, int64_t qk_width, int64_t v_width, int64_t value_step,
                                     float scale) {
    Forward{query, key, value, first, out, log_sum, {batch, length, heads, qk_width, v_width, value_step, scale}}.run();
}

void document_attention_backward_bf16(const float* grad_out, const float* query, const float* key, const float* value, const int64_t* first,
                                      const float* out, const float* log_sum, float* grad_query, float* grad_key, float* grad_value,
                                      int64_t batch, int64_t length, int64_t heads, int64_t qk_width, int64_t v_width, int64_t value_step,
                                      float scale) {
    Backward{grad_out, query, key, value, out, log_sum, first, grad_query, grad_key, grad_value, {batch, length, heads, qk_width, v_width, value_step, scale}}.run();
}

}  // extern "C"
