// Exact selection from streams, as backends/select.py does it (which also leaves out what lies far below a guess):
// which keys, and which of the equal ones, belong to the k largest. Nothing is ever sorted. A first sweep counts the
// keys' upper 16 bits; the bin that holds the k-th key is then counted by its lower 15 bits, which gives the
// threshold; equal keys go to the lower positions. A sampled guess lets the first sweep count that bin as well.
// Guesses are only believed where exact counts confirm them.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "block.h"
#include "engine.h"
#include "sized.h"

namespace safepatch {
namespace {

using Counts = std::vector<int64_t>;

constexpr int kLowBits = 15;
constexpr size_t kCoarse = size_t{1} << 16, kFine = size_t{1} << kLowBits;
// A guess covers the sampled rank plus and minus five standard errors, at most so many coarse bins.
constexpr size_t kGuessBins = 4;
constexpr double kGuessSigmas = 5;
constexpr size_t kTieBins = 1024;

// How many keys lie in each bin or a higher one.
Counts tails_of(const Counts& counts) {
    Counts tails(counts.size());
    std::partial_sum(counts.rbegin(), counts.rend(), tails.rbegin());
    return tails;
}

// The highest bin whose tail count reaches `rank`; 0 where none does. Tails fall from left to right.
size_t bin_of(const Counts& tails, double rank) {
    const auto reaches = [rank](int64_t tail) { return static_cast<double>(tail) >= rank; };
    const auto past = std::partition_point(tails.begin(), tails.end(), reaches) - tails.begin();
    return past > 0 ? static_cast<size_t>(past) - 1 : 0;
}

size_t bin_of(const Counts& tails, int64_t rank) {
    const auto past = std::partition_point(tails.begin(), tails.end(), [rank](int64_t tail) { return tail >= rank; });
    return past > tails.begin() ? static_cast<size_t>(past - tails.begin()) - 1 : 0;
}

// Ties that a tensor may still take: entries with this key are selected up to `left`, by position.
struct Tally {
    uint32_t key;
    int64_t left;
};

// One patch's search. The phase says what the next sweep counts: the coarse bins, and finely those of the guess; the
// bin that holds the k-th key; the threshold's ties in each tensor; nothing.
class Search {
  public:
    Search(int64_t k, int64_t entries, size_t tensors)
        : k_(k),
          share_(entries > 0 ? static_cast<double>(k) / static_cast<double>(entries) : 0),
          phase_(k > 0 && k < entries ? Phase::keys : Phase::done),
          key_(k == 0 ? SP_NO_KEY : 0),
          need_(k == 0 ? 0 : SP_EVERY),
          coarse_(done() ? 0 : kCoarse),
          ties_(tensors) {}

    bool done() const { return phase_ == Phase::done; }

    // Choose the coarse bins to count finely from a sample's coarse counts.
    void guess(const Counts& coarse, int64_t sampled) {
        if (done() || std::all_of(coarse.begin(), coarse.end(), [](int64_t n) { return n == 0; })) return;
        const Counts tails = tails_of(coarse);
        auto [low, high] = span(tails, sampled);
        if (high - low >= kGuessBins) {
            const size_t middle = bin_of(tails, std::max(share_ * static_cast<double>(sampled), 1.0));
            low = middle - std::min(middle, kGuessBins / 2);
            high = std::min(low + kGuessBins, kCoarse) - 1;
        }
        fine_lo_ = low << kLowBits;
        fine_.assign((high - low + 1) * kFine, 0);
    }

    // Choose the range of keys to count in each tensor from the sample's fine counts.
    void guess_ties(const Counts& coarse, const Counts& fine, int64_t sampled) {
        Counts tails = tails_of(fine);
        const auto bins = static_cast<std::ptrdiff_t>((fine_lo_ >> kLowBits) + fine.size() / kFine);
        const int64_t above = std::accumulate(coarse.begin() + bins, coarse.end(), int64_t{0});
        for (int64_t& tail : tails) tail += above;
        const auto [low, high] = span(tails, sampled);
        tie_lo_ = fine_lo_ + low;
        tie_bins_ = kTieBins, tie_shift_ = 0;
        while ((high - low) >> tie_shift_ >= kTieBins) ++tie_shift_;
    }

    // The guess's window, counting into `counts` of a sample; with no bins if there is none.
    sp_window guessed(Counts& counts) const {
        counts.assign(done() ? 0 : fine_.size(), 0);
        return window(fine_lo_, 0, counts);
    }

