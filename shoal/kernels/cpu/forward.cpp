// One forward pass of a DeepSeek-family model over packed weights: decoding, and prefill in chunks.
//
// All of it is one parallel region. A phase is either a loop over tokens (norms, rotations, routing, conversions of inputs)
// or over panels of weights (products); phases are separated by barriers, which cost about a microsecond each, so a layer of
// a small model is not drowned in thread starts. Every number is computed by one task in an order that does not depend on
// the other rows or on the number of threads. Nothing is allocated once the largest batch has been seen.
//
// Reference: model/transformer.py with a cache; compared in tests/engine/test_runner.py.

#include <memory>
#include <new>
#include <type_traits>

#include "latent_attention.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace shoal {

// Mirrors kernels/packed.py. Pointers stay owned by Python.
struct Layer {
    const float* input_norm;
    const float* query_norm;   // of the query latent; null without query compression
    const float* latent_norm;
    const float* post_norm;
    const float* router_bias;  // null: choose by the scores alone
    Matrix down_projections;   // query (latent) rows, then key-value latent and rotary key
    Matrix query_up;           // ABSENT without query compression
    Matrix key_up;             // count = heads, [latent, plain]
    Matrix value_up;           // count = heads, [value, latent]
    Matrix output;
    Matrix router;             // ABSENT in a dense layer
    Matrix expert_gate_up;     // panels alternate: 16 rows of the gate, 16 of the up projection
    Matrix expert_down;
    Matrix shared_gate_up;     // the dense network in a dense layer; ABSENT without shared experts
    Matrix shared_down;
};

struct Model {
    int64_t num_layers, hidden, heads, plain, rotary, value, latent, query_latent;
    int64_t experts_per_token, groups, top_groups;
    int32_t softmax_scores, group_by_best_two, renormalise;
    float routed_scale, norm_eps, latent_norm_eps, softmax_scale;
    const float* rotations;  // [positions][rotary / 2][cos, sin]
    const float* final_norm;
    Matrix head;
    const Layer* layers;
};

struct Batch {
    int64_t tokens;
    float* x;                  // [tokens, hidden] embeddings in; final hidden states (before the last norm) out
    const int32_t* position;   // place in its sequence
    const int32_t* sequence;   // row of `table`
    const int32_t* table;      // pages of each sequence
    int64_t table_width;
    void* cache;               // [layers][pages][page_tokens][latent + rotary]
    int32_t cache_is_bf16;
    int64_t page_tokens, layer_stride;
    const int32_t* output_row; // tokens whose logits are wanted
    int64_t outputs;
    float* logits;             // [outputs, vocabulary]
    int32_t* chosen;           // [layers, tokens, K] experts, or null
};

inline void norm_row(const float* x, const float* weight, int64_t width, float eps, float* out) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < width; ++d) sum += x[d] * x[d];
    const float scale = 1.0f / std::sqrt(sum / width + eps);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) out[d] = x[d] * scale * weight[d];
}

inline void rotate(const float* x, const float* rotation, int64_t rotary, float scale, float* out) {
    for (int64_t i = 0; i < rotary; i += 2) {
        const float cos = rotation[i], sin = rotation[i + 1], a = x[i], b = x[i + 1];
        out[i] = (a * cos - b * sin) * scale;
        out[i + 1] = (a * sin + b * cos) * scale;
    }
}

inline void put_value(float* p, float v) { *p = v; }
inline void put_value(bf16* p, float v) { *p = to_bf16(v); }

