// The output head of a policy: log-probabilities of its tokens and, once an objective has weighted the rows, both gradients,
// without the array of scores. See products.h.
//
// Block of rows by block, a segment of the vocabulary at a time, so that scores and the weights in use stay in the cache of a
// core. A score becomes a power, exp(score - score of the row's own token), while it is in a register. What the rows will weigh
// is not known yet, but all that is left for later is a factor per row: powers times weights give the gradient of the hidden
// state but for it, and powers kept in bfloat16, whose range is that of float32, the gradient of the weights. That saves the
// backward pass two of its three products. Rows for which there is no memory make their scores again. Cross-entropy, whose
// rows all weigh the same, needs no second pass: head.cpp.
//
// Reference: training/loss.py through PyTorch; compared in tests/kernels/test_products.py.

#include "cross_entropy.h"
#include "products.h"

namespace {

using namespace shoal;

constexpr int64_t HEAD_ROWS = 128;            // every block reads all weights once
constexpr int64_t SEGMENT_BYTES = 512 << 10;  // of weights, at a time
constexpr int64_t MAX_SEGMENT = 512;
constexpr int64_t CHUNK_ROWS = 1024;  // whose powers or gradients lie together; a multiple of HEAD_ROWS
constexpr int64_t OUTS_PER_TASK = 128;
constexpr float TOO_LARGE = 1e26f;  // sum of powers that calls for another score to start from

// A row's scores, exponentiated from `start` on: the sum of the powers, and of each times its exponent.
struct RowSoftmax {
    float start, chosen, sum, mean;

    float log_sum() const { return start + std::log(sum); }
    float log_probability() const { return chosen - start - std::log(sum); }
    float entropy() const { return std::log(sum) - mean / sum; }
    // The token's power less all powers: its gradient but for the factor of the row.
    float token_gradient() const { return fast_exp(chosen - start) - sum; }
};

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

    // `use(row, column in the segment, some times sixteen scores over the temperature)`.
    template <typename Use>
    void scores(const bf16* input, int64_t count, int64_t start, int64_t stop, Use&& use) const {
        block_times_panels<3>(input, width, count, forward + start * width, (stop - start) / LANES, [&](int64_t r, int64_t p, auto& acc) {
            for (int64_t i = 0; i < TILE_ROWS; ++i) {
                for (Lanes& v : acc[i]) v *= inverse_temperature;
                use(r + i, p * LANES, acc[i]);
            }
        });
    }

    // The score of one row's token, the same bits as among all of them.
    float token_score(const bf16* input, int64_t row, int64_t token) const {
        Lanes acc[1][1] = {};
        tile<1, 1>(input + row * row_stride(width), 0, 2, forward + token / LANES * LANES * width, 0, width / 2, acc);
        return acc[0][0][token % LANES] * inverse_temperature;
    }

    // Where rows start that are `TOO_LARGE` from their token's score: their largest one.
    void start_from_largest(const bf16* input, int64_t count, RowSoftmax* row) const {
        Lanes top[HEAD_ROWS];
        std::fill(top, top + HEAD_ROWS, Lanes{} - INFINITY);
        scores(input, count, 0, vocabulary, [&](int64_t r, int64_t, auto& v) { for (const Lanes& each : v) top[r] = max_lanes(top[r], each); });
        for (int64_t r = 0; r < count; ++r) {
            row[r].start = top[r][0];
            for (int64_t i = 1; i < LANES; ++i) row[r].start = std::max(row[r].start, top[r][i]);
        }
    }

    // The softmax of a block of rows. `use(start, stop, powers of these columns)`; all again if rows have to start elsewhere.
    template <typename Use>
    void softmax(const bf16* input, int64_t first, int64_t count, bf16* power, RowSoftmax* row, Use&& use) const {
        const int64_t most = segment(), stride = row_stride(most);
        for (int64_t r = 0; r < count; ++r) row[r].start = row[r].chosen = token_score(input, r, token[first + r]);
        for (bool again : {true, false}) {
            Lanes sum[HEAD_ROWS] = {}, mean[HEAD_ROWS] = {};
            for (int64_t start = 0; start < vocabulary; start += most) {
                const int64_t stop = std::min(vocabulary, start + most);
                scores(input, count, start, stop, [&](int64_t r, int64_t column, auto& v) {
                    if (r >= count) return;
                    Lanes sums = sum[r], means = mean[r];
                    for (const Lanes& each : v) {
                        const Lanes exponent = each - row[r].start, here = quick_exp(exponent);
                        sums += here, means += here * exponent;
                        put_bf16(power + r * stride + column, here);
                        column += LANES;
                    }
                    sum[r] = sums, mean[r] = means;
                });
                use(start, stop, power);
            }
            bool fine = true;
            for (int64_t r = 0; r < count; ++r) row[r].sum = sum_of(sum[r]), row[r].mean = sum_of(mean[r]), fine &= row[r].sum < TOO_LARGE;
            if (fine || !again) return;
            start_from_largest(input, count, row);
        }
    }
};

