// The passes, written once over the vector operations of simd.h and compiled once per instruction set.
//
// A pass goes through a chunk tile by tile. Each step is a short loop over a tile's arrays in the first-level
// cache, so that any mix of dtypes, kinds and requests is a sequence of a few simple loops. Arrays are padded
// with zeros to whole words of 64 entries; a zero score is never eligible, so padding needs no special care.

using Bits = uint64_t;

constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kAllLanes = static_cast<uint32_t>((1ULL << SP_LANES) - 1);

SP_OP const void* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
SP_OP void* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
SP_OP int64_t width(int32_t dtype) { return dtype == SP_F32 ? 4 : 2; }

// ---- dtypes ----

template <int D>
SP_OP F value(const void* p, int i) {
    if constexpr (D == SP_F32) return load_f(at(p, 4 * i));
    if constexpr (D == SP_F16) return from_f16(at(p, 2 * i));
    if constexpr (D == SP_BF16) return from_bf16(load_u16(at(p, 2 * i)));
}
template <int D>
SP_OP U raw(const void* p, int i) {
    if constexpr (D == SP_F32) return load_u(at(p, 4 * i));
    if constexpr (D != SP_F32) return load_u16(at(p, 2 * i));
}
template <int D>
SP_OP void store_raw(void* p, int i, U a) {
    if constexpr (D == SP_F32) store_u(at(p, 4 * i), a);
    if constexpr (D != SP_F32) store_u16(at(p, 2 * i), a);
}
template <int D>
SP_OP U rounded(F a) {
    if constexpr (D == SP_F32) return as_u(a);
    if constexpr (D == SP_F16) return to_f16(a);
    if constexpr (D == SP_BF16) return to_bf16(a);
}
template <int D>
constexpr uint32_t infinity() {
    return D == SP_F32 ? kInfinity : D == SP_F16 ? 0x7c00 : 0x7f80;
}
template <int D>
constexpr uint32_t magnitude_bits() {
    return D == SP_F32 ? kMagnitude : 0x7fff;
}

// Call the instance of a function template for a dtype.
#define SP_BY_DTYPE(dtype, function, ...)                \
    ((dtype) == SP_F32   ? function<SP_F32>(__VA_ARGS__) \
     : (dtype) == SP_F16 ? function<SP_F16>(__VA_ARGS__) \
                         : function<SP_BF16>(__VA_ARGS__))

// ---- random retention ----

// The multipliers of Philox, and a round of it; words are the low halves of lanes.
constexpr uint64_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57;
SP_OP void mix(Q& a, Q& b, Q& c, Q& d, uint64_t k0, uint64_t k1) {
    const Q p0 = mul_q(a, set_q(kM0)), p1 = mul_q(c, set_q(kM1));
    a = xor_q(high(p1), b, set_q(k0));
    c = xor_q(high(p0), d, set_q(k1));
    b = p1;
    d = p0;
}

// Which of the 256 entries from index 4 * counter are retained: bit i of word w is entry 64 * w + i. A counter makes
// four words a, b, c, d, of its four entries in this order; every Q holds one of them for kLanesQ counters, which
// `below` puts in order. Several chains of multiplications run side by side: one alone would spend its time waiting
// for itself.
static void draw(const Random& random, uint64_t counter, Bits* kept) {
    constexpr int kChains = SP_LANES == 16 ? 8 : 4;
    constexpr int kEntries = 4 * kLanesQ;
    for (int word = 0; word < 4; ++word) kept[word] = 0;
    for (int done = 0; done < 256; done += kChains * kEntries) {
        Q a[kChains], b[kChains], c[kChains], d[kChains];
        // Words 2 and 3 of the counter are zero: the first round is half a round.
        for (int i = 0; i < kChains; ++i) {
            const Q low = add_q(set_q(counter + static_cast<uint64_t>(done / 4 + i * kLanesQ)), counters());
            d[i] = mul_q(low, set_q(kM0));
            a[i] = xor_q(high(low), set_q(random.rounds[0][0]));
            b[i] = set_q(0);
            c[i] = xor_q(high(d[i]), set_q(random.rounds[0][1]));
        }
#pragma GCC unroll 9
        for (int round = 1; round < 10; ++round) {
            for (int i = 0; i < kChains; ++i) {
                mix(a[i], b[i], c[i], d[i], random.rounds[round][0], random.rounds[round][1]);
            }
        }
        for (int i = 0; i < kChains; ++i) {
            const int at = done + i * kEntries;
            kept[at / 64] |= below(a[i], b[i], c[i], d[i], random.keep) << at % 64;
        }
    }
}

// Retained ones among `wanted`. No random numbers are drawn where nothing is wanted.
static void retain(const Random& random, int64_t index, const Bits* wanted, Bits* kept, int words) {
    const int skip = static_cast<int>(index % 4);  // not zero only in a tile that ends before the next multiple of 4
    for (int w = 0; w < words; w += 4) {
        Bits drawn[4] = {}, any = 0;
        for (int i = w; i < words && i < w + 4; ++i) any |= wanted[i];
        if (any != 0) draw(random, static_cast<uint64_t>(index) / 4 + 16 * static_cast<uint64_t>(w), drawn);
        for (int i = w; i < words && i < w + 4; ++i) kept[i] = wanted[i] & drawn[i - w] >> skip;
    }
}

// ---- deltas ----

template <int D>
static void widen(const void* p, float* to, int words) {
    for (int i = 0; i < 64 * words; i += SP_LANES) store_f(to + i, value<D>(p, i));
}

