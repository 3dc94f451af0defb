/* safepatch.h: the C interface of the safepatch engine. C99; needs stddef and stdint only.
 *
 * Arrays and numbers in, bits and counts out: the engine never sees a file or a recipe. Every call but
 * sp_engine_close may be made from several threads at once on the same engine; they take turns.
 * The caller owns every buffer it passes in, and the engine keeps no pointer to one after the call.
 * Buffers need the natural alignment of their entries. No call throws or aborts on bad data or a bad argument; where
 * a pointer may be NULL, its call says so, and elsewhere NULL is a bad argument.
 *
 * A struct that a caller allocates begins with its size, so that fields can be added to its end: set `size` to sizeof
 * the struct and the rest to zero. In an array the first element's size counts for all. A program and a library of
 * one ABI understand each other, whichever is newer: a field that the caller does not know is taken as 0, and one
 * that only the caller knows must be 0. sp_bits, sp_lora and sp_fault are parts of others, and never change. */
#ifndef SAFEPATCH_H
#define SAFEPATCH_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SP_API __attribute__((visibility("default")))
#else
#define SP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The library's version; its ABI, which the name libsafepatch.so.N carries: within one, calls and fields are only
 * added; and the numeric contract, which changes when the same call gives other bits. */
#define SP_VERSION_MAJOR 0
#define SP_VERSION_MINOR 1
#define SP_VERSION_PATCH 0
#define SP_ABI_VERSION 3
#define SP_SPEC_VERSION 1

/* A cut's `before` beyond every position, a cut's `key` above every score, a `keep` that retains all. */
#define SP_EVERY INT64_MAX
#define SP_NO_KEY UINT32_MAX
#define SP_KEEP_ALL (UINT64_C(1) << 32)

typedef enum sp_status {
    SP_OK = 0,
    SP_BAD_ARGUMENT = 1, /* the call itself is wrong: a bug in the caller */
    SP_UNSUPPORTED = 2,  /* this machine lacks the instruction set that was asked for */
    SP_NO_MEMORY = 3,    /* or no thread can be started */
    SP_INTERNAL = 4,     /* a bug in the engine */
    SP_BAD_DATA = 5,     /* what lies in a fix breaks a rule of its encoding */
    SP_STOPPED = 6,      /* by the caller's own sp_progress */
    SP_IO_FAILED = 7     /* one of the caller's own sp_io */
} sp_status;

/* Values of the int32_t fields below. */
enum { SP_F32 = 0, SP_F16 = 1, SP_BF16 = 2 };                            /* dtype */
enum { SP_CHECKPOINT = 0, SP_DELTA = 1, SP_LORA = 2 };                   /* kind */
enum { SP_MAGNITUDE = 0, SP_SCORES = 1, SP_GRADIENTS = 2 };              /* importance */
enum { SP_WEIGHT_PATCHED = 0, SP_WEIGHT_BASE = 1, SP_WEIGHT_DELTA = 2 }; /* weight */
enum { SP_ALONE = 0, SP_ALL = 1, SP_ELECTED = 2, SP_ELECTED_UP = 3 };    /* acts */
enum { SP_SUM = 0, SP_MEAN = 1, SP_TOTAL = 2, SP_WEIGHTED = 3 };         /* join */
enum { SP_RETAIN_FIRST = 0, SP_SELECT_FIRST = 1 };                       /* order */

typedef struct sp_engine sp_engine;

/* What a call tells between steps, on the calling thread: `done` of `total` entries of the block in the pass that is
 * under way; a call makes one to four, each from 0. Not 0 ends the call with SP_STOPPED, and the output is undefined.
 * It must return, and may not call the same engine. */
typedef int (*sp_progress)(void* user, int64_t done, int64_t total);

/* Entries of a tensor as they lie in a file: 4 bytes each for F32, 2 for F16 and BF16. */
typedef struct sp_bits {
    const void* data;
    int32_t dtype;
} sp_bits;

