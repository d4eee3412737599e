// SwiGLU networks of training, one or many: every expert's tokens gathered, multiplied, gated and multiplied again, and all
// of it backwards, without a loop in Python and without an array between two steps. See products.h.
//
// A *slot* is a (token, choice) pair; slots are sorted by expert. `choice[slot]` is token * K + k. Without routing (dense and
// shared networks) there is one expert and `choice` is null: slot s is token s.
//
// The output of a slot is not kept for its weight's gradient: <W act, g> = <act, W^T g>, and the latter is computed anyway.
//
// Reference: model/experts.py through PyTorch; compared in tests/kernels/test_products.py.

#include <type_traits>
#include <vector>

#include "products.h"

namespace {

using namespace shoal;

constexpr int64_t GROUP_SLOTS = 4096;  // experts are taken together up to this many slots: enough tasks, arrays that stay in the cache

struct Block {
    int64_t expert, first, count;  // slots
};

struct Sizes {
    int64_t slots, hidden, width, experts, per_token;
};

std::vector<Block> blocks_of(const int64_t* end, int64_t experts) {
    std::vector<Block> blocks;
    for (int64_t e = 0, start = 0; e < experts; start = end[e++])
        for (int64_t s = start; s < end[e]; s += BLOCK) blocks.push_back({e, s, std::min(BLOCK, end[e] - s)});
    return blocks;
}

// Rows of `x` that the slots of a block name.
void gather(const float* x, const int64_t* choice, const Block& b, const Sizes& n, int64_t width, bf16* block) {
    for (int64_t r = 0; r < b.count; ++r) {
        const int64_t slot = b.first + r, token = choice ? choice[slot] / n.per_token : slot;
        put_row(block + r * row_stride(width), x + token * width, width);
    }
    clear_rows(block, width, b.count);
}

// Store 8 rows and N panels of sums as rows of `out`.
template <typename T, int N>
inline void put_tile(T* out, int64_t width, int64_t first, int64_t valid, int64_t panel, const Lanes (&acc)[TILE_ROWS][N]) {
    for (int64_t i = 0; i < std::min(TILE_ROWS, valid); ++i)
        for (int j = 0; j < N; ++j) put(out + (first + i) * width + (panel + j) * LANES, acc[i][j]);
}

template <typename T>
void forward(const float* x, const int64_t* choice, const int64_t* end, const bf16* gate_up, const bf16* down, bf16* kept, T* out,
             const Sizes& n) {
    const std::vector<Block> blocks = blocks_of(end, n.experts);
    const int64_t size = n.hidden * n.width;
#pragma omp parallel
    {
        Buffer<bf16> input(BLOCK * row_stride(n.hidden)), act(BLOCK * row_stride(n.width));
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < blocks.size(); ++task) {
            const Block& b = blocks[task];
            gather(x, choice, b, n, n.hidden, input.get());
            auto gate_tile = [&](int64_t r, int64_t p, auto& acc) {
                if constexpr (std::extent<std::remove_reference_t<decltype(acc)>, 1>::value == 2)
                    for (int64_t i = 0; i < TILE_ROWS; ++i) {
                        const Lanes gate = acc[i][0], up = acc[i][1];
                        const int64_t column = p / 2 * LANES;
                        put(act.get() + (r + i) * row_stride(n.width) + column, gate * quick_sigmoid(gate) * up);
                        if (r + i >= b.count) continue;
                        bf16* keep = kept + (b.first + r + i) * 2 * n.width + column;
                        put(keep, gate);
                        put(keep + n.width, up);
                    }
            };
            block_times_panels<2>(input.get(), n.hidden, b.count, gate_up + b.expert * 2 * size, 2 * n.width / LANES, gate_tile);
            block_times_panels<3>(act.get(), n.width, b.count, down + b.expert * size, n.hidden / LANES,
                                  [&](int64_t r, int64_t p, auto& acc) { put_tile(out, n.hidden, b.first + r, b.count - r, p, acc); });
        }
    }
}

// What one thread needs for one block of the backward pass.
struct Scratch {
    Buffer<bf16> grad, input, grad_gate_up, act;
    explicit Scratch(const Sizes& n)
        : grad(BLOCK * row_stride(n.hidden)),
          input(BLOCK * row_stride(n.hidden)),
          grad_gate_up(BLOCK * row_stride(2 * n.width)),
          act(BLOCK * row_stride(n.width)) {}
};

