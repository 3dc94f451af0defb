// Tensors that are stored as codes: their values for the passes, and new codes where a patch acts. As passes.inl, but
// in plain loops over arrays, which the compiler turns into vectors: few entries are acted on.

// ---- grids ----

// What a code stands for.
template <int G>
SP_OP float number(uint32_t code) {
    if constexpr (G == SP_E4M3) {
        // The bits of a float32 whose exponent is 120 too small; that of the code that is none is out of its range.
        const uint32_t size = code & 0x7f, sign = (code & 0x80) << 24;
        const uint32_t bits = size << 20 | sign;
        float small;
        __builtin_memcpy(&small, &bits, 4);
        return size == 0x7f ? __builtin_nanf("") : small * 0x1p120f;
    }
    if constexpr (G == SP_E2M1) {
        constexpr float kNumbers[] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
        return kNumbers[code & 15];
    }
    if constexpr (G == SP_INT8) return static_cast<float>(static_cast<int8_t>(code));
    if constexpr (G == SP_INT4) return static_cast<float>(static_cast<int32_t>(code & 15) - 8);
}

template <int G>
constexpr bool kHalfBytes = G == SP_E2M1 || G == SP_INT4;
template <int G>
constexpr bool kFloats = G == SP_E4M3 || G == SP_E2M1;
template <int G>
constexpr int kMantissa = G == SP_E4M3 ? 3 : 1;
template <int G>
constexpr int kBottom = G == SP_E4M3 ? -6 : 0;  // the lowest exponent of a normal number
template <int G>
constexpr int kZero = G == SP_INT4 ? 8 : 0;  // the code of 0
template <int G>
constexpr float kHighest = G == SP_E4M3   ? 448
                           : G == SP_E2M1 ? 6
                           : G == SP_INT8 ? 127
                                          : 7;
template <int G>
constexpr float kLowest = kFloats<G> ? -kHighest<G> : -kHighest<G> - 1;

