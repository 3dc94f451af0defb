#include "fix.h"

#include <bit>
#include <cstddef>
#include <cstring>

namespace safepatch {

namespace {

constexpr int64_t BLOCK = SP_FIX_BLOCK;

template <class Entry>
Entry lowest_bit(Entry x) {
    return static_cast<Entry>(x & (~x + 1));
}

// Entries are compared 64 bytes at a time, then 8: at a few percent of changes most of these hold none.
template <class Entry>
int64_t find(const Entry* before, const Entry* after, int64_t entries, int64_t start, sp_fix_changes out) {
    constexpr int64_t WORD = 8 / sizeof(Entry), STEP = 8 * WORD, BITS = 8 * sizeof(Entry);
    auto* old_entries = static_cast<Entry*>(out.old_entries);
    auto* new_entries = static_cast<Entry*>(out.new_entries);
    int64_t n = 0;
    const auto changed = [&](int64_t i) {
        const auto x = static_cast<Entry>(before[i] ^ after[i]);
        const int64_t place = start + i;
        ++out.counts[place / BLOCK - start / BLOCK];
        out.at[n] = static_cast<uint16_t>(place % BLOCK);
        out.side[n] = (before[i] & lowest_bit(x)) != 0;
        for (size_t k = 0; k < sizeof(Entry); ++k) out.planes[k][n] = static_cast<uint8_t>(x >> (8 * k));
        old_entries[n] = before[i];
        new_entries[n] = after[i];
        ++n;
    };
    int64_t i = 0;
    for (; i + STEP <= entries; i += STEP) {
        uint64_t a[8], b[8], any = 0;
        std::memcpy(a, before + i, sizeof a);
        std::memcpy(b, after + i, sizeof b);
        for (int w = 0; w < 8; ++w) any |= a[w] ^= b[w];
        if (any == 0) continue;
        for (int w = 0; w < 8; ++w) {
            while (a[w] != 0) {
                const int64_t j = std::countr_zero(a[w]) / BITS;
                changed(i + w * WORD + j);
                a[w] &= ~(static_cast<uint64_t>(static_cast<Entry>(-1)) << (j * BITS));
            }
        }
    }
    for (; i < entries; ++i) {
        if (before[i] != after[i]) changed(i);
    }
    return n;
}

template <class Code>
int64_t gaps(const uint16_t* at, const int64_t* counts, size_t blocks, Code* codes, int64_t* lengths) {
    constexpr int64_t MOST = static_cast<Code>(-1);
    int64_t total = 0;
    for (size_t b = 0; b < blocks; ++b) {
        const int64_t before = total;
        int64_t previous = -1;
        for (int64_t i = 0; i < counts[b]; ++i) {
            int64_t gap = at[i] - previous - 1;
            if (gap < 0) throw Broken("positions are not in order");
            for (; gap >= MOST; gap -= MOST, ++total) {
                if (codes != nullptr) codes[total] = static_cast<Code>(MOST);
            }
            if (codes != nullptr) codes[total] = static_cast<Code>(gap);
            ++total;
            previous = at[i];
        }
        at += counts[b];
        lengths[b] = total - before;
    }
    return total;
}

// Changes that are decoded at once: their entries are on the way from memory while the next ones are decoded.
constexpr size_t BATCH = 64;

// Decoded changes, BATCH at a time: each(rank of the first, number, index in the run of each). Every step is checked,
// so that no array is left whatever lies in them.
template <class Entry, class Code, class Each>
void each_batch(const sp_fix_run& run, const Entry* entries, const Each& each) {
    constexpr int64_t MOST = static_cast<Code>(-1);
    const auto* gap = static_cast<const Code*>(run.gap);
    const uint64_t first_code = run.rows[0], first_rank = run.rows[1];
    int64_t places[BATCH];
    size_t held = 0;
    uint64_t rank = 0;
    for (size_t b = 0; b < run.blocks; ++b) {
        const uint64_t* row = run.rows + 2 * b;
        const Code *code = gap + (row[0] - first_code), *code_end = gap + (row[2] - first_code);
        const uint64_t rank_end = row[3] - first_rank;
        const int64_t base = static_cast<int64_t>(b) * BLOCK;
        const int64_t end = run.entries - base < BLOCK ? run.entries : base + BLOCK;
        int64_t next = base;  // the index that a code of 0 means
        bool skipped = false;
        for (; code != code_end; ++code) {
            next += *code;
            skipped = *code == MOST;
            if (skipped) continue;
            if (next >= end) throw Broken("a gap leads past the end of its block or tensor");
            if (rank + held == rank_end) throw Broken("the block table has fewer changes than the gap codes");
            __builtin_prefetch(entries + next, 1);
            places[held++] = next++;
            if (held == BATCH) {
                each(rank, held, places);
                rank += held;
                held = 0;
            }
        }
        if (skipped) throw Broken("a code follows a block's last change");
        if (rank + held != rank_end) throw Broken("the block table has more changes than the gap codes");
    }
    each(rank, held, places);
}

template <class Entry>
Entry xor_of(const sp_fix_run& run, uint64_t rank) {
    Entry x = 0;
    for (size_t k = 0; k < sizeof(Entry); ++k) {
        if (run.planes[k] != nullptr) x |= static_cast<Entry>(static_cast<Entry>(run.planes[k][rank]) << (8 * k));
    }
    return x;
}

template <class Entry, class Code>
void settle_as(const sp_fix_run& run, Entry* entries, int32_t goal, Entry* olds, Entry* news, sp_fix_tally& tally) {
    constexpr int64_t OTHER = sizeof(Code) == 1 ? 65535 : 255;
    const uint64_t shift = run.rows[1] % 8;
    int64_t expected = 0, block_end = 0;  // the index after the last change, in its block
    tally = {};
    each_batch<Entry, Code>(run, entries, [&](uint64_t rank, size_t count, const int64_t* places) {
        for (size_t i = 0; i < count; ++i, ++rank) {
            const auto x = xor_of<Entry>(run, rank);
            if (x == 0) throw Broken("an entry that is said to change has an XOR of 0");
            const uint64_t bit = rank + shift;
            const Entry now = entries[places[i]];
            const bool side = run.side[bit / 8] >> (bit % 8) & 1, is_old = ((now & lowest_bit(x)) != 0) == side;
            olds[rank] = static_cast<Entry>(now ^ (is_old ? 0 : x));
            news[rank] = static_cast<Entry>(now ^ (is_old ? x : 0));
            tally.old_count += is_old;
            tally.new_count += !is_old;
            if (places[i] >= block_end) expected = places[i] / BLOCK * BLOCK, block_end = expected + BLOCK;
            tally.other_codes += 1;
            if (places[i] - expected >= OTHER) tally.other_codes += (places[i] - expected) / OTHER;
            expected = places[i] + 1;
        }
    });
    if (goal == SP_FIX_KEEP) return;
    const Entry* wanted = goal == SP_FIX_OLD ? olds : news;
    each_batch<Entry, Code>(run, entries, [&](uint64_t rank, size_t count, const int64_t* places) {
        for (size_t i = 0; i < count; ++i) entries[places[i]] = wanted[rank + i];
    });
}

template <class Entry>
void settle_in(const sp_fix_run& run, void* entries, int32_t goal, void* olds, void* news, sp_fix_tally& tally) {
    auto *at = static_cast<Entry*>(entries), *before = static_cast<Entry*>(olds), *after = static_cast<Entry*>(news);
    if (run.gap_width == 1) {
        settle_as<Entry, uint8_t>(run, at, goal, before, after, tally);
    } else {
        settle_as<Entry, uint16_t>(run, at, goal, before, after, tally);
    }
}

}  // namespace

int64_t find_changes(int32_t width, const void* old_entries, const void* new_entries, int64_t entries, int64_t start,
                     const sp_fix_changes& out) {
    const auto run = [&]<class Entry>(Entry) {
        return find(static_cast<const Entry*>(old_entries), static_cast<const Entry*>(new_entries), entries, start,
                    out);
    };
    return width == 1 ? run(uint8_t{}) : width == 2 ? run(uint16_t{}) : run(uint32_t{});
}

int64_t encode_gaps(const uint16_t* at, const int64_t* counts, size_t blocks, int32_t gap_width, void* codes,
                    int64_t* lengths) {
    return gap_width == 1 ? gaps(at, counts, blocks, static_cast<uint8_t*>(codes), lengths)
                          : gaps(at, counts, blocks, static_cast<uint16_t*>(codes), lengths);
}

void settle(const sp_fix_run& run, void* entries, int32_t goal, void* old_entries, void* new_entries,
            sp_fix_tally& tally) {
    const auto in = run.width == 1 ? settle_in<uint8_t> : run.width == 2 ? settle_in<uint16_t> : settle_in<uint32_t>;
    in(run, entries, goal, old_entries, new_entries, tally);
}

}  // namespace safepatch
