// What the engine asks of an instruction set: three functions, and the structures they share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "safepatch.h"

// The vector code relies on GCC's target regions.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SP_X86 1
#else
#define SP_X86 0
#endif
#if defined(__aarch64__) && defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define SP_NEON 1
#else
#define SP_NEON 0
#endif

namespace safepatch {

// Entries worked on at once: their float32 copies stay in the first-level cache.
inline constexpr int kTile = 1024;
// Masks travel between steps as 64-bit words, one bit per entry.
inline constexpr int kWords = kTile / 64;
// Entries that a thread takes at once, at most.
inline constexpr int kChunk = 32768;
// Codes that are rewritten at once.
inline constexpr int kBatch = 256;
static_assert(kChunk <= 65536);  // places in a chunk have 16 bits
static_assert(kBatch <= 256);    // and those in a batch 8
// Buffers may be read or written this many entries beyond their end.
inline constexpr int kSlack = 64;
// Keys of finite scores lie below.
inline constexpr uint32_t kInfinity = 0x7f800000;

inline sp_cut cut_of(uint32_t key, int64_t before) { return {sizeof(sp_cut), key, before, 0, 0}; }

// A cut less what `best`, which selects no other entries, selects.
inline sp_cut without(sp_cut cut, const sp_cut& best) {
    if (cut.key == SP_NO_KEY || best.key == SP_NO_KEY) return cut;
    if (best.key == 0) return cut_of(SP_NO_KEY, 0);  // it selects all
    cut.skip_key = best.key;
    cut.skip_before = best.before;
    return cut;
}

// Philox4x32-10 with its round keys spelled out.
struct Random {
    uint64_t rounds[10][2];
    uint32_t keep;
    bool all;  // everything is retained
};

struct Fault {
    int64_t count = 0;
    int64_t first = -1;

    void add(int64_t n, int64_t index) {
        if (n == 0) return;
        count += n;
        if (first < 0 || index < first) first = index;
    }
};

// A histogram under construction. Two halves take turns, so that equal keys in a row don't wait for each
// other; or `sums` are added to, where keys are too few to pay for bins of their own.
struct Window {
    uint32_t lo;
    uint32_t shift;
    uint32_t bins;
    uint32_t* counts;   // [2][bins]
    int64_t above = 0;  // keys beyond the last bin
    int64_t* sums = nullptr;
};

// Where a chunk's keys are in a list.
struct Span {
    int64_t begin;
    int64_t n;
};

// How a pass learns which entries are eligible.
enum class Eligible {
    find,    // from the inputs: it scores them, draws random numbers, and reports what it finds
    stored,  // from the bits that an earlier pass saved: it scores, and draws and reports nothing
    listed   // from the list of keys that an earlier pass made: it reads the inputs for their deltas at most
};

// What a pass wants from one patch.
struct Task {
    const sp_patch* patch = nullptr;  // null: nothing is eligible
    Random random{};
    Eligible eligible = Eligible::find;
    bool retain_eligible = false;  // only retained entries are eligible
    bool retain_selected = false;  // only retained entries of T are selected

    const uint64_t* stored = nullptr;  // one bit per entry, by chunks
    // Keys and places within their chunks, in order, and where each chunk's are. With magnitude importance a key
    // keeps the sign of its delta, so that it stands for the delta as well.
    const uint32_t* list = nullptr;
    const uint16_t* places = nullptr;
    const Span* spans = nullptr;

    bool only = false;  // restrict eligible entries to one key
    uint32_t only_key = 0;
    bool collect = false;  // restrict to keys >= floor and list them
    uint32_t floor = 0;
    uint64_t* save = nullptr;  // where to save the eligible bits

    sp_cut cut = cut_of(SP_NO_KEY, 0);

