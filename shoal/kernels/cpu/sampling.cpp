// Sampling from logits without a pass over them per operation.

#include <cmath>

#include "simd.h"

extern "C" {

// Draw one token per row: `log_softmax(logit / temperature)`, then the first token whose cumulated probability passes
// `uniform` (temperature 0: the largest logit). Reference: engine/sampling.py.
void sample_rows(const float* logit, const float* temperature, const double* uniform, int64_t rows, int64_t width, int64_t* token, float* logprob, uint8_t* finite) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* line = logit + row * width;
        const float inverse = temperature[row] > 0.0f ? 1.0f / temperature[row] : 1.0f;
        float top = -INFINITY;
        int64_t best = 0;
        bool all_finite = true;
        for (int64_t v = 0; v < width; ++v) {
            all_finite &= std::isfinite(line[v]);
            if (line[v] > top) top = line[v], best = v;
        }
        finite[row] = all_finite;
        double sum = 0.0;
        for (int64_t v = 0; v < width; v += 16) {
            const int64_t stop = std::min<int64_t>(16, width - v);
            float block = 0.0f;
#pragma omp simd reduction(+ : block)
            for (int64_t i = 0; i < stop; ++i) block += shoal::fast_exp((line[v + i] - top) * inverse);
            sum += block;
        }
        int64_t chosen = best;
        if (temperature[row] > 0.0f && all_finite) {
            const double threshold = uniform[row] * sum;
            double before = 0.0;
            chosen = width - 1;
            for (int64_t v = 0; v < width; v += 16) {
                const int64_t stop = std::min<int64_t>(16, width - v);
                float block = 0.0f;
#pragma omp simd reduction(+ : block)
                for (int64_t i = 0; i < stop; ++i) block += shoal::fast_exp((line[v + i] - top) * inverse);
                if (before + block > threshold) {
                    double cumulated = before;
                    chosen = std::min(width, v + 16) - 1;
                    for (int64_t i = 0; i < stop; ++i) {
                        cumulated += shoal::fast_exp((line[v + i] - top) * inverse);
                        if (cumulated > threshold) {
                            chosen = v + i;
                            break;
                        }
                    }
                    break;
                }
                before += block;
            }
        }
        token[row] = chosen;
        logprob[row] = (line[chosen] - top) * inverse - static_cast<float>(std::log(sum));
    }
}

}  // extern "C"