// Of a patch that isn't a LoRA.
template <int D, bool kCheckpoint>
SP_OP F dense_delta(const void* p, const float* base, int i) {
    const F given = value<D>(p, i);
    return kCheckpoint ? sub(given, load_f(base + i)) : given;
}
template <int D>
static void dense_deltas(int32_t kind, const void* p, const float* base, float* to, int words) {
    if (kind == SP_DELTA) {
        widen<D>(p, to, words);
        return;
    }
    for (int i = 0; i < 64 * words; i += SP_LANES) store_f(to + i, dense_delta<D, true>(p, base, i));
}

// out[row, col...] of kRows rows and kVectors vectors of columns; the factor `a` is read once for all rows.
template <int kRows, int kVectors>
SP_OP void lora_block(const sp_lora& lora, int64_t row, int64_t col, float* out) {
    F sum[kRows][kVectors];
    for (auto& of_row : sum) {
        for (F& s : of_row) s = set_f(0);
    }
    for (int64_t r = 0; r < lora.rank; ++r) {
        const float* a = lora.a + r * lora.cols + col;
        for (int i = 0; i < kRows; ++i) {
            const F b = set_f(lora.b[(row + i) * lora.rank + r]);
            for (int v = 0; v < kVectors; ++v) sum[i][v] = add(sum[i][v], mul(b, load_f(a + v * SP_LANES)));
        }
    }
    for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            store_f(out + i * lora.cols + v * SP_LANES, mul(set_f(lora.scale), sum[i][v]));
        }
    }
}

// Columns [col, col + n) of kRows rows.
template <int kRows>
static void lora_rows(const sp_lora& lora, int64_t row, int64_t col, int64_t n, float* out) {
    constexpr int kVectors = SP_LANES == 16 ? 4 : 2;  // as many sums as fit the registers
    const int64_t end = col + n;
    for (; end - col >= kVectors * SP_LANES; col += kVectors * SP_LANES, out += kVectors * SP_LANES) {
        lora_block<kRows, kVectors>(lora, row, col, out);
    }
    for (; col < end; col += SP_LANES, out += SP_LANES) {
        const int part = end - col < SP_LANES ? static_cast<int>(end - col) : SP_LANES;
        for (int i = 0; i < kRows; ++i) {
            F sum = set_f(0);
            for (int64_t r = 0; r < lora.rank; ++r) {
                const F b = set_f(lora.b[(row + i) * lora.rank + r]);
                sum = add(sum, mul(b, load_part(lora.a + r * lora.cols + col, part)));
            }
            store_part(out + i * lora.cols, mul(set_f(lora.scale), sum), part);
        }
    }
}

// Deltas of the entries [index, index + n) of the tensor.
static void lora_deltas(const sp_lora& lora, int64_t index, int64_t n, float* out) {
    while (n > 0) {
        const int64_t row = index / lora.cols, col = index % lora.cols;
        const int64_t rows = col == 0 ? n / lora.cols : 0;
        int64_t done = lora.cols - col < n ? lora.cols - col : n;
        if (rows >= 4) {
            done = 4 * lora.cols;
            lora_rows<4>(lora, row, 0, lora.cols, out);
        } else if (rows >= 2) {
            done = 2 * lora.cols;
            lora_rows<2>(lora, row, 0, lora.cols, out);
        } else {
            lora_rows<1>(lora, row, col, done, out);
        }
        index += done;
        n -= done;
        out += done;
    }
    __builtin_memset(out, 0, kSlack * sizeof(float));
}

// ---- scores ----

// Every scoring step marks the entries that are eligible before retention (delta finite, score finite and
// positive) and those with key >= floor, and says whether there may be a fault.

SP_OP bool any_odd(U top, U bottom) {
    return bits(less(set_u(kInfinity - 1), top)) != 0 || bits(less(bottom, set_u(0))) != 0;
}
SP_OP U magnitude(F a) { return and_u(as_u(a), set_u(kMagnitude)); }
SP_OP uint32_t positive(U key) { return bits(less(set_u(0), key)) & bits(less(key, set_u(kInfinity))); }

struct Marks {
    Bits positive[kWords];
    Bits high[kWords];
};

static bool score_magnitudes(const float* d, uint32_t floor, Marks& marks, int words) {
    U top = set_u(0);
    for (int w = 0; w < words; ++w) {
        Bits found = 0, high = 0;
        for (int i = 0; i < 64; i += SP_LANES) {
            const U key = magnitude(load_f(d + 64 * w + i));
            top = max_u(top, key);
            found |= static_cast<Bits>(positive(key)) << i;
            high |= static_cast<Bits>(bits(less(set_u(floor - 1), key))) << i;
        }
        marks.positive[w] = found;
        marks.high[w] = high;
    }
    return any_odd(top, set_u(0));
}

// The common case in one loop: widen the values, subtract the base from a checkpoint's, and score. A key is a delta
// here, so that one which isn't finite shows as a large key; only then is a second look taken.
template <int D, bool kCheckpoint>
static bool score_values(const void* p, const float* base, float* d, uint32_t floor, Marks& marks, int words) {
    U top = set_u(0);
    for (int w = 0; w < words; ++w) {
        Bits found = 0, high = 0;
        for (int i = 0; i < 64; i += SP_LANES) {
            const int j = 64 * w + i;
            const F delta = dense_delta<D, kCheckpoint>(p, base, j);
            const U key = magnitude(delta);
            store_f(d + j, delta);
            top = max_u(top, key);
            found |= static_cast<Bits>(bits(less(set_u(0), key))) << i;
            high |= static_cast<Bits>(bits(less(set_u(floor - 1), key))) << i;
        }
        marks.positive[w] = found;
        marks.high[w] = high;
    }
    return any_odd(top, set_u(0)) && score_magnitudes(d, floor, marks, words);
}

