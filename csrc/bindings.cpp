// safepatch_core._engine: the C interface for Python. `backends/cpu.py` has checked shapes and dtypes before;
// here arrays become pointers. The GIL is free while the engine works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "safepatch.h"

namespace py = pybind11;

namespace {

// A block as `backends/cpu.py` hands it over: numbers of the C interface for names.
using Bits = std::tuple<py::array, int32_t>;           // entries, dtype
using Lora = std::tuple<py::array, py::array, float>;  // a, b, scale
// Kind, importance, weight, values, scores, Philox key, keep, scale.
using Patch =
    std::tuple<int32_t, int32_t, int32_t, std::variant<Bits, Lora>, std::optional<Bits>, uint64_t, uint64_t, float>;
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // rows, columns, and those of a block
using Scales = std::tuple<py::array, int64_t, bool>;           // table, its first row, turned
// Grid, flip, data, first, entries, shape, scales, handed dtype, rounding, Philox key, original.
using Codes = std::tuple<int32_t, int32_t, py::array, int64_t, int64_t, Shape, Scales, int32_t, int32_t, uint64_t,
                         std::optional<Bits>>;
// Base, start, columns, patches, acts, join, order, lambda, codes.
using Given = std::tuple<Bits, int64_t, int64_t, std::vector<std::optional<Patch>>, int32_t, int32_t, int32_t, float,
                         std::optional<Codes>>;

sp_bits bits(const Bits& given) { return {std::get<0>(given).data(), std::get<1>(given)}; }

sp_lora lora(const Lora& given, int64_t cols) {
    const auto& [a, b, scale] = given;
    return {static_cast<const float*>(a.data()),
            static_cast<const float*>(b.data()),
            a.shape(0),
            b.shape(0),
            cols,
            scale};
}

sp_patch patch(const std::optional<Patch>& given, int64_t cols) {
    sp_patch p{};
    p.size = sizeof p;
    if (!given) return p;
    const auto& [kind, importance, weight, values, scores, random_key, keep, scale] = *given;
    p.present = 1;
    p.kind = kind;
    p.importance = importance;
    p.weight = weight;
    if (const auto* entries = std::get_if<Bits>(&values)) p.values = bits(*entries);
    if (const auto* factors = std::get_if<Lora>(&values)) p.lora = lora(*factors, cols);
    if (scores) p.scores = bits(*scores);
    p.random_key = random_key;
    p.keep = keep;
    p.scale = scale;
    return p;
}

sp_codes codes_of(Codes given) {
    auto& [grid, flip, data, first, entries, shape, scales, handed, rounding, random_key, original] = given;
    sp_codes codes{};
    codes.size = sizeof codes;
    codes.grid = grid;
    codes.flip = flip;
    codes.data = static_cast<uint8_t*>(data.mutable_data());
    codes.first = first;
    codes.entries = entries;
    std::tie(codes.rows, codes.cols, codes.block_rows, codes.block_cols) = shape;
    const auto& [table, table_first, turned] = scales;
    codes.scales = static_cast<const float*>(table.data());
    codes.scale_first = table_first;
    codes.scale_rows = table.shape(0);
    codes.turned = turned;
    codes.handed = handed;
    codes.rounding = rounding;
    codes.random_key = random_key;
    if (original) codes.original = bits(*original);
    return codes;
}

// The same in the C interface's words; `given` must outlive it.
struct Block {
    std::vector<sp_patch> patches;
    sp_codes codes{};
    sp_block block{};

    explicit Block(const Given& given) {
        const auto& [base, start, cols, of_patches, acts, join, order, lambda, of_codes] = given;
        for (const auto& p : of_patches) patches.push_back(patch(p, cols));
        block.size = sizeof block;
        block.base = bits(base);
        block.entries = std::get<0>(base).size();
        block.start = start;
        block.patches = patches.data();
        block.patch_count = patches.size();
        block.acts = acts;
        block.join = join;
        block.order = order;
        block.lambda = &lambda;
        if (!of_codes) return;
        codes = codes_of(*of_codes);
        block.codes = &codes;
    }
    Block(const Block&) = delete;
};

struct Found {
    std::vector<sp_patch_report> patches;
    std::vector<sp_kept> kept;  // of codes
    sp_report report{};