SP_OP uint32_t bits_of(float a) {
    uint32_t b;
    __builtin_memcpy(&b, &a, 4);
    return b;
}
SP_OP bool is_finite(float a) { return (bits_of(a) & kMagnitude) < kInfinity; }
// 2^exponent, of a normal number.
SP_OP float power(int exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float a;
    __builtin_memcpy(&a, &bits, 4);
    return a;
}
// Of sizes below 2^22, ties to even.
SP_OP float to_integer(float a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
SP_OP float clamped(float a, float lowest, float highest) {
    const float up = a < lowest ? lowest : a;
    return up > highest ? highest : up;
}

// A saturated value in steps of its binade (or of the subnormals), and that binade's exponent.
template <int G>
SP_OP float steps_of(float size, int& exponent) {
    exponent = static_cast<int>(bits_of(size) >> 23) - 127;
    if (exponent < kBottom<G>) exponent = kBottom<G>;
    return size * power(kMantissa<G> - exponent);
}
// The step after the last of a binade is the first of the next one: codes run on. Zero is +0.
template <int G>
SP_OP uint8_t float_code(float steps, int exponent, bool negative) {
    const int code = ((exponent - kBottom<G>) << kMantissa<G>)+static_cast<int>(steps);
    return static_cast<uint8_t>(code | (negative & (code > 0) ? (kHalfBytes<G> ? 8 : 128) : 0));
}
template <int G>
SP_OP uint8_t integer_code(float whole) {
    return static_cast<uint8_t>(static_cast<int>(whole) + kZero<G>);
}

// The code of the nearest number, of two as near the even one.
template <int G>
SP_OP uint8_t nearest(float value) {
    const float y = clamped(value, kLowest<G>, kHighest<G>);
    if constexpr (!kFloats<G>) return integer_code<G>(to_integer(y));
    int exponent;
    const float steps = steps_of<G>(__builtin_fabsf(y), exponent);
    return float_code<G>(to_integer(steps), exponent, y < 0);
}

// The code below or above, a <= y < b: b if the random number is below the share of the way that y has gone.
template <int G>
SP_OP uint8_t by_chance(float value, uint32_t random) {
    const float y = clamped(value, kLowest<G>, kHighest<G>);
    float steps = y, unit = 1;
    int exponent = 0;
    if constexpr (kFloats<G>) {
        steps = __builtin_copysignf(steps_of<G>(__builtin_fabsf(y), exponent), y);
        unit = power(exponent - kMantissa<G>);
    }
    const auto whole = static_cast<float>(static_cast<int>(steps));
    const float below = steps < whole ? whole - 1 : whole;
    const float a = below * unit, b = (below + 1) * unit;
    // A number is below what the share times 2^32 is cut to iff the next whole one is not above it.
    const double share = static_cast<double>((y - a) / (b - a)) * 0x1p32;
    const float chosen = static_cast<double>(random) + 1 <= share ? below + 1 : below;
    if constexpr (!kFloats<G>) return integer_code<G>(chosen);
    return float_code<G>(__builtin_fabsf(chosen), exponent, chosen < 0);
}

// ---- where codes and scales lie ----

// The place of an entry of the tensor in the stored one.
SP_OP int64_t stored_place(const sp_codes& codes, int64_t index) {
    if (!codes.turned) return index;
    const int64_t inside = index % (codes.rows * codes.cols);
    return index - inside + inside % codes.rows * codes.cols + inside / codes.rows;
}

// The scales of the row that was asked for last: places mostly go on in it.
struct ScaleRow {
    int64_t begin = 0, end = 0;
    const float* scales = nullptr;
};
SP_OP void find_row(const sp_codes& codes, int64_t place, ScaleRow& row) {
    if (place >= row.begin && place < row.end) return;
    const int64_t index = place / codes.cols;
    row.begin = index * codes.cols;
    row.end = row.begin + codes.cols;
    const int64_t down = (codes.rows - 1) / codes.block_rows + 1;
    const int64_t across = (codes.cols - 1) / codes.block_cols + 1;
    const int64_t in_table = index / codes.rows * down + index % codes.rows / codes.block_rows;
    row.scales = codes.scales + (in_table - codes.scale_first) * across;
}
SP_OP float scale_at(const sp_codes& codes, int64_t place, ScaleRow& row) {
    find_row(codes, place, row);
    const auto col = static_cast<uint64_t>(place - row.begin), width = static_cast<uint64_t>(codes.block_cols);
    // Dividing 32 bits takes half as long.
    if ((col | width) >> 32 == 0) return row.scales[static_cast<uint32_t>(col) / static_cast<uint32_t>(width)];
    return row.scales[col / width];
}

// The code at a place of `data`. Other threads may change the other half of its byte.
template <int G>
SP_OP uint8_t code_at(const sp_codes& codes, int64_t at) {
    if constexpr (!kHalfBytes<G>) return codes.data[at] ^ static_cast<uint8_t>(codes.flip);
    return __atomic_load_n(codes.data + at / 2, __ATOMIC_RELAXED) >> (at % 2 * 4) & 15;
}
template <int G>
SP_OP void put_code(const sp_codes& codes, int64_t at, uint8_t old, uint8_t fresh) {
    if constexpr (!kHalfBytes<G>) {
        codes.data[at] = static_cast<uint8_t>(fresh ^ codes.flip);
        return;
    }
    const auto change = static_cast<uint8_t>((old ^ fresh) << (at % 2 * 4));
    if (codes.turned) {
        __atomic_fetch_xor(codes.data + at / 2, change, __ATOMIC_RELAXED);
    } else {
        codes.data[at / 2] ^= change;
    }
}

// ---- values ----

template <int G>
static void find_numbers(const sp_codes& codes, int64_t index, int n, float* to) {
    if (codes.turned) {
        for (int i = 0; i < n; ++i)
            to[i] = number<G>(code_at<G>(codes, stored_place(codes, index + i) - codes.first));
        return;
    }
    const int64_t from = index - codes.first;
    if constexpr (kHalfBytes<G>) {
        for (int i = 0; i < n; ++i) {
            const int64_t at = from + i;
            to[i] = number<G>(codes.data[at / 2] >> (at % 2 * 4) & 15);
        }
    } else {
        const uint8_t *data = codes.data + from, flip = static_cast<uint8_t>(codes.flip);
        for (int i = 0; i < n; ++i) to[i] = number<G>(data[i] ^ flip);
    }
}

// v of the entries [index, index + n) of the tensor.
static __attribute__((noinline)) void find_values(const sp_codes& codes, int64_t index, int n, float* to) {
    const auto find = codes.grid == SP_E4M3   ? find_numbers<SP_E4M3>
                      : codes.grid == SP_E2M1 ? find_numbers<SP_E2M1>
                      : codes.grid == SP_INT8 ? find_numbers<SP_INT8>
                                              : find_numbers<SP_INT4>;
    find(codes, index, n, to);
    ScaleRow row;
    if (codes.turned) {
        for (int i = 0; i < n; ++i) to[i] *= scale_at(codes, stored_place(codes, index + i), row);
        return;
    }
    for (int i = 0; i < n;) {
        find_row(codes, index + i, row);
        const int64_t col = index + i - row.begin, block = col / codes.block_cols;
        const int64_t in_block = (block + 1) * codes.block_cols - col, in_row = row.end - row.begin - col;
        const int64_t left = in_block < in_row ? in_block : in_row;
        const int stop = left < n - i ? i + static_cast<int>(left) : n;
        const float s = row.scales[block];
        for (; i < stop; ++i) to[i] *= s;
    }
}

// The values as a tensor of the dtype would hold them.
template <int D>
static void round_to(float* values, int words) {
    if constexpr (D == SP_F32) return;
    for (int i = 0; i < 64 * words; i += SP_LANES) {
        const U narrow = rounded<D>(load_f(values + i));
        uint16_t half[SP_LANES];
        store_u16(half, narrow);
        store_f(values + i, value<D>(half, 0));
    }
}

// What a trainer was handed, in space.base.
static void find_handed(const sp_codes& codes, const Tile& tile, Workspace& space) {
    if (codes.original.data != nullptr) {
        const Tile there{tile.index - codes.first, tile.within, tile.index, tile.n, tile.words, 0};
        const void* p = padded(codes.original, there, space.base_bits);
        SP_BY_DTYPE(codes.original.dtype, widen, p, space.base, tile.words);
    } else {
        find_values(codes, tile.index, tile.n, space.base);
        for (int i = tile.n; i < 64 * tile.words; ++i) space.base[i] = 0;
    }
    SP_BY_DTYPE(codes.handed, round_to, space.base, tile.words);
}

// ---- new codes ----

// The next entries that any T holds. Which patch comes next is as good as chance, so that no branch asks for it:
// every list ends with a place beyond the chunk.
static void fill_batch(std::vector<Lane>& lanes, Sink* sinks, Batch& batch) {
    int n = 0;
    for (; n < kBatch; ++n) {
        int place = kChunk;
        for (size_t p = 0; p < lanes.size(); ++p) {
            const int here = sinks[p].places[sinks[p].taken];
            place = here < place ? here : place;
        }
        if (place == kChunk) break;
        batch.place[n] = static_cast<uint16_t>(place);
        for (size_t p = 0; p < lanes.size(); ++p) {
            Sink& sink = sinks[p];
            const bool holds = sink.places[sink.taken] == place;
            float d;
            __builtin_memcpy(&d, sink.list + sink.taken, 4);
            lanes[p].holds[n] = holds;
            lanes[p].step[n] = lanes[p].scale * (d + 0.f);  // a delta of -0 is one of +0
            sink.taken += holds;
        }
    }
    batch.n = n;
}

// As `elect`, of a batch.
static void elect_batch(std::vector<Lane>& lanes, const Batch& batch, bool up) {
    for (int i = 0; i < batch.n; ++i) {
        float total = 0;
        for (const Lane& lane : lanes) total = lane.holds[i] ? total + lane.step[i] : total;
        const bool plus = up ? total >= 0 : total > 0, minus = total < 0, lost = total != total;
        for (Lane& lane : lanes) {
            lane.acting[i] = lane.holds[i] && ((lane.step[i] > 0 && plus) || (lane.step[i] < 0 && minus) || lost);
        }
    }
}

// How many patches act on each entry (or more than one), and the number of one that does.
static void count_actors(const std::vector<Lane>& lanes, Batch& batch) {
    const int n = batch.n;
    uint8_t* actors = batch.actors;
    uint32_t* owner = batch.owner;
    for (int i = 0; i < n; ++i) actors[i] = 0, owner[i] = 0;
    for (uint32_t p = 0; p < lanes.size(); ++p) {
        const uint8_t* acting = lanes[p].acting;
        for (int i = 0; i < n; ++i) owner[i] = acting[i] ? p : owner[i];
        for (int i = 0; i < n; ++i) {
            const uint8_t more = actors[i] + acting[i];
            actors[i] = more < 2 ? more : 2;
        }
    }
}

// Who acts on which of them.
static void settle_batch(std::vector<Lane>& lanes, int32_t acts, Batch& batch) {
    const int n = batch.n;
    for (Lane& lane : lanes) __builtin_memcpy(lane.acting, lane.holds, static_cast<size_t>(n));
    if (acts >= SP_ELECTED) elect_batch(lanes, batch, acts == SP_ELECTED_UP);
    count_actors(lanes, batch);
    if (acts != SP_ALONE) return;
    const uint8_t* actors = batch.actors;
    for (Lane& lane : lanes) {
        uint8_t* acting = lane.acting;
        for (int i = 0; i < n; ++i) acting[i] = actors[i] == 1 ? acting[i] : 0;
    }
    count_actors(lanes, batch);
}

// As `joined`, of a batch.
static void join_batch(const std::vector<Lane>& lanes, int32_t join, float lambda, Batch& batch) {
    const int n = batch.n;
    float *sum = batch.acc, *members = batch.y;
    for (int i = 0; i < n; ++i) sum[i] = join == SP_SUM ? batch.w[i] : 0, members[i] = 0;
    for (const Lane& lane : lanes) {
        const float share = join == SP_WEIGHTED ? lane.scale : 1;
        for (int i = 0; i < n; ++i) {
            sum[i] = lane.acting[i] ? sum[i] + lane.step[i] : sum[i];
            members[i] = lane.acting[i] ? members[i] + share : members[i];
        }
    }
    if (join == SP_SUM) return;
    for (int i = 0; i < n; ++i) {
        if (join != SP_TOTAL) sum[i] = sum[i] / (members[i] == 0 ? 1 : members[i]);
        sum[i] = batch.w[i] + lambda * sum[i];
    }
}

// Philox of kChains vectors of counters, whose words a and b are given; c and d are 0. Several side by side, as in
// `draw`: arrays that go through memory every round take three times as long.
template <int kChains>
SP_OP void philox(uint64_t key, uint64_t* a, uint64_t* b, uint64_t* c, uint64_t* d) {
    Q x[kChains][4];
    for (int i = 0; i < kChains; ++i) {
        x[i][0] = load_q(a + i * kLanesQ);
        x[i][1] = load_q(b + i * kLanesQ);
        x[i][2] = x[i][3] = set_q(0);
    }
    auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
        for (auto& of : x) mix(of[0], of[1], of[2], of[3], k0, k1);
    }
    for (int i = 0; i < kChains; ++i) {
        store_q(a + i * kLanesQ, x[i][0]);
        store_q(b + i * kLanesQ, x[i][1]);
        store_q(c + i * kLanesQ, x[i][2]);
        store_q(d + i * kLanesQ, x[i][3]);
    }
}

