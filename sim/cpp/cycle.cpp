// The cycle engine: the accelerator's control without data. sim/cycle.py loads the C function at the end.

#include "cycle/recurrence.hpp"

namespace {

// Mirrored by `_Options` in sim/cycle.py.
struct Options {
    uint64_t start_cycle;  // cycle number of the first cycle, which the memory's stalls depend on
    uint64_t max_cycles;
    uint64_t skip;         // use recurrences
};

// Mirrored by `_Result` in sim/cycle.py.
struct Result {
    uint64_t cycles, simulated;  // simulated : one by one, without those that were skipped
    uint64_t skips, finished;
    Counts counts;
};

class Simulation {
public:
    Simulation(const ArchConfig& arch, const MemoryConfig& memory, const Program& program, const Options& options,
               uint64_t* stores, uint64_t stores_size, SnapshotStore& store)
        : options_{options}, program_{program}, waits_{program}, core_{arch, memory, program, waits_},
          comparison_{program, waits_}, inner_{kInnerSets}, outer_{kOuterSets}, store_{store},
          stores_{stores}, stores_size_{stores_size} {}

    Result run() {
        const bool skip = options_.skip != 0;
        uint64_t next_sample = 0;
        while (!core_.done && cycle_ < options_.max_cycles) {
            core_.step(options_.start_cycle + cycle_, false);
            ++simulated_;
            if (core_.stored) note_store(cycle_ + 1);
            ++cycle_;
            if (!skip) continue;
            if (core_.issued || (core_.requested && simulated_ >= next_sample && core_.bursts_left % rarity() == 0)) {
                next_sample = simulated_ + kSampleDistance;
                look_back();
            }
        }
        const bool finished = core_.done;
        if (finished) stop();
        return {cycle_, simulated_, skips_, finished, core_.counts};
    }

private:
    static constexpr uint32_t kInnerSets = 1021, kOuterSets = 2047;
    static constexpr uint64_t kSampleDistance = 16, kRecordDistance = 128, kLeastCopy = 32;

    // The core is reset while the memory ports finish.
    void stop() {
        for (bool first = true, drained = false; !drained; first = false) {
            drained = core_.drained();
            if (first) core_.step(options_.start_cycle + cycle_, true);
            else core_.step_aborted(options_.start_cycle + cycle_);
            ++cycle_;
            ++simulated_;
        }
    }

    // Where nothing recurs for long, fewer moments are looked at; which ones depends on the state alone.
    uint32_t rarity() const {
        const uint64_t steps = simulated_ - last_skip_;
        return steps < 1024 ? 1 : steps < 4096 ? 2 : 4;
    }

    void note_store(uint64_t cycle) {
        if (stored_ < stores_size_) stores_[stored_] = cycle;
        ++stored_;
    }

    void look_back() {
        Capture capture{program_, now_, cycle_};
        core_.visit(capture, options_.start_cycle + cycle_);
        capture.hash();
        now_.stores = stored_;
        now_.history = history_.size();
        now_.era = era_;
        now_.dispatcher = core_.dispatcher();
        now_.counts = core_.counts;
        if (copy()) return;
        if (core_.issued || cycle_ >= next_record_) record();
        repeat();
        if (store_.full()) forget();
        const Snapshot* const kept = store_.keep(now_);
        inner_.insert(kept->hash, kept);
        outer_.insert(kept->whole, kept);
    }

    // Looks for the same state elsewhere in the program, and copies what followed.
    bool copy() {
        const Snapshot* from = nullptr;
        const Checkpoint* to = nullptr;
        outer_.each(now_.whole, [&](const Snapshot& state) {
            if (!comparison_.same(state, now_)) return;
            const Checkpoint* const reached = comparison_.reach(state, now_, history_);
            if (reached && reached->cycle > state.cycle + kLeastCopy && (to == nullptr || reached->cycle - state.cycle > to->cycle - from->cycle)) {
                from = &state;
                to = reached;
            }
        });
        if (to != nullptr) copy_to(*from, *to);
        return to != nullptr;
    }

