// Which instruction set is used. The build defines DGEMMA_HAS_... for each isa_*.cpp that it compiled.
#include <string.h>

#include <atomic>

#include "dgemma_cpu.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define DGEMMA_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dgemma {
namespace {

struct Path {
    const char* name;
    const Kernels* (*kernels)();
    bool (*runs)();
};

#if defined(DGEMMA_X86)
struct Leaf {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf leaf(uint32_t number, uint32_t sub) {
    Leaf out;
#if defined(_MSC_VER)
    int values[4];
    __cpuid(values, 0);
    if (static_cast<uint32_t>(values[0]) < number) return out;
    __cpuidex(values, static_cast<int>(number), static_cast<int>(sub));
    memcpy(&out, values, sizeof(values));
#else
    if (!__get_cpuid_count(number, sub, &out.eax, &out.ebx, &out.ecx, &out.edx)) out = Leaf();
#endif
    return out;
}

// The registers that the operating system saves: 6 of them for 256 bits, 0xE6 for 512.
bool saved(uint64_t wanted) {
    if (!(leaf(1, 0).ecx >> 27 & 1)) return false;  // OSXSAVE
#if defined(_MSC_VER)
    const uint64_t state = _xgetbv(0);
#else
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const uint64_t state = static_cast<uint64_t>(high) << 32 | low;
#endif
    return (state & wanted) == wanted;
}

bool has_avx2() { return saved(0x6) && (leaf(7, 0).ebx >> 5 & 1); }
bool has_avxvnni() { return has_avx2() && leaf(7, 0).eax >= 1 && (leaf(7, 1).eax >> 4 & 1); }
bool has_avx512vnni() {
    const Leaf seven = leaf(7, 0);
    const bool foundation = seven.ebx >> 16 & 1, bytes = seven.ebx >> 30 & 1, lengths = seven.ebx >> 31 & 1;
    return saved(0xE6) && foundation && bytes && lengths && (seven.ecx >> 11 & 1);
}
#endif

#if defined(__aarch64__)
bool has_neon() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // ASIMDDP, the dot product
#else
    return true;  // every 64-bit ARM processor of the other systems that are supported
#endif
}
#endif

bool always() { return true; }

// In order of preference.
const Path kPaths[] = {
#if defined(DGEMMA_HAS_AVX512VNNI)
    {"avx512vnni", avx512vnni_kernels, has_avx512vnni},
#endif
#if defined(DGEMMA_HAS_AVXVNNI)
    {"avxvnni", avxvnni_kernels, has_avxvnni},
#endif
#if defined(DGEMMA_HAS_AVX2)
    {"avx2", avx2_kernels, has_avx2},
#endif
#if defined(DGEMMA_HAS_NEON)
    {"neon", neon_kernels, has_neon},
#endif
    {"portable", portable_kernels, always},
};

const Path* find(const char* name) {
    for (const Path& path : kPaths) {
        if (!strcmp(path.name, name)) return path.runs() ? &path : nullptr;
    }
    return nullptr;
}

const Kernels* first_that_runs() {
    for (const Path& path : kPaths) {
        if (path.runs()) return path.kernels();
    }
    return portable_kernels();
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& chosen() {
    const Kernels* kernels = in_use;
    if (!kernels) in_use = kernels = first_that_runs();
    return *kernels;
}

}  // namespace dgemma

DGEMMA_API int32_t dgemma_abi(void) { return 3; }

DGEMMA_API const char* dgemma_compiled(void) {
    static char names[128];
    char* at = names;
    for (const dgemma::Path& path : dgemma::kPaths) {
        if (at != names) *at++ = ' ';
        for (const char* c = path.name; *c; c++) *at++ = *c;
    }
    *at = 0;
    return names;
}

DGEMMA_API int32_t dgemma_runs(const char* isa) { return dgemma::find(isa) != nullptr; }

DGEMMA_API int32_t dgemma_use(const char* isa) {
    const dgemma::Path* path = dgemma::find(isa);
    if (path) dgemma::in_use = path->kernels();
    return path != nullptr;
}
