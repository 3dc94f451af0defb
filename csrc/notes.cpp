// Notes: lists of the keys that an earlier look at the patches found, which stand for the patches in the next.
#include <algorithm>
#include <cstring>
#include <memory>

#include "engine.h"

namespace safepatch {

void Notes::make_room(int64_t capacity, int64_t chunks) {
    keys.room<uint32_t>(static_cast<size_t>(capacity) + kSlack);
    places.room<uint16_t>(static_cast<size_t>(capacity));
    spans.room<Span>(static_cast<size_t>(chunks));
}

void Notes::append(Sink& sink, int64_t slot, std::atomic<int64_t>& used, int64_t capacity) {
    const int64_t begin = used.fetch_add(sink.listed);
    if (sink.listed != 0 && begin + sink.listed <= capacity) {  // of none there may be no list, either
        const auto n = static_cast<size_t>(sink.listed);
        std::memcpy(keys.get<uint32_t>() + begin, sink.list, n * sizeof(uint32_t));
        std::memcpy(places.get<uint16_t>() + begin, sink.places, n * sizeof(uint16_t));
    }
    spans.get<Span>()[slot] = {begin, sink.listed};
    sink.listed = 0;
}

void Notes::serve(Task& task) const {
    task.eligible = Eligible::listed;
    task.list = keys.get<uint32_t>();
    task.places = places.get<uint16_t>();
    task.spans = spans.get<Span>();
}

void Kept::Patch::take(const Notes& list, int64_t n, uint32_t from, int64_t chunks, const Sink& facts) {
    quota = used = n;
    floor = from;
    found = facts;
    notes.keys.copy<uint32_t>(list.keys, static_cast<size_t>(n), kSlack);
    notes.places.copy<uint16_t>(list.places, static_cast<size_t>(n), 1);  // an empty list is one, too
    notes.spans.copy<Span>(list.spans, static_cast<size_t>(chunks));
}

Kept::Kept(const sp_block& block) : entries(block.entries), start(block.start), order(block.order) {
    for (size_t p = 0; p < block.patch_count; ++p) patches.emplace_back().of = block.patches[p];
}

bool Kept::fits(const sp_block& block) const {
    if (block.entries != entries || block.start != start || block.order != order) return false;
    if (block.patch_count != patches.size()) return false;
    return std::equal(patches.begin(), patches.end(), block.patches, [](const Patch& mine, const sp_patch& other) {
        const sp_patch& of = mine.of;
        if (!of.present || !other.present) return of.present == other.present;
        return of.kind == other.kind && of.importance == other.importance && of.lora.cols == other.lora.cols &&
               of.random_key == other.random_key && of.keep == other.keep;
    });
}

bool Kept::reach(const sp_block& block, const int64_t* quotas) const {
    for (size_t p = 0; p < patches.size(); ++p) {
        const sp_patch& patch = block.patches[p];
        if (patch.present && std::max(quotas[p], patch.skip) > patches[p].quota) return false;
    }
    return true;
}

bool Kept::reach(const sp_block& block, const sp_cut* cuts) const {
    for (size_t p = 0; p < patches.size(); ++p) {
        if (block.patches[p].present && cuts[p].key < patches[p].floor) return false;
    }
    return true;
}

size_t Kept::bytes() const {
    size_t sum = sizeof *this;
    for (const Patch& patch : patches) {
        const Notes& notes = patch.notes;
        sum += sizeof patch + notes.keys.bytes() + notes.places.bytes() + notes.spans.bytes() + notes.ties.bytes();
    }
    return sum;
}

// Keys must stand for deltas, or the patches would have to be read again.
std::unique_ptr<Kept> Engine::note(const sp_block& block, const sp_window* windows, size_t count, sp_report& report) {
    const std::lock_guard lock(turn_);
    const Counting counting = this->counting(block, windows, count);
    const std::vector<Task>& tasks = counting.tasks;
    const Chunks chunks(block);
    const int64_t capacity = list_capacity(block.entries);
    if (notes_.size() < block.patch_count) notes_.resize(block.patch_count);
    std::vector<std::atomic<int64_t>> used(block.patch_count);
    bool sufficient = block.codes == nullptr;
    for (size_t p = 0; p < block.patch_count; ++p) {
        if (tasks[p].patch == nullptr) continue;
        notes_[p].make_room(capacity, chunks.count());
        sufficient = sufficient && tasks[p].collect && block.patches[p].importance == SP_MAGNITUDE;
    }
    sweep({&block, &tasks, nullptr}, counting.swept, [&](Thread& thread, const Range& range) {
        count_listed(thread, counting.listed);
        for (size_t p = 0; p < block.patch_count; ++p) {
            if (tasks[p].patch != nullptr) notes_[p].append(thread.sinks[p], range.slot, used[p], capacity);
        }
    });
    report_all(report, block.patch_count);
    auto kept = std::make_unique<Kept>(block);
    for (size_t p = 0; sufficient && p < block.patch_count; ++p) {
        if (tasks[p].patch == nullptr) continue;
        sufficient = used[p] <= capacity;
        if (sufficient) kept->patches[p].take(notes_[p], used[p], tasks[p].floor, chunks.count(), found(p));
    }
    return sufficient ? std::move(kept) : nullptr;
}

void Engine::apply(const sp_block& block, const sp_cut* cuts, Kept& kept, void* out, sp_report& report) {
    const std::lock_guard lock(turn_);
    std::vector<Task> tasks = fresh_tasks(block);
    for (size_t p = 0; p < tasks.size(); ++p) {
        tasks[p].cut = cuts[p];
        if (tasks[p].patch != nullptr) kept.patches[p].notes.serve(tasks[p]);
    }
    sweep({&block, &tasks, out});
    report_all(report, block.patch_count);
    for (size_t p = 0; p < tasks.size(); ++p) {
        if (tasks[p].patch != nullptr) give_facts(kept.patches[p].found, report.patches[p]);
    }
}

}  // namespace safepatch
