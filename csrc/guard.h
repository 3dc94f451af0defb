// What every call of the C interface stands behind: arguments are checked, and no exception leaves.
#pragma once

#include "safepatch.h"

namespace safepatch {

// The call is wrong in itself unless `good`; throws std::invalid_argument.
void need(bool good, const char* what);

inline bool aligned(const void* p, size_t size) { return reinterpret_cast<uintptr_t>(p) % size == 0; }

// The status of the exception that is being handled; its text is what sp_last_error gives this thread.
sp_status status_of_exception();

// Run `body`, and turn what it throws into a status with a text.
template <class Body>
sp_status guarded(const Body& body) {
    try {
        body();
        return SP_OK;
    } catch (...) {
        return status_of_exception();
    }
}

}  // namespace safepatch
