// The header of a safetensors file behind I/O callbacks: untrusted, so every number is checked before it is used.
#pragma once

#include <cstdint>
#include <exception>
#include <map>
#include <string>
#include <string_view>

#include "safepatch.h"

namespace safepatch {

// A callback did not do what it was asked to.
struct IoFailed : std::exception {
    explicit IoFailed(const char* what) : what_(what) {}
    const char* what() const noexcept override { return what_; }

  private:
    const char* what_;
};

// A file of the caller's.
class File {
  public:
    explicit File(const sp_io& io) : io_(io) {}
    uint64_t length() const;
    void read(uint64_t offset, void* data, size_t bytes) const;
    void write(uint64_t offset, const void* data, size_t bytes) const;
    void sync() const;
    bool writable() const { return io_.write_at != nullptr; }

  private:
    sp_io io_;
};

// One tensor, or array: `begin` and `end` count from the beginning of the file.
struct Stored {
    std::string dtype;
    std::string shape;  // its numbers joined by commas
    uint64_t entries = 1;
    uint64_t begin = 0, end = 0;

    // Bytes of an entry, 0 where the dtype has none of its own.
    uint64_t width() const;
};

struct Header {
    std::map<std::string, Stored> tensors;  // in bytewise order of their names
    std::map<std::string, std::string> metadata;

    // Throws Broken for what is no header.
    explicit Header(const File& file);
};

// What a fix says of a tensor that it touches.
struct Facts {
    uint64_t entries = 0, changes = 0;
    std::string old_hash, new_hash;
};

// The text of __metadata__'s key `tensors`. Throws Broken.
std::map<std::string, Facts> facts_of(std::string_view text);

}  // namespace safepatch