template <int D>
static bool score_dense(int32_t kind, const void* p, const float* base, float* d, uint32_t floor, Marks& marks,
                        int words) {
    return kind == SP_CHECKPOINT ? score_values<D, true>(p, base, d, floor, marks, words)
                                 : score_values<D, false>(p, base, d, floor, marks, words);
}

template <int D>
static bool score_given(const void* p, const float* d, uint32_t* keys, uint32_t floor, Marks& marks, int words) {
    U top = set_u(0), bottom = set_u(0);
    for (int w = 0; w < words; ++w) {
        Bits found = 0, high = 0;
        for (int i = 0; i < 64; i += SP_LANES) {
            const int j = 64 * w + i;
            const U key = as_u(value<D>(p, j)), size = magnitude(load_f(d + j));
            store_u(keys + j, key);
            top = max_u(top, max_u(key, size));
            bottom = min_u(bottom, key);
            found |= static_cast<Bits>(positive(key) & bits(less(size, set_u(kInfinity)))) << i;
            high |= static_cast<Bits>(bits(less(set_u(floor - 1), key))) << i;
        }
        marks.positive[w] = found;
        marks.high[w] = high;
    }
    return any_odd(top, bottom);
}

template <int D>
static bool score_gradients(const void* p, const float* x, const float* d, uint32_t* keys, uint32_t floor,
                            Marks& marks, int words) {
    U top = set_u(0);
    for (int w = 0; w < words; ++w) {
        Bits found = 0, high = 0;
        for (int i = 0; i < 64; i += SP_LANES) {
            const int j = 64 * w + i;
            const U key = magnitude(mul(load_f(x + j), value<D>(p, j))), size = magnitude(load_f(d + j));
            store_u(keys + j, key);
            top = max_u(top, max_u(key, size));
            found |= static_cast<Bits>(positive(key) & bits(less(size, set_u(kInfinity)))) << i;
            high |= static_cast<Bits>(bits(less(set_u(floor - 1), key))) << i;
        }
        marks.positive[w] = found;
        marks.high[w] = high;
    }
    return any_odd(top, set_u(0));
}

SP_OP void note(Fault& fault, Bits found, int64_t index) {
    if (found != 0) fault.add(count_bits(found), index + lowest_bit(found));
}

static void report_faults(const Lane& lane, bool scored, int64_t index, int words, Sink& sink) {
    for (int w = 0; w < words; ++w) {
        Bits bad_delta = 0, bad_score = 0, negative = 0;
        for (int i = 0; i < 64; i += SP_LANES) {
            const int j = 64 * w + i;
            const U key = load_u(at(lane.k, 4 * j)), size = and_u(key, set_u(kMagnitude));
            bad_delta |= static_cast<Bits>(bits(less(set_u(kInfinity - 1), magnitude(load_f(lane.d + j))))) << i;
            bad_score |= static_cast<Bits>(bits(less(set_u(kInfinity - 1), size))) << i;
            negative |= static_cast<Bits>(positive(size) & bits(less(key, set_u(0)))) << i;
        }
        note(sink.bad_delta, bad_delta, index + 64 * w);
        if (!scored) continue;
        note(sink.bad_score, bad_score & ~bad_delta, index + 64 * w);
        note(sink.negative, negative & ~bad_delta, index + 64 * w);
    }
}

// ---- keys ----

SP_OP U key_at(const void* keys, int i) { return and_u(load_u(at(keys, 4 * i)), set_u(kMagnitude)); }

// Mark keys above, or equal to, a limit.
static void mark_above(const void* keys, uint32_t limit, Bits* marks, int words) {
    for (int w = 0; w < words; ++w) {
        Bits found = 0;
        for (int i = 0; i < 64; i += SP_LANES) {
            found |= static_cast<Bits>(bits(less(set_u(limit), key_at(keys, 64 * w + i)))) << i;
        }
        marks[w] = found;
    }
}
static void mark_equal(const void* keys, uint32_t limit, Bits* marks, int words) {
    for (int w = 0; w < words; ++w) {
        Bits found = 0;
        for (int i = 0; i < 64; i += SP_LANES) {
            found |= static_cast<Bits>(bits(equal(set_u(limit), key_at(keys, 64 * w + i)))) << i;
        }
        marks[w] = found;
    }
}

// Count the marked keys of a tile into a window: vectors find the bins and pack those of marked keys, then come
// scalar increments (see Window).
static void count_marked(const void* keys, const Bits* marks, int words, uint32_t* index, Window& window) {
    const uint64_t span = static_cast<uint64_t>(window.bins) << window.shift;
    const U lo = set_u(window.lo);
    const U size = set_u(span > kMagnitude ? kMagnitude : static_cast<uint32_t>(span));
    uint32_t* next = index;
    for (int w = 0; w < words; ++w) {
        if (marks[w] == 0) continue;
        for (int i = 0; i < 64; i += SP_LANES) {
            const U offset = sub_u(key_at(keys, 64 * w + i), lo);
            const uint32_t marked = static_cast<uint32_t>(marks[w] >> i) & kAllLanes;
            const uint32_t within = bits(less(offset, size));
            const uint32_t below_lo = bits(less(offset, set_u(0)));
            window.above += count_bits(marked & ~within);
            next += compress(next, shift_right(offset, window.shift), marked & within & ~below_lo);
        }
    }
    if (window.sums != nullptr) {
        for (const uint32_t* i = index; i < next; ++i) ++window.sums[*i];
        return;
    }
    uint32_t* even = window.counts;
    uint32_t* odd = window.counts + window.bins;
    const uint32_t* i = index;
    for (; i + 1 < next; i += 2) {
        ++even[i[0]];
        ++odd[i[1]];
    }
    if (i < next) ++even[*i];
}