/* delta[row, col] = scale * (sum over r of b[row, r] * a[r, col], from 0, in order of r).
 * `a` is [rank, cols] and `b` [rows, rank], row-major, of the whole tensor. */
typedef struct sp_lora {
    const float* a;
    const float* b;
    int64_t rank;
    int64_t rows;
    int64_t cols;
    float scale;
} sp_lora;

/* Codes that stand for numbers of a grid, times a scale. A code of 8 bits is E4M3 or a number in two's complement; of
 * two codes of 4 bits in a byte the low one is first: E2M1, or a number plus 8. */
enum { SP_E4M3 = 0, SP_E2M1 = 1, SP_INT8 = 2, SP_INT4 = 3 }; /* grid */
enum { SP_STOCHASTIC = 0, SP_NEAREST = 1 };                  /* rounding */

/* How a tensor is stored as codes: matrices [rows, cols], one below another, and a table of scales, of which one is
 * shared by block_rows x block_cols entries of a matrix. */
typedef struct sp_codes {
    size_t size; /* sizeof(sp_codes) */
    int32_t grid;
    int32_t flip;  /* bits of a byte of 8-bit codes that are the other way round in `data` */
    uint8_t* data; /* the codes of `entries` entries of the tensor from `first` on: all of the block, or more */
    int64_t first; /* even where codes have 4 bits */
    int64_t entries;
    int64_t rows;
    int64_t cols;
    int64_t block_rows;
    int64_t block_cols;
    const float* scales; /* [scale_rows, ceil(cols / block_cols)], from row `scale_first` of the table on */
    int64_t scale_first;
    int64_t scale_rows;
    int32_t turned;      /* entries are counted in the transposes of the matrices; then `data` holds whole ones */
    int32_t handed;      /* dtype that values were rounded to when checkpoints were trained on them: what d is from */
    int32_t rounding;    /* to a neighbour on the grid, or the nearest number (ties to the even code) */
    int32_t reserved;    /* 0 */
    uint64_t random_key; /* of the Philox numbers that stochastic rounding draws, one for each entry */
    sp_bits original;    /* the same entries of the float model, which are then what is patched; or NULL and F32 */
} sp_codes;

/* One patch's share of a block. */
typedef struct sp_patch {
    size_t size;        /* sizeof(sp_patch) */
    int32_t present;    /* 0: the patch has nothing for this tensor, and no other field is read */
    int32_t kind;       /* which of `values` (checkpoint, delta) and `lora` is read */
    int32_t importance; /* `scores` holds scores or gradients; it isn't read for magnitude */
    int32_t weight;     /* what gradients are multiplied with */
    sp_bits values;
    sp_bits scores;
    sp_lora lora;
    uint64_t random_key; /* of Philox */
    uint64_t keep;       /* an entry is retained iff its 32-bit random number is smaller */
    float scale;
    int32_t reserved; /* 0 */
    int64_t skip;     /* sp_merge: so many of its quota, the best ones, are not selected */
} sp_patch;

/* Entries [start, start + entries) of one tensor, in row-major order. */
typedef struct sp_block {
    size_t size; /* sizeof(sp_block) */
    sp_bits base;
    int64_t entries;
    int64_t start;
    const sp_patch* patches;
    size_t patch_count;
    int32_t acts; /* where several patches select an entry: none of them acts, all, those of the elected sign */
    int32_t join; /* what becomes of their steps scale * delta: each is added to the entry, or their mean or sum is */
    int32_t order;
    sp_progress progress; /* NULL: none */
    void* user;           /* handed to `progress` */
    const float* lambda;  /* what that mean or sum is multiplied with; NULL: 1 */
    /* NULL, or how the tensor is stored: then `base` is not read, `data` is what sp_apply and sp_merge change in
     * place and are given as output, and gradients are multiplied with deltas only. */
    const sp_codes* codes;
} sp_block;

/* Selected are the eligible entries with key > `key`, or key == `key` and index in the tensor < `before`.
 * A key is the bit pattern of a float32 score. With a `skip_key` above 0, those that a cut of it and `skip_before`
 * would select are left out again. */
