// Work on several threads, and memory that each of them keeps.
#pragma once

#include <stdint.h>

#include <memory>
#include <type_traits>

namespace dgemma {

// Calls work(context, unit) for every unit below `units`, on up to `threads` threads; which of them takes which unit
// is left to chance, so results must not depend on it.
void share(int64_t units, int threads, void (*work)(void*, int64_t), void* context);

template <class Work>
void share(int64_t units, int threads, Work&& work) {
    using Plain = typename std::remove_reference<Work>::type;
    share(units, threads, [](void* context, int64_t unit) { (*static_cast<Plain*>(context))(unit); }, &work);
}

// Memory of this thread that outlives the call, so that no step pays for fresh pages: one piece a Use, which grows.
enum class Use { kPanels, kUnit, kFloats, kCodes, kMore, kCount };

void* scratch(Use use, int64_t bytes);

template <class T>
T* scratch(Use use, int64_t count) {
    return static_cast<T*>(scratch(use, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace dgemma
