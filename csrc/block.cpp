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
    if (patch.kind == SP_LORA) {
        check(patch.lora, block);
    } else {
        check(patch.values, any, "patch values");
    }
}

void skip(sp_bits& bits, int64_t entries) {
    if (bits.data != nullptr) bits.data = static_cast<const char*>(bits.data) + entries * width(bits);
}

}  // namespace

OwnBlock::OwnBlock(const sp_block& block, std::vector<sp_patch> own) : sp_block(block), held(std::move(own)) {
    patches = held.data();
}

OwnBlock::OwnBlock(const sp_block* from, bool inputs) : sp_block(adopted(from, "block")) {
    need(entries >= 0 && start >= 0 && start <= INT64_MAX - entries, "block range");
    need(patch_count == 0 || patches != nullptr, "block patches");
    need(acts >= SP_ALONE && acts <= SP_ELECTED_UP, "block acts");
    need(join >= SP_SUM && join <= SP_WEIGHTED, "block join");
    need(order >= SP_RETAIN_FIRST && order <= SP_SELECT_FIRST, "block order");
    need(aligned(lambda, sizeof(float)), "block lambda");
    check(base, entries > 0, "block base");
    held = adopted(patches, patch_count, "patch");
    patches = held.data();
    for (const sp_patch& patch : held) check(patch, *this, inputs);
}

OwnBlock OwnBlock::part(int64_t lo, int64_t hi) const {
    OwnBlock cut(*this, held);
    cut.start += lo;
    cut.entries = hi - lo;
    skip(cut.base, lo);
    for (sp_patch& patch : cut.held) {
        skip(patch.values, lo);
        skip(patch.scores, lo);
    }
    return cut;
}

}  // namespace safepatch