// Choose experts of one token: `score` are router logits, overwritten by affinities.
void choose(const Model& m, const Layer& layer, float* score, int32_t* expert, float* weight, std::vector<float>& steered) {
    const int64_t experts = layer.router.rows, per_group = experts / m.groups;
    if (m.softmax_scores) {
        float top = score[0], sum = 0.0f;
        for (int64_t e = 1; e < experts; ++e) top = std::max(top, score[e]);
        for (int64_t e = 0; e < experts; ++e) sum += score[e] = std::exp(score[e] - top);
        for (int64_t e = 0; e < experts; ++e) score[e] /= sum;
    } else {
        for (int64_t e = 0; e < experts; ++e) score[e] = 1.0f / (1.0f + std::exp(-score[e]));
    }
    steered.assign(score, score + experts);
    if (layer.router_bias)
        for (int64_t e = 0; e < experts; ++e) steered[e] += layer.router_bias[e];
    if (m.groups > 1 && m.top_groups < m.groups) {
        std::vector<float> group(m.groups);
        for (int64_t g = 0; g < m.groups; ++g) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t e = g * per_group; e < (g + 1) * per_group; ++e) {
                if (steered[e] > first) second = first, first = steered[e];
                else if (steered[e] > second) second = steered[e];
            }
            group[g] = m.group_by_best_two ? first + second : first;
        }
        std::vector<char> kept(static_cast<size_t>(m.groups), 0);
        for (int64_t k = 0; k < m.top_groups; ++k) {
            int64_t best = 0;
            while (kept[best]) ++best;
            for (int64_t g = best + 1; g < m.groups; ++g)
                if (!kept[g] && group[g] > group[best]) best = g;
            kept[best] = 1;
        }
        for (int64_t e = 0; e < experts; ++e)
            if (!kept[e / per_group]) steered[e] = -INFINITY;
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

class Forward {
  public:
    explicit Forward(const Model& model) : m(model) {}

    template <typename T>
    void run(const Batch& batch) {
        prepare<T>(batch);
#pragma omp parallel
        {
            for (int64_t index = 0; index < m.num_layers; ++index) {
                attention<T>(batch, m.layers[index], index);
                feed_forward(batch, m.layers[index], index);
            }
            logits(batch);
        }
    }

  private:
    const Model m;
    Operand normed, query_latent, plain_query, mixed_latent, attended, act, shared_act, head_input;
    std::vector<float> down, query, mixed, values, score, gate, shared_gate, final, expert_weight, partial, partial_stats;
    std::vector<uint8_t> panel;
    std::vector<int32_t> all_rows, head_rows, expert_of, slot_of, slot_token, first_slot, active, slot_rows;
    std::vector<float> slot_weight;

    int64_t query_width() const { return m.heads * (m.plain + m.rotary); }
    int64_t head_blocks() const { return padded(m.heads) / LANES; }
    int64_t entry_width() const { return m.latent + m.rotary; }
    int64_t split = 0, max_chunks = 0;

    template <typename V> static void grow(V& v, int64_t size) {
        if (static_cast<int64_t>(v.size()) < size) v.resize(size);
    }

    template <typename T>
    void prepare(const Batch& b) {
        const int64_t tokens = b.tokens;
        int64_t longest = 0;
        for (int64_t t = 0; t < tokens; ++t) longest = std::max<int64_t>(longest, b.position[t] + 1);
        max_chunks = padded(longest, CHUNK) / CHUNK;
        int64_t threads = 1;
#if defined(_OPENMP)
        threads = omp_get_max_threads();
#endif
        // Few tokens: chunks of the context are shared out and merged later. Many: each task keeps its own running result.
        split = tokens * head_blocks() < 2 * threads && max_chunks > 1;
        const int64_t partials = split ? tokens * head_blocks() * max_chunks : 2 * threads;
        grow(partial, partials * LANES * m.latent);
        grow(partial_stats, partials * 2 * LANES);
        grow(panel, tokens * head_blocks() * entry_width() * LANES * static_cast<int64_t>(sizeof(T)));
        grow(mixed, tokens * padded(m.heads) * m.latent);
        grow(query, tokens * query_width());
        grow(values, tokens * m.heads * m.value);
        grow(all_rows, tokens);
        for (int64_t t = 0; t < tokens; ++t) all_rows[t] = static_cast<int32_t>(t);
        grow(head_rows, tokens * m.heads);
        for (int64_t h = 0; h < m.heads; ++h)
            for (int64_t t = 0; t < tokens; ++t) head_rows[h * tokens + t] = static_cast<int32_t>(t * m.heads + h);
        grow(final, std::max<int64_t>(b.outputs, tokens) * m.hidden);
        for (int64_t i = 0; i < m.num_layers; ++i) {
            const Layer& layer = m.layers[i];
            grow(down, tokens * layer.down_projections.rows);
            if (layer.router.format != ABSENT) {
                const int64_t slots = tokens * m.experts_per_token, width = layer.expert_down.cols;
                grow(score, tokens * layer.router.rows);
                grow(gate, slots * padded(width));
                grow(expert_of, slots), grow(expert_weight, slots), grow(slot_of, slots), grow(slot_token, slots);
                grow(slot_weight, slots), grow(slot_rows, slots);
                grow(first_slot, layer.router.rows + 1), grow(active, layer.router.rows);
                for (int64_t s = 0; s < slots; ++s) slot_rows[s] = static_cast<int32_t>(s);
            }
            if (layer.shared_down.format != ABSENT) grow(shared_gate, tokens * padded(layer.shared_down.cols));
        }
    }

