#include "safetensors.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fix.h"

namespace safepatch {
namespace {

// As the format's own implementation has it.
constexpr uint64_t kMostHeader = 100'000'000;

// JSON as headers have it: objects, arrays of numbers, texts, whole numbers. Whoever reads says what may come.
class Json {
  public:
    explicit Json(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

    // Calls each(key) with the reader at the key's value, which it must take.
    template <class Each>
    void object(const Each& each) {
        take('{');
        if (took('}')) return;
        do {
            const std::string key = text();
            take(':');
            each(key);
        } while (took(','));
        take('}');
    }
    template <class Each>
    void array(const Each& each) {
        take('[');
        if (took(']')) return;
        do each();
        while (took(','));
        take(']');
    }
    uint64_t number() {
        blanks();
        if (at_ == end_ || *at_ < '0' || *at_ > '9') wrong();
        uint64_t value = 0;
        for (; at_ != end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
            if (value > (INT64_MAX - 9) / 10) throw Broken("a number in the header is too large");
            value = 10 * value + static_cast<uint64_t>(*at_ - '0');
        }
        return value;
    }
    std::string text() {
        take('"');
        std::string found;
        while (true) {
            if (at_ == end_ || static_cast<unsigned char>(*at_) < 0x20) wrong();
            const char c = *at_++;
            if (c == '"') return found;
            if (c == '\\') {
                escape(found);
            } else {
                found += c;
            }
        }
    }
    void finish() {
        blanks();
        if (at_ != end_) wrong();
    }

  private:
    [[noreturn]] static void wrong() { throw Broken("the header is not the JSON that it should be"); }

    void blanks() {
        while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
    }
    bool took(char c) {
        blanks();
        if (at_ == end_ || *at_ != c) return false;
        ++at_;
        return true;
    }
    void take(char c) {
        if (!took(c)) wrong();
    }
    uint32_t unit() {
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i) {
            if (at_ == end_) wrong();
            const char c = *at_++;
            const char* digits = "0123456789abcdef0123456789ABCDEF";
            const char* found = std::find(digits, digits + 32, c);
            if (found == digits + 32) wrong();
            value = 16 * value + static_cast<uint32_t>((found - digits) % 16);
        }
        return value;
    }
    void escape(std::string& to) {
        static constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
        if (at_ == end_) wrong();
        const char c = *at_++;
        if (const size_t i = kNames.find(c); i != std::string_view::npos) {
            to += kMeant[i];
            return;
        }
        if (c != 'u') wrong();
        uint32_t point = unit();
        if (point >= 0xd800 && point < 0xe000) {
            if (point >= 0xdc00 || end_ - at_ < 2 || at_[0] != '\\' || at_[1] != 'u') wrong();
            at_ += 2;
            const uint32_t low = unit();
            if (low < 0xdc00 || low >= 0xe000) wrong();
            point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
        }
        utf8(point, to);
    }
    static void utf8(uint32_t point, std::string& to) {
        const auto tail = [&](int shift) { to += static_cast<char>(0x80 | (point >> shift & 63)); };
        if (point < 0x80) {
            to += static_cast<char>(point);
        } else if (point < 0x800) {
            to += static_cast<char>(0xc0 | point >> 6), tail(0);
        } else if (point < 0x10000) {
            to += static_cast<char>(0xe0 | point >> 12), tail(6), tail(0);
        } else {
            to += static_cast<char>(0xf0 | point >> 18), tail(12), tail(6), tail(0);
        }
    }

