// The output head in training: scores, cross-entropy, and both gradients, without the array of scores. See products.h.
//
// A block of rows is multiplied up to the whole vocabulary, turned into its own gradient while it lies in the cache of a
// core, and multiplied down again. For the weight's gradient the gradients of CHUNK_ROWS rows are kept in bfloat16.
// Log-probabilities of a policy, whose gradient waits for its objective, are in policy_head.cpp.
//
// Reference: training/loss.py through PyTorch; compared in tests/kernels/test_products.py.

#include <type_traits>

#include "cross_entropy.h"
#include "products.h"

namespace {

using namespace shoal;

constexpr int64_t HEAD_ROWS = 32;      // whose scores, in float32, still fit beside the weights that pass by
constexpr int64_t CHUNK_ROWS = 1024;
constexpr int64_t SEGMENT = 1024;      // of the vocabulary, summed before the next weights are touched
constexpr int64_t OUTS_PER_TASK = 128;

struct Head {
    const float* hidden;
    const bf16 *forward, *backward;
    float *grad_hidden, *grad_weight;  // the latter, or both, may be null
    int64_t rows, width, vocabulary;

    int64_t panels() const { return vocabulary / LANES; }

    // Scores of a block as rows of floats.
    void scores(const bf16* input, int64_t count, float* score) const {
        block_times_panels<3>(input, width, count, forward, panels(), [&](int64_t r, int64_t p, auto& acc) {
            constexpr int N = std::extent<std::remove_reference_t<decltype(acc)>, 1>::value;
            for (int64_t i = 0; i < TILE_ROWS; ++i)
                for (int j = 0; j < N; ++j) put(score + (r + i) * vocabulary + (p + j) * LANES, acc[i][j]);
        });
    }

    // grad_hidden of a block: gradients of the scores times weights, a segment of the vocabulary after the other.
    void lower(const bf16* grads, int64_t first, int64_t count) const {
        for (int64_t start = 0; start < vocabulary; start += SEGMENT)
            add_block_times_panels(grads + start, row_stride(vocabulary), count, backward, vocabulary, start, std::min(vocabulary, start + SEGMENT), width,
                                   grad_hidden + first * width);
    }

    // Scores of a block; `use` is given each row's and leaves their gradient there, for `grads`.
    template <typename Use>
    void block(int64_t first, int64_t count, bf16* input, float* score, bf16* grads, Use&& use) const {
        for (int64_t r = 0; r < count; ++r) put_row(input + r * row_stride(width), hidden + (first + r) * width, width);
        clear_rows(input, width, count);
        scores(input, count, score);
        for (int64_t r = 0; r < count; ++r) {
            float* line = score + r * vocabulary;
            use(first + r, line);
            if (!grad_hidden) continue;
            put_row(grads + r * row_stride(vocabulary), line, vocabulary);
        }
        if (grad_hidden) clear_rows(grads, vocabulary, count);
    }

    // use(row, its scores) for all rows; then both gradients from what it leaves there.
    template <typename Use>
    void run(Use&& use) const {
        const int64_t most = std::min(rows, CHUNK_ROWS), pairs = (most + 1) / 2;
        Buffer<bf16> left(grad_weight ? 2 * pairs * vocabulary : 1), right(grad_weight ? 2 * pairs * width : 1);
#pragma omp parallel
        {
            Buffer<bf16> input(HEAD_ROWS * row_stride(width)), grads(grad_hidden ? HEAD_ROWS * row_stride(vocabulary) : 1);
            Buffer<float> score(HEAD_ROWS * vocabulary);
            for (int64_t start = 0; start < rows; start += CHUNK_ROWS) {
                const int64_t stop = std::min(rows, start + CHUNK_ROWS), chunk_pairs = (stop - start + 1) / 2, step = chunk_pairs * PAIR;
#pragma omp for schedule(dynamic, 1)
                for (int64_t first = start; first < stop; first += HEAD_ROWS) {
                    const int64_t count = std::min(HEAD_ROWS, stop - first), at = (first - start) * LANES;
                    block(first, count, input.get(), score.get(), grads.get(), use);
                    if (grad_hidden) lower(grads.get(), first, count);
                    if (!grad_weight) continue;
                    block_to_columns(grads.get(), vocabulary, count, left.get() + at, step);
                    block_to_columns(input.get(), width, count, right.get() + at, step);
                }
                if (!grad_weight) continue;
#pragma omp for schedule(dynamic, 1)
                for (int64_t n = 0; n < vocabulary; n += OUTS_PER_TASK)
                    outer_columns(left.get(), {n, std::min(vocabulary, n + OUTS_PER_TASK)}, right.get(), width, {0, width / LANES}, chunk_pairs,
                                  start > 0, grad_weight);
            }
        }
    }
};

}  // namespace

extern "C" {

// Cross-entropy in nats and best token of each row of `hidden` under the head; with gradients of the summed loss, the
// weight's or both of which may be null.
void head_cross_entropy(const float* hidden, const bf16* forward, const bf16* backward, const int64_t* label, float* loss, int64_t* best,
                        float* grad_hidden, float* grad_weight, int64_t rows, int64_t width, int64_t vocabulary) {
    Head{hidden, forward, backward, grad_hidden, grad_weight, rows, width, vocabulary}.run(
        [&](int64_t row, float* score) { loss[row] = cross_entropy_row(score, label[row], vocabulary, best[row]); });
}

}  // extern "C"
