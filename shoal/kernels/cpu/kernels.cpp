// Fused CPU kernels of Shoal: RMSNorm, SwiGLU and causal attention over packed documents, forward and backward.
//
// Why: at small widths a training step on a CPU is not limited by its matrix products but by the passes over memory
// around them. Each kernel here does in one pass what PyTorch does in five to ten. Plain C++ that the compiler
// vectorises for the machine it is built on; every function has a PyTorch reference beside it (kernels/reference.py) and
// a test that compares the two. C interface: pointers to contiguous arrays unless a stride is named. No allocation
// survives a call, nothing is read or written outside the arrays, sizes are checked by the Python side.
//
// OpenMP is the runtime PyTorch has already loaded (same library name), so there is one pool of threads, not two.

#include <vector>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

using namespace shoal;

int num_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <typename T>
void swiglu_forward(const T* gate_up, T* act, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * width;
        const T* up = gate + width;
        T* out = act + row * width;
#pragma omp simd
        for (int64_t f = 0; f < width; ++f) {
            float g = load(gate, f);
            store(out, f, g / (1.0f + fast_exp(-g)) * load(up, f));
        }
    }
}

template <typename T>
void swiglu_backward(const T* grad_act, const T* gate_up, T* grad_gate_up, T* act, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * width;
        const T* up = gate + width;
        const T* grad = grad_act + row * width;
        T* grad_gate = grad_gate_up + row * 2 * width;
        T* grad_up = grad_gate + width;
        T* out = act + row * width;
#pragma omp simd
        for (int64_t f = 0; f < width; ++f) {
            float g = load(gate, f), u = load(up, f), d = load(grad, f);
            float sigmoid = 1.0f / (1.0f + fast_exp(-g));
            float silu = g * sigmoid;
            store(out, f, silu * u);
            store(grad_up, f, d * silu);
            store(grad_gate, f, d * u * sigmoid * (1.0f + g * (1.0f - sigmoid)));
        }
    }
}

// Scratch of one thread for one (row, head). Keys and values are copied with their width padded to whole lanes, and once
// more transposed with LANES spare columns, so that no inner loop has a remainder; padding is zero and adds nothing.
struct Scratch {
    int64_t length, qk_width, v_width;
    std::vector<float> key, key_t, value, value_t, query, grad, grad_key, grad_value, score, grad_score;
    Scratch(int64_t length, int64_t qk, int64_t v) : length(length), qk_width(padded(qk)), v_width(padded(v)) {
        key.assign(length * qk_width, 0.0f);
        key_t.assign(qk_width * (length + LANES), 0.0f);
        value.assign(length * v_width, 0.0f);
        query.assign(qk_width, 0.0f);
        score.assign(length + LANES, 0.0f);
    }
    void for_backward() {
        value_t.assign(v_width * (length + LANES), 0.0f);
        grad.assign(v_width, 0.0f);
        grad_key.assign(length * qk_width, 0.0f);
        grad_value.assign(length * v_width, 0.0f);
        grad_score.assign(length + LANES, 0.0f);
    }
};

void copy_rows(const float* source, int64_t step, int64_t count, int64_t width, float* out, int64_t out_step) {
    for (int64_t t = 0; t < count; ++t) std::memcpy(out + t * out_step, source + t * step, width * sizeof(float));
}

void transpose(const float* source, int64_t step, int64_t count, int64_t width, float* out) {
    for (int64_t d = 0; d < width; ++d)
        for (int64_t t = 0; t < count; ++t) out[d * (count + LANES) + t] = source[t * step + d];
}

// line[t] = sum_d vector[d] * matrix_t[d][first + t] for t < padded(count)
inline void scores(const float* vector, const float* matrix_t, int64_t width, int64_t stride, int64_t first, int64_t count, float* line) {
    for (int64_t t = 0; t < count; t += LANES) {
        Lanes sum = {};
        const float* column = matrix_t + first + t;
        for (int64_t d = 0; d < width; ++d) sum += vector[d] * lanes(column + d * stride);
        put(line + t, sum);
    }
}

// out[d] = sum_t weight[t] * matrix[t][d] for d < padded width
inline void weighted_rows(const float* weight, const float* matrix, int64_t count, int64_t width, float* out, int64_t out_width) {
    for (int64_t d = 0; d < width; d += LANES) {
        Lanes sum = {};
        for (int64_t t = 0; t < count; ++t) sum += weight[t] * lanes(matrix + t * width + d);
        const int64_t valid = std::min(LANES, out_width - d);
        if (valid == LANES)
            put(out + d, sum);
        else
            for (int64_t lane = 0; lane < valid; ++lane) out[d + lane] = sum[lane];
    }
}

// matrix[t][d] += weight[t] * vector[d]
inline void add_outer(const float* weight, const float* vector, int64_t count, int64_t width, float* matrix) {
    for (int64_t d = 0; d < width; d += LANES) {
        const Lanes value = lanes(vector + d);
        for (int64_t t = 0; t < count; ++t) put(matrix + t * width + d, lanes(matrix + t * width + d) + weight[t] * value);
    }
}

}  // namespace

extern "C" {

int shoal_abi_version() { return 2; }

// out = x / rms(x) * weight; inverse_rms is kept for the backward pass.
void rms_norm_forward(const float* x, const float* weight, float* out, float* inverse_rms, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* in = x + row * width;
        float* to = out + row * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < width; ++d) sum += in[d] * in[d];
        const float scale = 1.0f / std::sqrt(sum / width + eps);
        inverse_rms[row] = scale;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) to[d] = in[d] * scale * weight[d];
    }
}

