#include "guard.h"

#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "dispatch.h"
#include "engine.h"
#include "fix.h"
#include "safetensors.h"

namespace safepatch {
namespace {

thread_local std::string last_error;

sp_status failed(sp_status status, const char* why) {
    try {
        last_error = why;
    } catch (...) {
        last_error.clear();
    }
    return status;
}

}  // namespace

void need(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

sp_status status_of_exception() {
    try {
        throw;
    } catch (const std::bad_alloc&) {
        return failed(SP_NO_MEMORY, "out of memory");
    } catch (const std::length_error&) {
        return failed(SP_NO_MEMORY, "out of memory");
    } catch (const Broken& error) {
        return failed(SP_BAD_DATA, error.what());
    } catch (const IoFailed& error) {
        return failed(SP_IO_FAILED, error.what());
    } catch (const Stopped&) {
        return failed(SP_STOPPED, "stopped by the caller");
    } catch (const Unsupported& error) {
        return failed(SP_UNSUPPORTED, error.what());
    } catch (const std::invalid_argument& error) {
        return failed(SP_BAD_ARGUMENT, error.what());
    } catch (const std::system_error& error) {
        const bool full = error.code() == std::errc::resource_unavailable_try_again;
        return full ? failed(SP_NO_MEMORY, "no thread can be started") : failed(SP_INTERNAL, error.what());
    } catch (const std::exception& error) {
        return failed(SP_INTERNAL, error.what());
    } catch (...) {
        return failed(SP_INTERNAL, "unknown exception");
    }
}

}  // namespace safepatch

const char* sp_last_error(void) { return safepatch::last_error.c_str(); }