// Powers of the first rows: of every CHUNK_ROWS of them as columns (products.h), a row's token holding `token_gradient`.
struct Kept {
    int64_t rows;
    bf16* power;
    float *gradient, *factor;  // [rows][width] of the hidden states for a weight of one; [rows] one over the sum of powers

    int64_t chunk_rows(int64_t start) const { return std::min(CHUNK_ROWS, rows - start); }
    static int64_t step(int64_t count) { return (count + 1) / 2 * PAIR; }
};

struct HeadForward {
    const Head& head;
    const bf16* backward;
    const Kept& kept;

    // `use(row, its softmax)`.
    template <typename Use>
    void run(Use&& use) const {
#pragma omp parallel
        {
            Buffer<bf16> input(HEAD_ROWS * row_stride(head.width)), power(HEAD_ROWS * row_stride(head.segment()));
            RowSoftmax row[HEAD_ROWS];
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < head.rows; first += HEAD_ROWS) {
                const int64_t count = head.load(first, head.rows, input.get());
                if (first < kept.rows) keep(input.get(), power.get(), first, count, row);
                else head.softmax(input.get(), first, count, power.get(), row, [](int64_t, int64_t, bf16*) {});
                for (int64_t r = 0; r < count; ++r) use(first + r, row[r]);
            }
        }
    }

    void keep(const bf16* input, bf16* power, int64_t first, int64_t count, RowSoftmax* row) const {
        const int64_t chunk = first / CHUNK_ROWS * CHUNK_ROWS, step = Kept::step(kept.chunk_rows(chunk)), stride = row_stride(head.segment());
        bf16* columns = kept.power + chunk * head.vocabulary + (first - chunk) * LANES;
        head.softmax(input, first, count, power, row, [&](int64_t start, int64_t stop, bf16* some) {
            for (int64_t r = 0; r < count; ++r) {
                const int64_t place = head.token[first + r] - start;
                if (place >= 0 && place < stop - start) some[r * stride + place] = 0;
            }
            if (count % 2) std::memset(some + count * stride, 0, (stop - start) * sizeof(bf16));
            add_block_times_panels(some, stride, count, backward, head.vocabulary, start, stop, head.width, kept.gradient + first * head.width);
            block_to_columns(some, stride, stop - start, count, columns + start / LANES * step, step);
        });
        for (int64_t r = 0; r < count; ++r) {
            const int64_t token = head.token[first + r];
            const float of_token = row[r].token_gradient(), factor = 1.0f / row[r].sum;
            columns[token / LANES * step + r / 2 * PAIR + token % LANES * 2 + r % 2] = to_bf16(of_token);
            float* gradient = kept.gradient + (first + r) * head.width;
            const bf16* weight = head.forward + token / LANES * LANES * head.width + token % LANES * 2;
            for (int64_t d = 0; d < head.width; ++d) gradient[d] = (gradient[d] + of_token * to_float(weight[d / 2 * PAIR + d % 2])) * factor;
            kept.factor[first + r] = factor;
        }
    }
};

// Gradients of sum over rows of row_weight * (log_sum - score of the token), with the scores over the temperature.
struct HeadGradient {
    const Head& head;
    const bf16* backward;
    const Kept& kept;
    const float *log_sum, *row_weight;
    float *grad_hidden, *grad_weight;   // the latter may be null

    void run() const {
        if (kept.rows) use_kept();
        if (kept.rows < head.rows) make_again();
    }

