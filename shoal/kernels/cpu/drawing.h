// Drawing a token by inverting the cumulated distribution, block of scores by block: the first token whose cumulated weight
// passes a uniform number.
//
// A score weighs 2^(score * scale - shift), with the temperature in `scale`. The shift is a whole number that keeps weights in
// range, and changes nothing but their exponents: who has seen all scores and who has seen a few draw the same token with the
// same log-probability, bit for bit (tests/kernels/test_dispatch.py).

#pragma once

#include "simd.h"

namespace shoal {

constexpr int64_t DRAW_BLOCK = 256;
constexpr double TOO_HEAVY = 1e26;  // sum of weights that calls for another shift

struct Drawing {
    float scale, shift;

    // For a temperature, 0 counting as 1, with weights near one for scores near `top`.
    static Drawing near(float temperature, float top) {
        const float scale = 1.44269504088896341f / (temperature > 0.0f ? temperature : 1.0f);
        return {scale, std::isfinite(top) ? std::nearbyint(top * scale) : 0.0f};
    }
    float log_probability(float score, double sum) const {
        int exponent;
        const double fraction = std::frexp(sum, &exponent);
        return static_cast<float>((static_cast<double>(score) * scale - exponent - shift) * 0.69314718055994531 - std::log(fraction));
    }
};

// 2^(x - shift) to about 1e-7.
inline Lanes power_of_two(Lanes x, float shift) {
#if defined(__AVX512F__)
    const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-1e4f), (__m512)x);  // NaN stays
    const Lanes whole = (Lanes)_mm512_roundscale_ps(clamped, 0), part = (Lanes)clamped - whole;
#else
    const Lanes low = Lanes{} - 1e4f, clamped = x < low ? low : x, whole = to_lanes(nearest(clamped)), part = clamped - whole;
#endif
    Lanes power = Lanes{} + 1.5403530e-4f;  // Taylor series of 2^part, part in [-1/2, 1/2]
    power = power * part + 1.3333558e-3f;
    power = power * part + 9.6181291e-3f;
    power = power * part + 5.5504109e-2f;
    power = power * part + 2.4022651e-1f;
    power = power * part + 6.9314718e-1f;
    power = power * part + 1.0f;
#if defined(__AVX512F__)
    return (Lanes)_mm512_scalef_ps((__m512)power, (__m512)(whole - shift));
#else
    const Lanes exponent = whole - shift, bounded = exponent > 128.0f ? Lanes{} + 128.0f : exponent;
    const IntLanes bits = (nearest(bounded < -127.0f ? Lanes{} - 127.0f : bounded) + 127) << 23;
    Lanes factor;
    std::memcpy(&factor, &bits, sizeof factor);
    return power * factor;
#endif
}

inline Lanes draw_weights(Lanes score, Drawing drawing) { return power_of_two(score * drawing.scale, drawing.shift); }

// The first `count` of sixteen scores; the others weigh nothing.
inline Lanes first_scores(Lanes score, int64_t count) {
    for (int64_t i = std::max<int64_t>(count, 0); i < LANES; ++i) score[i] = -INFINITY;
    return score;
}

// Weights of one block, of which `weight` must hold whole vectors; their sum.
inline float draw_weights(const float* score, int64_t width, Drawing drawing, float* weight) {
    Lanes sums = {};
    for (int64_t v = 0; v < width; v += LANES) {
        Lanes here = {};
        if (v + LANES <= width) here = lanes(score + v);
        else std::memcpy(&here, score + v, (width - v) * sizeof(float)), here = first_scores(here, width - v);
        const Lanes weights = draw_weights(here, drawing);
        put(weight + v, weights);
        sums += weights;
    }
    return sum_of(sums);
}

inline double total_weight(const float* sums, int64_t blocks) {
    double total = 0.0;
    for (int64_t block = 0; block < blocks; ++block) total += sums[block];
    return total;
}

// The token at `threshold` of the cumulated weights of `width` tokens. `weights_of(first, count, weight)` fills in those of a
// block.
template <typename Weights>
int64_t token_at(const float* sums, int64_t width, double threshold, Weights&& weights_of) {
    const int64_t blocks = (width + DRAW_BLOCK - 1) / DRAW_BLOCK;
    alignas(64) float weight[DRAW_BLOCK];
    double before = 0.0;
    int64_t block = 0, place = 0;
    while (block < blocks - 1 && before + sums[block] <= threshold) before += sums[block++];
    const int64_t first = block * DRAW_BLOCK, count = std::min(DRAW_BLOCK, width - first);
    weights_of(first, count, weight);
    while (place < count - 1 && (before += weight[place]) <= threshold) ++place;
    return first + place;
}

}  // namespace shoal
