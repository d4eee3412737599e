// Fused CPU kernels of Shoal around the products: RMSNorm, SwiGLU, cross-entropy, rows gathered and summed.
//
// Why: at small widths a training step on a CPU is not limited by its matrix products but by the passes over memory
// around them. Each kernel here does in one pass what PyTorch does in five to ten. Plain C++ that the compiler
// vectorises for the machine it is built on; every function has a PyTorch reference beside it (kernels/reference.py) and
// a test that compares the two. C interface: pointers to contiguous arrays unless a stride is named. No allocation
// survives a call, nothing is read or written outside the arrays, sizes are checked by the Python side.
//
// OpenMP is the runtime PyTorch has already loaded (same library name), so there is one pool of threads, not two.

#include "cross_entropy.h"
#include "norms.h"

namespace {

using namespace shoal;

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exp_lanes(-x)); }

template <typename T>
void swiglu_forward(const T* gate_up, T* act, int64_t rows, int64_t width) {
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * width;
        const T* up = gate + width;
        T* out = act + row * width;
        for (int64_t f = 0; f < whole; f += LANES) {
            const Lanes g = lanes(gate + f);
            put(out + f, g * sigmoid(g) * lanes(up + f));
        }
        for (int64_t f = whole; f < width; ++f) {
            const float g = load(gate, f);
            store(out, f, g / (1.0f + fast_exp(-g)) * load(up, f));
        }
    }
}

template <typename T>
void swiglu_backward(const T* grad_act, const T* gate_up, T* grad_gate_up, T* act, int64_t rows, int64_t width) {
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = gate_up + row * 2 * width;
        const T* up = gate + width;
        const T* grad = grad_act + row * width;
        T* grad_gate = grad_gate_up + row * 2 * width;
        T* grad_up = grad_gate + width;
        T* out = act + row * width;
        for (int64_t f = 0; f < whole; f += LANES) {
            const Lanes g = lanes(gate + f), u = lanes(up + f), d = lanes(grad + f);
            const Lanes s = sigmoid(g), silu = g * s;
            put(out + f, silu * u);
            put(grad_up + f, d * silu);
            put(grad_gate + f, d * u * s * (1.0f + g * (1.0f - s)));
        }
        for (int64_t f = whole; f < width; ++f) {
            const float g = load(gate, f), u = load(up, f), d = load(grad, f);
            const float s = 1.0f / (1.0f + fast_exp(-g)), silu = g * s;
            store(out, f, silu * u);
            store(grad_up, f, d * silu);
            store(grad_gate, f, d * u * s * (1.0f + g * (1.0f - s)));
        }
    }
}

}  // namespace

extern "C" {

int shoal_abi_version() { return 2; }

// out = x / rms(x) * weight; inverse_rms is kept for the backward pass.
void rms_norm_forward(const float* x, const float* weight, float* out, float* inverse_rms, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) inverse_rms[row] = norm_row(x + row * width, weight, out + row * width, width, eps);
}

// grad_weight must come in zeroed.
void rms_norm_backward(const float* grad, const float* x, const float* weight, const float* inverse_rms, float* grad_x,
                       float* grad_weight, int64_t rows, int64_t width) {
    ThreadSums sums(width);
#pragma omp parallel
    {
        float* mine = sums.mine();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row)
            norm_row_backward(grad + row * width, x + row * width, weight, inverse_rms[row], grad_x + row * width, mine, width);
    }
    sums.add_to(grad_weight);
}

void swiglu_forward_f32(const float* gate_up, float* act, int64_t rows, int64_t width) { swiglu_forward(gate_up, act, rows, width); }
void swiglu_forward_bf16(const bf16* gate_up, bf16* act, int64_t rows, int64_t width) { swiglu_forward(gate_up, act, rows, width); }
void swiglu_backward_f32(const float* grad_act, const float* gate_up, float* grad_gate_up, float* act, int64_t rows, int64_t width) {
    swiglu_backward(grad_act, gate_up, grad_gate_up, act, rows, width);
}
void swiglu_backward_bf16(const bf16* grad_act, const bf16* gate_up, bf16* grad_gate_up, bf16* act, int64_t rows, int64_t width) {
    swiglu_backward(grad_act, gate_up, grad_gate_up, act, rows, width);
}