    void use_kept() const {
        const int64_t width = head.width, vocabulary = head.vocabulary;
        Buffer<bf16> right(grad_weight ? (kept.rows + 1) * width : 1);
#pragma omp parallel
        {
            Buffer<bf16> input(HEAD_ROWS * row_stride(width));
            Buffer<float> line(width);
#pragma omp for schedule(static)
            for (int64_t first = 0; first < kept.rows; first += HEAD_ROWS) {
                const int64_t count = std::min(HEAD_ROWS, kept.rows - first), chunk = first / CHUNK_ROWS * CHUNK_ROWS;
                for (int64_t r = 0; r < count; ++r) {
                    const int64_t row = first + r;
                    const float weight = row_weight[row], factor = weight * kept.factor[row];
                    for (int64_t d = 0; d < width; d += LANES) {
                        put(grad_hidden + row * width + d, lanes(kept.gradient + row * width + d) * weight);
                        put(line.get() + d, lanes(head.hidden + row * width + d) * factor);
                    }
                    put_row(input.get() + r * row_stride(width), line.get(), width);
                }
                clear_rows(input.get(), width, count);
                if (grad_weight)
                    block_to_columns(input.get(), width, count, right.get() + chunk * width + (first - chunk) * LANES, Kept::step(kept.chunk_rows(chunk)));
            }
            if (grad_weight) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t n = 0; n < vocabulary; n += OUTS_PER_TASK)
                    for (int64_t chunk = 0; chunk < kept.rows; chunk += CHUNK_ROWS)
                        outer_columns(kept.power + chunk * vocabulary, {n, std::min(vocabulary, n + OUTS_PER_TASK)}, right.get() + chunk * width, width,
                                      {0, width / LANES}, Kept::step(kept.chunk_rows(chunk)) / PAIR, chunk > 0, grad_weight);
            }
        }
    }

    void make_again() const {
        const int64_t rows = head.rows, width = head.width, vocabulary = head.vocabulary, most = std::min(rows - kept.rows, CHUNK_ROWS);
        Buffer<bf16> left(grad_weight ? (most + 1) * vocabulary : 1), right(grad_weight ? (most + 1) * width : 1);
#pragma omp parallel
        {
            Buffer<bf16> input(HEAD_ROWS * row_stride(width)), grads(HEAD_ROWS * row_stride(head.segment()));
            for (int64_t start = kept.rows; start < rows; start += CHUNK_ROWS) {
                const int64_t stop = std::min(rows, start + CHUNK_ROWS), step = Kept::step(stop - start);
#pragma omp for schedule(dynamic, 1)
                for (int64_t first = start; first < stop; first += HEAD_ROWS) {
                    const int64_t count = head.load(first, stop, input.get()), at = (first - start) * LANES;
                    block(input.get(), grads.get(), first, count, grad_weight ? left.get() + at : nullptr, step);
                    if (grad_weight) block_to_columns(input.get(), width, count, right.get() + at, step);
                }
                if (!grad_weight) continue;
#pragma omp for schedule(dynamic, 1)
                for (int64_t n = 0; n < vocabulary; n += OUTS_PER_TASK)
                    outer_columns(left.get(), {n, std::min(vocabulary, n + OUTS_PER_TASK)}, right.get(), width, {0, width / LANES}, step / PAIR,
                                  start > 0, grad_weight);
            }
        }
    }

    void block(const bf16* input, bf16* grads, int64_t first, int64_t count, bf16* columns, int64_t step) const {
        const int64_t most = head.segment(), stride = row_stride(most);
        for (int64_t start = 0; start < head.vocabulary; start += most) {
            const int64_t stop = std::min(head.vocabulary, start + most);
            head.scores(input, count, start, stop, [&](int64_t r, int64_t column, auto& v) {
                for (const Lanes& each : v) {
                    put_bf16(grads + r * stride + column, r < count ? quick_exp(each - log_sum[first + r]) * row_weight[first + r] : Lanes{});
                    const int64_t token = r < count ? head.token[first + r] - start - column : LANES;
                    if (token >= 0 && token < LANES)
                        grads[r * stride + column + token] = to_bf16((fast_exp(each[token] - log_sum[first + r]) - 1.0f) * row_weight[first + r]);
                    column += LANES;
                }
            });
            add_block_times_panels(grads, stride, count, backward, head.vocabulary, start, stop, head.width, grad_hidden + first * head.width);
            if (columns) block_to_columns(grads, stride, stop - start, count, columns + start / LANES * step, step);
        }
    }
};

}  // namespace

extern "C" {

// Rows whose powers may be kept, when `rows` are wanted: all, or whole chunks.
int64_t head_kept_rows(int64_t rows, int64_t wanted) { return wanted >= rows ? rows : wanted / CHUNK_ROWS * CHUNK_ROWS; }

// Log-probability of each row's token under softmax(scores / temperature), the entropy there, and the logarithm of the sum of
// exponentials. Of the first `kept_rows` (from `head_kept_rows`) what their gradients need: `power` [kept_rows, even][vocabulary],
// `gradient` [kept_rows][width], `factor` [kept_rows].
void head_log_probability(const float* hidden, const bf16* forward, const bf16* backward, const int64_t* token, float inverse_temperature,
                          float* logprob, float* entropy, float* log_sum, bf16* power, float* gradient, float* factor, int64_t kept_rows,
                          int64_t rows, int64_t width, int64_t vocabulary) {
    const Head head{hidden, forward, rows, width, vocabulary, token, inverse_temperature};
    const Kept kept{kept_rows, power, gradient, factor};
    HeadForward{head, backward, kept}.run([&](int64_t row, const RowSoftmax& softmax) {
        logprob[row] = softmax.log_probability(), entropy[row] = softmax.entropy(), log_sum[row] = softmax.log_sum();
    });
}

// Gradients of sum(row_weight * -log-probability * temperature); the weight's may be null.
void head_log_probability_backward(const float* hidden, const bf16* forward, const bf16* backward, const int64_t* token,
                                   float inverse_temperature, const float* log_sum, const float* row_weight, bf16* power, float* gradient,
                                   float* factor, int64_t kept_rows, float* grad_hidden, float* grad_weight, int64_t rows, int64_t width,
                                   int64_t vocabulary) {
    const Head head{hidden, forward, rows, width, vocabulary, token, inverse_temperature};
    const Kept kept{kept_rows, power, gradient, factor};
    HeadGradient{head, backward, kept, log_sum, row_weight, grad_hidden, grad_weight}.run();
}

}  // extern "C"