    template <typename Fill>
    void each_token(int64_t tokens, Fill&& fill) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t) fill(t);
    }

    // Panels of `w` in tasks of `grain`; the barrier at the end is the phase's.
    template <typename Use>
    void product(const Matrix& w, const Operand& x, int64_t tokens, Use&& use) {
        const int64_t panels = w.panels(), grain = panels >= 64 ? 8 : panels >= 16 ? 4 : 2;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < panels; first += grain)
            for_panels(w, 0, first, std::min(panels, first + grain), x, all_rows.data(), tokens, use);
    }

    static void put_rows(float* out, int64_t stride, int64_t rows, int64_t r, int64_t panel, Lanes v) {
        const int64_t column = panel * LANES, valid = std::min(LANES, rows - column);
        float* to = out + r * stride + column;
        if (valid == LANES)
            put(to, v);
        else
            for (int64_t i = 0; i < valid; ++i) to[i] = v[i];
    }

    static void add_rows(float* out, int64_t stride, int64_t rows, int64_t r, int64_t panel, Lanes v) {
        const int64_t column = panel * LANES, valid = std::min(LANES, rows - column);
        float* to = out + r * stride + column;
        if (valid == LANES)
            put(to, lanes(to) + v);
        else
            for (int64_t i = 0; i < valid; ++i) to[i] += v[i];
    }

    void reserve(Operand& operand, int64_t rows, const Matrix& w) {
#pragma omp single
        operand.reserve(rows, w);
    }

    void norm_into(const Batch& b, const float* x, int64_t stride, const float* weight, int64_t width, float eps, Operand& to) {
        each_token(b.tokens, [&](int64_t t) {
            thread_local std::vector<float> row;
            grow(row, width);
            norm_row(x + t * stride, weight, width, eps, row.data());
            to.set(t, row.data(), width);
        });
    }

    template <typename T>
    void attention(const Batch& b, const Layer& layer, int64_t index) {
        const int64_t tokens = b.tokens, width = entry_width(), down_rows = layer.down_projections.rows;
        const bool compressed = layer.query_up.format != ABSENT;
        const int64_t first_rows = compressed ? m.query_latent : query_width();
        T* entries = static_cast<T*>(b.cache) + index * b.layer_stride;
        T* panels = reinterpret_cast<T*>(panel.data());
        reserve(normed, tokens, layer.down_projections);
        norm_into(b, b.x, m.hidden, layer.input_norm, m.hidden, m.norm_eps, normed);
        product(layer.down_projections, normed, tokens,
                [&](int64_t r, int64_t p, Lanes v) { put_rows(down.data(), down_rows, down_rows, r, p, v); });
        if (compressed) {
            reserve(query_latent, tokens, layer.query_up);
            norm_into(b, down.data(), down_rows, layer.query_norm, m.query_latent, m.latent_norm_eps, query_latent);
            product(layer.query_up, query_latent, tokens,
                    [&](int64_t r, int64_t p, Lanes v) { put_rows(query.data(), query_width(), query_width(), r, p, v); });
        }
        reserve(plain_query, tokens * m.heads, layer.key_up);
        each_token(tokens, [&](int64_t t) { write_entry(b, layer, entries, t, first_rows); });
        each_token(tokens, [&](int64_t t) { prepare_query(b, panels, t, compressed ? query.data() + t * query_width() : down.data() + t * down_rows); });
        lift_queries(b, layer, panels);
        attend(b, entries, panels, width);
        reserve(mixed_latent, tokens * m.heads, layer.value_up);
        each_token(tokens, [&](int64_t t) {
            for (int64_t h = 0; h < m.heads; ++h) mixed_latent.set(t * m.heads + h, mixed.data() + (t * padded(m.heads) + h) * m.latent, m.latent);
        });
        lower_values(b, layer);
        reserve(attended, tokens, layer.output);
        each_token(tokens, [&](int64_t t) { attended.set(t, values.data() + t * m.heads * m.value, m.heads * m.value); });
        product(layer.output, attended, tokens, [&](int64_t r, int64_t p, Lanes v) { add_rows(b.x, m.hidden, m.hidden, r, p, v); });
    }

    // The cache entry of token t: normed latent, rotated shared key.
    template <typename T>
    void write_entry(const Batch& b, const Layer& layer, T* entries, int64_t t, int64_t offset) {
        thread_local std::vector<float> row;
        grow(row, entry_width());
        const float* from = down.data() + t * layer.down_projections.rows + offset;
        const int64_t position = b.position[t];
        norm_row(from, layer.latent_norm, m.latent, m.latent_norm_eps, row.data());
        rotate(from + m.latent, m.rotations + position * m.rotary, m.rotary, 1.0f, row.data() + m.latent);
        const int64_t page = b.table[b.sequence[t] * b.table_width + position / b.page_tokens];
        T* to = entries + (page * b.page_tokens + position % b.page_tokens) * entry_width();
        for (int64_t i = 0; i < entry_width(); ++i) put_value(to + i, row[i]);
    }

    // Panel slot of column k for head h of token t.
    template <typename T>
    T* query_slot(T* panels, int64_t t, int64_t h, int64_t k) const {
        T* block = panels + (t * head_blocks() + h / LANES) * entry_width() * LANES;
        return block + k / PACK<T> * PACK<T> * LANES + h % LANES * PACK<T> + k % PACK<T>;
    }

    // Rotary part of the queries into the panels; plain part as operand of the key up-projection.
    template <typename T>
    void prepare_query(const Batch& b, T* panels, int64_t t, const float* from) {
        thread_local std::vector<float> row;
        grow(row, m.rotary);
        T* block = panels + t * head_blocks() * entry_width() * LANES;
        if (m.heads % LANES) std::memset(block, 0, head_blocks() * entry_width() * LANES * sizeof(T));
        for (int64_t h = 0; h < m.heads; ++h) {
            const float* head = from + h * (m.plain + m.rotary);
            plain_query.set(t * m.heads + h, head, m.plain);
            rotate(head + m.plain, m.rotations + b.position[t] * m.rotary, m.rotary, m.softmax_scale, row.data());
            for (int64_t i = 0; i < m.rotary; ++i) put_value(query_slot(panels, t, h, m.latent + i), row[i]);
        }
    }

    template <typename T>
    void lift_queries(const Batch& b, const Layer& layer, T* panels) {
        const Matrix& w = layer.key_up;
        const int64_t grain = std::min<int64_t>(w.panels(), 8), per_head = (w.panels() + grain - 1) / grain;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < m.heads * per_head; ++task) {
            const int64_t h = task / per_head, first = task % per_head * grain;
            for_panels(w, h, first, std::min(w.panels(), first + grain), plain_query, head_rows.data() + h * b.tokens, b.tokens,
                       [&](int64_t t, int64_t p, Lanes v) {
                           for (int64_t i = 0; i < LANES; ++i) put_value(query_slot(panels, t, h, p * LANES + i), v[i] * m.softmax_scale);
                       });
        }
    }

    Partial partial_at(int64_t i) {
        const float* stats = partial_stats.data() + 2 * i * LANES;
        return {lanes(stats), lanes(stats + LANES), partial.data() + i * LANES * m.latent};
    }
    void keep_partial(int64_t i, const Partial& p) {
        put(partial_stats.data() + 2 * i * LANES, p.top);
        put(partial_stats.data() + (2 * i + 1) * LANES, p.sum);
    }

    template <typename T>
    void attend(const Batch& b, const T* entries, const T* panels, int64_t width) {
        const int64_t blocks = head_blocks(), tasks = b.tokens * blocks;
        static thread_local std::unique_ptr<ChunkScratch<T>> scratch;
        if (!scratch) scratch.reset(new ChunkScratch<T>);
        auto cache_of = [&](int64_t t) {
            return PagedEntries<T>{entries, b.table + b.sequence[t] * b.table_width, b.page_tokens, b.page_tokens * width, width};
        };
        auto chunk = [&](int64_t task, int64_t start, Partial& out) {
            const int64_t t = task / blocks, seen = b.position[t] + 1;
            attend_chunk<T>(cache_of(t), panels + task * width * LANES, start, std::min(CHUNK, seen - start), m.latent,
                            std::min(LANES, m.heads - task % blocks * LANES), *scratch, out);
        };
        auto finish = [&](int64_t task, const Partial& total) {
            const int64_t t = task / blocks, first = task % blocks * LANES, heads = std::min(LANES, m.heads - first);
            for (int64_t h = 0; h < heads; ++h) {
                float* to = mixed.data() + (t * padded(m.heads) + first + h) * m.latent;
                const float norm = 1.0f / total.sum[h];
                for (int64_t c = 0; c < m.latent; c += LANES) put(to + c, lanes(total.mixed + h * m.latent + c) * norm);
            }
        };
        if (split) {
#pragma omp for schedule(dynamic, 1) collapse(2)
            for (int64_t task = 0; task < tasks; ++task)
                for (int64_t c = 0; c < max_chunks; ++c) {
                    if (c * CHUNK > b.position[task / blocks]) continue;
                    Partial out = partial_at(task * max_chunks + c);
                    chunk(task, c * CHUNK, out);
                    keep_partial(task * max_chunks + c, out);
                }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks; ++task) {
                Partial total = partial_at(task * max_chunks);
                for (int64_t c = 1; c * CHUNK <= b.position[task / blocks]; ++c)
                    merge(total, partial_at(task * max_chunks + c), m.latent, std::min(LANES, m.heads));
                finish(task, total);
            }
            return;
        }
        int64_t thread = 0;