// A random number for each entry: its lane of its Philox block.
static void draw_batch(uint64_t key, int64_t index, Batch& batch) {
    constexpr int kChains = 4;
    static_assert(kBatch % (kChains * kLanesQ) == 0);
    const int n = batch.n;
    auto& [a, b, c, d] = batch.words;
    for (int i = 0; i < n; ++i) {
        a[i] = static_cast<uint64_t>(index + batch.place[i]) / 4;
        b[i] = a[i] >> 32;
    }
    for (int i = 0; i < n; i += kChains * kLanesQ) philox<kChains>(key, a + i, b + i, c + i, d + i);
    for (int i = 0; i < n; ++i) {
        const uint64_t lane = static_cast<uint64_t>(index + batch.place[i]) % 4;
        batch.random[i] = static_cast<uint32_t>(lane < 2 ? lane == 0 ? a[i] : b[i] : lane == 2 ? c[i] : d[i]);
    }
}

// What the float model has at the entries of a batch.
static void find_originals(const sp_codes& codes, int64_t index, Batch& batch, Workspace& space) {
    const sp_bits& original = codes.original;
    const void* p = at(original.data, (index - codes.first) * width(original.dtype));
    if (original.dtype == SP_F32) take<uint32_t>(p, batch.place, batch.n, space.bits);
    if (original.dtype != SP_F32) take<uint16_t>(p, batch.place, batch.n, space.bits);
    SP_BY_DTYPE(original.dtype, widen, space.bits, batch.w, (batch.n + 63) / 64);
}