    void copy_to(const Snapshot& from, const Checkpoint& to) {
        const uint64_t cycles = to.cycle - from.cycle, later = now_.cycle - from.cycle;
        core_.copy(to.core, Comparison::taken(to, from));
        move(from, 1, later);
        if (!Comparison::same_queues(from, now_)) core_.replace(now_.dispatcher);
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            waits_.repeat(unit, now_.held[unit], core_.queues().seen(unit), now_.seen[unit] - from.seen[unit]);
        }
        core_.counts = now_.counts;
        add(core_.counts, from.counts, to.counts, 1);
        for (uint64_t i = from.stores; i < to.stores; ++i) note_store(i < stores_size_ ? stores_[i] + later : 0);
        cycle_ += cycles;
        ++era_;
        last_skip_ = simulated_;
        ++skips_;
    }

    // Looks for the same state a few periods ago, up to counts, and skips periods.
    void repeat() {
        const Snapshot* from = nullptr;
        uint64_t periods = 0;
        inner_.each(now_.hash, [&](const Snapshot& state) {
            const uint64_t found = comparison_.periods(state, now_);
            if (found * (now_.cycle - state.cycle) > (from ? periods * (now_.cycle - from->cycle) : 0)) {
                from = &state;
                periods = found;
            }
        });
        if (from != nullptr) skip(*from, static_cast<uint32_t>(periods));
    }

    void skip(const Snapshot& from, uint32_t periods) {
        const uint64_t period = now_.cycle - from.cycle, stores = now_.stores - from.stores;
        Advance advance{from, now_, periods};
        core_.visit(advance, 0);
        move(from, periods, periods * period);
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            const uint32_t further = now_.seen[unit] - from.seen[unit];
            if (further != 0) waits_.repeat(unit, now_.held[unit], core_.queues().seen(unit), further);
        }
        add(core_.counts, from.counts, now_.counts, periods);
        for (uint64_t i = 0; i < periods * stores; ++i) {
            note_store(stored_ < stores_size_ ? stores_[stored_ - stores] + period : 0);
        }
        cycle_ += periods * period;
        last_skip_ = simulated_;
        ++skips_;
    }

    // Moves the core on, `times` as far in the program as the present is from `from`.
    void move(const Snapshot& from, uint32_t times, uint64_t cycles) {
        Move move{program_, from, now_, times};
        core_.visit(move, 0);
        core_.move(cycles);
    }

    static void add(Counts& counts, const Counts& from, const Counts& to, uint64_t times) {
        for (unsigned i = 0; i < event::kCount; ++i) counts.events[i] += times * (to.events[i] - from.events[i]);
        for (unsigned i = 0; i < reader::kCount; ++i) {
            counts.read_beats[i] += times * (to.read_beats[i] - from.read_beats[i]);
        }
        counts.write_beats += times * (to.write_beats - from.write_beats);
    }

    void record() {
        next_record_ = cycle_ + kRecordDistance;
        history_.push_back(store_.keep(
            Checkpoint{core_, cycle_, stored_, now_.index, now_.fetch.bursts, now_.fetch.resting, core_.counts}));
    }

    void forget() {
        inner_.clear();
        outer_.clear();
        history_.clear();
        store_.clear();
        now_.history = 0;
    }

    const Options options_;
    const Program& program_;
    Waits waits_;
    Core core_;
    const Comparison comparison_;
    SnapshotTable inner_, outer_;
    std::vector<const Checkpoint*> history_;
    SnapshotStore& store_;
    Present now_;
    uint64_t* const stores_;
    const uint64_t stores_size_;
    uint64_t cycle_ = 0, simulated_ = 0, stored_ = 0, next_record_ = 0, last_skip_ = 0, skips_ = 0;
    uint32_t era_ = 0;
};

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

Program* nm_cycle_open(const ArchConfig* arch, const uint8_t* code, uint64_t instructions) {
    return new Program{*arch, code, instructions};
}
void nm_cycle_close(Program* program) { delete program; }

// stores : room for the cycle in which the last write of each storing instruction was answered.
void nm_cycle_run(const Program* program, const ArchConfig* arch, const MemoryConfig* memory, const Options* options,
                  uint64_t* stores, uint64_t stores_size, Result* result) {
    static thread_local SnapshotStore store;  // fresh memory would cost more than its use
    store.clear();
    auto simulation = std::make_unique<Simulation>(*arch, *memory, *program, *options, stores, stores_size, store);
    *result = simulation->run();
}

#pragma GCC visibility pop
}