typedef struct sp_cut {
    size_t size; /* sizeof(sp_cut) */
    uint32_t key;
    int64_t before;
    uint32_t skip_key;
    int64_t skip_before;
} sp_cut;

/* Histogram request for one patch: counts[(key - lo) >> shift] += 1 for keys in [lo, lo + (bins << shift)).
 */
typedef struct sp_window {
    size_t size; /* sizeof(sp_window) */
    size_t patch;
    uint32_t lo;
    uint32_t shift; /* at most 31 */
    size_t bins;
    int64_t* counts;
} sp_window;

/* How many entries break a rule, and the lowest index of one in the tensor (-1 for none). */
typedef struct sp_fault {
    int64_t count;
    int64_t first;
} sp_fault;

typedef struct sp_patch_report {
    size_t size; /* sizeof(sp_patch_report) */
    int64_t eligible;
    int64_t selected;
    int64_t applied;
    sp_fault bad_delta; /* NaN or infinite delta */
    sp_fault bad_score; /* NaN or infinite score where the delta is finite */
    sp_fault negative;  /* finite negative score where the delta is finite */
} sp_patch_report;

/* What became of the entries on which one patch alone acts, in a tensor that is stored as codes. With v and v' the
 * values before and after, and D what the patch asked for (its sum less the old value, in float32), the sums are
 * exact: two's complement of 768 bits, the low word first, in units of 2^-360. */
typedef struct sp_kept {
    size_t size; /* sizeof(sp_kept) */
    int64_t acted;
    int64_t changed;    /* to another code */
    int64_t saturated;  /* beyond the grid's range */
    uint64_t along[12]; /* sum of (v' - v) D */
    uint64_t asked[12]; /* sum of D^2 */
    uint64_t moved[12]; /* sum of (v' - v)^2 */
} sp_kept;

typedef struct sp_report {
    size_t size;              /* sizeof(sp_report) */
    sp_patch_report* patches; /* the caller's array of block->patch_count; a call overwrites all of it */
    sp_fault overflow;        /* acted on, finite before, not finite after rounding; such an entry keeps its bits */
    int64_t acted;            /* entries on which any patch acts */
    int64_t changed;          /* those of them whose bits in the output are not the base's: what survives rounding */
    sp_kept* kept;      /* with codes, the caller's array of block->patch_count, overwritten too; else not read */
    sp_fault bad_scale; /* acted on, under a scale that isn't finite or is below 2^-100; the code stays */
    sp_fault saturated; /* written, and beyond the grid's range */
} sp_report;

/* @return of the library that is loaded: its version, like "0.1.0" (static text), SP_ABI_VERSION, SP_SPEC_VERSION. */
SP_API const char* sp_version_string(void);
SP_API uint32_t sp_abi_version(void);
SP_API uint32_t sp_spec_version(void);

/* @return what a status means; static text. */
SP_API const char* sp_strerror(sp_status status);

/* @return why the calling thread's last failing call failed; the thread's own text, good until its next call.
 */
SP_API const char* sp_last_error(void);

/* @return 1 if `isa` ("scalar", "avx2", "avx512", "neon") is built in and this machine has it, else 0. */
SP_API int sp_isa_usable(const char* isa);

/* Open an engine with `threads` >= 1 threads, the caller's own included. `isa` may be NULL: then the
 * environment variable SAFEPATCH_FORCE_ISA decides, or else the best that this machine has.
 * @return SP_OK, SP_BAD_ARGUMENT, SP_UNSUPPORTED or SP_NO_MEMORY. On success the caller owns *engine and ends
 * it with sp_engine_close; otherwise *engine is NULL. */
SP_API sp_status sp_engine_open(int32_t threads, const char* isa, sp_engine** engine);

/* Stop the threads and free the engine. NULL is allowed; no other call may be running on it. In a forked
 * child, where an engine of the parent goes on with one thread, this does nothing. */
SP_API void sp_engine_close(sp_engine* engine);

/* @return the instruction set in use, "none" for NULL; static text. */
SP_API const char* sp_engine_isa(const sp_engine* engine);

