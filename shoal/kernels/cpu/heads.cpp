// Queries and keys of latent attention put together in one pass: the rotary tail of each head turned, the shared rotary key
// copied to every head, keys and values cut out of their common up-projection, the cache's entry made of a normed latent and
// a turned key. And the same backwards.
//
// Reference: model/rope.py and model/mla.py through PyTorch; compared in tests/kernels/test_heads.py.

#include "norms.h"

namespace {

using namespace shoal;

// Pairs (a, b) turned by (cos, sin); `sign` -1 turns back, which is also the gradient.
inline void rotate(const float* x, const float* rotation, int64_t rotary, float sign, float* out) {
#pragma omp simd
    for (int64_t i = 0; i < rotary; i += 2) {
        const float cos = rotation[i], sin = sign * rotation[i + 1], a = x[i], b = x[i + 1];
        out[i] = a * cos - b * sin;
        out[i + 1] = a * sin + b * cos;
    }
}

inline void copy(const float* from, float* to, int64_t count) { std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float)); }

}  // namespace

extern "C" {

// x, out: [tokens][heads][plain + rotary]; rotation: [tokens][rotary / 2][cos, sin].
void rotate_tails(const float* x, const float* rotation, float* out, int64_t tokens, int64_t heads, int64_t plain, int64_t rotary, float sign) {
    const int64_t width = plain + rotary;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t at = (t * heads + h) * width;
            copy(x + at, out + at, plain);
            rotate(x + at + plain, rotation + t * rotary, rotary, sign, out + at + plain);
        }
}

// up: [tokens][heads][plain + value]; shared: [tokens][rotary]; key: [tokens][heads][plain + rotary]; value: [tokens][heads][value].
void expand_keys(const float* up, const float* shared, float* key, float* value, int64_t tokens, int64_t heads, int64_t plain, int64_t rotary,
                 int64_t value_width) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t row = t * heads + h;
            const float* from = up + row * (plain + value_width);
            float* to = key + row * (plain + rotary);
            copy(from, to, plain);
            copy(shared + t * rotary, to + plain, rotary);
            copy(from + plain, value + row * value_width, value_width);
        }
}

void expand_keys_backward(const float* grad_key, const float* grad_value, float* grad_up, float* grad_shared, int64_t tokens, int64_t heads,
                          int64_t plain, int64_t rotary, int64_t value_width) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        float* total = grad_shared + t * rotary;
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t row = t * heads + h;
            const float* from = grad_key + row * (plain + rotary);
            float* to = grad_up + row * (plain + value_width);
            copy(from, to, plain);
            copy(grad_value + row * value_width, to + plain, value_width);
            if (h == 0) {
                copy(from + plain, total, rotary);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < rotary; ++i) total[i] += from[plain + i];
            }
        }
    }
}

// down, entry: [tokens][latent + rotary]. The latent is normed, the rest turned; inverse_rms is kept for the backward pass.
void latent_entries(const float* down, const float* weight, const float* rotation, float* entry, float* inverse_rms, int64_t tokens,
                    int64_t latent, int64_t rotary, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = t * (latent + rotary);
        inverse_rms[t] = norm_row(down + at, weight, entry + at, latent, eps);
        rotate(down + at + latent, rotation + t * rotary, rotary, 1.0f, entry + at + latent);
    }
}

// grad_weight must come in zeroed.
void latent_entries_backward(const float* grad, const float* down, const float* weight, const float* rotation, const float* inverse_rms,
                             float* grad_down, float* grad_weight, int64_t tokens, int64_t latent, int64_t rotary) {
    ThreadSums sums(latent);
#pragma omp parallel
    {
        float* mine = sums.mine();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t at = t * (latent + rotary);
            norm_row_backward(grad + at, down + at, weight, inverse_rms[t], grad_down + at, mine, latent);
            rotate(grad + at + latent, rotation + t * rotary, rotary, -1.0f, grad_down + at + latent);
        }
    }
    sums.add_to(grad_weight);
}

}  // extern "C"
