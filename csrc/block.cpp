#include "block.h"

#include <utility>

#include "sized.h"

namespace safepatch {
namespace {

size_t width(const sp_bits& bits) { return bits.dtype == SP_F32 ? 4 : 2; }

void check(const sp_bits& bits, bool any, const char* what) {
    need(bits.dtype >= SP_F32 && bits.dtype <= SP_BF16, what);
    need(!any || (bits.data != nullptr && aligned(bits.data, width(bits))), what);
}

void check(const sp_lora& lora, const sp_block& block) {
    const bool any = block.entries > 0;
    need(lora.rank >= 0 && lora.rows >= 0 && lora.cols >= 0, "LoRA shape");
    need(lora.rank == 0 || !any ||
             (lora.a != nullptr && lora.b != nullptr && aligned(lora.a, 4) && aligned(lora.b, 4)),
         "LoRA factors");
    need(!any || (lora.cols > 0 && (block.start + block.entries - 1) / lora.cols < lora.rows),
         "LoRA factors: the block ends beyond their product");
}

void check(const sp_patch& patch, const sp_block& block, bool inputs) {
    if (!patch.present) return;
    const bool any = block.entries > 0;
    need(patch.kind >= SP_CHECKPOINT && patch.kind <= SP_LORA, "patch kind");
    need(patch.importance >= SP_MAGNITUDE && patch.importance <= SP_GRADIENTS, "patch importance");
    need(patch.weight >= SP_WEIGHT_PATCHED && patch.weight <= SP_WEIGHT_DELTA, "patch weight");
    need(patch.reserved == 0, "patch reserved");
    need(patch.skip >= 0, "patch skip");
    if (!inputs) return;
    if (patch.importance != SP_MAGNITUDE) check(patch.scores, any, "patch scores");
    need(block.codes == nullptr || patch.importance != SP_GRADIENTS || patch.weight == SP_WEIGHT_DELTA,
         "patch weight: of codes, gradients are multiplied with deltas");
    if (patch.kind == SP_LORA) {
        check(patch.lora, block);
    } else {
        check(patch.values, any, "patch values");
    }
}

// Rows of the table of scales before that of an entry's row.
int64_t scale_row(const sp_codes& codes, int64_t place) {
    const int64_t row = place / codes.cols, down = (codes.rows - 1) / codes.block_rows + 1;
    return row / codes.rows * down + row % codes.rows / codes.block_rows;
}

void check(const sp_codes& codes, const sp_block& block) {
    need(codes.grid >= SP_E4M3 && codes.grid <= SP_INT4, "codes grid");
    const int64_t step = codes.grid == SP_E4M3 || codes.grid == SP_INT8 ? 1 : 2;
    need(codes.flip >= 0 && codes.flip <= 255, "codes flip");
    need(codes.first >= 0 && codes.first % step == 0, "codes first");
    need(codes.entries >= 0 && codes.first <= INT64_MAX - codes.entries, "codes entries");
    need(codes.first <= block.start && block.start + block.entries <= codes.first + codes.entries,
         "codes: the block ends beyond them");
    need(codes.rows > 0 && codes.cols > 0 && codes.rows <= INT64_MAX / 2 / codes.cols, "codes shape");
    need(codes.block_rows > 0 && codes.block_cols > 0 && codes.block_cols <= INT64_MAX / 2, "codes blocks");
    need(codes.turned == 0 || codes.turned == 1, "codes turned");
    const int64_t matrix = codes.rows * codes.cols;
    need(!codes.turned || (codes.first % matrix == 0 && codes.entries % matrix == 0), "codes turned: whole matrices");
    need(codes.handed >= SP_F32 && codes.handed <= SP_BF16, "codes handed");
    need(codes.rounding == SP_STOCHASTIC || codes.rounding == SP_NEAREST, "codes rounding");
    need(codes.reserved == 0, "codes reserved");
    check(codes.original, false, "codes original");
    need(codes.original.data == nullptr || aligned(codes.original.data, width(codes.original)), "codes original");
    if (codes.entries == 0) return;
    need(codes.data != nullptr, "codes data");
    need(codes.scales != nullptr && aligned(codes.scales, sizeof(float)), "codes scales");
    need(codes.scale_first >= 0 && codes.scale_rows >= 0 && codes.scale_first <= INT64_MAX - codes.scale_rows,
         "codes scale rows");
    need(codes.scale_first <= scale_row(codes, codes.first) &&
             scale_row(codes, codes.first + codes.entries - 1) < codes.scale_first + codes.scale_rows,
         "codes scales: codes lie beyond them");
}

void skip(sp_bits& bits, int64_t entries) {
    if (bits.data != nullptr) bits.data = static_cast<const char*>(bits.data) + entries * width(bits);
}

}  // namespace

OwnBlock::OwnBlock(const sp_block& block, std::vector<sp_patch> own, std::vector<sp_codes> own_codes)
    : sp_block(block), held(std::move(own)), stored(std::move(own_codes)) {
    patches = held.data();
    if (codes != nullptr) codes = stored.data();
}

OwnBlock::OwnBlock(const sp_block* from, bool inputs) : sp_block(adopted(from, "block")) {
    need(entries >= 0 && start >= 0 && start <= INT64_MAX - entries, "block range");
    need(patch_count == 0 || patches != nullptr, "block patches");
    need(acts >= SP_ALONE && acts <= SP_ELECTED_UP, "block acts");
    need(join >= SP_SUM && join <= SP_WEIGHTED, "block join");
    need(order >= SP_RETAIN_FIRST && order <= SP_SELECT_FIRST, "block order");
    need(aligned(lambda, sizeof(float)), "block lambda");
    if (codes != nullptr) {
        stored = adopted(codes, 1, "codes");
        codes = stored.data();
        check(*codes, *this);
    }
    check(base, entries > 0 && codes == nullptr, "block base");
    held = adopted(patches, patch_count, "patch");
    patches = held.data();
    for (const sp_patch& patch : held) check(patch, *this, inputs);
}

OwnBlock OwnBlock::part(int64_t lo, int64_t hi) const {
    OwnBlock cut(*this, held, stored);
    cut.start += lo;
    cut.entries = hi - lo;
    if (codes == nullptr) skip(cut.base, lo);
    for (sp_patch& patch : cut.held) {
        skip(patch.values, lo);
        skip(patch.scores, lo);
    }
    return cut;
}

}  // namespace safepatch