    const char *at_, *end_;
};

uint64_t product(uint64_t a, uint64_t b) {
    if (b != 0 && a > INT64_MAX / b) throw Broken("a tensor of more entries than can be counted");
    return a * b;
}

Stored stored(Json& json, uint64_t data, uint64_t length) {
    Stored found;
    std::vector<uint64_t> offsets;
    int keys = 0;
    json.object([&](const std::string& key) {
        ++keys;
        if (key == "dtype") {
            found.dtype = json.text();
        } else if (key == "shape") {
            json.array([&] {
                const uint64_t size = json.number();
                found.entries = product(found.entries, size);
                found.shape += (found.shape.empty() ? "" : ",") + std::to_string(size);
            });
        } else if (key == "data_offsets") {
            json.array([&] { offsets.push_back(json.number()); });
        } else {
            throw Broken("a key of a tensor that no header has");
        }
    });
    if (keys != 3 || offsets.size() != 2) throw Broken("a tensor lacks its dtype, shape or offsets");
    if (offsets[0] > offsets[1] || offsets[1] > length - data) throw Broken("a tensor lies beyond its file");
    if (found.width() > 0 && product(found.entries, found.width()) != offsets[1] - offsets[0]) {
        throw Broken("a tensor has other bytes than its shape");
    }
    found.begin = data + offsets[0], found.end = data + offsets[1];
    return found;
}

template <class T>
void add(std::map<std::string, T>& to, const std::string& key, T value) {
    if (!to.emplace(key, std::move(value)).second) throw Broken("a name appears twice");
}

}  // namespace

uint64_t File::length() const {
    const int64_t length = io_.length(io_.user);
    if (length < 0) throw IoFailed("a length can't be had");
    return static_cast<uint64_t>(length);
}

void File::read(uint64_t offset, void* data, size_t bytes) const {
    auto* to = static_cast<unsigned char*>(data);
    while (bytes > 0) {
        const int64_t n = io_.read_at(io_.user, offset, to, bytes);
        if (n <= 0 || static_cast<uint64_t>(n) > bytes)
            throw IoFailed("read_at failed, or a file has become shorter");
        to += n, offset += static_cast<uint64_t>(n), bytes -= static_cast<size_t>(n);
    }
}

void File::write(uint64_t offset, const void* data, size_t bytes) const {
    const auto* from = static_cast<const unsigned char*>(data);
    while (bytes > 0) {
        const int64_t n = io_.write_at(io_.user, offset, from, bytes);
        if (n <= 0 || static_cast<uint64_t>(n) > bytes) throw IoFailed("write_at failed");
        from += n, offset += static_cast<uint64_t>(n), bytes -= static_cast<size_t>(n);
    }
}

void File::sync() const {
    if (io_.sync != nullptr && io_.sync(io_.user) != 0) throw IoFailed("sync failed");
}

uint64_t Stored::width() const {
    static const std::map<std::string_view, uint64_t> widths = {
        {"BOOL", 1},        {"U8", 1},          {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1},
        {"F8_E4M3FNUZ", 1}, {"F8_E5M2FNUZ", 1}, {"I16", 2}, {"U16", 2},     {"F16", 2},     {"BF16", 2},
        {"I32", 4},         {"U32", 4},         {"F32", 4}, {"I64", 8},     {"U64", 8},     {"F64", 8}};
    const auto found = widths.find(dtype);
    return found == widths.end() ? 0 : found->second;
}

Header::Header(const File& file) {
    const uint64_t length = file.length();
    unsigned char first[8];
    if (length < sizeof first) throw Broken("a file too short for a header");
    file.read(0, first, sizeof first);
    uint64_t size = 0;
    for (int i = 0; i < 8; ++i) size |= uint64_t{first[i]} << (8 * i);
    if (size > kMostHeader || size > length - 8) throw Broken("a header that is longer than its file, or than any");
    std::string text(size, ' ');
    file.read(8, text.data(), text.size());
    Json json(text);
    json.object([&](const std::string& name) {
        if (name == "__metadata__") {
            if (!metadata.empty()) throw Broken("a name appears twice");
            json.object([&](const std::string& key) { add(metadata, key, json.text()); });
        } else {
            add(tensors, name, stored(json, 8 + size, length));
        }
    });
    json.finish();
}

std::map<std::string, Facts> facts_of(std::string_view text) {
    std::map<std::string, Facts> all;
    Json json(text);
    json.object([&](const std::string& name) {
        Facts facts;
        int keys = 0;
        json.object([&](const std::string& key) {
            ++keys;
            if (key == "entries") {
                facts.entries = json.number();
            } else if (key == "changes") {
                facts.changes = json.number();
            } else if (key == "old" || key == "new") {
                (key == "old" ? facts.old_hash : facts.new_hash) = json.text();
            } else {
                throw Broken("a fact of a tensor that no fix has");
            }
        });
        if (keys != 4 || facts.changes == 0 || facts.changes > facts.entries) throw Broken("the facts of a tensor");
        add(all, name, std::move(facts));
    });
    json.finish();
    if (all.empty()) throw Broken("a fix that touches no tensor");
    return all;
}

}  // namespace safepatch