static void count(const uint32_t* keys, int64_t n, Workspace& space, Window& window) {
    Bits all[kWords];
    for (int64_t done = 0; done < n; done += kTile) {
        const int here = n - done < kTile ? static_cast<int>(n - done) : kTile;
        for (int w = 0; w < kWords; ++w) {
            const int left = here - 64 * w;
            all[w] = left >= 64 ? ~Bits{0} : left > 0 ? (Bits{1} << left) - 1 : 0;
        }
        count_marked(keys + done, all, (here + 63) / 64, space.index, window);
    }
}

// The places of the set bits, `first` being that of bit 0. Writes up to 16 places beyond the last. Eight bits
// a word are written without asking how many there are: a branch per bit would be mispredicted.
static int64_t places_of(const Bits* marks, int words, int first, uint16_t* places) {
    uint16_t* next = places;
    for (int w = 0; w < words; ++w) {
        Bits left = marks[w];
        const int n = count_bits(left);
        const int word = first + 64 * w;
        for (int done = 0; done < n || done == 0; done += 8) {
            for (int i = done; i < done + 8; ++i) {
                next[i] = static_cast<uint16_t>(word + lowest_bit(left));
                left &= left - 1;
            }
        }
        next += n;
    }
    return next - places;
}

// Append the marked keys of a tile to a list.
static void list_marked(const void* keys, const Bits* marks, int words, int64_t within, Sink& sink) {
    uint16_t* places = sink.places + sink.listed;
    uint32_t* list = sink.list + sink.listed;
    const int64_t n = places_of(marks, words, static_cast<int>(within), places);
    for (int64_t i = 0; i < n; ++i) __builtin_memcpy(list + i, at(keys, 4 * (places[i] - within)), 4);
    sink.listed += n;
}

// A cut as the n entries from `index` of the tensor see it: keys above `key` are selected, and of the first `ties`
// entries those equal to it.
//
//   where `before` is     |<- index      index + n ->|
//   no tie is selected    *                                key = cut.key, ties = 0
//   some are                         *                     key = cut.key, ties = before - index
//   all are                                          *     key = cut.key - 1, ties = 0: a tie is as good as a greater
//   key
//
// Nearly always it is the first or the last, and one comparison will do.
struct Limit {
    uint32_t key;
    int64_t ties;
};
static Limit limit_of(uint32_t cut, int64_t before, int64_t index, int64_t n) {
    const uint32_t key = cut < kMagnitude ? cut : kMagnitude;
    const int64_t ties = before > index ? before - index : 0;
    if (ties < n) return {key, ties};
    return {key > 0 ? key - 1 : 0, 0};
}

// The entries of a tile that lie on the upper side of a limit.
static void mark_within(const void* keys, const Limit& limit, Bits* marks, int words) {
    mark_above(keys, limit.key, marks, words);
    if (limit.ties == 0) return;
    Bits equals[kWords];
    mark_equal(keys, limit.key, equals, words);
    for (int w = 0; w < words; ++w) {
        const int64_t left = limit.ties - 64 * w;
        marks[w] |= left >= 64 ? equals[w] : left > 0 ? equals[w] & ((Bits{1} << left) - 1) : 0;
    }
}

// T of a tile.
static void cut_tile(Lane& lane, const sp_cut& cut, int64_t index, int words) {
    mark_within(lane.k, limit_of(cut.key, cut.before, index, 64 * words), lane.selected, words);
    for (int w = 0; w < words; ++w) lane.selected[w] &= lane.eligible[w];
    if (cut.skip_key == 0) return;
    Bits skipped[kWords];
    mark_within(lane.k, limit_of(cut.skip_key, cut.skip_before, index, 64 * words), skipped, words);
    for (int w = 0; w < words; ++w) lane.selected[w] &= ~skipped[w];
}

// ---- writing ----

// What the steps of the patches that act make of a vector of base values, before rounding.
template <int kJoin>
SP_OP F joined(const std::vector<Lane>& lanes, F lambda, int w, int i, F base) {
    F sum = kJoin == SP_SUM ? base : set_f(0), members = set_f(0);
    for (const Lane& lane : lanes) {
        const F step = mul(set_f(lane.scale), load_f(lane.d + 64 * w + i));
        const M acts = mask(static_cast<uint32_t>(lane.acts[w] >> i));
        sum = select(acts, add(sum, step), sum);
        if constexpr (kJoin == SP_MEAN) members = select(acts, add(members, set_f(1)), members);
        if constexpr (kJoin == SP_WEIGHTED) members = select(acts, add(members, set_f(lane.scale)), members);
    }
    if constexpr (kJoin == SP_SUM) return sum;
    if constexpr (kJoin == SP_TOTAL) return add(base, mul(lambda, sum));
    // Scales that cancel divide by nothing.
    const M some = less(members, set_f(0)) | less(set_f(0), members);
    return add(base, mul(lambda, div(sum, kJoin == SP_MEAN ? members : select(some, members, set_f(1)))));
}