    // What to count in a block of this tensor during the present sweep.
    void windows(size_t tensor, std::vector<sp_window>& wanted) {
        if (phase_ == Phase::keys) wanted.push_back(window(0, kLowBits, coarse_));
        if ((phase_ == Phase::keys || phase_ == Phase::bin) && !fine_.empty()) {
            wanted.push_back(window(fine_lo_, 0, fine_));
        }
        if ((phase_ == Phase::keys || phase_ == Phase::ties) && tie_bins_ > 0) {
            if (ties_[tensor].empty()) ties_[tensor].assign(tie_bins_, 0);
            wanted.push_back(window(tie_lo_, tie_shift_, ties_[tensor]));
        }
    }

    // A sweep has ended.
    void advance() {
        if (phase_ == Phase::keys) {
            const Counts tails = tails_of(coarse_);
            if (tails[0] <= k_) {
                key_ = 0, need_ = SP_EVERY, phase_ = Phase::done;
                return;
            }
            const size_t lo = bin_of(tails, k_) << kLowBits;
            if (lo >= fine_lo_ && lo < fine_lo_ + fine_.size()) {
                settle(lo);
            } else {
                fine_.assign(kFine, 0);
                fine_lo_ = lo, phase_ = Phase::bin;
            }
        } else if (phase_ == Phase::bin) {
            settle(fine_lo_);
        } else {
            phase_ = Phase::done;
        }
    }

    // The ties that each tensor may take.
    std::vector<Tally> shares() const {
        std::vector<Tally> shares(ties_.size(), {key_, need_});
        if (need_ == 0 || need_ == SP_EVERY || ties_.size() == 1) return shares;
        int64_t left = need_;
        for (size_t tensor = 0; tensor < ties_.size(); ++tensor) {
            const int64_t here = ties_[tensor].empty() ? 0 : ties_[tensor][(key_ - tie_lo_) >> tie_shift_];
            shares[tensor].left = here <= left ? SP_EVERY : left;
            left = std::max<int64_t>(left - here, 0);
        }
        return shares;
    }

  private:
    enum class Phase { keys, bin, ties, done };

    static sp_window window(size_t lo, uint32_t shift, Counts& counts) {
        return {sizeof(sp_window), 0, static_cast<uint32_t>(lo), shift, counts.size(), counts.data()};
    }

    // The bins that hold the sampled rank plus and minus its margin.
    std::pair<size_t, size_t> span(const Counts& tails, int64_t sampled) const {
        const double rank = share_ * static_cast<double>(sampled);
        const double margin = kGuessSigmas * std::sqrt(rank * (1 - share_)) + 1;
        return {bin_of(tails, rank + margin), bin_of(tails, std::max(rank - margin, 1.0))};
    }

    // The bin that starts at `lo` holds the k-th key, and its fine counts are complete.
    void settle(size_t lo) {
        const auto first = fine_.begin() + static_cast<std::ptrdiff_t>(lo - fine_lo_);
        const auto bins_above = coarse_.begin() + static_cast<std::ptrdiff_t>((lo >> kLowBits) + 1);
        const Counts counts(first, first + kFine);
        Counts tails = tails_of(counts);
        const int64_t over = std::accumulate(bins_above, coarse_.end(), int64_t{0});
        for (int64_t& tail : tails) tail += over;
        const size_t bin = bin_of(tails, k_);
        key_ = static_cast<uint32_t>(lo + bin);
        need_ = k_ - (tails[bin] - counts[bin]);
        phase_ = Phase::done;
        if (need_ == counts[bin]) {
            need_ = SP_EVERY;
        } else if (ties_.size() > 1 && ties_of_threshold() != counts[bin]) {
            for (Counts& ties : ties_) ties.clear();
            tie_lo_ = key_, tie_shift_ = 0, tie_bins_ = 1;
            phase_ = Phase::ties;
        }
    }

    // What the tensors counted in the threshold's bin: its ties, if no other key fell into it.
    int64_t ties_of_threshold() const {
        const size_t place = (key_ - tie_lo_) >> tie_shift_;
        if (key_ < tie_lo_ || place >= tie_bins_) return -1;
        int64_t sum = 0;
        for (const Counts& ties : ties_) sum += ties.empty() ? 0 : ties[place];
        return sum;
    }

    int64_t k_;
    double share_;
    Phase phase_;
    uint32_t key_;  // the threshold, once done
    int64_t need_;  // how many of its ties to take
    Counts coarse_, fine_;
    size_t fine_lo_ = 0;
    size_t tie_lo_ = 0, tie_bins_ = 0;
    uint32_t tie_shift_ = 0;
    std::vector<Counts> ties_;  // of each tensor; empty until it is counted in
};

}  // namespace
}  // namespace safepatch

using safepatch::aligned;
using safepatch::Counts;
using safepatch::guarded;
using safepatch::need;
using safepatch::OwnBlock;
using safepatch::Search;
using safepatch::Tally;