// Cross-entropy of each row, and in place of the scores its gradient, softmax - onehot. `best` is the largest score.
#define SHOAL_CROSS_ENTROPY(NAME, T)                                                                                       \
    void NAME(T* score, const int64_t* label, float* loss, int64_t* best, int64_t rows, int64_t width) {                   \
        _Pragma("omp parallel for schedule(static)") for (int64_t row = 0; row < rows; ++row)                              \
            loss[row] = cross_entropy_row(score + row * width, label[row], width, best[row]);                              \
    }
SHOAL_CROSS_ENTROPY(cross_entropy_rows_f32, float)
SHOAL_CROSS_ENTROPY(cross_entropy_rows_bf16, bf16)

// Log-probability of each row's token and the entropy of the row.
void log_probability_rows_f32(const float* score, const int64_t* token, float* logprob, float* entropy, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) logprob[row] = log_probability_row(score + row * width, token[row], width, entropy[row]);
}

// One row of a token for each of its slots: out[slot] = x[token[slot]], in bfloat16 or float.
#define SHOAL_GATHER(NAME, T)                                                                                              \
    void NAME(const float* x, const int64_t* token, T* out, int64_t slots, int64_t width) {                                \
        _Pragma("omp parallel for schedule(static)") for (int64_t s = 0; s < slots; ++s) {                                 \
            const float* from = x + token[s] * width;                                                                      \
            T* to = out + s * width;                                                                                       \
            _Pragma("omp simd") for (int64_t d = 0; d < width; ++d) store(to, d, from[d]);                                 \
        }                                                                                                                  \
    }
SHOAL_GATHER(gather_rows_f32, float)
SHOAL_GATHER(gather_rows_bf16, bf16)

// out[token] = sum over its K slots of weight[token][k] * x[slot[token][k]]; weight null means ones.
#define SHOAL_REDUCE(NAME, T)                                                                                              \
    void NAME(const T* x, const int64_t* slot, const float* weight, float* out, int64_t tokens, int64_t choices, int64_t width) { \
        _Pragma("omp parallel for schedule(static)") for (int64_t m = 0; m < tokens; ++m) {                                \
            float* to = out + m * width;                                                                                   \
            for (int64_t k = 0; k < choices; ++k) {                                                                        \
                const T* from = x + slot[m * choices + k] * width;                                                         \
                const float w = weight ? weight[m * choices + k] : 1.0f;                                                   \
                if (k == 0) {                                                                                              \
                    _Pragma("omp simd") for (int64_t d = 0; d < width; ++d) to[d] = w * load(from, d);                     \
                } else {                                                                                                   \
                    _Pragma("omp simd") for (int64_t d = 0; d < width; ++d) to[d] += w * load(from, d);                    \
                }                                                                                                          \
            }                                                                                                              \
        }                                                                                                                  \
    }
SHOAL_REDUCE(reduce_slots_f32, float)
SHOAL_REDUCE(reduce_slots_bf16, bf16)

// Backward of the weighted sum: grad_x[slot] = weight * grad[token], grad_weight[token][k] = <x[slot], grad[token]>.
// Slots that belong to no token (padding) are not written.
#define SHOAL_REDUCE_BACKWARD(NAME, T)                                                                                     \
    void NAME(const float* grad, const T* x, const int64_t* slot, const float* weight, T* grad_x, float* grad_weight,      \
              int64_t tokens, int64_t choices, int64_t width) {                                                            \
        _Pragma("omp parallel for schedule(static)") for (int64_t m = 0; m < tokens; ++m) {                                \
            const float* g = grad + m * width;                                                                             \
            for (int64_t k = 0; k < choices; ++k) {                                                                        \
                const int64_t at = slot[m * choices + k] * width;                                                          \
                const float w = weight[m * choices + k];                                                                   \
                float dot = 0.0f;                                                                                          \
                _Pragma("omp simd reduction(+ : dot)") for (int64_t d = 0; d < width; ++d) {                               \
                    dot += g[d] * load(x + at, d);                                                                         \
                    store(grad_x + at, d, w * g[d]);                                                                       \
                }                                                                                                          \
                grad_weight[m * choices + k] = dot;                                                                        \
            }                                                                                                              \
        }                                                                                                                  \
    }
SHOAL_REDUCE_BACKWARD(reduce_slots_backward_f32, float)
SHOAL_REDUCE_BACKWARD(reduce_slots_backward_bf16, bf16)

}  // extern "C"
