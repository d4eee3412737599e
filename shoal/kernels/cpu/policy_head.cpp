// The output head of a policy: log-probabilities of its tokens and, once an objective has weighted the rows, both gradients,
// without the array of scores. See products.h.
//
// Two passes over the vocabulary, a segment at a time for a block of rows, so that scores, gradients and the weights in use stay
// in the cache of a core. The first keeps of each row what its softmax divides by, and is all that log-probabilities need. The
// second makes the scores again, which is cheaper than keeping them, turns them into gradients while they are in registers, and
// multiplies them down. For the weight's gradient the gradients of CHUNK_ROWS rows are kept in bfloat16. Cross-entropy, whose
// rows all weigh the same, needs one pass only: head.cpp.
//
// Reference: training/loss.py through PyTorch; compared in tests/kernels/test_products.py.

#include <type_traits>

#include "cross_entropy.h"
#include "products.h"

namespace {

using namespace shoal;

constexpr int64_t HEAD_ROWS = 128;            // every block reads all weights once
constexpr int64_t SEGMENT_BYTES = 512 << 10;  // of weights, at a time
constexpr int64_t MAX_SEGMENT = 512;
constexpr int64_t CHUNK_ROWS = 1024;
constexpr int64_t OUTS_PER_TASK = 128;

using RowSoftmax = Softmax<quick_exp>;

struct Head {
    const float* hidden;
    const bf16* forward;
    int64_t rows, width, vocabulary;
    const int64_t* token;
    float inverse_temperature;

    int64_t segment() const { return std::clamp(SEGMENT_BYTES / (2 * width) / PAIR * PAIR, PAIR, MAX_SEGMENT); }

    // Hidden states as a block of inputs. Gives the number of rows in it.
    int64_t load(int64_t first, int64_t last, bf16* input) const {
        const int64_t count = std::min(HEAD_ROWS, last - first);
        for (int64_t r = 0; r < count; ++r) put_row(input + r * row_stride(width), hidden + (first + r) * width, width);
        clear_rows(input, width, count);
        return count;
    }

    // `use(row, column in the segment, sixteen scores over the temperature)`.
    template <typename Use>
    void scores(const bf16* input, int64_t count, int64_t start, int64_t stop, Use&& use) const {
        block_times_panels<3>(input, width, count, forward + start * width, (stop - start) / LANES, [&](int64_t r, int64_t p, auto& acc) {
            constexpr int N = std::extent<std::remove_reference_t<decltype(acc)>, 1>::value;
            for (int64_t i = 0; i < TILE_ROWS; ++i)
                for (int j = 0; j < N; ++j) use(r + i, (p + j) * LANES, acc[i][j] * inverse_temperature);
        });
    }

    // `use(row, its softmax, score of its token)` once a row has seen the whole vocabulary.
    template <typename Use>
    void normalise(Use&& use) const {
        const int64_t most = segment();
#pragma omp parallel
        {
            Buffer<bf16> input(HEAD_ROWS * row_stride(width));
            Buffer<float> score(HEAD_ROWS * most), chosen(HEAD_ROWS);
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < rows; first += HEAD_ROWS) {
                const int64_t count = load(first, rows, input.get());
                RowSoftmax softmax[HEAD_ROWS];
                for (int64_t start = 0; start < vocabulary; start += most) {
                    const int64_t stop = std::min(vocabulary, start + most);
                    scores(input.get(), count, start, stop, [&](int64_t r, int64_t column, Lanes v) { put(score.get() + r * most + column, v); });
                    for (int64_t r = 0; r < count; ++r) {
                        const float* line = score.get() + r * most;
                        softmax[r].take(line, stop - start);
                        if (token[first + r] >= start && token[first + r] < stop) chosen.get()[r] = line[token[first + r] - start];
                    }
                }
                for (int64_t r = 0; r < count; ++r) use(first + r, softmax[r], chosen.get()[r]);
            }
        }
    }
};

// Gradients of sum over rows of row_weight * (log_sum - score of the token), with the scores over the temperature.
struct HeadGradient {
    const Head& head;
    const bf16* backward;
    const float *log_sum, *row_weight;
    float *grad_hidden, *grad_weight;   // the latter may be null