// Round and write the acting entries; the others keep their bits. `same` counts, lane by lane, the bits that are
// written as they were: a mask of those that change would cost twice as much.
template <int D>
static void write_vector(const void* base_bits, int j, F base, F sum, uint32_t acting, void* out, uint32_t& overflow,
                         U& same) {
    const U old = raw<D>(base_bits, j);
    const U fresh = rounded<D>(sum);
    const uint32_t finite = bits(less(magnitude(base), set_u(kInfinity)));
    const uint32_t fits = bits(less(and_u(fresh, set_u(magnitude_bits<D>())), set_u(infinity<D>())));
    const U written = select(mask(acting & finite & fits), fresh, old);
    overflow = acting & finite & ~fits;
    same = count_up(same, equal(written, old));
    store_raw<D>(out, j, written);
}

// How many of the entries of so many words have changed.
SP_OP int64_t changed(U same, int words) {
    uint32_t lanes[SP_LANES];
    store_u(lanes, same);
    int64_t n = 64 * words;
    for (const uint32_t lane : lanes) n -= lane;
    return n;
}

template <int D, int kJoin>
static void write_joined(const std::vector<Lane>& lanes, float lambda, const float* base, const void* base_bits,
                         void* out, int64_t index, int words, Written& written) {
    U same = set_u(0);
    for (int w = 0; w < words; ++w) {
        Bits acting = 0, over = 0;
        for (const Lane& lane : lanes) acting |= lane.acts[w];
        for (int i = 0; i < 64; i += SP_LANES) {
            const F old = load_f(base + 64 * w + i);
            uint32_t failed = 0;
            write_vector<D>(base_bits, 64 * w + i, old, joined<kJoin>(lanes, set_f(lambda), w, i, old),
                            static_cast<uint32_t>(acting >> i), out, failed, same);
            over |= static_cast<Bits>(failed) << i;
        }
        note(written.overflow, over, index + 64 * w);
        written.acted += count_bits(acting);
    }
    written.changed += changed(same, words);
}

template <int D>
static void write(const sp_block& block, const std::vector<Lane>& lanes, const float* base, const void* base_bits,
                  void* out, int64_t index, int words, Written& written) {
    const auto with = block.join == SP_SUM     ? write_joined<D, SP_SUM>
                      : block.join == SP_MEAN  ? write_joined<D, SP_MEAN>
                      : block.join == SP_TOTAL ? write_joined<D, SP_TOTAL>
                                               : write_joined<D, SP_WEIGHTED>;
    with(lanes, block.lambda == nullptr ? 1.0f : *block.lambda, base, base_bits, out, index, words, written);
}

// Who acts on a word of 64 entries that several patches may have selected: one that is alone.
static void let_alone(std::vector<Lane>& lanes, int w) {
    Bits one = 0, several = 0;
    for (const Lane& lane : lanes) {
        several |= one & lane.selected[w];
        one |= lane.selected[w];
    }
    for (Lane& lane : lanes) lane.acts[w] = lane.selected[w] & ~several;
}

// Or those whose steps have the sign of the sum of all. Steps that are infinite both ways have no sum and elect no
// sign: then all act, and what they make is not finite either. A sum of 0 elects nobody, or with `up` the positive.
static void elect(std::vector<Lane>& lanes, int w, bool up) {
    const F zero = set_f(0);
    Bits any = 0;
    for (Lane& lane : lanes) {
        any |= lane.selected[w];
        lane.acts[w] = 0;
    }
    for (int i = 0; i < 64; i += SP_LANES) {
        if ((any >> i & kAllLanes) == 0) continue;
        const auto step = [w, i](const Lane& lane) { return mul(set_f(lane.scale), load_f(lane.d + 64 * w + i)); };
        F total = zero;
        for (const Lane& lane : lanes) {
            total = select(mask(static_cast<uint32_t>(lane.selected[w] >> i)), add(total, step(lane)), total);
        }
        const M none = mask(up ? bits(equal(magnitude(total), set_u(0))) : 0);
        const M plus = less(zero, total) | none, minus = less(total, zero);
        const M lost = less(set_u(kInfinity), magnitude(total));
        for (Lane& lane : lanes) {
            const M agrees = (plus & less(zero, step(lane))) | (minus & less(step(lane), zero)) | lost;
            lane.acts[w] |= static_cast<Bits>(bits(agrees)) << i;
        }
    }
    for (Lane& lane : lanes) lane.acts[w] &= lane.selected[w];
}

static void settle(std::vector<Lane>& lanes, int32_t acts, int words) {
    for (int w = 0; w < words; ++w) {
        if (acts == SP_ALONE) let_alone(lanes, w);
        if (acts >= SP_ELECTED) elect(lanes, w, acts == SP_ELECTED_UP);
        if (acts != SP_ALL) continue;
        for (Lane& lane : lanes) lane.acts[w] = lane.selected[w];
    }
}

static int64_t count_marks(const Bits* marks, int words) {
    int64_t n = 0;
    for (int w = 0; w < words; ++w) n += count_bits(marks[w]);
    return n;
}

// ---- a pass ----

struct Tile {
    int64_t offset;  // of the first entry in the block, and
    int64_t within;  // in the chunk
    int64_t index;   // in the tensor
    int n;
    int words;
    int next;  // how many entries the chunk's next tile has
};

// A tile's entries, padded in `copy` unless they are whole words.
SP_OP const void* padded(const sp_bits& bits, const Tile& tile, void* copy) {
    const int64_t size = width(bits.dtype);
    const void* p = at(bits.data, tile.offset * size);
    if (tile.n == 64 * tile.words) return p;
    __builtin_memset(copy, 0, static_cast<size_t>(64 * tile.words * size));
    __builtin_memcpy(copy, p, static_cast<size_t>(tile.n * size));
    return copy;
}