// The scales of a batch: in a row of the stored tensor they follow each other.
static void find_scales(const sp_codes& codes, int64_t index, Batch& batch) {
    ScaleRow row;
    const auto width = static_cast<uint64_t>(codes.block_cols);
    const bool power = (width & (width - 1)) == 0 && codes.cols < INT32_MAX;
    const int shift = lowest_bit(width);
    for (int i = 0; i < batch.n;) {
        const int64_t place = batch.at[i] + codes.first;
        if (codes.turned || !power) {
            batch.scale[i++] = scale_at(codes, place, row);
            continue;
        }
        find_row(codes, place, row);
        const int64_t col = row.begin - index, end = row.end - index;  // places in the chunk
        for (; i < batch.n && batch.place[i] < end; ++i) batch.scale[i] = row.scales[(batch.place[i] - col) >> shift];
    }
}

// Old codes, scales and values.
template <int G>
static void look_up(const sp_codes& codes, int64_t index, Batch& batch, Workspace& space) {
    const int n = batch.n;
    for (int i = 0; i < n; ++i) batch.at[i] = stored_place(codes, index + batch.place[i]) - codes.first;
    for (int i = 0; i < n; ++i) batch.old[i] = code_at<G>(codes, batch.at[i]);
    find_scales(codes, index, batch);
    for (int i = 0; i < n; ++i) batch.v[i] = number<G>(batch.old[i]) * batch.scale[i];
    if (codes.original.data != nullptr) {
        find_originals(codes, index, batch, space);
    } else {
        for (int i = 0; i < n; ++i) batch.w[i] = batch.v[i];
    }
}