struct sp_select {
    size_t tensors;
    int64_t entries;
    size_t patches;
    std::vector<Search> searches;               // one per patch, then those for what patches skip
    std::vector<size_t> owners{};               // whose they are
    std::vector<std::vector<Tally>> tallies{};  // per search and tensor, once nothing is pending
    bool begun = false;                         // something may have been counted

    bool pending() const {
        return std::any_of(searches.begin(), searches.end(), [](const Search& s) { return !s.done(); });
    }
    void add(size_t patch, int64_t k) {
        searches.emplace_back(k, entries, tensors);
        owners.push_back(patch);
    }
    void finish() {
        if (pending()) return;
        tallies.clear();
        for (const Search& search : searches) tallies.push_back(search.shares());
    }
};

namespace {

// Count a sample.
void count(sp_engine& engine, const std::vector<OwnBlock>& sample, const std::vector<sp_window>& windows) {
    for (const OwnBlock& block : sample) {
        std::vector<sp_patch_report> reports(block.patch_count);
        sp_report report{};
        report.size = sizeof report;
        report.patches = reports.data();
        engine.engine.histogram(block, windows.data(), windows.size(), report);
    }
}

void guess(sp_select& select, sp_engine& engine, const std::vector<OwnBlock>& sample) {
    int64_t sampled = 0;
    for (const OwnBlock& block : sample) sampled += block.entries;
    std::vector<Search>& searches = select.searches;
    std::vector<Counts> coarse(select.patches, Counts(safepatch::kCoarse)), fine(searches.size());
    std::vector<sp_window> windows;
    for (size_t p = 0; p < select.patches; ++p) {
        windows.push_back({sizeof(sp_window), p, 0, safepatch::kLowBits, coarse[p].size(), coarse[p].data()});
    }
    count(engine, sample, windows);
    for (size_t i = 0; i < searches.size(); ++i) searches[i].guess(coarse[select.owners[i]], sampled);
    if (select.tensors == 1) return;
    windows.clear();
    for (size_t i = 0; i < searches.size(); ++i) {
        windows.push_back(searches[i].guessed(fine[i]));
        windows.back().patch = select.owners[i];
    }
    count(engine, sample, windows);
    for (size_t i = 0; i < searches.size(); ++i) {
        if (!fine[i].empty()) searches[i].guess_ties(coarse[select.owners[i]], fine[i], sampled);
    }
}

// One past the tensor index of the block's n-th entry of patch p with its key, by halving.
int64_t place_of(sp_engine& engine, const OwnBlock& block, const std::vector<uint32_t>& keys, size_t p, int64_t n) {
    int64_t lo = 0, hi = block.entries;
    std::vector<int64_t> counts(keys.size());
    while (hi - lo > 1) {
        const int64_t middle = lo + (hi - lo) / 2;
        engine.engine.count_equal(block.part(lo, middle), keys.data(), counts.data());
        if (counts[p] >= n) {
            hi = middle;
        } else {
            lo = middle, n -= counts[p];
        }
    }
    return block.start + hi;
}

// Cuts of a block by tallies, one per patch, which become those of the next block.
std::vector<sp_cut> cuts_by(std::vector<Tally>& tallies, sp_engine& engine, const OwnBlock& block) {
    std::vector<uint32_t> keys;
    std::vector<int64_t> counts(tallies.size());
    bool any = false;
    for (const Tally& tally : tallies) {
        keys.push_back(tally.key);
        any = any || (tally.left > 0 && tally.left < SP_EVERY);
    }
    if (any) engine.engine.count_equal(block, keys.data(), counts.data());
    std::vector<sp_cut> cuts;
    for (size_t p = 0; p < tallies.size(); ++p) {
        int64_t& left = tallies[p].left;
        int64_t before = left > 0 ? SP_EVERY : 0;
        if (left > 0 && left < SP_EVERY) {
            if (counts[p] > left) before = place_of(engine, block, keys, p, left);
            left -= std::min(left, counts[p]);
        }
        cuts.push_back(safepatch::cut_of(keys[p], before));
    }
    return cuts;
}

std::vector<sp_cut> next_cuts(sp_select& select, sp_engine& engine, size_t tensor, const OwnBlock& block) {
    std::vector<Tally> tallies, skipped(select.patches, {SP_NO_KEY, 0});
    for (size_t p = 0; p < select.patches; ++p) tallies.push_back(select.tallies[p][tensor]);
    for (size_t i = select.patches; i < select.searches.size(); ++i) {
        skipped[select.owners[i]] = select.tallies[i][tensor];
    }
    std::vector<sp_cut> cuts = cuts_by(tallies, engine, block);
    if (select.searches.size() > select.patches) {
        const std::vector<sp_cut> best = cuts_by(skipped, engine, block);
        for (size_t p = 0; p < select.patches; ++p) cuts[p] = safepatch::without(cuts[p], best[p]);
    }
    // Only now: a call that is stopped half-way can be made again.
    for (size_t i = 0; i < select.searches.size(); ++i) {
        select.tallies[i][tensor] = (i < select.patches ? tallies : skipped)[select.owners[i]];
    }
    return cuts;
}

}  // namespace