// Ask for the next tile's entries while this one is worked on: the steps read in bursts, which the hardware's
// own prefetching doesn't foresee.
SP_OP void prefetch_next(const sp_bits& bits, const Tile& tile) {
    if (tile.next == 0) return;
    const int64_t size = width(bits.dtype);
    const void* p = at(bits.data, (tile.offset + kTile) * size);
    for (int64_t line = 0; line < tile.next * size; line += 64) __builtin_prefetch(at(p, line));
}

static void find_deltas(const sp_patch& patch, const Tile& tile, const float* base, const float* lora,
                        Workspace& space, Lane& lane) {
    lane.d = lane.delta;
    if (patch.kind == SP_LORA) {
        lane.d = lora + tile.within;
        return;
    }
    const void* p = padded(patch.values, tile, space.bits);
    SP_BY_DTYPE(patch.values.dtype, dense_deltas, patch.kind, p, base, lane.delta, tile.words);
}

// x of |x * gradient|.
static const float* find_weight(const sp_patch& patch, const Tile& tile, const float* base, const Lane& lane,
                                Workspace& space) {
    if (patch.weight == SP_WEIGHT_BASE) return base;
    if (patch.weight == SP_WEIGHT_DELTA) return lane.d;
    if (patch.kind == SP_CHECKPOINT) {
        const void* p = padded(patch.values, tile, space.bits);
        SP_BY_DTYPE(patch.values.dtype, widen, p, space.weight, tile.words);
    } else {
        for (int i = 0; i < 64 * tile.words; i += SP_LANES) {
            store_f(space.weight + i, add(load_f(base + i), load_f(lane.d + i)));
        }
    }
    return space.weight;
}

// Find lane.d, lane.k and the marks; report faults unless `sink` is null.
static void score(const sp_patch& patch, const Tile& tile, const float* base, const float* lora, uint32_t floor,
                  Workspace& space, Lane& lane, Marks& marks, Sink* sink) {
    bool odd = false;
    if (patch.importance == SP_MAGNITUDE && patch.kind != SP_LORA) {
        const void* p = padded(patch.values, tile, space.bits);
        odd = SP_BY_DTYPE(patch.values.dtype, score_dense, patch.kind, p, base, lane.delta, floor, marks, tile.words);
        lane.k = lane.d = lane.delta;
    } else if (patch.importance == SP_MAGNITUDE) {
        find_deltas(patch, tile, base, lora, space, lane);
        lane.k = lane.d;
        odd = score_magnitudes(lane.d, floor, marks, tile.words);
    } else {
        find_deltas(patch, tile, base, lora, space, lane);
        const float* x = patch.importance == SP_GRADIENTS ? find_weight(patch, tile, base, lane, space) : nullptr;
        const int32_t dtype = patch.scores.dtype;
        const void* p = padded(patch.scores, tile, space.bits);
        lane.k = lane.key;
        if (x != nullptr) {
            odd = SP_BY_DTYPE(dtype, score_gradients, p, x, lane.d, lane.key, floor, marks, tile.words);
        } else {
            odd = SP_BY_DTYPE(dtype, score_given, p, lane.d, lane.key, floor, marks, tile.words);
        }
    }
    if (odd && sink != nullptr) {
        report_faults(lane, patch.importance != SP_MAGNITUDE, tile.index, tile.words, *sink);
    }
}

// Lay a list out over the tile: lane.d, lane.k and the eligible entries.
static void spread_list(const Task& task, const Tile& tile, const float* base, const float* lora, const Range& range,
                        Workspace& space, Lane& lane) {
    const sp_patch& patch = *task.patch;
    void* keys = lane.key;
    if (patch.importance == SP_MAGNITUDE) {
        lane.d = lane.delta;
        keys = lane.delta;
    } else {
        find_deltas(patch, tile, base, lora, space, lane);
    }
    lane.k = keys;
    for (int w = 0; w < tile.words; ++w) lane.eligible[w] = 0;
    const int64_t end = task.spans[range.slot].begin + task.spans[range.slot].n;
    for (; lane.next < end; ++lane.next) {
        const int64_t place = task.places[lane.next] - tile.within;
        if (place >= tile.n) break;
        __builtin_memcpy(at(keys, 4 * place), task.list + lane.next, 4);
        lane.eligible[place / 64] |= Bits{1} << place % 64;
    }
}

static void visit_patch(const Task& task, const Tile& tile, const float* base, const float* lora, const Range& range,
                        Workspace& space, Lane& lane, Sink& sink) {
    const int words = tile.words;
    const int64_t first_word = range.word + tile.within / 64;
    if (task.eligible == Eligible::listed) {
        spread_list(task, tile, base, lora, range, space, lane);
        return;
    }

    Marks marks;
    const bool find = task.eligible == Eligible::find;
    score(*task.patch, tile, base, lora, task.floor, space, lane, marks, find ? &sink : nullptr);
    if (task.patch->kind != SP_LORA) prefetch_next(task.patch->values, tile);
    if (task.patch->importance != SP_MAGNITUDE) prefetch_next(task.patch->scores, tile);
    const Bits* wanted = find ? marks.positive : task.stored + first_word;
    Bits restricted[kWords];
    if (task.only) {
        mark_equal(lane.k, task.only_key, restricted, words);
        for (int w = 0; w < words; ++w) restricted[w] &= wanted[w];
        wanted = restricted;
    }
    if (task.retain_eligible && find && !task.random.all) {
        retain(task.random, tile.index, wanted, lane.eligible, words);
    } else {
        for (int w = 0; w < words; ++w) lane.eligible[w] = wanted[w];
    }
    sink.eligible += count_marks(lane.eligible, words);

    for (Window& window : sink.windows) count_marked(lane.k, lane.eligible, words, space.index, window);
    if (task.collect) {
        for (int w = 0; w < words; ++w) marks.high[w] &= lane.eligible[w];
        list_marked(lane.k, marks.high, words, tile.within, sink);
    }
    if (task.save != nullptr) {
        for (int w = 0; w < words; ++w) task.save[first_word + w] = lane.eligible[w];
    }
}