// What is written: as in a float base, an entry that is not finite stays; nor has a code that is no number a
// neighbour.
static void divide_batch(int64_t index, Batch& batch, Written& written) {
    constexpr float kLeastScale = 0x1p-100f;
    const int n = batch.n;
    uint32_t odd = 0;
    for (int i = 0; i < n; ++i) {
        const bool some = batch.actors[i] != 0, scale = is_finite(batch.scale[i]) & (batch.scale[i] >= kLeastScale);
        const bool finite = is_finite(batch.w[i]) & is_finite(batch.v[i]), sum = is_finite(batch.acc[i]);
        const bool good = some & finite & scale & sum;
        batch.written[i] = good;
        batch.y[i] = good ? batch.acc[i] / batch.scale[i] : 0;
        odd |= some & !good;
    }
    for (int i = 0; odd && i < n; ++i) {
        if (batch.actors[i] == 0) continue;
        const int64_t position = index + batch.place[i];
        const bool finite = is_finite(batch.w[i]) && is_finite(batch.v[i]);
        if (finite && !is_finite(batch.acc[i])) written.overflow.add(1, position);
        if (!is_finite(batch.scale[i]) || batch.scale[i] < kLeastScale) written.bad_scale.add(1, position);
    }
}

// New codes.
template <int G>
static void round_batch(const sp_codes& codes, int64_t index, Batch& batch) {
    const int n = batch.n;
    if (codes.rounding == SP_NEAREST) {
        for (int i = 0; i < n; ++i) batch.fresh[i] = nearest<G>(batch.y[i]);
    } else {
        draw_batch(codes.random_key, index, batch);
        for (int i = 0; i < n; ++i) batch.fresh[i] = by_chance<G>(batch.y[i], batch.random[i]);
    }
    for (int i = 0; i < n; ++i) {
        // Alike in value is alike: a -0 stays one.
        const bool same = number<G>(batch.fresh[i]) == number<G>(batch.old[i]);
        batch.fresh[i] = same | !batch.written[i] ? batch.old[i] : batch.fresh[i];
        batch.after[i] = number<G>(batch.fresh[i]) * batch.scale[i];
    }
}