sp_status sp_select_open(size_t tensors, int64_t entries, const int64_t* quotas, size_t patches, sp_select** select) {
    if (select != nullptr) *select = nullptr;
    return guarded([&] {
        need(select != nullptr, "null selection");
        need(tensors > 0 && entries >= 0, "tensors and entries");
        need(patches == 0 || quotas != nullptr, "null quotas");
        auto made = std::make_unique<sp_select>(sp_select{tensors, entries, patches, {}});
        for (size_t p = 0; p < patches; ++p) {
            need(quotas[p] >= 0, "negative quota");
            made->add(p, quotas[p]);
        }
        made->finish();
        *select = made.release();
    });
}

sp_status sp_select_skip(sp_select* select, size_t patch, int64_t skip) {
    return guarded([&] {
        need(select != nullptr, "null selection");
        need(!select->begun, "what is skipped is said before anything else");
        need(patch < select->patches, "number of the patch");
        need(skip >= 0, "negative skip");
        const auto last = select->owners.end();
        need(std::find(select->owners.begin() + static_cast<std::ptrdiff_t>(select->patches), last, patch) == last,
             "skipped twice");
        if (skip > 0) select->add(patch, skip);
        select->finish();
    });
}

void sp_select_close(sp_select* select) { delete select; }

sp_status sp_select_guess(sp_select* select, sp_engine* engine, const sp_block* sample, size_t blocks) {
    return guarded([&] {
        need(select != nullptr && engine != nullptr, "null selection or engine");
        need(blocks == 0 || sample != nullptr, "null sample");
        need(!select->begun, "a guess comes before the first sweep");
        const size_t stride = blocks > 0 ? safepatch::stride_of(sample, "block") : 0;
        std::vector<OwnBlock> own;
        for (size_t i = 0; i < blocks; ++i) {
            own.emplace_back(reinterpret_cast<const sp_block*>(reinterpret_cast<const char*>(sample) + i * stride));
            need(own.back().patch_count == select->patches, "patches of the block");
        }
        guess(*select, *engine, own);
    });
}

int sp_select_pending(const sp_select* select) { return select != nullptr && select->pending(); }

sp_status sp_select_windows(sp_select* select, size_t tensor, sp_window* windows, size_t* count) {
    return guarded([&] {
        need(select != nullptr && count != nullptr, "null selection or count");
        need(tensor < select->tensors, "number of the tensor");
        if (!select->searches.empty()) safepatch::stride_of(windows, "window");
        select->begun = true;
        std::vector<sp_window> wanted;
        for (size_t i = 0; i < select->searches.size(); ++i) {
            const size_t first = wanted.size();
            select->searches[i].windows(tensor, wanted);
            for (size_t w = first; w < wanted.size(); ++w) wanted[w].patch = select->owners[i];
        }
        safepatch::give(windows, wanted);
        *count = wanted.size();
    });
}

sp_status sp_select_advance(sp_select* select) {
    return guarded([&] {
        need(select != nullptr, "null selection");
        need(select->pending(), "no sweep is pending");
        for (Search& search : select->searches) {
            if (!search.done()) search.advance();
        }
        select->finish();
    });
}

sp_status sp_select_tally(const sp_select* select, size_t tensor, size_t patch, uint32_t* key, int64_t* left) {
    return guarded([&] {
        need(select != nullptr && key != nullptr && left != nullptr, "null selection or output");
        need(!select->pending(), "a sweep is pending");
        need(tensor < select->tensors && patch < select->patches, "number of the tensor or patch");
        *key = select->tallies[patch][tensor].key;
        *left = select->tallies[patch][tensor].left;
    });
}

sp_status sp_select_cuts(sp_select* select, sp_engine* engine, size_t tensor, const sp_block* block, sp_cut* cuts) {
    return guarded([&] {
        need(select != nullptr && engine != nullptr, "null selection or engine");
        need(!select->pending(), "a sweep is pending");
        need(tensor < select->tensors, "number of the tensor");
        const OwnBlock own(block);
        need(own.patch_count == select->patches, "patches of the block");
        if (own.patch_count > 0) safepatch::stride_of(cuts, "cut");
        safepatch::give(cuts, next_cuts(*select, *engine, tensor, own));
    });
}