/* @return the number of threads, the caller's own included; 0 for NULL. */
SP_API int32_t sp_engine_threads(const sp_engine* engine);

/* @return upper bound, in bytes, of what the engine holds after an sp_merge of this many entries and patches;
 * 0 for NULL or fewer than 0 entries. The memory is reused by later calls and freed by sp_engine_close. */
SP_API size_t sp_scratch(const sp_engine* engine, int64_t entries, size_t patches);

/* Count eligible keys into `windows` (`count` of them; a patch may have several or none; counts are added
 * to).
 * @return SP_OK with eligible counts and faults of every patch in *report, SP_BAD_ARGUMENT or SP_NO_MEMORY.
 */
SP_API sp_status sp_histogram(sp_engine* engine, const sp_block* block, const sp_window* windows, size_t count,
                              sp_report* report);

/* counts[p] = number of eligible entries of patch p whose key is keys[p].
 * @return SP_OK, SP_BAD_ARGUMENT or SP_NO_MEMORY. */
SP_API sp_status sp_count_equal(sp_engine* engine, const sp_block* block, const uint32_t* keys, int64_t* counts);

/* Write the block's new entries to `out` (as many as the base's, same dtype; it may be the base's own buffer,
 * but overlaps no other input), patch p acting by cuts[p].
 * @return SP_OK with a full *report, SP_BAD_ARGUMENT or SP_NO_MEMORY. */
SP_API sp_status sp_apply(sp_engine* engine, const sp_block* block, const sp_cut* cuts, void* out, sp_report* report);

/* A whole tensor at once: find the cut that selects the quotas[p] best entries of each patch, but for the first
 * `skip` of them, then apply.
 * @return SP_OK with the cuts and a full *report, SP_BAD_ARGUMENT or SP_NO_MEMORY. */
SP_API sp_status sp_merge(sp_engine* engine, const sp_block* block, const int64_t* quotas, void* out, sp_cut* cuts,
                          sp_report* report);

/* What the patches of a block say, for more than one look at it: the best entries of each, in lists of magnitudes, at
 * most an eighth of the block long. What differs in quotas, skips, cuts, scales, the rule or lambda alone needs no
 * other look at the patches. Calls on one of them are made by one thread at a time. */
typedef struct sp_notes sp_notes;

/* Look at a whole tensor as sp_merge does, and list what quotas up to these can choose from.
 * @return SP_OK, SP_BAD_ARGUMENT, SP_NO_MEMORY or SP_STOPPED. On success the caller owns *notes and ends them with
 * sp_notes_close; they are NULL where lists won't do, which sp_merge does without. */
SP_API sp_status sp_notes_take(sp_engine* engine, const sp_block* block, const int64_t* quotas, sp_notes** notes);

/* As sp_histogram, and list what is not below the lowest of a patch's windows: *notes is NULL where lists won't do,
 * and nothing is listed of a patch without windows.
 * @return as sp_histogram; on success the caller owns *notes. */
SP_API sp_status sp_notes_count(sp_engine* engine, const sp_block* block, const sp_window* windows, size_t count,
                                sp_report* report, sp_notes** notes);

/* Free notes; NULL is allowed. */
SP_API void sp_notes_close(sp_notes* notes);

/* @return the bytes that notes take, 0 for NULL. */
SP_API size_t sp_notes_bytes(const sp_notes* notes);

/* As sp_merge, of the tensor that the notes are of. The block is the one that they were taken of, but for what may
 * differ; values, scores and factors of its patches are not read and may be missing.
 * @return as sp_merge; SP_BAD_ARGUMENT also for another block, or a quota or skip above the quotas of sp_notes_take.
 */
SP_API sp_status sp_notes_merge(sp_notes* notes, sp_engine* engine, const sp_block* block, const int64_t* quotas,
                                void* out, sp_cut* cuts, sp_report* report);

/* As sp_apply, of the block that the notes are of; see sp_notes_merge.
 * @return as sp_apply; SP_BAD_ARGUMENT also for another block, or a cut with a key below what is listed. */