#if defined(_OPENMP)
        thread = omp_get_thread_num();
#endif
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            Partial total = partial_at(2 * thread), next = partial_at(2 * thread + 1);
            chunk(task, 0, total);
            for (int64_t start = CHUNK; start <= b.position[task / blocks]; start += CHUNK) {
                chunk(task, start, next);
                merge(total, next, m.latent, std::min(LANES, m.heads));
            }
            finish(task, total);
        }
    }

    void lower_values(const Batch& b, const Layer& layer) {
        const Matrix& w = layer.value_up;
        const int64_t stride = m.heads * m.value;
#pragma omp for schedule(dynamic, 1)
        for (int64_t h = 0; h < m.heads; ++h)
            for_panels(w, h, 0, w.panels(), mixed_latent, head_rows.data() + h * b.tokens, b.tokens,
                       [&](int64_t t, int64_t p, Lanes v) { put_rows(values.data() + h * m.value, stride, m.value, t, p, v); });
    }

    void feed_forward(const Batch& b, const Layer& layer, int64_t index) {
        const int64_t tokens = b.tokens;
        const bool routed = layer.router.format != ABSENT, shared = layer.shared_down.format != ABSENT;
        const Matrix& like = routed ? layer.expert_gate_up : layer.shared_gate_up;
        reserve(normed, tokens, like);
        each_token(tokens, [&](int64_t t) {
            float* row = final.data() + t * m.hidden;
            norm_row(b.x + t * m.hidden, layer.post_norm, m.hidden, m.norm_eps, row);
            normed.set(t, row, m.hidden);
        });
        if (routed) route(b, layer, index);
        if (shared) {
            product_gated(layer.shared_gate_up, 0, normed, all_rows.data(), tokens, shared_gate.data(), padded(layer.shared_down.cols));
            reserve(shared_act, tokens, layer.shared_down);
            each_token(tokens, [&](int64_t t) { shared_act.set(t, shared_gate.data() + t * padded(layer.shared_down.cols), layer.shared_down.cols); });
        }
        if (routed) gate_experts(layer);
        down_projections(b, layer, routed, shared);
    }

    // silu(gate) * up for the pairs of panels of one matrix.
    static void gated_panels(const Matrix& w, int64_t which, int64_t pair, const Operand& x, const int32_t* rows, int64_t num_rows, float* out, int64_t stride) {
        Lanes gate_value = {};
        for_rows<2>(w, which, 2 * pair, x, rows, num_rows, [&](int64_t r, int p, Lanes v) {
            if (p == 0) {
                gate_value = v;
            } else {
                const Lanes silu = gate_value / (1.0f + exp_lanes(-gate_value));
                put(out + r * stride + pair * LANES, silu * v);
            }
        });
    }

    void product_gated(const Matrix& w, int64_t which, const Operand& x, const int32_t* rows, int64_t num_rows, float* out, int64_t stride) {
        const int64_t pairs = w.panels() / 2, grain = pairs >= 32 ? 4 : 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < pairs; first += grain)
            for (int64_t pair = first; pair < std::min(pairs, first + grain); ++pair)
                gated_panels(w, which, pair, x, rows, num_rows, out, stride);
    }

    int64_t num_active = 0;

    void route(const Batch& b, const Layer& layer, int64_t index) {
        const int64_t tokens = b.tokens, experts = layer.router.rows, per_token = m.experts_per_token;
        // Router logits in float32 whatever the weights are: a flipped expert is a large error.
        each_token(tokens, [&](int64_t t) {
            thread_local std::vector<float> steered;
            const float* row = final.data() + t * m.hidden;
            float* logit = score.data() + t * experts;
            for (int64_t p = 0; p < layer.router.panels(); ++p) {
                const float* panel = reinterpret_cast<const float*>(layer.router.panel(0, p));
                Lanes sums[4] = {};
                int64_t k = 0;
                for (; k + 4 <= m.hidden; k += 4)
                    for (int64_t j = 0; j < 4; ++j) sums[j] += lanes(panel + (k + j) * LANES) * row[k + j];
                for (; k < m.hidden; ++k) sums[0] += lanes(panel + k * LANES) * row[k];
                put_rows(logit, 0, experts, 0, p, (sums[0] + sums[1]) + (sums[2] + sums[3]));
            }
            choose(m, layer, logit, expert_of.data() + t * per_token, expert_weight.data() + t * per_token, steered);
        });
#pragma omp single
        {
            if (b.chosen) std::memcpy(b.chosen + index * tokens * per_token, expert_of.data(), tokens * per_token * sizeof(int32_t));
            sort_by_expert(tokens * per_token, experts, per_token);
        }
    }

    // Slots: (token, choice) pairs in the order of their experts, tokens ascending.
    void sort_by_expert(int64_t slots, int64_t experts, int64_t per_token) {
        std::fill(first_slot.begin(), first_slot.begin() + experts + 1, 0);
        for (int64_t s = 0; s < slots; ++s) ++first_slot[expert_of[s] + 1];
        num_active = 0;
        for (int64_t e = 0; e < experts; ++e) {
            if (first_slot[e + 1]) active[num_active++] = static_cast<int32_t>(e);
            first_slot[e + 1] += first_slot[e];
        }
        std::vector<int32_t> next(first_slot.begin(), first_slot.begin() + experts);
        for (int64_t s = 0; s < slots; ++s) {
            const int32_t slot = next[expert_of[s]]++;
            slot_token[slot] = static_cast<int32_t>(s / per_token);
            slot_weight[slot] = expert_weight[s];
        }
    }

    void gate_experts(const Layer& layer) {
        const Matrix& w = layer.expert_gate_up;
        const int64_t pairs = w.panels() / 2, stride = padded(layer.expert_down.cols), slots = first_slot[layer.router.rows];
        const int64_t grain = std::max<int64_t>(1, std::min<int64_t>(pairs, 65536 / std::max<int64_t>(1, 2 * w.panel_bytes())));
        const int64_t per_expert = (pairs + grain - 1) / grain;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < num_active * per_expert; ++task) {
            const int64_t e = active[task / per_expert], first = task % per_expert * grain;
            for (int64_t pair = first; pair < std::min(pairs, first + grain); ++pair)
                gated_panels(w, e, pair, normed, slot_token.data() + first_slot[e], first_slot[e + 1] - first_slot[e], gate.data() + first_slot[e] * stride, stride);
        }
        reserve(act, slots, layer.expert_down);
        each_token(slots, [&](int64_t s) { act.set(s, gate.data() + s * stride, layer.expert_down.cols); });
    }

    // Shared and routed experts' second products, added to the residual: every output panel is one task's alone.
    void down_projections(const Batch& b, const Layer& layer, bool routed, bool shared) {
        const Matrix& like = routed ? layer.expert_down : layer.shared_down;
        const int64_t panels = like.panels(), grain = panels >= 32 ? 4 : 2;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < panels; first += grain) {
            const int64_t last = std::min(panels, first + grain);
            if (shared)
                for_panels(layer.shared_down, 0, first, last, shared_act, all_rows.data(), b.tokens,
                           [&](int64_t r, int64_t p, Lanes v) { add_rows(b.x, m.hidden, m.hidden, r, p, v); });
            for (int64_t i = 0; routed && i < num_active; ++i) {
                const int64_t e = active[i], start = first_slot[e];
                for_panels(layer.expert_down, e, first, last, act, slot_rows.data() + start, first_slot[e + 1] - start,
                           [&](int64_t r, int64_t p, Lanes v) { add_rows(b.x, m.hidden, m.hidden, slot_token[start + r], p, v * slot_weight[start + r]); });
            }
        }
    }

    void logits(const Batch& b) {
        if (!b.outputs) return;
        reserve(head_input, b.outputs, m.head);
        each_token(b.outputs, [&](int64_t i) {
            float* row = final.data() + i * m.hidden;
            norm_row(b.x + b.output_row[i] * m.hidden, m.final_norm, m.hidden, m.norm_eps, row);
            head_input.set(i, row, m.hidden);
        });
        product(m.head, head_input, b.outputs, [&](int64_t r, int64_t p, Lanes v) { put_rows(b.logits, m.head.rows, m.head.rows, r, p, v); });
    }
};

}  // namespace shoal

