// Sampling from logits without a pass over them per operation.

#include <vector>

#include "drawing.h"

namespace {

using namespace shoal;

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

}  // namespace

extern "C" {

// Draw one token per row: `log_softmax(logit / temperature)`, then the first token whose cumulated probability passes
// `uniform` (temperature 0: the largest logit). Reference: kernels/reference.py.
void sample_rows(const float* logit, const float* temperature, const double* uniform, int64_t rows, int64_t width, int64_t* token, float* logprob, uint8_t* finite) {
    const int64_t blocks = (width + DRAW_BLOCK - 1) / DRAW_BLOCK;
#pragma omp parallel
    {
        std::vector<float> sums(blocks);
        alignas(64) float weight[DRAW_BLOCK];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* line = logit + row * width;
            const auto [top, all_finite] = largest_of(line, width);
            const Drawing drawing = Drawing::near(temperature[row], top);
            for (int64_t block = 0; block < blocks; ++block)
                sums[block] = draw_weights(line + block * DRAW_BLOCK, std::min(DRAW_BLOCK, width - block * DRAW_BLOCK), drawing, weight);
            const double sum = total_weight(sums.data(), blocks);
            finite[row] = all_finite;
            token[row] = temperature[row] > 0.0f && all_finite
                             ? token_at(sums.data(), width, uniform[row] * sum,
                                        [&](int64_t first, int64_t count, float* to) { draw_weights(line + first, count, drawing, to); })
                             : place_of(line, width, top);
            logprob[row] = drawing.log_probability(line[token[row]], sum);
        }
    }
}

}  // extern "C"
