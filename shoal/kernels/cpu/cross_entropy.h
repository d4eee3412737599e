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

// A row's softmax so far: largest score, sum of exp(score - top), and of that times (score - top).
template <Lanes (*EXP)(Lanes)>
struct Softmax {
    float top = -INFINITY, sum = 0.0f, mean = 0.0f;

    // The next columns' scores.
    void take(const float* score, int64_t width) {
        const int64_t whole = width / LANES * LANES;
        Lanes tops = Lanes{} - INFINITY;
        for (int64_t v = 0; v < whole; v += LANES) tops = max_lanes(tops, lanes(score + v));
        float larger = top;
        for (int64_t i = 0; i < LANES; ++i) larger = std::max(larger, tops[i]);
        for (int64_t v = whole; v < width; ++v) larger = std::max(larger, score[v]);
        if (larger > top) {
            const float scale = fast_exp(top - larger);
            mean = sum == 0.0f ? 0.0f : (mean + (top - larger) * sum) * scale;
            sum *= scale, top = larger;
        }
        Lanes sums = {}, means = {};
        for (int64_t v = 0; v < whole; v += LANES) {
            const Lanes below = lanes(score + v) - top, power = EXP(below);
            sums += power, means += power * below;
        }
        sum += sum_of(sums), mean += sum_of(means);
        for (int64_t v = whole; v < width; ++v) {
            const float below = score[v] - top, power = fast_exp(below);
            sum += power, mean += power * below;
        }
    }
    float log_sum() const { return top + std::log(sum); }
    float log_probability(float score) const { return score - top - std::log(sum); }
    float entropy() const { return std::log(sum) - mean / sum; }
};

// log softmax(score)[token] and the entropy of softmax(score), both in nats.
inline float log_probability_row(const float* score, int64_t token, int64_t width, float& entropy) {
    Softmax<exp_lanes> softmax;
    softmax.take(score, width);
    entropy = softmax.entropy();
    return softmax.log_probability(score[token]);
}

}  // namespace shoal