    explicit Found(const Block& block) : patches(block.patches.size()) {
        for (sp_patch_report& of : patches) of.size = sizeof of;
        report.size = sizeof report;
        report.patches = patches.data();
        if (block.block.codes == nullptr) return;
        kept.resize(patches.size());
        for (sp_kept& of : kept) of.size = sizeof of;
        report.kept = kept.data();
    }
};

py::tuple fault(const sp_fault& f) { return py::make_tuple(f.count, f.first); }

template <size_t kWords>
py::bytes bytes(const uint64_t (&words)[kWords]) {
    return {reinterpret_cast<const char*>(words), sizeof words};
}

// ([(acted, changed, saturated, (along, asked, moved))], bad scales, saturated).
py::object kept(const Found& found) {
    if (found.report.kept == nullptr) return py::none();
    py::list patches;
    for (const sp_kept& of : found.kept) {
        const py::tuple sums = py::make_tuple(bytes(of.along), bytes(of.asked), bytes(of.moved));
        patches.append(py::make_tuple(of.acted, of.changed, of.saturated, sums));
    }
    return py::make_tuple(patches, fault(found.report.bad_scale), fault(found.report.saturated));
}

// ([(eligible, selected, applied, bad delta, bad score, negative)], overflow, acted, changed, kept), a fault being
// (count, first).
py::tuple report(const Found& found) {
    py::list patches;
    for (const sp_patch_report& p : found.patches) {
        patches.append(py::make_tuple(p.eligible, p.selected, p.applied, fault(p.bad_delta), fault(p.bad_score),
                                      fault(p.negative)));
    }
    return py::make_tuple(patches, fault(found.report.overflow), found.report.acted, found.report.changed,
                          kept(found));
}

struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct BadData : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void raise(sp_status status) {
    if (status == SP_OK) return;
    if (status == SP_NO_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, sp_last_error());
        throw py::error_already_set();
    }
    if (status == SP_UNSUPPORTED) throw Unsupported(sp_last_error());
    if (status == SP_BAD_DATA) throw BadData(sp_last_error());
    throw std::runtime_error(std::string(sp_strerror(status)) + ": " + sp_last_error());
}

// A C call without the GIL. The error text belongs to the thread, which stays the same.
template <class Call>
void released(const Call& call) {
    sp_status status = SP_OK;
    {
        const py::gil_scoped_release release;
        status = call();
    }
    raise(status);
}

struct Close {
    void operator()(sp_engine* engine) const { sp_engine_close(engine); }
    void operator()(sp_notes* notes) const { sp_notes_close(notes); }
};

class Notes {
  public:
    explicit Notes(sp_notes* notes) : notes_(notes) {}
    size_t nbytes() const { return sp_notes_bytes(notes_.get()); }
    sp_notes* get() const { return notes_.get(); }

  private:
    std::unique_ptr<sp_notes, Close> notes_;
};

using Window = std::tuple<size_t, uint32_t, uint32_t, py::array>;
using Cut = std::tuple<uint32_t, int64_t, uint32_t, int64_t>;  // as sp_cut

class Engine {
  public:
    Engine(int32_t threads, const std::optional<std::string>& isa) {
        sp_engine* engine = nullptr;
        raise(sp_engine_open(threads, isa ? isa->c_str() : nullptr, &engine));
        engine_.reset(engine);
    }

    std::string isa() const { return sp_engine_isa(engine_.get()); }
    int32_t threads() const { return sp_engine_threads(engine_.get()); }
    size_t scratch(int64_t entries, size_t patches) const { return sp_scratch(engine_.get(), entries, patches); }

    py::tuple histogram(const Given& given, std::vector<Window>& requests) {
        const Block block(given);
        Found found(block);
        const std::vector<sp_window> windows = in_c(requests);
        released(
            [&] { return sp_histogram(engine_.get(), &block.block, windows.data(), windows.size(), &found.report); });
        return report(found);
    }

    std::pair<py::tuple, std::unique_ptr<Notes>> note(const Given& given, std::vector<Window>& requests) {
        const Block block(given);
        Found found(block);
        const std::vector<sp_window> windows = in_c(requests);
        sp_notes* notes = nullptr;
        released([&] {
            return sp_notes_count(engine_.get(), &block.block, windows.data(), windows.size(), &found.report, &notes);
        });
        return {report(found), owned(notes)};
    }