// What the patches need of the whole chunk: where their lists begin, and a LoRA's deltas.
static void begin_chunk(const Pass& pass, const Range& range, Workspace& space) {
    const std::vector<Task>& tasks = *pass.tasks;
    for (size_t p = 0; p < tasks.size(); ++p) {
        const sp_patch* patch = tasks[p].patch;
        if (patch == nullptr) continue;
        const bool listed = tasks[p].eligible == Eligible::listed;
        if (listed) space.lanes[p].next = tasks[p].spans[range.slot].begin;
        if (patch->kind == SP_LORA && !(listed && patch->importance == SP_MAGNITUDE)) {
            lora_deltas(patch->lora, pass.block->start + range.begin, range.n, space.lora[p]);
        }
    }
}

// T of a patch, on a tile whose eligible entries are found.
static void select_patch(const Task& task, const Tile& tile, const float* base, Lane& lane, Sink& sink) {
    if (task.patch == nullptr) {
        for (int w = 0; w < tile.words; ++w) lane.selected[w] = 0;
        lane.d = base;  // anything readable
        lane.scale = 0;
        return;
    }
    lane.scale = task.patch->scale;
    cut_tile(lane, task.cut, tile.index, tile.words);
    if (task.retain_selected && !task.random.all) {
        retain(task.random, tile.index, lane.selected, lane.selected, tile.words);
    }
    sink.selected += count_marks(lane.selected, tile.words);
}

static void write_tile(const Pass& pass, const Tile& tile, const float* base, const void* base_bits, Workspace& space,
                       Sink* sinks, Written& written) {
    const sp_block& block = *pass.block;
    const int64_t size = width(block.base.dtype);
    void* out = at(pass.out, tile.offset * size);
    void* to = tile.n == 64 * tile.words ? out : space.out_bits;
    settle(space.lanes, block.acts, tile.words);
    SP_BY_DTYPE(block.base.dtype, write, block, space.lanes, base, base_bits, to, tile.index, tile.words, written);
    if (to != out) __builtin_memcpy(out, to, static_cast<size_t>(tile.n * size));
    for (size_t p = 0; p < space.lanes.size(); ++p) sinks[p].applied += count_marks(space.lanes[p].acts, tile.words);
}

// Of a block that is stored as codes, in space.base; see codes.inl.
static void find_handed(const sp_codes& codes, const Tile& tile, Workspace& space);

static bool is_base_read(const sp_block& block) {
    for (size_t p = 0; p < block.patch_count; ++p) {
        if (block.patches[p].present && block.patches[p].kind == SP_CHECKPOINT) return true;
    }
    return false;
}

// What the patches' deltas and weights are from: the tile as float32.
static const float* find_base(const sp_block& block, const Tile& tile, Workspace& space, const void*& base_bits) {
    if (block.codes != nullptr) {
        if (is_base_read(block)) find_handed(*block.codes, tile, space);
        return space.base;
    }
    base_bits = padded(block.base, tile, space.base_bits);
    prefetch_next(block.base, tile);
    if (block.base.dtype == SP_F32) return static_cast<const float*>(base_bits);
    SP_BY_DTYPE(block.base.dtype, widen, base_bits, space.base, tile.words);
    return space.base;
}

static void visit(const Pass& pass, Workspace& space, Range range, Sink* sinks, Written& written) {
    const sp_block& block = *pass.block;
    const std::vector<Task>& tasks = *pass.tasks;
    begin_chunk(pass, range, space);
    for (int64_t within = 0; within < range.n; within += kTile) {
        const int n = range.n - within < kTile ? static_cast<int>(range.n - within) : kTile;
        const int64_t rest = range.n - within - n;
        const Tile tile{range.begin + within,
                        within,
                        block.start + range.begin + within,
                        n,
                        (n + 63) / 64,
                        rest < kTile ? static_cast<int>(rest) : kTile};
        const void* base_bits = nullptr;
        const float* base = find_base(block, tile, space, base_bits);
        for (size_t p = 0; p < tasks.size(); ++p) {
            Lane& lane = space.lanes[p];
            if (tasks[p].patch != nullptr) {
                visit_patch(tasks[p], tile, base, space.lora[p], range, space, lane, sinks[p]);
            }
            if (pass.out == nullptr) continue;
            select_patch(tasks[p], tile, base, lane, sinks[p]);
            if (block.codes != nullptr) list_marked(lane.d, lane.selected, tile.words, within, sinks[p]);
        }
        if (pass.out != nullptr && block.codes == nullptr)
            write_tile(pass, tile, base, base_bits, space, sinks, written);
    }
}

// ---- writing from lists ----

template <class T>
static void take(const void* from, const uint16_t* places, int64_t n, void* to) {
    for (int64_t i = 0; i < n; ++i)
        __builtin_memcpy(at(to, i * sizeof(T)), at(from, places[i] * sizeof(T)), sizeof(T));
}
template <class T>
static void put(const void* from, const uint16_t* places, int64_t n, void* to) {
    for (int64_t i = 0; i < n; ++i)
        __builtin_memcpy(at(to, places[i] * sizeof(T)), at(from, i * sizeof(T)), sizeof(T));
}

