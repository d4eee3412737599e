// Rows of scores: cross-entropy with its gradient in their place, and log-probability with entropy.

#pragma once

#include "simd.h"

namespace shoal {

// `score` becomes softmax - onehot, `best` is the place of the largest. Returns the loss in nats.
template <typename T>
float cross_entropy_row(T* score, int64_t label, int64_t width, int64_t& best) {
    const int64_t whole = width / LANES * LANES;
    float top = -INFINITY;
    Lanes tops = Lanes{} - INFINITY;
    for (int64_t v = 0; v < whole; v += LANES) tops = max_lanes(tops, lanes(score + v));
    for (int64_t i = 0; i < LANES; ++i) top = std::max(top, tops[i]);
    for (int64_t v = whole; v < width; ++v) top = std::max(top, load(score, v));
    best = 0;
    for (int64_t v = 0; v < width; ++v)
        if (load(score, v) == top) {
            best = v;
            break;
        }
    Lanes sums = {};
    for (int64_t v = 0; v < whole; v += LANES) sums += exp_lanes(lanes(score + v) - top);
    float sum = sum_of(sums);
    for (int64_t v = whole; v < width; ++v) sum += fast_exp(load(score, v) - top);
    const float at_label = load(score, label), norm = 1.0f / sum;
    for (int64_t v = 0; v < whole; v += LANES) put(score + v, exp_lanes(lanes(score + v) - top) * norm);
    for (int64_t v = whole; v < width; ++v) store(score, v, fast_exp(load(score, v) - top) * norm);
    store(score, label, fast_exp(at_label - top) * norm - 1.0f);
    return std::log(sum) - (at_label - top);
}

// log softmax(score)[token] and the entropy of softmax(score), both in nats; `score` stays as it is.
inline float log_probability_row(const float* score, int64_t token, int64_t width, float& entropy) {
    Lanes tops = Lanes{} - INFINITY, sums = {}, means = {};
    const int64_t whole = width / LANES * LANES;
    float top = -INFINITY;
    for (int64_t v = 0; v < whole; v += LANES) tops = max_lanes(tops, lanes(score + v));
    for (int64_t i = 0; i < LANES; ++i) top = std::max(top, tops[i]);
    for (int64_t v = whole; v < width; ++v) top = std::max(top, score[v]);
    for (int64_t v = 0; v < whole; v += LANES) {
        const Lanes below = lanes(score + v) - top, power = exp_lanes(below);
        sums += power, means += power * below;
    }
    float sum = sum_of(sums), mean = sum_of(means);
    for (int64_t v = whole; v < width; ++v) {
        const float below = score[v] - top, power = fast_exp(below);
        sum += power, mean += power * below;
    }
    const float log_sum = std::log(sum);
    entropy = log_sum - mean / sum;
    return score[token] - top - log_sum;
}

}  // namespace shoal