SP_API sp_status sp_notes_apply(sp_notes* notes, sp_engine* engine, const sp_block* block, const sp_cut* cuts,
                                void* out, sp_report* report);

/* The numbers that a recipe's settings come down to; no engine needed.
 *
 * The random key of a patch's tensor: BLAKE2b-64 of the seed and both names, UTF-8 without a NUL inside.
 * @return SP_OK, or SP_BAD_ARGUMENT for NULL. */
SP_API sp_status sp_random_key(uint64_t seed, const char* patch, const char* tensor, uint64_t* random_key);

/* `keep` of the share of entries that is retained: 0 and more, 1 retains all.
 * @return SP_OK, or SP_BAD_ARGUMENT for NULL, a negative share or NaN. */
SP_API sp_status sp_keep(double retain, uint64_t* keep);

/* The quota that `top` of so many entries comes to: the product in double, rounded half to even.
 * @return SP_OK, or SP_BAD_ARGUMENT for NULL, fewer than 0 entries or a share outside of [0, 1]. */
SP_API sp_status sp_quota(double top, int64_t entries, int64_t* quota);

/* Exact selection from streams: the cuts of tensors, or of whole models, that are never in memory at once.
 *
 * Tensors are numbered in bytewise order of their names, which is the order in which equal keys are taken. While
 * sp_select_pending: sweep over all blocks of all tensors, in any order and cut, with sp_histogram and the windows of
 * sp_select_windows; then call sp_select_advance. One sweep does mostly, three at most. Then take the cuts of each
 * tensor's blocks for sp_apply, in order of position. Processes that share a sweep add up their counts before
 * sp_select_advance, every array once. After SP_NO_MEMORY a selection can only be closed.
 * Calls on one selection are made by one thread at a time, or by several on blocks of different engines if each
 * counts into windows of its own. */
typedef struct sp_select sp_select;

/* The most windows that a patch has at once. */
#define SP_SELECT_WINDOWS 6

/* Select the quotas[p] best of each patch among `entries`, which lie in `tensors` tensors.
 * @return SP_OK, SP_BAD_ARGUMENT or SP_NO_MEMORY. On success the caller owns *select and ends it with
 * sp_select_close; otherwise *select is NULL. */
SP_API sp_status sp_select_open(size_t tensors, int64_t entries, const int64_t* quotas, size_t patches,
                                sp_select** select);

/* Before anything else: of the quota of a patch, the best `skip` entries are not selected.
 * @return SP_OK, SP_BAD_ARGUMENT or SP_NO_MEMORY. */
SP_API sp_status sp_select_skip(sp_select* select, size_t patch, int64_t skip);

/* Free a selection; NULL is allowed. */
SP_API void sp_select_close(sp_select* select);

/* Before the first sweep, if at all: blocks that stand for all entries, such as a few from every tensor. A guess
 * costs a sweep over them and mostly saves one over everything; whatever they are, the result is the same.
 * @return SP_OK, SP_BAD_ARGUMENT, SP_NO_MEMORY or SP_STOPPED. */
SP_API sp_status sp_select_guess(sp_select* select, sp_engine* engine, const sp_block* sample, size_t blocks);

/* @return 1 if there is a sweep to do, else 0; 0 for NULL. */
SP_API int sp_select_pending(const sp_select* select);

/* What to count in a block of this tensor in the present sweep. `windows` has room for SP_SELECT_WINDOWS per patch;
 * their counts belong to the selection.
 * @return SP_OK with the number of them in *count, SP_BAD_ARGUMENT or SP_NO_MEMORY. */
SP_API sp_status sp_select_windows(sp_select* select, size_t tensor, sp_window* windows, size_t* count);

/* A sweep has ended.
 * @return SP_OK, SP_BAD_ARGUMENT where none is pending, or SP_NO_MEMORY. */
SP_API sp_status sp_select_advance(sp_select* select);

