// RMSNorm of one row, forward and backward, and the sums over rows that its weight's gradient needs.

#pragma once

#include <vector>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace shoal {

inline int num_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

inline int thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// to = x / rms(x) * weight; returns 1 / rms(x).
inline float norm_row(const float* x, const float* weight, float* to, int64_t width, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += x[d] * x[d];
    const float scale = 1.0f / std::sqrt(sum / width + eps);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) to[d] = x[d] * scale * weight[d];
    return scale;
}

// Gradient of the row; that of the weight is added to `grad_weight`.
inline void norm_row_backward(const float* grad, const float* x, const float* weight, float scale, float* grad_x, float* grad_weight, int64_t width) {
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < width; ++d) dot += grad[d] * weight[d] * x[d];
    const float pull = dot * scale * scale * scale / width;
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) {
        grad_x[d] = grad[d] * weight[d] * scale - x[d] * pull;
        grad_weight[d] += grad[d] * x[d] * scale;
    }
}

// A row of sums for each thread, added up in their order.
class ThreadSums {
   public:
    explicit ThreadSums(int64_t width) : width(width), sums(static_cast<size_t>(num_threads()) * width, 0.0f) {}
    float* mine() { return sums.data() + static_cast<size_t>(thread_index()) * width; }
    void add_to(float* total) const {
        for (size_t at = 0; at < sums.size(); ++at) total[at % width] += sums[at];
    }

   private:
    int64_t width;
    std::vector<float> sums;
};

}  // namespace shoal
