// PyTorch's CPU arrays from a pool of blocks in huge pages.
//
// PyTorch aligns every array to 64 bytes. glibc (seen in 2.36) gives such a request a piece of a chunk that is a little larger,
// so a freed piece is too small for the next request of the same size: with anything lasting allocated in between, a loop that
// takes and frees one array of 16 MiB grows by 16 MiB each time (docs/log.md, 2026-11-28). Here sizes are rounded up to
// classes, eight to a doubling, and a freed block serves the next array of its class.
//
// Whatever is in the pool, used and free, stays below a quarter more than the most that was ever in use at once: beyond that
// the blocks that have been free for longest go back to the system. Small arrays are left to malloc.
//
// Built against the headers of the installed PyTorch (`allocator.py`); installed by commands, never by importing the package.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <new>

namespace {

constexpr size_t HEADER = 64;  // before every array; holds the size of its block, and keeps the alignment
constexpr size_t SMALLEST_POOLED = 64 << 10;
constexpr size_t HUGE_BYTES = 2 << 20;
constexpr size_t SLAB_BYTES = 32 << 20;  // that blocks below HUGE_BYTES are cut from
constexpr size_t ALWAYS_KEPT = 64 << 20;

size_t class_of(size_t bytes) {
    size_t step = SMALLEST_POOLED / 8;
    while (step * 16 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

// `bytes` of zeros that begin at a huge page; null when there are none.
char* map_huge(size_t bytes) {
    void* region = mmap(nullptr, bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (region == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(region);
    char* start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    if (start > begin) munmap(begin, start - begin);
    munmap(start + bytes, begin + HUGE_BYTES - start);
    madvise(start, bytes, MADV_HUGEPAGE);
    return start;
}

class Pool final : public c10::Allocator {
public:
    c10::DataPtr allocate(size_t bytes) override {
        void* data = bytes ? take(bytes + HEADER) : nullptr;
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

    int64_t used() const { return static_cast<int64_t>(used_); }
    int64_t free_bytes() const { return static_cast<int64_t>(free_); }
    std::mutex mutex;

private:
    struct Free {
        char* block;
        uint64_t since;
    };

    static void release(void* data);

    void* take(size_t bytes) {
        if (bytes < SMALLEST_POOLED) {
            void* block = nullptr;
            if (posix_memalign(&block, HEADER, bytes)) throw std::bad_alloc();
            return with_size(static_cast<char*>(block), 0);
        }
        const size_t size = class_of(bytes);
        std::lock_guard<std::mutex> guard(mutex);
        char* block = reuse(size);
        size_t found = block ? *reinterpret_cast<size_t*>(block) : size;
        used_ += found;
        most_used_ = std::max(most_used_, used_);
        if (!block) {
            give_back(most_used_ + most_used_ / 4 + ALWAYS_KEPT);
            block = size < HUGE_BYTES ? cut(size) : map_huge(size);
            if (!block) {
                give_back(0);
                block = map_huge(size);
            }
            if (!block) {
                used_ -= size;
                throw std::bad_alloc();
            }
        }
        return with_size(block, found);
    }

    static void* with_size(char* block, size_t size) {
        *reinterpret_cast<size_t*>(block) = size;
        return block + HEADER;
    }

    // The block that was freed last of the smallest class that fits and is at most a quarter too large.
    char* reuse(size_t size) {
        for (auto at = blocks_.lower_bound(size); at != blocks_.end() && at->first <= size + size / 4; ++at) {
            if (at->second.empty()) continue;
            char* block = at->second.back().block;
            at->second.pop_back();
            free_ -= at->first;
            return block;
        }
        return nullptr;
    }

    char* cut(size_t size) {
        if (slab_left_ < size) {
            slab_ = map_huge(SLAB_BYTES);
            slab_left_ = slab_ ? SLAB_BYTES : 0;
            if (!slab_) return nullptr;
        }
        char* block = slab_;
        slab_ += size;
        slab_left_ -= size;
        return block;
    }

    // Unmap blocks, the longest free first, until used and free together are at most `limit`.
    void give_back(size_t limit) {
        while (free_ && used_ + free_ > limit) {
            auto oldest = blocks_.end();
            for (auto at = blocks_.lower_bound(HUGE_BYTES); at != blocks_.end(); ++at)
                if (!at->second.empty() && (oldest == blocks_.end() || at->second.front().since < oldest->second.front().since)) oldest = at;
            if (oldest == blocks_.end()) return;
            munmap(oldest->second.front().block, oldest->first);
            oldest->second.pop_front();
            free_ -= oldest->first;
        }
    }

    std::map<size_t, std::deque<Free>> blocks_;  // free ones, by class, the longest free in front
    size_t used_ = 0, most_used_ = 0, free_ = 0;
    uint64_t clock_ = 0;
    char* slab_ = nullptr;
    size_t slab_left_ = 0;

    friend void give(Pool& pool, char* block, size_t size);
};

Pool& pool() {
    static Pool* one = new Pool;  // arrays may be freed after everything else
    return *one;
}

void give(Pool& pool, char* block, size_t size) {
    std::lock_guard<std::mutex> guard(pool.mutex);
    pool.blocks_[size].push_back({block, ++pool.clock_});
    pool.used_ -= size;
    pool.free_ += size;
}

void Pool::release(void* data) {
    if (!data) return;
    char* block = static_cast<char*>(data) - HEADER;
    const size_t size = *reinterpret_cast<size_t*>(block);
    if (size)
        give(pool(), block, size);
    else
        free(block);
}

}  // namespace

extern "C" {

// From now on PyTorch takes its CPU arrays here; those it has are freed as they were made.
void shoal_pool_arrays() {
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    c10::SetCPUAllocator(&pool(), 1);
}

int64_t shoal_pool_used() { return pool().used(); }
int64_t shoal_pool_free() { return pool().free_bytes(); }
}