/* When no sweep is pending: the key of a patch's cut, and how many entries that equal it a tensor may still take
 * (SP_EVERY: all), those that are skipped among them.
 * @return SP_OK or SP_BAD_ARGUMENT. */
SP_API sp_status sp_select_tally(const sp_select* select, size_t tensor, size_t patch, uint32_t* key, int64_t* left);

/* When no sweep is pending: the cuts of the next block of a tensor, in order of position from 0.
 * @return SP_OK, SP_BAD_ARGUMENT, SP_NO_MEMORY or SP_STOPPED. */
SP_API sp_status sp_select_cuts(sp_select* select, sp_engine* engine, size_t tensor, const sp_block* block,
                                sp_cut* cuts);

/* Merge known inputs on every instruction set that this machine has and compare with known results: what a build with
 * other compilers and flags must pass. Takes a fraction of a second.
 * @return SP_OK, SP_INTERNAL with what differs in sp_last_error, or SP_NO_MEMORY. */
SP_API sp_status sp_selftest(void);

/* The fix file, at the level of buffers: what two versions of a tensor differ in, found, encoded, told and undone.
 * These calls need no engine, run on the calling thread, and may be made from any number of threads at once.
 * Entries are unsigned integers of `width` (1, 2 or 4) bytes; a block is SP_FIX_BLOCK of them from a multiple of it.
 */
#define SP_FIX_BLOCK 65536

/* What sp_fix_settle leaves in the touched entries: what it finds there, or one side. */
enum { SP_FIX_KEEP = 0, SP_FIX_OLD = 1, SP_FIX_NEW = 2 };

/* Where sp_fix_find writes, with room for as many changes as there are entries. */
typedef struct sp_fix_changes {
    size_t size;        /* sizeof(sp_fix_changes) */
    int64_t* counts;    /* per block that the entries lie in: added to */
    uint16_t* at;       /* position in its block */
    uint8_t* side;      /* the old entry's bit at the place of the lowest bit that differs: 0 or 1 */
    uint8_t* planes[4]; /* byte k of old XOR new; the first `width` are written */
    void* old_entries;
    void* new_entries;
} sp_fix_changes;

/* Consecutive blocks of one tensor, as a fix file describes them: whatever lies in the arrays, no call leaves them.
 */
typedef struct sp_fix_run {
    size_t size; /* sizeof(sp_fix_run) */
    int32_t width;
    int32_t gap_width;        /* bytes of a gap code: 1 or 2 */
    int64_t entries;          /* in these blocks; only the tensor's last block may be cut short */
    size_t blocks;            /* as many as the entries fill */
    const uint64_t* rows;     /* [blocks + 1][2], as in the file: first code, changes before */
    const void* gap;          /* the codes from rows[0][0] on */
    size_t gap_count;         /* rows[blocks][0] - rows[0][0] */
    const uint8_t* side;      /* from the byte that holds bit rows[0][1] on */
    size_t side_count;        /* bytes of it */
    const uint8_t* planes[4]; /* byte k of the XORs from change rows[0][1] on, NULL for zeros; `width` are read */
    size_t changes;           /* rows[blocks][1] - rows[0][1], the length of each plane */
} sp_fix_run;

typedef struct sp_fix_tally {
    size_t size;       /* sizeof(sp_fix_tally) */
    int64_t old_count; /* touched entries that were on the old side */
    int64_t new_count;
    int64_t other_codes; /* codes that the changes would take with the other gap width */
} sp_fix_tally;

/* Find where two versions of entries [start, start + entries) of a tensor differ.
 * @return SP_OK with the number of changes in *found, or SP_BAD_ARGUMENT. */
SP_API sp_status sp_fix_find(int32_t width, const void* old_entries, const void* new_entries, int64_t entries,
                             int64_t start, const sp_fix_changes* out, int64_t* found);

/* Encode the positions of whole blocks, counts[b] of them in block b. `codes` may be NULL, to learn what room they
 * need.
 * @return SP_OK with the number of codes per block in `lengths`; SP_BAD_DATA for positions out of order, or
 * SP_BAD_ARGUMENT. */
