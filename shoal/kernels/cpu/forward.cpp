// One forward pass of a DeepSeek-family model over packed weights: decoding, and prefill in chunks.
//
// All of it is one parallel region whose threads go through phases together (team.h). A phase is either a loop over tokens
// (norms, rotations, routing, conversions of inputs) or over panels of weights (products). Every number is computed by one
// task in an order that does not depend on the other rows or on the number of threads. Nothing is allocated once the largest
// batch has been seen.
//
// Reference: model/transformer.py with a cache; compared in tests/engine/test_runner.py.

#include <atomic>
#include <memory>
#include <new>
#include <type_traits>

#include "drawing.h"
#include "fp8_entries.h"
#include "latent_attention.h"
#include "panel_products.h"
#include "routing.h"
#include "team.h"
#include "wide_attention.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace shoal {

constexpr int64_t PHASES_PER_LAYER = 22, LAST_PHASES = 6;

struct ThreadScratch {
    std::vector<float> row, scores;
    std::vector<uint8_t> panel;  // queries of one token and up to 16 heads
    std::vector<uint8_t> entries;  // a chunk of the context, where the cache is in FP8
    ChunkScratch<float> single;
    ChunkScratch<bf16> low;
    std::unique_ptr<Side> key, value;  // of one head, where a prompt is read fast
    std::vector<bf16> weight;
    std::vector<float> line;
    ChunkScratch<float>& chunk(float) { return single; }
    ChunkScratch<bf16>& chunk(bf16) { return low; }
};

// Tokens of one sequence that follow each other and are read with expanded keys and values; their context is rows [base, base +
// end) of what all such runs see.
struct WideRun {
    int64_t first, count, end, base;
};

class Forward {
  public:
    explicit Forward(const Model& model) : m(model) {}

    bool knows_tokens(const Batch& b) const {
        return !b.token || std::all_of(b.token, b.token + b.tokens, [&](int64_t token) { return token >= 0 && token < m.head.rows; });
    }