// Columns of a group of experts, for the gradients of their weights: of an expert all panels, then the next expert.
struct Columns {
    Buffer<bf16> grad, input, grad_gate_up, act;
    Columns(int64_t rows, const Sizes& n) : grad(rows * n.hidden), input(rows * n.hidden), grad_gate_up(rows * 2 * n.width), act(rows * n.width) {}
};

// Gate, up and weight of each slot turn the gradient of its activation into that of gate and up; the sum of gradient times
// activation is the gradient of its weight.
struct GateBackward {
    const bf16* kept;
    const float* weight;  // of the slots of the block, or null
    const Sizes& n;
    const Block& b;
    Scratch& s;
    Lanes* dot;  // of each row, lane by lane

    template <int N>
    void operator()(int64_t r, int64_t p, const Lanes (&acc)[TILE_ROWS][N]) const {
        for (int64_t i = 0; i < TILE_ROWS; ++i)
            for (int j = 0; j < N; ++j) one(r + i, (p + j) * LANES, acc[i][j]);
    }

    void one(int64_t row, int64_t column, Lanes grad) const {
        bf16* grad_gate = s.grad_gate_up.get() + row * row_stride(2 * n.width) + column;
        bf16* act = s.act.get() + row * row_stride(n.width) + column;
        if (row >= b.count) {
            put(grad_gate, Lanes{}), put(grad_gate + n.width, Lanes{}), put(act, Lanes{});
            return;
        }
        const bf16* keep = kept + (b.first + row) * 2 * n.width + column;
        const Lanes gate = lanes(keep), up = lanes(keep + n.width), sig = quick_sigmoid(gate), silu = gate * sig, product = silu * up;
        const float w = weight ? weight[row] : 1.0f;
        const Lanes scaled = grad * w;
        put(grad_gate, scaled * up * sig * (1.0f + gate * (1.0f - sig)));
        put(grad_gate + n.width, scaled * silu);
        put(act, product * w);
        if (weight) dot[row] += product * grad;
    }
};

struct Backward {
    const float *grad, *x, *weight;
    const int64_t *choice, *end;
    const bf16 *gate_up, *down, *kept;
    float *grad_weight, *grad_gate_up, *grad_down;
    Sizes n;

    int64_t start(int64_t e) const { return e ? end[e - 1] : 0; }
    int64_t pairs(int64_t e) const { return (end[e] - start(e) + 1) / 2; }

    // First pair of expert e in the columns of the group that begins with expert `first`.
    int64_t first_pair(int64_t first, int64_t e) const {
        int64_t total = 0;
        for (int64_t i = first; i < e; ++i) total += pairs(i);
        return total;
    }

    template <typename T>
    void block(const Block& b, int64_t group, Scratch& s, Columns& c, T* grad_x) const {
        float weights[BLOCK];
        Lanes dot[BLOCK] = {};
        for (int64_t r = 0; weight && r < b.count; ++r) weights[r] = weight[choice[b.first + r]];
        gather(grad, choice, b, n, n.hidden, s.grad.get());
        gather(x, choice, b, n, n.hidden, s.input.get());
        const int64_t size = n.hidden * n.width;
        const GateBackward gate{kept, weight ? weights : nullptr, n, b, s, dot};
        block_times_panels<2>(s.grad.get(), n.hidden, b.count, down + b.expert * size, n.width / LANES, gate);
        for (int64_t r = 0; weight && r < b.count; ++r) grad_weight[choice[b.first + r]] = sum_of(dot[r]);
        const int64_t step = pairs(b.expert) * PAIR, base = first_pair(group, b.expert) * 2, at = (b.first - start(b.expert)) * LANES;
        block_to_columns(s.grad.get(), n.hidden, b.count, c.grad.get() + base * n.hidden + at, step);
        block_to_columns(s.input.get(), n.hidden, b.count, c.input.get() + base * n.hidden + at, step);
        block_to_columns(s.grad_gate_up.get(), 2 * n.width, b.count, c.grad_gate_up.get() + base * 2 * n.width + at, step);
        block_to_columns(s.act.get(), n.width, b.count, c.act.get() + base * n.width + at, step);
        block_times_panels<3>(s.grad_gate_up.get(), 2 * n.width, b.count, gate_up + b.expert * 2 * size, n.hidden / LANES,
                              [&](int64_t r, int64_t p, auto& acc) { put_tile(grad_x, n.hidden, b.first + r, b.count - r, p, acc); });
    }

