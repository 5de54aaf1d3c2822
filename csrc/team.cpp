#include "team.h"

#include <stdlib.h>

#include <atomic>
#include <new>
#include <thread>
#include <vector>

#include "dgemma_cpu.h"

namespace dgemma {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> runtime{nullptr};

struct Job {
    void (*work)(void*, int64_t);
    void* context;
    int64_t units;
    std::atomic<int64_t> next{0};
};

void help(void* opaque) {
    Job& job = *static_cast<Job*>(opaque);
    for (int64_t unit = job.next++; unit < job.units; unit = job.next++) job.work(job.context, unit);
}

struct Piece {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Piece() { ::operator delete(data, std::align_val_t{64}); }
};

}  // namespace

void share(int64_t units, int threads, void (*work)(void*, int64_t), void* context) {
    Job job{work, context, units};
    const int64_t hands = threads < units ? threads : units;
    if (hands <= 1) {
        help(&job);
    } else if (const GompParallel parallel = runtime) {
        // As many as torch uses, whatever the units: a team of another size would be built anew.
        parallel(help, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int64_t i = 1; i < hands; i++) others.emplace_back(help, &job);
        help(&job);
        for (std::thread& other : others) other.join();
    }
}

void* scratch(Use use, int64_t bytes) {
    static thread_local Piece pieces[static_cast<int>(Use::kCount)];
    Piece& piece = pieces[static_cast<int>(use)];
    if (piece.bytes < bytes) {
        ::operator delete(piece.data, std::align_val_t{64});
        piece.data = nullptr;
        piece.bytes = 0;
        piece.data = ::operator new(static_cast<size_t>(bytes), std::align_val_t{64});
        piece.bytes = bytes;
    }
    return piece.data;
}

}  // namespace dgemma

DGEMMA_API void dgemma_team(void* gomp_parallel) {
    dgemma::runtime = reinterpret_cast<dgemma::GompParallel>(gomp_parallel);
}
