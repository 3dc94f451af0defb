// Which instruction set runs.
#pragma once

#include <stdexcept>

#include "passes.h"

namespace safepatch {

// This machine lacks an instruction set that was asked for by name.
struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The instruction set called `name`, by default $SAFEPATCH_FORCE_ISA, by default the best.
// Throws Unsupported, or std::invalid_argument for a name that isn't one.
const Isa& choose_isa(const char* name);

bool usable(const char* name);

}  // namespace safepatch