extern "C" {

// Bytes of the structures, so that Python can refuse a library built for another layout.
int64_t shoal_struct_bytes(int32_t which) {
    return which == 0 ? sizeof(shoal::Matrix) : which == 1 ? sizeof(shoal::Layer) : which == 2 ? sizeof(shoal::Model) : sizeof(shoal::Batch);
}

void* forward_new(const shoal::Model* model) { return new (std::nothrow) shoal::Forward(*model); }
void forward_free(void* forward) { delete static_cast<shoal::Forward*>(forward); }

// 0, or 1 when memory ran out.
int32_t forward_run(void* forward, const shoal::Batch* batch) {
    try {
        auto& f = *static_cast<shoal::Forward*>(forward);
        if (batch->cache_is_bf16)
            f.run<shoal::bf16>(*batch);
        else
            f.run<float>(*batch);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// y = x W^T for one packed matrix: the product alone, for tests, benchmarks and layers outside the fused pass.
void packed_linear(const shoal::Matrix* w, const float* x, int64_t rows, float* y) {
    shoal::Operand operand;
    operand.reserve(rows, *w);
    std::vector<int32_t> row(rows);
    for (int64_t r = 0; r < rows; ++r) row[r] = static_cast<int32_t>(r);
    const int64_t panels = w->panels();
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) operand.set(r, x + r * w->cols, w->cols);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < panels; first += 4)
            shoal::for_panels(*w, 0, first, std::min(panels, first + 4), operand, row.data(), rows, [&](int64_t r, int64_t p, shoal::Lanes v) {
                const int64_t column = p * shoal::LANES, valid = std::min(shoal::LANES, w->rows - column);
                for (int64_t i = 0; i < valid; ++i) y[r * w->rows + column + i] = v[i];
            });
    }
}