    std::vector<int64_t> count_equal(const Given& given, const std::vector<uint32_t>& keys) {
        const Block block(given);
        same_length(block, keys.size());
        std::vector<int64_t> counts(keys.size());
        released([&] { return sp_count_equal(engine_.get(), &block.block, keys.data(), counts.data()); });
        return counts;
    }

    // From notes, if there are any: then nothing of the patches is read.
    py::tuple apply(const Given& given, const std::vector<Cut>& wanted, py::array& out, const Notes* notes) {
        const Block block(given);
        same_length(block, wanted.size());
        Found found(block);
        std::vector<sp_cut> cuts;
        for (const auto& [key, before, skip_key, skip_before] : wanted) {
            cuts.push_back({sizeof(sp_cut), key, before, skip_key, skip_before});
        }
        void* to = out.mutable_data();
        released([&] {
            sp_engine* engine = engine_.get();
            return notes == nullptr
                       ? sp_apply(engine, &block.block, cuts.data(), to, &found.report)
                       : sp_notes_apply(notes->get(), engine, &block.block, cuts.data(), to, &found.report);
        });
        return report(found);
    }

    // As `apply`.
    std::pair<std::vector<Cut>, py::tuple> merge(const Given& given, const std::vector<int64_t>& quotas,
                                                 py::array& out, const std::vector<int64_t>& skips,
                                                 const Notes* notes) {
        Block block(given);
        same_length(block, quotas.size());
        if (!skips.empty()) same_length(block, skips.size());
        for (size_t p = 0; p < skips.size(); ++p) block.patches[p].skip = skips[p];
        Found found(block);
        std::vector<sp_cut> cuts(quotas.size(), {sizeof(sp_cut), 0, 0, 0, 0});
        void* to = out.mutable_data();
        released([&] {
            sp_engine* engine = engine_.get();
            const int64_t* wanted = quotas.data();
            return notes == nullptr
                       ? sp_merge(engine, &block.block, wanted, to, cuts.data(), &found.report)
                       : sp_notes_merge(notes->get(), engine, &block.block, wanted, to, cuts.data(), &found.report);
        });
        std::vector<Cut> places;
        for (const sp_cut& cut : cuts) places.emplace_back(cut.key, cut.before, cut.skip_key, cut.skip_before);
        return {places, report(found)};
    }

    std::unique_ptr<Notes> take_notes(const Given& given, const std::vector<int64_t>& quotas) {
        const Block block(given);
        same_length(block, quotas.size());
        sp_notes* notes = nullptr;
        released([&] { return sp_notes_take(engine_.get(), &block.block, quotas.data(), &notes); });
        return owned(notes);
    }

  private:
    static std::unique_ptr<Notes> owned(sp_notes* notes) {
        return notes == nullptr ? nullptr : std::make_unique<Notes>(notes);
    }

    static std::vector<sp_window> in_c(std::vector<Window>& requests) {
        std::vector<sp_window> windows;
        for (auto& [p, lo, shift, counts] : requests) {
            auto* bins = static_cast<int64_t*>(counts.mutable_data());
            windows.push_back({sizeof(sp_window), p, lo, shift, static_cast<size_t>(counts.size()), bins});
        }
        return windows;
    }

    static void same_length(const Block& block, size_t n) {
        if (n != block.patches.size()) throw py::value_error("expected one number per patch");
    }

    std::unique_ptr<sp_engine, Close> engine_;
};

// The fix file. `fixes/codec.py` gives arrays of the right types and lengths.

using Plane = std::optional<py::array>;

int64_t fix_find(const py::array& before, const py::array& after, int64_t start, py::array& counts, py::array& at,
                 py::array& side, py::array& planes, py::array& olds, py::array& news) {
    if (planes.shape(0) > 4) throw py::value_error("expected at most 4 planes");
    sp_fix_changes out{sizeof out,
                       static_cast<int64_t*>(counts.mutable_data()),
                       static_cast<uint16_t*>(at.mutable_data()),
                       static_cast<uint8_t*>(side.mutable_data()),
                       {},
                       olds.mutable_data(),
                       news.mutable_data()};
    for (py::ssize_t k = 0; k < planes.shape(0); ++k) out.planes[k] = static_cast<uint8_t*>(planes.mutable_data(k));
    int64_t found = 0;
    released([&] {
        return sp_fix_find(static_cast<int32_t>(before.itemsize()), before.data(), after.data(), before.size(), start,
                           &out, &found);
    });
    return found;
}