    // Some panels of one weight gradient of expert e.
    void weight_gradient(int64_t group, int64_t e, int64_t task, Columns& c) const {
        const int64_t base = first_pair(group, e) * 2, gate_tasks = outer_tasks(n.hidden), size = n.hidden * n.width;
        const bool is_gate_up = task < gate_tasks;
        const int64_t in = is_gate_up ? n.hidden : n.width, p = (is_gate_up ? task : task - gate_tasks) * OUTER_PANELS;
        const Range in_panels{p, std::min(in / LANES, p + OUTER_PANELS)};
        if (is_gate_up)
            outer_columns(c.grad_gate_up.get() + base * 2 * n.width, {0, 2 * n.width}, c.input.get() + base * n.hidden, in, in_panels, pairs(e),
                          false, grad_gate_up + e * 2 * size);
        else
            outer_columns(c.grad.get() + base * n.hidden, {0, n.hidden}, c.act.get() + base * n.width, in, in_panels, pairs(e), false,
                          grad_down + e * size);
    }

    // Groups of experts, as the first expert of each and, last, their number.
    std::vector<int64_t> groups() const {
        std::vector<int64_t> first{0};
        for (int64_t e = 1; e < n.experts; ++e)
            if (end[e] - start(first.back()) > GROUP_SLOTS) first.push_back(e);
        first.push_back(n.experts);
        return first;
    }

    template <typename T>
    void run(T* grad_x) const {
        const std::vector<Block> blocks = blocks_of(end, n.experts);
        const std::vector<int64_t> group = groups();
        int64_t most = 0;
        for (size_t g = 0; g + 1 < group.size(); ++g) most = std::max(most, first_pair(group[g], group[g + 1]));
        Columns columns(2 * most, n);
        const int64_t tasks = outer_tasks(n.hidden) + outer_tasks(n.width);
#pragma omp parallel
        {
            Scratch scratch(n);
            size_t next = 0;
            for (size_t g = 0; g + 1 < group.size(); ++g) {
                size_t stop = next;
                while (stop < blocks.size() && blocks[stop].expert < group[g + 1]) ++stop;
#pragma omp for schedule(dynamic, 1)
                for (size_t task = next; task < stop; ++task) block(blocks[task], group[g], scratch, columns, grad_x);
                next = stop;
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < (group[g + 1] - group[g]) * tasks; ++task)
                    weight_gradient(group[g], group[g] + task / tasks, task % tasks, columns);
            }
        }
    }
};

}  // namespace

extern "C" {

// Sort (token, choice) pairs by expert, tokens ascending: `slot[choice]`, `choice[slot]`, and where each expert's slots end.
void sort_slots(const int64_t* expert, int64_t slots, int64_t experts, int64_t* slot, int64_t* choice, int64_t* end) {
    std::fill(end, end + experts, 0);
    for (int64_t i = 0; i < slots; ++i) ++end[expert[i]];
    std::vector<int64_t> next(static_cast<size_t>(experts), 0);
    for (int64_t e = 1; e < experts; ++e) next[e] = end[e] += end[e - 1];
    for (int64_t e = experts - 1; e > 0; --e) next[e] = end[e - 1];
    next[0] = 0;
    for (int64_t i = 0; i < slots; ++i) {
        slot[i] = next[expert[i]]++;
        choice[slot[i]] = i;
    }
}

// kept: [slots][2F] bfloat16, gate and up, for the backward pass. out: [slots][D], bfloat16 when routed, else float.
void swiglu_experts_forward(const float* x, const int64_t* choice, const int64_t* end, const bf16* gate_up, const bf16* down, bf16* kept,
                            void* out, int64_t slots, int64_t hidden, int64_t width, int64_t experts, int64_t per_token) {
    const Sizes n{slots, hidden, width, experts, per_token};
    if (choice)
        forward(x, choice, end, gate_up, down, kept, static_cast<bf16*>(out), n);
    else
        forward(x, choice, end, gate_up, down, kept, static_cast<float*>(out), n);
}

// grad: [tokens][D] of the weighted sum. grad_x: [slots][D], bfloat16 when routed (to be summed per token), else float.
// Experts without slots get gradients of zero.
void swiglu_experts_backward(const float* grad, const float* x, const float* weight, const int64_t* choice, const int64_t* end,
                             const bf16* gate_up, const bf16* down, const bf16* kept, void* grad_x, float* grad_weight, float* grad_gate_up,
                             float* grad_down, int64_t slots, int64_t hidden, int64_t width, int64_t experts, int64_t per_token) {
    const Backward pass{grad, x, weight, choice, end, gate_up, down, kept, grad_weight, grad_gate_up, grad_down, {slots, hidden, width, experts, per_token}};
    if (choice)
        pass.run(static_cast<bf16*>(grad_x));
    else
        pass.run(static_cast<float*>(grad_x));
}

}  // extern "C"
