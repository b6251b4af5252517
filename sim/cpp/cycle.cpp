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
               uint64_t* stores, uint64_t stores_size)
        : program_{program}, options_{options}, core_{arch, memory, program}, inner_{kInnerSets}, outer_{kOuterSets},
          stores_{stores}, stores_size_{stores_size} {}

    Result run() {
        const bool skip = options_.skip != 0;
        uint64_t next_sample = 0;
        while (!core_.done && cycle_ < options_.max_cycles) {
            core_.step(options_.start_cycle + cycle_, false);
            ++simulated_;
            if (core_.stored) note_store();
            ++cycle_;
            if (!skip) continue;
            if (core_.issued || (core_.requested && simulated_ >= next_sample)) {
                next_sample = simulated_ + kSampleDistance;
                look_back();
            }
        }
        const bool finished = core_.done;
        if (finished) stop();
        return {cycle_, simulated_, skips_, finished, core_.counts};
    }

private:
    static constexpr uint32_t kInnerSets = 256, kOuterSets = 2048;
    static constexpr uint64_t kSampleDistance = 16;

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

    void note_store() {
        if (stored_ < stores_size_) stores_[stored_] = cycle_;
        ++stored_;
    }

    void look_back() {
        Capture capture{now_, cycle_};
        core_.visit(capture, options_.start_cycle + cycle_);
        now_.stores = stored_;
        now_.counts = core_.counts;
        now_.hash = capture.hash(false);
        SnapshotTable::Found found = inner_.find(program_, now_);
        inner_.insert(now_);
        if (core_.issued && found.from == nullptr) {
            now_.hash = capture.hash(true);
            found = outer_.find(program_, now_);
            outer_.insert(now_);
        }
        if (found.from) jump(*found.from, static_cast<uint32_t>(found.periods));
    }

    void jump(const Snapshot& from, uint32_t periods) {
        const uint64_t cycles = periods * (now_.cycle - from.cycle);
        Advance advance{from, now_, periods};
        core_.visit(advance, options_.start_cycle + cycle_);
        core_.shift(cycles, periods * (now_.index - from.index));
        repeat(core_.counts, from.counts, now_.counts, periods);
        const uint64_t stores = now_.stores - from.stores, period = now_.cycle - from.cycle;
        for (uint64_t i = 0; i < periods * stores; ++i, ++stored_) {
            if (stored_ < stores_size_) stores_[stored_] = stores_[stored_ - stores] + period;
        }
        cycle_ += cycles;
        ++skips_;
    }

    static void repeat(Counts& counts, const Counts& from, const Counts& to, uint64_t periods) {
        for (unsigned i = 0; i < event::kCount; ++i) counts.events[i] += periods * (to.events[i] - from.events[i]);
        for (unsigned i = 0; i < reader::kCount; ++i) {
            counts.read_beats[i] += periods * (to.read_beats[i] - from.read_beats[i]);
        }
        counts.write_beats += periods * (to.write_beats - from.write_beats);
    }

    const Program& program_;
    const Options options_;
    Core core_;
    SnapshotTable inner_, outer_;
    Snapshot now_;
    uint64_t* const stores_;
    const uint64_t stores_size_;
    uint64_t cycle_ = 0, simulated_ = 0, stored_ = 0, skips_ = 0;
};

}  // namespace

extern "C" {

Program* nm_cycle_open(const ArchConfig* arch, const uint8_t* code, uint64_t instructions) {
    return new Program{*arch, code, instructions};
}
void nm_cycle_close(Program* program) { delete program; }

// stores : room for the cycle in which the last write of each storing instruction was answered.
void nm_cycle_run(const Program* program, const ArchConfig* arch, const MemoryConfig* memory, const Options* options,
                  uint64_t* stores, uint64_t stores_size, Result* result) {
    auto simulation = std::make_unique<Simulation>(*arch, *memory, *program, *options, stores, stores_size);
    *result = simulation->run();
}
}