// As `mark_within`, of n keys of a list.
static void mark_listed(const uint32_t* keys, const uint16_t* places, const Limit& limit, Bits* marks, int n) {
    mark_above(keys, limit.key, marks, (n + 63) / 64);
    for (int i = 0; limit.ties > 0 && i < n; ++i) {
        if ((keys[i] & kMagnitude) == limit.key && places[i] < limit.ties) marks[i / 64] |= Bits{1} << i % 64;
    }
}

// T of a chunk, from its list, as places (and keys) in the sink's own.
static void cut_list(const Task& task, const Range& range, int64_t index, Sink& sink) {
    const Span span = task.spans[range.slot];
    const uint32_t* keys = task.list + span.begin;
    const uint16_t* places = task.places + span.begin;
    const Limit limit = limit_of(task.cut.key, task.cut.before, index, range.n);
    const Limit best = limit_of(task.cut.skip_key, task.cut.skip_before, index, range.n);
    sink.listed = 0;
    for (int64_t done = 0; done < span.n; done += kTile) {
        const int n = span.n - done < kTile ? static_cast<int>(span.n - done) : kTile;
        const int words = (n + 63) / 64;
        Bits selected[kWords], skipped[kWords] = {};
        mark_listed(keys + done, places + done, limit, selected, n);
        if (task.cut.skip_key > 0) mark_listed(keys + done, places + done, best, skipped, n);
        for (int w = 0; w < words; ++w) selected[w] &= ~skipped[w];
        if (n % 64 != 0) selected[words - 1] &= (Bits{1} << n % 64) - 1;
        uint16_t* which = sink.places + sink.listed;
        const int64_t more = places_of(selected, words, 0, which);
        for (int64_t i = 0; i < more; ++i) {
            sink.list[sink.listed + i] = keys[done + which[i]];
            which[i] = places[done + which[i]];
        }
        sink.listed += more;
    }
}

// Write those of a patch's selected entries that no other patch has, a tile of them at a time. `out` is the
// chunk's and holds the base's bits.
template <int D>
static void write_listed(const sp_patch& patch, const Range& range, int64_t index, void* out, Workspace& space,
                         Lane& lane, Sink& sink, Written& written) {
    using Raw = std::conditional_t<D == SP_F32, uint32_t, uint16_t>;
    const F scale = set_f(patch.scale);
    for (int64_t done = 0; done < sink.listed; done += kTile) {
        const int n = sink.listed - done < kTile ? static_cast<int>(sink.listed - done) : kTile;
        const int words = (n + 63) / 64;
        const uint16_t* places = sink.places + done;
        take<Raw>(out, places, n, space.base_bits);
        widen<D>(space.base_bits, space.base, words);
        const void* d = sink.list + done;
        if (patch.importance != SP_MAGNITUDE) {
            const int32_t dtype = patch.values.dtype;
            const void* values = at(patch.values.data, range.begin * width(dtype));
            if (dtype == SP_F32) take<uint32_t>(values, places, n, space.bits);
            if (dtype != SP_F32) take<uint16_t>(values, places, n, space.bits);
            SP_BY_DTYPE(dtype, dense_deltas, patch.kind, space.bits, space.base, lane.delta, words);
            d = lane.delta;
        }
        U same = set_u(0);
        for (int w = 0; w < words; ++w) {
            Bits acts = 0, over = 0;
            for (int i = 0; i < 64 && 64 * w + i < n; ++i) {
                acts |= static_cast<Bits>(space.holders[places[64 * w + i]] == 1) << i;
            }
            for (int i = 0; i < 64; i += SP_LANES) {
                const int j = 64 * w + i;
                const F old = load_f(space.base + j);
                uint32_t failed = 0;
                write_vector<D>(space.base_bits, j, old, add(old, mul(scale, load_f(at(d, 4 * j)))),
                                static_cast<uint32_t>(acts >> i), space.out_bits, failed, same);
                over |= static_cast<Bits>(failed) << i;
            }
            sink.applied += count_bits(acts);
            written.acted += count_bits(acts);
            for (; over != 0; over &= over - 1) written.overflow.add(1, index + places[64 * w + lowest_bit(over)]);
        }
        written.changed += changed(same, words);
        put<Raw>(space.out_bits, places, n, out);
    }
}

static void patch_up(const Pass& pass, Workspace& space, Range range, Sink* sinks, Written& written) {
    const sp_block& block = *pass.block;
    const std::vector<Task>& tasks = *pass.tasks;
    const int64_t size = width(block.base.dtype), index = block.start + range.begin;
    void* out = at(pass.out, range.begin * size);
    const void* base = at(block.base.data, range.begin * size);
    if (out != base) __builtin_memcpy(out, base, static_cast<size_t>(range.n * size));
    __builtin_memset(space.holders, 0, static_cast<size_t>(range.n));
    for (size_t p = 0; p < tasks.size(); ++p) {
        Sink& sink = sinks[p];
        if (tasks[p].patch == nullptr) continue;
        cut_list(tasks[p], range, index, sink);
        for (int64_t i = 0; i < sink.listed; ++i) {
            uint8_t& holders = space.holders[sink.places[i]];
            holders = static_cast<uint8_t>(holders + (holders < 2));
        }
        sink.selected += sink.listed;
    }
    for (size_t p = 0; p < tasks.size(); ++p) {
        if (tasks[p].patch == nullptr) continue;
        SP_BY_DTYPE(block.base.dtype, write_listed, *tasks[p].patch, range, index, out, space, space.lanes[p],
                    sinks[p], written);
    }
}