// Read an array once with all threads; what it returns only keeps the compiler honest. The measured limit of bandwidth.
float stream_sum(const float* x, int64_t count) {
    float total = 0.0f;
#pragma omp parallel reduction(+ : total)
    {
        shoal::Lanes sums[8] = {};
#pragma omp for schedule(static)
        for (int64_t block = 0; block < count / (8 * shoal::LANES); ++block)
            for (int64_t j = 0; j < 8; ++j) sums[j] += shoal::lanes(x + (block * 8 + j) * shoal::LANES);
        for (int64_t j = 0; j < 8; ++j) total += sums[j][0];
    }
    return total;
}

// Draw one token per row: `log_softmax(logit / temperature)`, then the first token whose cumulated probability passes
// `uniform` (temperature 0: the largest logit). Reference: engine/sampling.py.
void sample_rows(const float* logit, const float* temperature, const double* uniform, int64_t rows, int64_t width, int64_t* token, float* logprob, uint8_t* finite) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* line = logit + row * width;
        const float inverse = temperature[row] > 0.0f ? 1.0f / temperature[row] : 1.0f;
        float top = -INFINITY;
        int64_t best = 0;
        bool all_finite = true;
        for (int64_t v = 0; v < width; ++v) {
            all_finite &= std::isfinite(line[v]);
            if (line[v] > top) top = line[v], best = v;
        }
        finite[row] = all_finite;
        double sum = 0.0;
        for (int64_t v = 0; v < width; v += 16) {
            const int64_t stop = std::min<int64_t>(16, width - v);
            float block = 0.0f;
#pragma omp simd reduction(+ : block)
            for (int64_t i = 0; i < stop; ++i) block += shoal::fast_exp((line[v + i] - top) * inverse);
            sum += block;
        }
        int64_t chosen = best;
        if (temperature[row] > 0.0f && all_finite) {
            const double threshold = uniform[row] * sum;
            double before = 0.0;
            chosen = width - 1;
            for (int64_t v = 0; v < width; v += 16) {
                const int64_t stop = std::min<int64_t>(16, width - v);
                float block = 0.0f;
#pragma omp simd reduction(+ : block)
                for (int64_t i = 0; i < stop; ++i) block += shoal::fast_exp((line[v + i] - top) * inverse);
                if (before + block > threshold) {
                    double cumulated = before;
                    chosen = std::min(width, v + 16) - 1;
                    for (int64_t i = 0; i < stop; ++i) {
                        cumulated += shoal::fast_exp((line[v + i] - top) * inverse);
                        if (cumulated > threshold) {
                            chosen = v + i;
                            break;
                        }
                    }
                    break;
                }
                before += block;
            }
        }
        token[row] = chosen;
        logprob[row] = (line[chosen] - top) * inverse - static_cast<float>(std::log(sum));
    }
}

}  // extern "C"