void fix_gaps(const py::array& at, const py::array& counts, int32_t gap_width, Plane codes, py::array& lengths) {
    void* to = codes ? codes->mutable_data() : nullptr;
    released([&] {
        return sp_fix_gaps(static_cast<const uint16_t*>(at.data()), static_cast<const int64_t*>(counts.data()),
                           static_cast<size_t>(counts.size()), gap_width, to,
                           static_cast<int64_t*>(lengths.mutable_data()));
    });
}

std::tuple<int64_t, int64_t, int64_t> fix_settle(const py::array& rows, const py::array& gap, const py::array& side,
                                                 const std::vector<Plane>& planes, size_t changes, py::array& entries,
                                                 int32_t goal, py::array& olds, py::array& news) {
    if (planes.size() > 4) throw py::value_error("expected at most 4 planes");
    sp_fix_run run{};
    run.size = sizeof run;
    run.width = static_cast<int32_t>(planes.size());
    run.gap_width = static_cast<int32_t>(gap.itemsize());
    run.entries = entries.size();
    run.blocks = static_cast<size_t>(rows.shape(0)) - 1;
    run.rows = static_cast<const uint64_t*>(rows.data());
    run.gap = gap.data();
    run.gap_count = static_cast<size_t>(gap.size());
    run.side = static_cast<const uint8_t*>(side.data());
    run.side_count = static_cast<size_t>(side.size());
    run.changes = changes;
    for (size_t k = 0; k < planes.size(); ++k) {
        if (planes[k]) run.planes[k] = static_cast<const uint8_t*>(planes[k]->data());
    }
    sp_fix_tally tally{sizeof tally, 0, 0, 0};
    void *at = entries.mutable_data(), *before = olds.mutable_data(), *after = news.mutable_data();
    released([&] { return sp_fix_settle(&run, at, goal, before, after, &tally); });
    return {tally.old_count, tally.new_count, tally.other_codes};
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
    m.doc() = "The C++ engine; see csrc/include/safepatch.h.";
    py::register_exception<Unsupported>(m, "Unsupported", PyExc_RuntimeError);
    py::register_exception<BadData>(m, "BadData", PyExc_ValueError);
    m.def("fix_find", &fix_find);
    m.def("fix_gaps", &fix_gaps);
    m.def("fix_settle", &fix_settle);
    m.def("version", &sp_version_string);
    m.def("abi_version", &sp_abi_version);
    m.def("spec_version", &sp_spec_version);
    m.def("isa_usable", [](const std::string& isa) { return sp_isa_usable(isa.c_str()) != 0; }, py::arg("isa"));
    py::class_<Notes>(m, "Notes").def_property_readonly("nbytes", &Notes::nbytes);
    py::class_<Engine>(m, "Engine")
        .def(py::init<int32_t, const std::optional<std::string>&>(), py::arg("threads"), py::arg("isa") = py::none())
        .def_property_readonly("isa", &Engine::isa)
        .def_property_readonly("threads", &Engine::threads)
        .def("scratch", &Engine::scratch, py::arg("entries"), py::arg("patches"))
        .def("histogram", &Engine::histogram, py::arg("block"), py::arg("windows"))
        .def("count_equal", &Engine::count_equal, py::arg("block"), py::arg("keys"))
        .def("note", &Engine::note, py::arg("block"), py::arg("windows"))
        .def("apply", &Engine::apply, py::arg("block"), py::arg("cuts"), py::arg("out"), py::arg("notes") = nullptr)
        .def("merge", &Engine::merge, py::arg("block"), py::arg("quotas"), py::arg("out"), py::arg("skips"),
             py::arg("notes") = nullptr)
        .def("take_notes", &Engine::take_notes, py::arg("block"), py::arg("quotas"));
}