SP_OP void add(ExactSum& sum, double term) {
    uint64_t bits;
    __builtin_memcpy(&bits, &term, 8);
    const auto exponent = static_cast<int>(bits >> 52 & 2047) - kLeastExponent;
    // 0, and what is not finite.
    if (exponent < 0 || exponent >= kExponents) return;
    const auto mantissa = static_cast<int64_t>((bits & ((1ULL << 52) - 1)) | 1ULL << 52);
    const auto sign = -static_cast<int64_t>(bits >> 63);
    sum.of[exponent] += (mantissa ^ sign) - sign;
}

// Write the new codes, and note which are. A branch for each would be foretold badly.
template <int G>
static void put_changed(const sp_codes& codes, Batch& batch) {
    int changes = 0;
    for (int i = 0; i < batch.n; ++i) {
        batch.changed[changes] = static_cast<uint8_t>(i);
        changes += batch.fresh[i] != batch.old[i];
    }
    batch.changes = changes;
    for (int k = 0; k < changes; ++k) {
        const int i = batch.changed[k];
        put_code<G>(codes, batch.at[i], batch.old[i], batch.fresh[i]);
    }
}

// What the patches did, each for itself and where it alone acts.
static void tell_patches(const std::vector<Lane>& lanes, Batch& batch, Sink* sinks, Written& written) {
    const int n = batch.n;
    for (int i = 0; i < n; ++i) batch.alone[i] = (batch.actors[i] == 1) & batch.written[i];
    for (int i = 0; i < n; ++i) {
        batch.asked[i] = static_cast<double>(batch.acc[i]) - static_cast<double>(batch.w[i]);
    }
    for (uint32_t p = 0; p < lanes.size(); ++p) {
        int applied = 0, alone = 0;
        for (int i = 0; i < n; ++i) applied += lanes[p].acting[i];
        for (int i = 0; i < n; ++i) alone += batch.alone[i] & (batch.owner[i] == p);
        sinks[p].applied += applied;
        written.kept[p].acted += alone;
    }
    for (int i = 0; i < n; ++i) {
        if (batch.alone[i]) add(written.kept[batch.owner[i]].asked, batch.asked[i] * batch.asked[i]);
    }
    for (int k = 0; k < batch.changes; ++k) {
        const int i = batch.changed[k];
        if (!batch.alone[i]) continue;
        Remains& kept = written.kept[batch.owner[i]];
        const double moved = static_cast<double>(batch.after[i]) - static_cast<double>(batch.v[i]);
        kept.changed += 1;
        add(kept.along, moved * batch.asked[i]);
        add(kept.moved, moved * moved);
    }
}

