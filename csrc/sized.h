// Structs that a caller allocates begin with their size. Here one of any version becomes one of ours, and back.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "guard.h"

namespace safepatch {

// The bytes that every version of a struct has had: up to the last field of the first version of this ABI. There is
// nothing behind it, or a field added later could lie in what an older caller leaves undefined.
template <class T>
inline constexpr size_t first_size = 0;
#define SP_FIRST_SIZE(T, last) \
    template <>                \
    inline constexpr size_t first_size<T> = offsetof(T, last) + sizeof(T::last)
SP_FIRST_SIZE(sp_patch, reserved);
SP_FIRST_SIZE(sp_block, user);
SP_FIRST_SIZE(sp_codes, original);
SP_FIRST_SIZE(sp_cut, before);
SP_FIRST_SIZE(sp_window, counts);
SP_FIRST_SIZE(sp_patch_report, negative);
SP_FIRST_SIZE(sp_kept, moved);
SP_FIRST_SIZE(sp_report, changed);
SP_FIRST_SIZE(sp_fix_changes, new_entries);
SP_FIRST_SIZE(sp_fix_run, changes);
SP_FIRST_SIZE(sp_fix_tally, other_codes);
SP_FIRST_SIZE(sp_io, length);
SP_FIRST_SIZE(sp_fix_sides, new_count);
#undef SP_FIRST_SIZE

// What is longer was hardly meant: an uninitialised `size`.
inline constexpr size_t kMostSize = 4096;

// The size that the caller's struct has, and the distance of elements in an array of them.
template <class T>
size_t stride_of(const T* from, const char* what) {
    static_assert(first_size<T> > 0);
    need(from != nullptr, what);
    need(aligned(from, alignof(T)), what);
    need(from->size >= first_size<T> && from->size <= kMostSize && from->size % alignof(T) == 0, what);
    return from->size;
}

template <class T>
T own(const unsigned char* from, size_t stride) {
    T to{};
    std::memcpy(&to, from, std::min(stride, sizeof(T)));
    to.size = sizeof(T);
    return to;
}

// Copies of structs that the caller fills. Throws if one says what this version cannot know.
template <class T>
std::vector<T> adopted(const T* first, size_t count, const char* what) {
    std::vector<T> all;
    if (count == 0) return all;
    const size_t stride = stride_of(first, what);
    const auto* from = reinterpret_cast<const unsigned char*>(first);
    all.reserve(count);
    for (size_t i = 0; i < count; ++i, from += stride) {
        need(std::all_of(from + std::min(stride, sizeof(T)), from + stride, [](auto byte) { return byte == 0; }),
             what);
        all.push_back(own<T>(from, stride));
    }
    return all;
}

template <class T>
T adopted(const T* from, const char* what) {
    return adopted(from, 1, what)[0];
}

// Fill in what the caller reads, as far as its structs go; their sizes stay.
template <class T>
void give(T* first, const std::vector<T>& all) {
    if (all.empty()) return;
    const size_t stride = first->size, end = std::min(stride, sizeof(T));
    auto* to = reinterpret_cast<unsigned char*>(first);
    for (const T& value : all) {
        const auto* from = reinterpret_cast<const unsigned char*>(&value);
        std::copy(from + sizeof(size_t), from + end, to + sizeof(size_t));
        to += stride;
    }
}

template <class T>
void give(T* to, const T& value) {
    give(to, std::vector<T>{value});
}

}  // namespace safepatch
