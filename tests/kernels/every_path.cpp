// In place of csrc/choose.cpp: every path that was compiled, whatever the processor says that it can run.
#include <string.h>

#include "../../csrc/dgemma_cpu.h"
#include "../../csrc/kernels.h"

namespace {

const dgemma::Kernels* const kAll[] = {
    dgemma::avx512vnni_kernels(), dgemma::avxvnni_kernels(), dgemma::avx2_kernels(), dgemma::portable_kernels()};
const dgemma::Kernels* in_use = kAll[0];

}  // namespace

const dgemma::Kernels& dgemma::chosen() { return *in_use; }

DGEMMA_API const char* dgemma_compiled(void) { return "avx512vnni avxvnni avx2 portable"; }

DGEMMA_API int32_t dgemma_use(const char* isa) {
    for (const dgemma::Kernels* kernels : kAll) {
        if (!strcmp(kernels->name, isa)) in_use = kernels;
    }
    return 1;
}