    // What `eligible` names is there, and nothing else.
    bool sound() const {
        return (stored != nullptr) == (eligible == Eligible::stored) &&
               (list != nullptr) == (eligible == Eligible::listed) && (list == nullptr || (places && spans));
    }
};

struct Pass {
    const sp_block* block;
    const std::vector<Task>* tasks;  // one per patch
    void* out;                       // null: select and write nothing
};

// A run of entries of the block, and its places in `spans` and in `stored` and `save`.
struct Range {
    int64_t begin;
    int64_t n;
    int64_t slot;
    int64_t word;
};

// A sum of float64 numbers that is never rounded: their mantissas by exponent, which 2^74 numbers fit.
// Terms are products of differences of float32 numbers, so they are 0 or between 2^-298 and 2^258.
inline constexpr int kLeastExponent = 1023 - 298;
inline constexpr int kExponents = 298 + 258 + 1;
struct ExactSum {
    __int128 of[kExponents];
};

// As sp_kept.
struct Remains {
    int64_t acted, changed, saturated;
    ExactSum along, asked, moved;
};

// What a pass found of the entries that it wrote; every thread has its own.
struct Written {
    Fault overflow;
    int64_t acted = 0;
    int64_t changed = 0;
    Fault bad_scale, saturated;
    std::vector<Remains> kept;  // one per patch, where codes are written
};

// What a pass found for one patch; every thread has its own.
struct Sink {
    int64_t eligible = 0;
    int64_t selected = 0;
    int64_t applied = 0;
    Fault bad_delta, bad_score, negative;
    std::vector<Window> windows;
    uint32_t* list = nullptr;  // room for kChunk + kSlack
    uint16_t* places = nullptr;
    int64_t listed = 0;
    int64_t taken = 0;  // of the listed, those whose codes are rewritten
};

// Codes that are rewritten: the entries of a chunk that some T holds, in order.
struct alignas(64) Batch {
    uint16_t place[kBatch];  // in the chunk
    int64_t at[kBatch];      // in the stored codes
    float scale[kBatch], v[kBatch], w[kBatch], acc[kBatch], y[kBatch], after[kBatch];
    double asked[kBatch];       // acc - w
    uint64_t words[4][kBatch];  // of Philox
    uint32_t random[kBatch];
    uint8_t old[kBatch], fresh[kBatch];
    uint8_t actors[kBatch];  // how many patches act: 0, 1, or 2 for several
    uint32_t owner[kBatch];  // one of them
    uint8_t written[kBatch];
    uint8_t alone[kBatch];    // written, and by one patch
    uint8_t changed[kBatch];  // the places in the batch of those whose codes are others now
    int n, changes;
};

// One patch's working memory for a tile.
struct alignas(64) Lane {
    float delta[kTile];
    uint32_t key[kTile];
    uint64_t eligible[kWords];
    uint64_t selected[kWords];
    uint64_t acts[kWords];
    float step[kBatch];      // of a batch of codes: scale * delta,
    uint8_t holds[kBatch];   // whether T holds the entry,
    uint8_t acting[kBatch];  // and whether the patch acts on it
    const float* d;          // where the deltas are: `delta`, or the input itself
    const void* k;           // where the keys are, sign bits to be ignored: `key`, or the deltas
    int64_t next;            // of the task's list
    float scale;
};

// One thread's working memory.
//
// Steps work on whole words of 64 entries. Where a tile ends within a word (only the last of a chunk does), its
// inputs are copied here and padded with zeros, and its output is copied out of here:
//
//   tile of 130 entries    |0 ... 63|64 ... 127|128 129 0 0 ... 0|
//
// Elsewhere inputs and output are used where they lie. Zeros are never eligible, so that no step asks how long its
// tile is. `bits` is any patch's values or scores: good until the next of them is looked at.
struct alignas(64) Workspace {
    float base[kTile];
    float weight[kTile];             // x of |x * gradient|
    uint32_t index[kTile + kSlack];  // bins of keys; slack because vectors are packed and stored whole
    uint32_t base_bits[kTile];
    uint32_t bits[kTile];
    uint32_t out_bits[kTile];
    uint8_t holders[kChunk];  // how many patches select an entry: 0, 1, or 2 for several
    Batch batch;
    std::vector<Lane> lanes;
    std::vector<float*> lora;  // per patch, kChunk + kSlack deltas; null unless the patch is a LoRA
};

struct Isa {
    const char* name;
    // Run a pass over a range of at most kChunk entries that begins at a multiple of 4 of its tensor,
    // or ends before the next one (which matters for random numbers only).
    void (*visit)(const Pass& pass, Workspace& space, Range range, Sink* sinks, Written& written);
    // Write a range from lists alone. Patches must either be null or have a list (and, if their keys aren't
    // their deltas, not be LoRA); entries of several patches are left alone, and sinks have room for lists.
    void (*patch_up)(const Pass& pass, Workspace& space, Range range, Sink* sinks, Written& written);
    // Write a range of a block that is stored as codes. Sinks have room for lists.
    void (*recode)(const Pass& pass, Workspace& space, Range range, Sink* sinks, Written& written);
    // Count `n` keys, sign bits ignored, into a window. `keys` has kSlack entries of slack.
    void (*count)(const uint32_t* keys, int64_t n, Workspace& space, Window& window);
};

extern const Isa scalar_isa;
#if SP_X86
extern const Isa avx2_isa;
extern const Isa avx512_isa;
#endif
#if SP_NEON
extern const Isa neon_isa;
#endif

}  // namespace safepatch
