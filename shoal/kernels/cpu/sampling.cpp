// Sampling from logits without a pass over them per operation.

#include <cmath>
#include <vector>

#include "simd.h"

namespace {

using namespace shoal;

constexpr int64_t BLOCK = 16;

struct Largest {
    int64_t place;  // the first of equals
    bool all_finite;
};

Largest largest_of(const float* line, int64_t width) {
    const int64_t whole = width / LANES * LANES;
    constexpr int32_t EXPONENT = 0x7f800000;  // all ones in infinities and NaN
    Lanes tops = Lanes{} - INFINITY;
    IntLanes endless = {};
    for (int64_t v = 0; v < whole; v += LANES) {
        tops = max_lanes(tops, lanes(line + v));
        endless |= (int_lanes(line + v) & EXPONENT) == EXPONENT;
    }
    float top = -INFINITY;
    bool all_finite = true;
    for (int64_t i = 0; i < LANES; ++i) top = std::max(top, tops[i]), all_finite &= !endless[i];
    for (int64_t v = whole; v < width; ++v) top = std::max(top, line[v]), all_finite &= std::isfinite(line[v]);
    int64_t place = 0;
    while (place < width - 1 && line[place] != top) ++place;
    return {place, all_finite};
}

}  // namespace

extern "C" {

// Draw one token per row: `log_softmax(logit / temperature)`, then the first token whose cumulated probability passes
// `uniform` (temperature 0: the largest logit). Reference: engine/sampling.py.
void sample_rows(const float* logit, const float* temperature, const double* uniform, int64_t rows, int64_t width, int64_t* token, float* logprob, uint8_t* finite) {
#pragma omp parallel
    {
        std::vector<float> sums((width + BLOCK - 1) / BLOCK);  // of the weights of so many tokens side by side
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* line = logit + row * width;
            const float inverse = temperature[row] > 0.0f ? 1.0f / temperature[row] : 1.0f;
            const Largest largest = largest_of(line, width);
            const float top = line[largest.place];
            finite[row] = largest.all_finite;
            auto weight = [&](int64_t v) { return shoal::fast_exp((line[v] - top) * inverse); };
            double sum = 0.0;
            for (int64_t v = 0; v < width; v += BLOCK) {
                const int64_t stop = std::min(BLOCK, width - v);
                float block = 0.0f;
#pragma omp simd reduction(+ : block)
                for (int64_t i = 0; i < stop; ++i) block += weight(v + i);
                sums[v / BLOCK] = block;
                sum += block;
            }
            int64_t chosen = largest.place;
            if (temperature[row] > 0.0f && largest.all_finite) {
                const double threshold = uniform[row] * sum;
                double before = 0.0;
                int64_t block = 0;
                const int64_t last = static_cast<int64_t>(sums.size()) - 1;
                while (block < last && before + sums[block] <= threshold) before += sums[block++];
                chosen = std::min(width, (block + 1) * BLOCK) - 1;
                for (int64_t v = block * BLOCK; v <= chosen; ++v) {
                    before += weight(v);
                    if (before > threshold) {
                        chosen = v;
                        break;
                    }
                }
            }
            token[row] = chosen;
            logprob[row] = (line[chosen] - top) * inverse - static_cast<float>(std::log(sum));
        }
    }
}

}  // extern "C"