// grad_weight must come in zeroed.
void rms_norm_backward(const float* grad, const float* x, const float* weight, const float* inverse_rms, float* grad_x,
                       float* grad_weight, int64_t rows, int64_t width) {
    std::vector<float> partial(static_cast<size_t>(num_threads()) * width, 0.0f);
#pragma omp parallel
    {
        float* mine = partial.data() + static_cast<int64_t>(thread_index()) * width;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* g = grad + row * width;
            const float* in = x + row * width;
            float* to = grad_x + row * width;
            const float scale = inverse_rms[row];
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t d = 0; d < width; ++d) dot += g[d] * weight[d] * in[d];
            const float pull = dot * scale * scale * scale / width;
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) {
                to[d] = g[d] * weight[d] * scale - in[d] * pull;
                mine[d] += g[d] * in[d] * scale;
            }
        }
    }
    for (int thread = 0; thread < num_threads(); ++thread)
        for (int64_t d = 0; d < width; ++d) grad_weight[d] += partial[static_cast<size_t>(thread) * width + d];
}

void swiglu_forward_f32(const float* gate_up, float* act, int64_t rows, int64_t width) { swiglu_forward(gate_up, act, rows, width); }
void swiglu_forward_bf16(const bf16* gate_up, bf16* act, int64_t rows, int64_t width) { swiglu_forward(gate_up, act, rows, width); }
void swiglu_backward_f32(const float* grad_act, const float* gate_up, float* grad_gate_up, float* act, int64_t rows, int64_t width) {
    swiglu_backward(grad_act, gate_up, grad_gate_up, act, rows, width);
}
void swiglu_backward_bf16(const bf16* grad_act, const bf16* gate_up, bf16* grad_gate_up, bf16* act, int64_t rows, int64_t width) {
    swiglu_backward(grad_act, gate_up, grad_gate_up, act, rows, width);
}

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
                transpose(key + base, qk_step, length, qk_width, s.key_t.data());
                copy_rows(value + b * length * v_stride + h * value_step, v_stride, length, v_width, s.value.data(), s.v_width);
                for (int64_t i = 0; i < length; ++i) {
                    const int64_t from = first[b * length + i], count = i - from + 1;
                    float* line = s.score.data();
                    scores(query + base + i * qk_step, s.key_t.data(), qk_width, length + LANES, from, count, line);
                    float top = -INFINITY;
#pragma omp simd reduction(max : top)
                    for (int64_t t = 0; t < count; ++t) top = std::max(top, line[t]);
                    for (int64_t t = count; t < padded(count); ++t) line[t] = -INFINITY;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t t = 0; t < padded(count); ++t) {
                        line[t] = fast_exp((line[t] - top) * scale);
                        sum += line[t];
                    }
                    log_sum[(b * heads + h) * length + i] = top * scale + std::log(sum);
                    const float norm = 1.0f / sum;
#pragma omp simd
                    for (int64_t t = 0; t < padded(count); ++t) line[t] *= norm;
                    float* o = out + ((b * length + i) * heads + h) * v_width;
                    weighted_rows(line, s.value.data() + from * s.v_width, count, s.v_width, o, v_width);
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
                transpose(key + qk_base, qk_step, length, qk_width, s.key_t.data());
                transpose(v0, v_stride, length, v_width, s.value_t.data());
                copy_rows(key + qk_base, qk_step, length, qk_width, s.key.data(), s.qk_width);
                std::fill(s.grad_key.begin(), s.grad_key.end(), 0.0f);
                std::fill(s.grad_value.begin(), s.grad_value.end(), 0.0f);
                for (int64_t i = 0; i < length; ++i) {
                    const int64_t from = first[b * length + i], count = i - from + 1;
                    const float* o = out + out_base + i * out_step;
                    const float* go = grad_out + out_base + i * out_step;
                    std::memcpy(s.query.data(), query + qk_base + i * qk_step, qk_width * sizeof(float));
                    std::memcpy(s.grad.data(), go, v_width * sizeof(float));
                    const float offset = log_sum[(b * heads + h) * length + i];
                    float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
                    for (int64_t u = 0; u < v_width; ++u) delta += go[u] * o[u];
                    float *p = s.score.data(), *ds = s.grad_score.data();
                    scores(s.query.data(), s.key_t.data(), qk_width, length + LANES, from, count, p);
                    scores(go, s.value_t.data(), v_width, length + LANES, from, count, ds);
#pragma omp simd
                    for (int64_t t = 0; t < padded(count); ++t) {
                        p[t] = fast_exp(p[t] * scale - offset);
                        ds[t] = p[t] * (ds[t] - delta) * scale;
                    }
                    weighted_rows(ds, s.key.data() + from * s.qk_width, count, s.qk_width, grad_query + qk_base + i * qk_step, qk_width);
                    add_outer(ds, s.query.data(), count, s.qk_width, s.grad_key.data() + from * s.qk_width);
                    add_outer(p, s.grad.data(), count, s.v_width, s.grad_value.data() + from * s.v_width);
                }
                for (int64_t t = 0; t < length; ++t) {
                    std::memcpy(grad_key + qk_base + t * qk_step, s.grad_key.data() + t * s.qk_width, qk_width * sizeof(float));
                    std::memcpy(grad_value + out_base + t * out_step, s.grad_value.data() + t * s.v_width, v_width * sizeof(float));
                }
            }
    }
}

}  // extern "C"
