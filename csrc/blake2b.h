// The hash of random keys and of fix files.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace safepatch {

inline uint64_t little_endian(const unsigned char* bytes) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= uint64_t{bytes[i]} << (8 * i);
    return word;
}

// BLAKE2b (RFC 7693) without a key.
class Blake2b {
  public:
    // Digests of another size are other digests; 8 to 64 bytes, a multiple of 8.
    explicit Blake2b(unsigned bytes) : bytes_(bytes), state_(kStart) { state_[0] ^= 0x01010000 | bytes; }

    void add(std::string_view text) { add(text.data(), text.size()); }
    void add(const void* data, size_t n) {
        const auto* from = static_cast<const unsigned char*>(data);
        while (n > 0) {
            if (used_ == sizeof block_) compress(false);
            const size_t part = std::min(n, sizeof block_ - used_);
            std::memcpy(block_ + used_, from, part);
            used_ += part, from += part, n -= part;
        }
    }
    // The first 8 bytes of the digest; nothing is added after it.
    uint64_t word() {
        finish();
        return state_[0];
    }
    std::string hex() {
        finish();
        std::string text;
        for (unsigned i = 0; i < bytes_; ++i) {
            const auto byte = static_cast<unsigned>(state_[i / 8] >> (8 * (i % 8)) & 255);
            text += "0123456789abcdef"[byte >> 4];
            text += "0123456789abcdef"[byte & 15];
        }
        return text;
    }

  private:
    static constexpr std::array<uint64_t, 8> kStart = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                                       0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                                       0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static constexpr unsigned char kOrder[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                                     {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                                     {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                                     {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                                     {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                                     {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                                     {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                                     {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                                     {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                                     {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

    static void mix(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d, uint64_t x, uint64_t y) {
        a += b + x, d = std::rotr(d ^ a, 32);
        c += d, b = std::rotr(b ^ c, 24);
        a += b + y, d = std::rotr(d ^ a, 16);
        c += d, b = std::rotr(b ^ c, 63);
    }

    void compress(bool last) {
        total_ += used_;
        used_ = 0;
        uint64_t m[16], v[16];
        for (int i = 0; i < 16; ++i) m[i] = little_endian(block_ + 8 * i);
        for (int i = 0; i < 8; ++i) v[i] = state_[i], v[i + 8] = kStart[i];
        v[12] ^= total_;
        if (last) v[14] = ~v[14];
        for (int round = 0; round < 12; ++round) {
            const unsigned char* s = kOrder[round % 10];
            for (int i = 0; i < 4; ++i) mix(v[i], v[4 + i], v[8 + i], v[12 + i], m[s[2 * i]], m[s[2 * i + 1]]);
            for (int i = 0; i < 4; ++i) {
                const int b = 4 + (i + 1) % 4, c = 8 + (i + 2) % 4, d = 12 + (i + 3) % 4;
                mix(v[i], v[b], v[c], v[d], m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
            }
        }
        for (int i = 0; i < 8; ++i) state_[i] ^= v[i] ^ v[i + 8];
    }

    void finish() {
        std::memset(block_ + used_, 0, sizeof block_ - used_);
        compress(true);
    }

    unsigned bytes_;
    std::array<uint64_t, 8> state_;
    unsigned char block_[128];
    size_t used_ = 0;
    uint64_t total_ = 0;
};

}  // namespace safepatch