// What became of the entries, in all and of each patch.
template <int G>
static void tell_batch(const std::vector<Lane>& lanes, int64_t index, Batch& batch, Sink* sinks, Written& written) {
    const auto is_beyond = [](float y) { return (y < kLowest<G>) | (y > kHighest<G>); };
    int acted = 0;
    bool beyond = false;
    for (int i = 0; i < batch.n; ++i) acted += batch.actors[i] != 0;
    for (int i = 0; i < batch.n; ++i) beyond |= is_beyond(batch.y[i]);
    written.acted += acted;
    written.changed += batch.changes;
    tell_patches(lanes, batch, sinks, written);
    for (int i = 0; beyond && i < batch.n; ++i) {
        if (!is_beyond(batch.y[i])) continue;
        written.saturated.add(1, index + batch.place[i]);
        if (batch.alone[i]) written.kept[batch.owner[i]].saturated += 1;
    }
}

template <int G>
static void rewrite(const sp_block& block, int64_t index, Workspace& space, Sink* sinks, Written& written) {
    const sp_codes& codes = *block.codes;
    std::vector<Lane>& lanes = space.lanes;
    Batch& batch = space.batch;
    for (fill_batch(lanes, sinks, batch); batch.n > 0; fill_batch(lanes, sinks, batch)) {
        settle_batch(lanes, block.acts, batch);
        look_up<G>(codes, index, batch, space);
        join_batch(lanes, block.join, block.lambda == nullptr ? 1.0f : *block.lambda, batch);
        divide_batch(index, batch, written);
        round_batch<G>(codes, index, batch);
        put_changed<G>(codes, batch);
        tell_batch<G>(lanes, index, batch, sinks, written);
    }
}

// Whether the list of a patch has all that is asked of it, deltas included.
static bool at_hand(const Task& task) {
    return task.patch == nullptr || (task.eligible == Eligible::listed && task.patch->importance == SP_MAGNITUDE &&
                                     (task.random.all || !task.retain_selected));
}

// T of every patch, as places and deltas in its sink's list.
static void list_selected(const Pass& pass, Workspace& space, const Range& range, Sink* sinks, Written& written) {
    const std::vector<Task>& tasks = *pass.tasks;
    bool listed = true;
    for (const Task& task : tasks) listed = listed && at_hand(task);
    for (size_t p = 0; p < tasks.size(); ++p) {
        sinks[p].listed = sinks[p].taken = 0;
        space.lanes[p].scale = tasks[p].patch == nullptr ? 0 : tasks[p].patch->scale;
        if (!listed || tasks[p].patch == nullptr) continue;
        cut_list(tasks[p], range, pass.block->start + range.begin, sinks[p]);
        sinks[p].selected += sinks[p].listed;
    }
    if (!listed) visit(pass, space, range, sinks, written);
    for (size_t p = 0; p < tasks.size(); ++p) {
        sinks[p].places[sinks[p].listed] = kChunk;
        sinks[p].list[sinks[p].listed] = 0;
    }
}

static void recode(const Pass& pass, Workspace& space, Range range, Sink* sinks, Written& written) {
    const sp_block& block = *pass.block;
    list_selected(pass, space, range, sinks, written);
    const int32_t grid = block.codes->grid;
    const auto with = grid == SP_E4M3   ? rewrite<SP_E4M3>
                      : grid == SP_E2M1 ? rewrite<SP_E2M1>
                      : grid == SP_INT8 ? rewrite<SP_INT8>
                                        : rewrite<SP_INT4>;
    with(block, block.start + range.begin, space, sinks, written);
}
