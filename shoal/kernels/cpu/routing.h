// Which experts a token goes to, and the tokens in the order of their experts.
//
// Reference: model/router.py; compared in tests/engine/test_runner.py.

#pragma once

#include "model.h"

namespace shoal {

// Choose experts of one token: `score` are router logits, overwritten by affinities; `scratch` has room for 2 x experts.
inline void choose(const Model& m, const Layer& layer, float* score, int32_t* expert, float* weight, float* scratch) {
    const int64_t experts = layer.router.rows, per_group = experts / m.groups;
    float *steered = scratch, *group = scratch + experts;
    if (m.softmax_scores) {
        float top = score[0], sum = 0.0f;
        for (int64_t e = 1; e < experts; ++e) top = std::max(top, score[e]);
        for (int64_t e = 0; e < experts; ++e) sum += score[e] = std::exp(score[e] - top);
        for (int64_t e = 0; e < experts; ++e) score[e] /= sum;
    } else {
        for (int64_t e = 0; e < experts; ++e) score[e] = 1.0f / (1.0f + std::exp(-score[e]));
    }
    for (int64_t e = 0; e < experts; ++e) steered[e] = score[e] + (layer.router_bias ? layer.router_bias[e] : 0.0f);
    if (m.groups > 1 && m.top_groups < m.groups) {
        for (int64_t g = 0; g < m.groups; ++g) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t e = g * per_group; e < (g + 1) * per_group; ++e) {
                if (steered[e] > first) second = first, first = steered[e];
                else if (steered[e] > second) second = steered[e];
            }
            group[g] = m.group_by_best_two ? first + second : first;
        }
        // Hide the groups that are not among the best; earlier ones win ties.
        for (int64_t g = 0; g < m.groups; ++g) {
            int64_t better = 0;
            for (int64_t other = 0; other < m.groups; ++other) better += group[other] > group[g] || (group[other] == group[g] && other < g);
            if (better >= m.top_groups) std::fill(steered + g * per_group, steered + (g + 1) * per_group, -INFINITY);
        }
    }
    float total = 0.0f;
    for (int64_t k = 0; k < m.experts_per_token; ++k) {
        int64_t best = 0;
        for (int64_t e = 1; e < experts; ++e)
            if (steered[e] > steered[best]) best = e;
        expert[k] = static_cast<int32_t>(best);
        weight[k] = score[best];
        total += score[best];
        steered[best] = -INFINITY;
    }
    const float scale = m.routed_scale / (m.renormalise ? total + 1e-20f : 1.0f);
    for (int64_t k = 0; k < m.experts_per_token; ++k) weight[k] *= scale;
}

// (token, choice) pairs, called slots, in the order of their experts; tokens of one expert ascend.
struct Routes {
    std::vector<int32_t> expert, token, first, active, next, row;
    std::vector<float> weight, slot_weight, score, scratch;
    int64_t num_active = 0;  // experts with at least one slot, listed in `active`

    void reserve(int64_t tokens, int64_t per_token, int64_t experts, int64_t threads) {
        const int64_t slots = tokens * per_token;
        grow(expert, slots), grow(token, slots), grow(weight, slots), grow(slot_weight, slots), grow(row, slots);
        grow(first, experts + 1), grow(next, experts + 1), grow(active, experts);
        grow(score, tokens * experts), grow(scratch, threads * 2 * experts);
        for (int64_t s = 0; s < slots; ++s) row[s] = static_cast<int32_t>(s);
    }

    // `expert` and `weight` by token, to slots.
    void sort(int64_t slots, int64_t experts, int64_t per_token) {
        std::fill(first.begin(), first.begin() + experts + 1, 0);
        for (int64_t s = 0; s < slots; ++s) ++first[expert[s] + 1];
        num_active = 0;
        for (int64_t e = 0; e < experts; ++e) {
            if (first[e + 1]) active[num_active++] = static_cast<int32_t>(e);
            first[e + 1] += first[e];
        }
        std::copy(first.begin(), first.begin() + experts + 1, next.begin());
        for (int64_t s = 0; s < slots; ++s) {
            const int32_t slot = next[expert[s]]++;
            token[slot] = static_cast<int32_t>(s / per_token);
            slot_weight[slot] = weight[s];
        }
    }
};

}  // namespace shoal