    template <typename T>
    void run(const Batch& batch) {
        prepare<T>(batch);
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            int64_t index = 0;
#if defined(_OPENMP)
            index = omp_get_thread_num();
#endif
            Member member(team, index);
            for (int64_t i = 0; i < m.num_layers; ++i) {
                attention<T>(member, batch, m.layers[i], i);
                feed_forward(member, batch, m.layers[i], i);
            }
            final_norm(member, batch);
            if (batch.logits) logits(member, batch);
            else draw(member, batch);
        }
    }

    // Whether the last batch's draws stand: they do not where scores are not finite, or far above those seen first.
    bool drew_all() const { return drew; }

  private:
    const Model m;
    Team team;
    int64_t threads = 1, split = 0, max_chunks = 0;
    std::vector<std::unique_ptr<ThreadScratch>> scratch;
    InputBuffer normed, query_latent, plain_query, mixed_latent, attended, act, shared_act, head_input;
    std::vector<float> down, query, values, gate, shared_gate, final, partial, partial_stats;
    std::vector<uint8_t> lifted;  // [tokens][heads][latent + rotary] queries in the space of cache entries
    std::vector<int32_t> all_rows, head_rows;
    std::vector<int32_t> narrow;  // tokens that attend to latents, which are all but those of wide runs
    std::vector<WideRun> runs;
    std::vector<uint8_t> is_wide;
    std::vector<int32_t> context_rows;
    std::vector<bf16> wide_query, context_key;  // [tokens][heads][plain + rotary]; [context][rotary]
    InputBuffer context_latent;
    Routes routes;
    std::vector<Drawing> drawings;
    std::vector<float> weight_sums;  // [outputs][blocks of the vocabulary]
    std::atomic<bool> drew{true};

    template <typename T>
    void prepare(const Batch& b) {
        const int64_t tokens = b.tokens;
        int64_t longest = 0;
        for (int64_t t = 0; t < tokens; ++t) longest = std::max<int64_t>(longest, b.position[t] + 1);
        max_chunks = padded(longest, CHUNK) / CHUNK;
#if defined(_OPENMP)
        threads = omp_get_max_threads();
#endif
        team.prepare(threads, m.num_layers * PHASES_PER_LAYER + LAST_PHASES);
        while (static_cast<int64_t>(scratch.size()) < threads) scratch.emplace_back(new ThreadScratch);
        const int64_t widest = std::max({m.hidden, m.entry_width(), m.query_latent, m.heads * m.value});
        const int64_t number = sizeof(T);
        for (auto& mine : scratch) {
            grow(mine->row, widest), grow(mine->panel, m.entry_width() * LANES * number);
            if (b.cache_is_fp8) grow(mine->entries, m.entry_width() * CHUNK * number);
        }
        // Few tokens: chunks of the context are shared out and merged later. Many: each task keeps its own running result.
        choose_wide<T>(b);
        const int64_t attending = static_cast<int64_t>(narrow.size()) * m.head_blocks();
        split = attending < 2 * threads;
        const int64_t partials = split ? attending * max_chunks : 2 * threads;
        grow(partial, partials * LANES * m.latent);
        grow(partial_stats, partials * 2 * LANES);
        grow(lifted, tokens * m.heads * m.entry_width() * static_cast<int64_t>(sizeof(T)));
        grow(query, tokens * m.query_width());
        grow(values, tokens * m.heads * m.value);
        grow(all_rows, tokens);
        for (int64_t t = 0; t < tokens; ++t) all_rows[t] = static_cast<int32_t>(t);
        head_rows.clear();
        for (int64_t h = 0; h < m.heads; ++h)
            for (const int32_t t : narrow) head_rows.push_back(static_cast<int32_t>(t * m.heads + h));
        grow(final, std::max(b.outputs, tokens) * m.hidden);
        head_input.reserve(b.outputs, m.head);
        if (!b.logits) {
            grow(weight_sums, b.outputs * draw_blocks());
            if (static_cast<int64_t>(drawings.size()) < b.outputs) drawings.resize(b.outputs);
            for (auto& mine : scratch) grow(mine->scores, b.outputs * DRAW_BLOCK);
        }
        drew = true;
        for (int64_t i = 0; i < m.num_layers; ++i) prepare(b, m.layers[i]);
    }

    // Absorbed attention is dear for a long prompt: a head's product with an entry takes latent numbers, and two of them, where
    // keys and values of its own take a few. Making those costs as much as lifting queries does, once per position of the context.
    template <typename T>
    void choose_wide(const Batch& b) {
        narrow.clear(), runs.clear();
        is_wide.assign(b.tokens, 0);
        int64_t context = 0;
        for (int64_t first = 0, last; first < b.tokens; first = last) {
            for (last = first + 1; last < b.tokens && b.sequence[last] == b.sequence[first] && b.position[last] == b.position[last - 1] + 1;) ++last;
            const int64_t count = last - first, end = b.position[last - 1] + 1;
            if (sizeof(T) == 2 && expanding_pays(count, end)) {
                runs.push_back({first, count, end, context});
                context += end;
                std::fill(is_wide.begin() + first, is_wide.begin() + last, 1);
            } else {
                for (int64_t t = first; t < last; ++t) narrow.push_back(static_cast<int32_t>(t));
            }
        }
        if (runs.empty()) return;
        const int64_t width = m.plain + m.rotary;
        grow(wide_query, (b.tokens + TILE_ROWS) * m.heads * width), grow(context_key, context * m.rotary);
        for (int64_t i = static_cast<int64_t>(context_rows.size()); i < context; ++i) context_rows.push_back(static_cast<int32_t>(i));
        for (int64_t i = 0; i < m.num_layers; ++i) context_latent.reserve(context, m.layers[i].value_up);
        int64_t longest = 0;
        for (const WideRun& run : runs) longest = std::max(longest, padded(run.end));
        for (auto& mine : scratch) {
            if (!mine->key || mine->key->positions < longest) mine->key.reset(new Side(width, longest)), mine->value.reset(new Side(m.value, longest));
            grow(mine->line, TILE_ROWS * longest), grow(mine->weight, TILE_ROWS * row_stride(longest));
        }
    }

    bool expanding_pays(int64_t count, int64_t end) const {
        if (m.layers[0].key_expand.format == ABSENT || count < LANES || tiles_allowed()) return false;
        const int64_t seen = count * (2 * end - count + 1) / 2, expanded = m.plain + m.value;
        return seen * (expanded + m.rotary) + end * m.latent * expanded < seen * (2 * m.latent + m.rotary) + count * m.latent * expanded;
    }

    void prepare(const Batch& b, const Layer& layer) {
        const int64_t tokens = b.tokens;
        grow(down, tokens * layer.down_projections.rows);
        normed.reserve(tokens, layer.down_projections), normed.reserve(tokens, layer.expert_gate_up), normed.reserve(tokens, layer.shared_gate_up);
        query_latent.reserve(tokens, layer.query_up);
        plain_query.reserve(tokens * m.heads, layer.key_up);
        mixed_latent.reserve(tokens * m.heads, layer.value_up);
        attended.reserve(tokens, layer.output);
        if (layer.router.format != ABSENT) {
            const int64_t slots = tokens * m.experts_per_token;
            routes.reserve(tokens, m.experts_per_token, layer.router.rows, threads);
            grow(gate, slots * padded(layer.expert_down.cols));
            act.reserve(slots, layer.expert_down);
        }
        if (layer.shared_down.format != ABSENT) {
            grow(shared_gate, tokens * padded(layer.shared_down.cols));
            shared_act.reserve(tokens, layer.shared_down);
        }
    }

    // Panels of `w` for all tokens, four to a task.
    template <typename Use>
    void product(Member& member, const Matrix& w, const Inputs& x, int64_t tokens, Use&& use) {
        const int64_t panels = w.panels(), grain = panels >= 32 ? 4 : 2;
        member.each((panels + grain - 1) / grain, [&](int64_t task) {
            for_panels(w, 0, task * grain, std::min(panels, (task + 1) * grain), x, all_rows.data(), tokens, use);
        });
    }

    // The row of the vocabulary where token t begins.
    void embed(const Batch& b, int64_t t) const {
        float* to = b.x + t * m.hidden;
        const int64_t from = b.token[t] * m.hidden;
        if (m.embedding_is_bf16)
            for (int64_t i = 0; i < m.hidden; ++i) to[i] = load(static_cast<const bf16*>(m.embedding) + from, i);
        else
            std::memcpy(to, static_cast<const float*>(m.embedding) + from, m.hidden * sizeof(float));
    }

    void norm_into(int64_t thread, const float* x, const float* weight, int64_t width, float eps, const Inputs& to, int64_t t) {
        float* row = scratch[thread]->row.data();
        norm_row(x, weight, row, width, eps);
        to.set(t, row, width);
    }

    template <typename T>
    void attention(Member& member, const Batch& b, const Layer& layer, int64_t index) {
        const int64_t tokens = b.tokens, down_rows = layer.down_projections.rows, thread = member.index();
        const bool compressed = layer.query_up.format != ABSENT;
        uint8_t* entries = static_cast<uint8_t*>(b.cache) + index * b.layer_bytes;
        T* queries = reinterpret_cast<T*>(lifted.data());
        const Inputs hidden = normed.of(layer.down_projections), latent = query_latent.of(layer.query_up), mixed = attended.of(layer.output);
        member.each(tokens, [&](int64_t t) {
            if (index == 0 && b.token) embed(b, t);
            norm_into(thread, b.x + t * m.hidden, layer.input_norm, m.hidden, m.norm_eps, hidden, t);
        });
        product(member, layer.down_projections, hidden, tokens,
                [&](int64_t t, int64_t p, Lanes v) { put_panel(down.data() + t * down_rows, down_rows, p, v); });
        member.each(tokens, [&](int64_t t) {
            const float* row = down.data() + t * down_rows;
            write_entry<T>(b, layer, entries, thread, t, row + (compressed ? m.query_latent : m.query_width()));
            if (compressed) norm_into(thread, row, layer.query_norm, m.query_latent, m.latent_norm_eps, latent, t);
            else prepare_query(b, layer, queries, thread, t, row);
        });
        if (compressed) {
            product(member, layer.query_up, latent, tokens,
                    [&](int64_t t, int64_t p, Lanes v) { put_panel(query.data() + t * m.query_width(), m.query_width(), p, v); });
            member.each(tokens, [&](int64_t t) { prepare_query(b, layer, queries, thread, t, query.data() + t * m.query_width()); });
        }
        lift_queries(member, layer, queries);
        attend(member, b, layer, entries, queries);
        lower_values(member, layer);
        attend_wide<T>(member, b, layer, entries);
        member.each(tokens, [&](int64_t t) { mixed.set(t, values.data() + t * m.heads * m.value, m.heads * m.value); });
        product(member, layer.output, mixed, tokens, [&](int64_t t, int64_t p, Lanes v) { add_panel(b.x + t * m.hidden, m.hidden, p, v); });
    }

    template <typename T>
    int64_t entry_bytes(const Batch& b) const {
        return b.cache_is_fp8 ? fp8_entry_bytes(m.latent, m.rotary) : m.entry_width() * static_cast<int64_t>(sizeof(T));
    }

    // The cache entry of token t: normed latent, rotated shared key.
    template <typename T>
    void write_entry(const Batch& b, const Layer& layer, uint8_t* entries, int64_t thread, int64_t t, const float* from) {
        float* row = scratch[thread]->row.data();
        const int64_t position = b.position[t];
        norm_row(from, layer.latent_norm, row, m.latent, m.latent_norm_eps);
        rotate(from + m.latent, m.rotations + position * m.rotary, m.rotary, 1.0f, row + m.latent);
        const int64_t page = b.table[b.sequence[t] * b.table_width + position / b.page_tokens];
        uint8_t* to = entries + (page * b.page_tokens + position % b.page_tokens) * entry_bytes<T>(b);
        if (b.cache_is_fp8) return pack_entry(row, m.latent, m.rotary, to);
        for (int64_t i = 0; i < m.entry_width(); ++i) store(reinterpret_cast<T*>(to), i, row[i]);
    }

    // Rotary part of the queries into place; plain part as inputs of the key up-projection.
    template <typename T>
    void prepare_query(const Batch& b, const Layer& layer, T* queries, int64_t thread, int64_t t, const float* from) {
        float* row = scratch[thread]->row.data();
        const Inputs plain = plain_query.of(layer.key_up);
        for (int64_t h = 0; h < m.heads && is_wide[t]; ++h) {
            const float* head = from + h * (m.plain + m.rotary);
            bf16* to = wide_query.data() + (t * m.heads + h) * (m.plain + m.rotary);
            rotate(head + m.plain, m.rotations + b.position[t] * m.rotary, m.rotary, 1.0f, row);
            put_row(to, head, m.plain);
            for (int64_t i = 0; i < m.rotary; ++i) to[m.plain + i] = to_bf16(row[i]);
        }
        for (int64_t h = 0; h < m.heads && !is_wide[t]; ++h) {
            const float* head = from + h * (m.plain + m.rotary);
            plain.set(t * m.heads + h, head, m.plain);
            rotate(head + m.plain, m.rotations + b.position[t] * m.rotary, m.rotary, m.softmax_scale, row);
            T* to = queries + (t * m.heads + h) * m.entry_width() + m.latent;
            for (int64_t i = 0; i < m.rotary; ++i) store(to, i, row[i]);
        }
    }

    int64_t num_narrow() const { return static_cast<int64_t>(narrow.size()); }
    const int32_t* rows_of_head(int64_t h) const { return head_rows.data() + h * num_narrow(); }

    template <typename T>
    void lift_queries(Member& member, const Layer& layer, T* queries) {
        const Matrix& w = layer.key_up;
        const Inputs plain = plain_query.of(w);
        const int64_t grain = std::min<int64_t>(w.panels(), 8), per_head = (w.panels() + grain - 1) / grain;
        member.each(m.heads * per_head, [&](int64_t task) {
            const int64_t h = task / per_head, first = task % per_head * grain;
            for_panels(w, h, first, std::min(w.panels(), first + grain), plain, rows_of_head(h), num_narrow(),
                       [&](int64_t i, int64_t p, Lanes v) { put(queries + (narrow[i] * m.heads + h) * m.entry_width() + p * LANES, v * m.softmax_scale); });
        });
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
    void attend(Member& member, const Batch& b, const Layer& layer, const uint8_t* entries, const T* queries) {
        const int64_t blocks = m.head_blocks(), tasks = num_narrow() * blocks, width = m.entry_width(), thread = member.index();
        const Inputs mixed = mixed_latent.of(layer.value_up);
        auto token_of = [&](int64_t task) { return static_cast<int64_t>(narrow[task / blocks]); };
        auto heads_of = [&](int64_t task) { return std::min(LANES, m.heads - task % blocks * LANES); };
        T* panel = reinterpret_cast<T*>(scratch[thread]->panel.data());
        int64_t packed_task = -1;
        auto chunk = [&](int64_t task, int64_t start, Partial& out) {
            if (packed_task != task) pack_queries(queries + (token_of(task) * m.heads + task % blocks * LANES) * width, heads_of(task), width, panel);
            packed_task = task;
            const int64_t t = token_of(task), seen = b.position[t] + 1;
            const int32_t* table = b.table + b.sequence[t] * b.table_width;
            ChunkScratch<T>& work = scratch[thread]->chunk(T{});
            if (b.cache_is_fp8) {
                const PagedEntries<uint8_t> packed{entries, table, b.page_tokens, b.page_tokens * entry_bytes<T>(b), entry_bytes<T>(b)};
                const int64_t count = std::min(CHUNK, seen - start);
                T* plain = reinterpret_cast<T*>(scratch[thread]->entries.data());
                for (int64_t i = 0; i < count; ++i) unpack_entry(packed.at(start + i), m.latent, m.rotary, plain + i * width);
                const int32_t only = 0;
                return attend_chunk<T>({plain, &only, CHUNK, 0, width}, panel, 0, count, m.latent, heads_of(task), work, out);
            }
            const PagedEntries<T> cache{reinterpret_cast<const T*>(entries), table, b.page_tokens, b.page_tokens * width, width};
            attend_chunk<T>(cache, panel, start, seen, m.latent, heads_of(task), work, out);
        };
        // Head h of a finished task, as input of the value up-projection.
        auto finish = [&](int64_t task, const Partial& total, int64_t h) {
            float* from = total.mixed + h * m.latent;
            const float norm = 1.0f / total.sum[h];
            for (int64_t c = 0; c < m.latent; c += LANES) put(from + c, lanes(from + c) * norm);
            mixed.set(token_of(task) * m.heads + task % blocks * LANES + h, from, m.latent);
        };
        if (split) {
            member.each(tasks * max_chunks, [&](int64_t i) {
                const int64_t task = i / max_chunks, start = i % max_chunks * CHUNK;
                if (start > b.position[token_of(task)]) return;
                Partial out = partial_at(i);
                chunk(task, start, out);
                keep_partial(i, out);
            });
            member.each(tasks * LANES, [&](int64_t i) {
                const int64_t task = i / LANES, h = i % LANES;
                if (h >= heads_of(task)) return;
                Partial total = partial_at(task * max_chunks);
                for (int64_t c = 1; c * CHUNK <= b.position[token_of(task)]; ++c) merge(total, partial_at(task * max_chunks + c), m.latent, h, h + 1);
                finish(task, total, h);
            });
            return;
        }
        member.each(tasks, [&](int64_t task) {
            Partial total = partial_at(2 * thread), next = partial_at(2 * thread + 1);
            chunk(task, 0, total);
            for (int64_t start = CHUNK; start <= b.position[token_of(task)]; start += CHUNK) {
                chunk(task, start, next);
                merge(total, next, m.latent, 0, heads_of(task));
            }
            for (int64_t h = 0; h < heads_of(task); ++h) finish(task, total, h);
        });
    }

    void lower_values(Member& member, const Layer& layer) {
        const Matrix& w = layer.value_up;
        const Inputs mixed = mixed_latent.of(w);
        member.each(m.heads, [&](int64_t h) {
            for_panels(w, h, 0, w.panels(), mixed, rows_of_head(h), num_narrow(),
                       [&](int64_t i, int64_t p, Lanes v) { put_panel(values.data() + (narrow[i] * m.heads + h) * m.value, m.value, p, v); });
        });
    }

    // Attention of wide runs, a head of one to a task: its keys and values from the latents, then all queries.
    template <typename T>
    void attend_wide(Member& member, const Batch& b, const Layer& layer, const uint8_t* entries) {
        if (runs.empty()) return;
        const int64_t thread = member.index(), width = m.plain + m.rotary, num_runs = static_cast<int64_t>(runs.size());
        const Inputs context = context_latent.of(layer.value_up);
        member.each(runs.back().base + runs.back().end, [&](int64_t place) {
            const WideRun& run = *std::prev(std::upper_bound(runs.begin(), runs.end(), place, [](int64_t at, const WideRun& each) { return at < each.base; }));
            const int64_t position = place - run.base, page = b.table[b.sequence[run.first] * b.table_width + position / b.page_tokens];
            const uint8_t* from = entries + (page * b.page_tokens + position % b.page_tokens) * entry_bytes<T>(b);
            float* row = scratch[thread]->row.data();
            if (b.cache_is_fp8) unpack_entry(from, m.latent, m.rotary, row);
            else
                for (int64_t i = 0; i < m.entry_width(); ++i) row[i] = load(reinterpret_cast<const T*>(from), i);
            context.set(place, row, m.latent);
            for (int64_t i = 0; i < m.rotary; ++i) context_key[place * m.rotary + i] = to_bf16(row[m.latent + i]);
        });
        member.each(num_runs * m.heads, [&](int64_t task) {
            const WideRun& run = runs[task / m.heads];
            const int64_t h = task % m.heads, used = padded(run.end);
            ThreadScratch& mine = *scratch[thread];
            Side &key = *mine.key, &value = *mine.value;
            auto expand = [&](const Matrix& w, Side& side) {
                for_panels(w, h, 0, w.panels(), context, context_rows.data() + run.base, run.end,
                           [&](int64_t t, int64_t p, Lanes v) { put_bf16(side.rows.get() + t * row_stride(side.width) + p * LANES, v); });
                side.clear(run.end, used);
            };
            expand(layer.key_expand, key);
            for (int64_t t = 0; t < run.end; ++t)
                std::memcpy(key.rows.get() + t * row_stride(width) + m.plain, context_key.data() + (run.base + t) * m.rotary, m.rotary * sizeof(bf16));
            key.make_panels(used);
            expand(layer.value_up, value);
            value.make_columns(used);
            for (int64_t i = 0; i < run.count; i += TILE_ROWS) {
                const int64_t at = (run.first + i) * m.heads + h, valid = std::min(TILE_ROWS, run.count - i);
                const Window w(nullptr, run.end - run.count + i, valid);
                scores(wide_query.data() + at * width, m.heads * width, key, w, mine.line.data(), used);
                float norm[TILE_ROWS] = {}, top;
                for (int64_t q = 0; q < valid; ++q) norm[q] = 1.0f / weigh(mine.line.data() + q * used, w, q, m.softmax_scale, mine.weight.data() + q * row_stride(used), &top);
                weighted_sum(mine.weight.data(), row_stride(used), value, w, norm, valid, values.data() + at * m.value, m.heads * m.value);
            }
        });
    }

    void feed_forward(Member& member, const Batch& b, const Layer& layer, int64_t index) {
        const bool routed = layer.router.format != ABSENT;
        const Inputs hidden = normed.of(routed ? layer.expert_gate_up : layer.shared_gate_up);
        member.each(b.tokens, [&](int64_t t) {
            float* row = final.data() + t * m.hidden;
            norm_row(b.x + t * m.hidden, layer.post_norm, row, m.hidden, m.norm_eps);
            hidden.set(t, row, m.hidden);
        });
        if (routed) route(member, b, layer, index);
        gate_and_up(member, b, layer, hidden, routed);
        const Inputs routed_act = act.of(layer.expert_down), always_act = shared_act.of(layer.shared_down);
        const int64_t slots = routed ? b.tokens * m.experts_per_token : 0;
        member.each(slots + (layer.shared_down.format != ABSENT ? b.tokens : 0), [&](int64_t i) {
            const Matrix& w = i < slots ? layer.expert_down : layer.shared_down;
            const float* from = i < slots ? gate.data() + i * padded(w.cols) : shared_gate.data() + (i - slots) * padded(w.cols);
            (i < slots ? routed_act : always_act).set(i < slots ? i : i - slots, from, w.cols);
        });
        down_projections(member, b, layer, routed_act, always_act, routed);
    }

    void route(Member& member, const Batch& b, const Layer& layer, int64_t index) {
        const int64_t tokens = b.tokens, experts = layer.router.rows, per_token = m.experts_per_token;
        // Router logits in float32 whatever the weights are: a flipped expert is a large error.
        Inputs exact;
        exact.format = F32, exact.stride = exact.cols = m.hidden, exact.floats = final.data();
        product(member, layer.router, exact, tokens,
                [&](int64_t t, int64_t p, Lanes v) { put_panel(routes.score.data() + t * experts, experts, p, v); });
        member.each(tokens, [&](int64_t t) {
            choose(m, layer, routes.score.data() + t * experts, routes.expert.data() + t * per_token, routes.weight.data() + t * per_token,
                   routes.scratch.data() + member.index() * 2 * experts);
        });
        member.each(1, [&](int64_t) {
            if (b.chosen) std::memcpy(b.chosen + index * tokens * per_token, routes.expert.data(), tokens * per_token * sizeof(int32_t));
            routes.sort(tokens * per_token, experts, per_token);
        });
    }

    // silu(gate) * up, two pairs of panels to a task: of the experts in use, then of the shared one.
    void gate_and_up(Member& member, const Batch& b, const Layer& layer, const Inputs& x, bool routed) {
        auto tasks_of = [](const Matrix& w) { return w.format == ABSENT ? 0 : (w.panels() + 3) / 4; };
        const int64_t per_expert = routed ? tasks_of(layer.expert_gate_up) : 0, of_experts = per_expert * (routed ? routes.num_active : 0);
        member.each(of_experts + tasks_of(layer.shared_gate_up), [&](int64_t task) {
            const bool shared = task >= of_experts;
            const Matrix& w = shared ? layer.shared_gate_up : layer.expert_gate_up;
            const int64_t e = shared ? 0 : routes.active[task / per_expert], first = (shared ? task - of_experts : task % per_expert) * 4;
            const int64_t start = shared ? 0 : routes.first[e], count = shared ? b.tokens : routes.first[e + 1] - start;
            const int64_t stride = padded(shared ? layer.shared_down.cols : layer.expert_down.cols);
            float* out = shared ? shared_gate.data() : gate.data() + start * stride;
            Lanes gate_value = {};
            for_panels(w, e, first, std::min(w.panels(), first + 4), x, shared ? all_rows.data() : routes.token.data() + start, count,
                       [&](int64_t r, int64_t p, Lanes v) {
                           if (p % 2 == 0) gate_value = v;
                           else put(out + r * stride + p / 2 * LANES, gate_value / (1.0f + exp_lanes(-gate_value)) * v);
                       });
        });
    }

    // Shared and routed experts' second products, added to the residual: every output panel is one task's alone.
    void down_projections(Member& member, const Batch& b, const Layer& layer, const Inputs& routed_act, const Inputs& always_act, bool routed) {
        const Matrix& w = layer.expert_down;
        const bool shared = layer.shared_down.format != ABSENT;
        // A task goes from expert to expert, and where a piece ends the stream of weights breaks off: one task per thread.
        const int64_t panels = (routed ? w : layer.shared_down).panels(), grain = padded(std::max<int64_t>(1, panels / threads), panels >= 32 ? BUNDLE : 2);
        member.each((panels + grain - 1) / grain, [&](int64_t task) {
            const int64_t first = task * grain, last = std::min(panels, first + grain), active = routed ? routes.num_active : 0;
            if (shared)
                for_panels(layer.shared_down, 0, first, last, always_act, all_rows.data(), b.tokens,
                           [&](int64_t t, int64_t p, Lanes v) { add_panel(b.x + t * m.hidden, m.hidden, p, v); });
            for (int64_t i = 0; i < active; ++i) {
                const int64_t e = routes.active[i], start = routes.first[e];
                for_panels(w, e, first, last, routed_act, routes.row.data() + start, routes.first[e + 1] - start, [&](int64_t r, int64_t p, Lanes v) {
                    add_panel(b.x + routes.token[start + r] * m.hidden, m.hidden, p, v * routes.slot_weight[start + r]);
                });
            }
        });
    }

    void final_norm(Member& member, const Batch& b) {
        const Inputs hidden = head_input.of(m.head);
        const int64_t thread = member.index();
        member.each(b.outputs, [&](int64_t i) { norm_into(thread, b.x + b.output_row[i] * m.hidden, m.final_norm, m.hidden, m.norm_eps, hidden, i); });
    }

    void logits(Member& member, const Batch& b) {
        product(member, m.head, head_input.of(m.head), b.outputs, [&](int64_t i, int64_t p, Lanes v) { put_panel(b.logits + i * m.head.rows, m.head.rows, p, v); });
    }

    int64_t draw_blocks() const { return (m.head.rows + DRAW_BLOCK - 1) / DRAW_BLOCK; }

    // `use(place in rows, token of the first, sixteen scores)` for a block of the vocabulary and outputs `rows`, in order for each.
    template <typename Use>
    void for_block(int64_t block, const int32_t* rows, int64_t count, Use&& use) {
        const int64_t first = block * DRAW_BLOCK / LANES, last = std::min(m.head.panels(), first + DRAW_BLOCK / LANES);
        for_panels(m.head, 0, first, last, head_input.of(m.head), rows, count, [&](int64_t i, int64_t p, Lanes v) { use(i, p * LANES, v); });
    }

    // Its scores, a line of DRAW_BLOCK for each output.
    void block_scores(int64_t block, const int32_t* rows, int64_t count, float* scores) {
        for_block(block, rows, count, [&](int64_t i, int64_t column, Lanes v) { put(scores + i * DRAW_BLOCK + column % DRAW_BLOCK, v); });
    }

    // A token for each output, whose scores never leave registers: what is kept of a block is the sum of its weights, and the
    // block that a token falls into is made again.
    void draw(Member& member, const Batch& b) {
        const int64_t blocks = draw_blocks(), width = m.head.rows;
        float* scores = scratch[member.index()]->scores.data();
        member.each(1, [&](int64_t) {
            block_scores(0, all_rows.data(), b.outputs, scores);
            for (int64_t i = 0; i < b.outputs; ++i) {
                const float* line = scores + i * DRAW_BLOCK;
                drawings[i] = Drawing::near(b.temperature[i], *std::max_element(line, line + std::min(DRAW_BLOCK, width)));
            }
        });
        member.each(blocks, [&](int64_t block) {
            float* sums = scores;  // sixteen of each output
            std::fill(sums, sums + b.outputs * LANES, 0.0f);
            for_block(block, all_rows.data(), b.outputs, [&](int64_t i, int64_t column, Lanes v) {
                if (column + LANES > width) v = first_scores(v, width - column);
                put(sums + i * LANES, lanes(sums + i * LANES) + draw_weights(v, drawings[i]));
            });
            for (int64_t i = 0; i < b.outputs; ++i) weight_sums[i * blocks + block] = sum_of(lanes(sums + i * LANES));
        });
        member.each(b.outputs, [&](int64_t i) {
            const float* sums = weight_sums.data() + i * blocks;
            const double sum = total_weight(sums, blocks);
            if (!(sum < TOO_HEAVY)) {
                drew = false;
                return;
            }
            const int32_t row = static_cast<int32_t>(i);
            b.drawn[i] = token_at(sums, width, b.uniform[i] * sum, [&](int64_t first, int64_t count, float* to) {
                block_scores(first / DRAW_BLOCK, &row, 1, scores);
                draw_weights(scores, count, drawings[i], to);
            });
            b.drawn_logprob[i] = drawings[i].log_probability(scores[b.drawn[i] % DRAW_BLOCK], sum);
        });
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

// 0; 1 when memory ran out; 2 when a token lies outside of the vocabulary; 3 when tokens could not be drawn without logits.
int32_t forward_run(void* forward, const shoal::Batch* batch) {
    try {
        auto& f = *static_cast<shoal::Forward*>(forward);
        if (!f.knows_tokens(*batch)) return 2;
        if (batch->reads_bf16)
            f.run<shoal::bf16>(*batch);
        else
            f.run<float>(*batch);
        return f.drew_all() ? 0 : 3;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // extern "C"