SP_API sp_status sp_fix_gaps(const uint16_t* at, const int64_t* counts, size_t blocks, int32_t gap_width, void* codes,
                             int64_t* lengths);

/* Tell the side of every touched entry of a run, and leave the side `goal` in `entries`; both sides of the touched
 * entries are written to `old_entries` and `new_entries`, run->changes each. Applying or undoing twice does no harm.
 * @return SP_OK with *tally; SP_BAD_DATA for a run that breaks a rule, with `entries` as they were; or
 * SP_BAD_ARGUMENT. */
SP_API sp_status sp_fix_settle(const sp_fix_run* run, void* entries, int32_t goal, void* old_entries,
                               void* new_entries, sp_fix_tally* tally);

/* The fix file, at the level of files: a checkpoint's shards are checked, changed and changed back in place.
 *
 * A file of the caller's: reading and writing return how many bytes were moved, more than 0, or a negative number
 * where they fail; syncing returns 0 once all that was written is safe; the length is in bytes, or negative. */
typedef int64_t (*sp_read_at)(void* user, uint64_t offset, void* data, size_t bytes);
typedef int64_t (*sp_write_at)(void* user, uint64_t offset, const void* data, size_t bytes);
typedef int (*sp_sync)(void* user);
typedef int64_t (*sp_length)(void* user);

typedef struct sp_io {
    size_t size; /* sizeof(sp_io) */
    void* user;  /* handed to each of them */
    sp_read_at read_at;
    sp_write_at write_at; /* NULL where nothing is written */
    sp_sync sync;         /* NULL where nothing needs to last */
    sp_length length;
} sp_io;

typedef struct sp_fix sp_fix;

/* How many of the touched entries were found on either side. */
typedef struct sp_fix_sides {
    size_t size; /* sizeof(sp_fix_sides) */
    int64_t old_count;
    int64_t new_count;
} sp_fix_sides;

/* Open a fix file. Its callbacks are used until it is closed. That an encoding is the only one which its change may
 * have is not asked here, as `safepatch verify` does; whatever lies in a file, no call leaves its arrays.
 * @return SP_OK, SP_BAD_ARGUMENT, SP_BAD_DATA, SP_IO_FAILED or SP_NO_MEMORY. On success the caller owns *fix and ends
 * it with sp_fix_close; otherwise *fix is NULL. Calls on one fix are made by one thread at a time. */
SP_API sp_status sp_fix_open(const sp_io* file, sp_fix** fix);

/* Free a fix; NULL is allowed. */
SP_API void sp_fix_close(sp_fix* fix);

/* @return its id, 32 hexadecimal digits, which is good until it is closed; "" for NULL. */
SP_API const char* sp_fix_id(const sp_fix* fix);

/* Tell on which side a checkpoint is; `shards` are all of its `count` safetensors files. Nothing is written.
 * @return SP_OK with *sides; SP_BAD_DATA for another base, a foreign edit or a broken file; SP_BAD_ARGUMENT,
 * SP_IO_FAILED or SP_NO_MEMORY. */
SP_API sp_status sp_fix_check(sp_fix* fix, const sp_io* shards, size_t count, sp_fix_sides* sides);

/* Apply a fix to a checkpoint, or take it out. All touched entries are proved by their hashes before a byte changes;
 * a fix that is there (or is not) already, or in part, is refused with SP_BAD_DATA. A run that was cut off leaves
 * such a part: with `resume` not 0 it is finished, in either direction. Shards are synced in the end. What the caller
 * keeps beside them, such as checksums, and that nobody loads them meanwhile, is the caller's affair.
 * @return as sp_fix_check; *sides is what was found before. */
SP_API sp_status sp_fix_apply(sp_fix* fix, const sp_io* shards, size_t count, int32_t resume, sp_fix_sides* sides);
SP_API sp_status sp_fix_revert(sp_fix* fix, const sp_io* shards, size_t count, int32_t resume, sp_fix_sides* sides);

#ifdef __cplusplus
}
#endif

#endif