    void run() const {
        const int64_t rows = head.rows, width = head.width, vocabulary = head.vocabulary, most = std::min(rows, CHUNK_ROWS), pairs = (most + 1) / 2;
        Buffer<bf16> left(grad_weight ? 2 * pairs * vocabulary : 1), right(grad_weight ? 2 * pairs * width : 1);
#pragma omp parallel
        {
            Buffer<bf16> input(HEAD_ROWS * row_stride(width)), grads(HEAD_ROWS * row_stride(head.segment()));
            for (int64_t start = 0; start < rows; start += CHUNK_ROWS) {
                const int64_t stop = std::min(rows, start + CHUNK_ROWS), chunk_pairs = (stop - start + 1) / 2, step = chunk_pairs * PAIR;
#pragma omp for schedule(dynamic, 1)
                for (int64_t first = start; first < stop; first += HEAD_ROWS) {
                    const int64_t count = head.load(first, stop, input.get()), at = (first - start) * LANES;
                    block(input.get(), grads.get(), first, count, grad_weight ? left.get() + at : nullptr, step);
                    if (grad_weight) block_to_columns(input.get(), width, count, right.get() + at, step);
                }
                if (!grad_weight) continue;
#pragma omp for schedule(dynamic, 1)
                for (int64_t n = 0; n < vocabulary; n += OUTS_PER_TASK)
                    outer_columns(left.get(), {n, std::min(vocabulary, n + OUTS_PER_TASK)}, right.get(), width, {0, width / LANES}, chunk_pairs,
                                  start > 0, grad_weight);
            }
        }
    }

    void block(const bf16* input, bf16* grads, int64_t first, int64_t count, bf16* columns, int64_t step) const {
        const int64_t most = head.segment(), stride = row_stride(most);
        for (int64_t start = 0; start < head.vocabulary; start += most) {
            const int64_t stop = std::min(head.vocabulary, start + most);
            head.scores(input, count, start, stop, [&](int64_t r, int64_t column, Lanes v) {
                put_bf16(grads + r * stride + column, r < count ? quick_exp(v - log_sum[first + r]) * row_weight[first + r] : Lanes{});
                const int64_t token = r < count ? head.token[first + r] - start - column : LANES;
                if (token >= 0 && token < LANES)
                    grads[r * stride + column + token] = to_bf16((fast_exp(v[token] - log_sum[first + r]) - 1.0f) * row_weight[first + r]);
            });
            add_block_times_panels(grads, stride, count, backward, head.vocabulary, start, stop, head.width, grad_hidden + first * head.width);
            if (columns) block_to_columns(grads, stride, stop - start, count, columns + start / LANES * step, step);
        }
    }
};

}  // namespace

extern "C" {

// Log-probability of each row's token under softmax(scores / temperature), the entropy there, and the logarithm of the sum of
// exponentials.
void head_log_probability(const float* hidden, const bf16* forward, const int64_t* token, float inverse_temperature, float* logprob,
                          float* entropy, float* log_sum, int64_t rows, int64_t width, int64_t vocabulary) {
    Head{hidden, forward, rows, width, vocabulary, token, inverse_temperature}.normalise([&](int64_t row, const RowSoftmax& softmax, float score) {
        logprob[row] = softmax.log_probability(score), entropy[row] = softmax.entropy(), log_sum[row] = softmax.log_sum();
    });
}

// Gradients of sum(row_weight * -log-probability * temperature); the weight's may be null.
void head_log_probability_backward(const float* hidden, const bf16* forward, const bf16* backward, const int64_t* token,
                                   float inverse_temperature, const float* log_sum, const float* row_weight, float* grad_hidden,
                                   float* grad_weight, int64_t rows, int64_t width, int64_t vocabulary) {
    const Head head{hidden, forward, rows, width, vocabulary, token, inverse_temperature};
    HeadGradient{head, backward, log_sum, row_weight, grad_hidden, grad_weight}.run();
}

}  // extern "C"
