// Sampling from logits without a pass over them per operation.

#include <cmath>
#include <vector>

#include "simd.h"

namespace {

using namespace shoal;

constexpr int64_t BLOCK = 256;

struct Largest {
    float value;
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
    return {top, all_finite};
}

// The first place that holds `value`, or the last one of all.
int64_t place_of(const float* line, int64_t width, float value) {
    int64_t place = 0;
    while (place < width - 1 && line[place] != value) ++place;
    return place;
}

// exp((line[v] - top) * inverse) for the tokens of one block into `weight`; their sum.
float block_weights(const float* line, int64_t width, float top, float inverse, float* weight) {
    Lanes sums = {};
    int64_t v = 0;
    for (; v + LANES <= width; v += LANES) {
        const Lanes here = exp_lanes((lanes(line + v) - top) * inverse);
        put(weight + v, here);
        sums += here;
    }
    float sum = sum_of(sums);
    for (; v < width; ++v) sum += weight[v] = fast_exp((line[v] - top) * inverse);
    return sum;
}

}  // namespace

extern "C" {

// Draw one token per row: `log_softmax(logit / temperature)`, then the first token whose cumulated probability passes
// `uniform` (temperature 0: the largest logit). Reference: engine/sampling.py.
void sample_rows(const float* logit, const float* temperature, const double* uniform, int64_t rows, int64_t width, int64_t* token, float* logprob, uint8_t* finite) {
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel
    {
        std::vector<float> sums(blocks);  // of the weights of so many tokens side by side
        alignas(64) float weight[BLOCK];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* line = logit + row * width;
            const float inverse = temperature[row] > 0.0f ? 1.0f / temperature[row] : 1.0f;
            const auto [top, all_finite] = largest_of(line, width);
            finite[row] = all_finite;
            double sum = 0.0;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = block * BLOCK;
                sum += sums[block] = block_weights(line + first, std::min(BLOCK, width - first), top, inverse, weight);
            }
            int64_t chosen;
            if (temperature[row] > 0.0f && all_finite) {
                const double threshold = uniform[row] * sum;
                double before = 0.0;
                int64_t block = 0;
                while (block < blocks - 1 && before + sums[block] <= threshold) before += sums[block++];
                const int64_t first = block * BLOCK, count = std::min(BLOCK, width - first);
                block_weights(line + first, count, top, inverse, weight);
                int64_t place = 0;
                while (place < count - 1 && (before += weight[place]) <= threshold) ++place;
                chosen = first + place;
            } else {
                chosen = place_of(line, width, top);
            }
            token[row] = chosen;
            logprob[row] = (line[chosen] - top) * inverse - static_cast<float>(std::log(sum));
        }
    }
}

}  // extern "C"
