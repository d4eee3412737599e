// The threads of one pass, and the phases they go through together.
//
// A phase is a number of tasks. Every thread first takes the tasks of its own contiguous share, so that it streams one piece
// of memory, then what is left of the others'. A phase ends when its *tasks* are done, not when every thread has come: a
// thread that the system has put aside, with no task in hand, holds nobody up, and skips what happened without it. Waiting
// spins for some microseconds, a tenth of what a barrier of OpenMP costs here, and then yields the core.

#pragma once

#include <atomic>
#include <memory>

#include <sched.h>

#include "simd.h"

namespace shoal {

constexpr int64_t SPINS = 2000;

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Team {
  public:
    // Counters of `phases` phases, all at zero. Not thread-safe.
    void prepare(int64_t threads, int64_t phases) {
        num_threads = threads;
        const int64_t counters = phases * (threads + 1);
        if (counters > capacity) counter.reset(new Counter[capacity = counters]);
        for (int64_t i = 0; i < counters; ++i) {
            counter[i].value.store(0, std::memory_order_relaxed);
            counter[i].over.store(false, std::memory_order_relaxed);
        }
    }

  private:
    friend class Member;
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};  // tasks done; in the counters of threads: tasks taken from their shares
        std::atomic<bool> over{false};  // somebody has seen the end of the phase
    };
    std::unique_ptr<Counter[]> counter;
    int64_t capacity = 0, num_threads = 1;
};

// One thread's place in the team.
class Member {
  public:
    Member(Team& team, int64_t thread) : team(team), thread(thread) {}
    const int64_t& index() const { return thread; }

    // The next phase: `task(i)` for i < count, by whoever comes first. All threads must ask for the same phases in the same
    // order. `count` may be read from what earlier phases wrote: a thread that comes so late that others have gone on (and
    // may have overwritten it) finds the phase over and never uses its count.
    template <typename Task>
    void each(int64_t count, Task&& task) {
        Team::Counter* phase = team.counter.get() + place;
        const int64_t threads = team.num_threads;
        place += threads + 1;
        if (phase->over.load(std::memory_order_acquire)) return;
        int64_t finished = 0;
        for (int64_t step = 0; step < threads; ++step) {
            const int64_t owner = (thread + step) % threads, first = owner * count / threads, last = (owner + 1) * count / threads;
            std::atomic<int64_t>& taken = phase[1 + owner].value;
            if (step && first + taken.load(std::memory_order_relaxed) >= last) continue;
            for (int64_t i; (i = first + taken.fetch_add(1, std::memory_order_relaxed)) < last; ++finished) task(i);
        }
        if (finished) phase->value.fetch_add(finished, std::memory_order_acq_rel);
        for (int64_t spin = 0; phase->value.load(std::memory_order_acquire) < count; ++spin)
            spin < SPINS ? pause_core() : static_cast<void>(sched_yield());
        phase->over.store(true, std::memory_order_release);
    }

  private:
    Team& team;
    const int64_t thread;
    int64_t place = 0;
};

}  // namespace shoal
