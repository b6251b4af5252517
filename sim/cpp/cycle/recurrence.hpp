// Skipping: the machine is a finite automaton, so when its state recurs, what followed the first time follows again.
//
// Inside an instruction only counts change from period to period: whole periods are skipped until one of them nears its
// end (`Comparison::periods`). Across instructions the state recurs as a whole, at another place of the program: then what
// followed is copied, up to a checkpoint recorded there, as long as the instructions are alike (`Comparison::reach`).
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "snapshot.hpp"

// The machine at the moment of a snapshot.
struct Checkpoint {
    Core core;
    uint64_t cycle, stores;
    uint32_t index, fetches;
    bool resting;
    Counts counts;
};

class Comparison {
public:
    explicit Comparison(const Program& program) : program_{program} {}

    const Program& program() const { return program_; }

    // How many more periods between the snapshots are certain: 0 if none is.
    uint64_t periods(const Snapshot& from, const Snapshot& to) const {
        if (!same_bytes(from, to)) return 0;
        const bool near = from.era == to.era;
        uint64_t limit = kMany;
        for (uint32_t i = 0; i < to.count_size && limit != 0; ++i) {
            limit = least(limit, of_count(from.count[i], to.count[i], near));
        }
        limit = least(limit, of_level(from.level, to.level, near));
        limit = least(limit, of_fetch(from.fetch, to.fetch));
        if (limit != 0 && from.index != to.index) limit = least(limit, of_program(from, to, limit));
        return limit == kMany ? 0 : limit;  // nothing runs down
    }

    // Whether the state is the same, wherever the program is.
    bool same(const Snapshot& from, const Snapshot& to) const {
        if (!same_bytes(from, to) || from.level.inner != to.level.inner || !from.fetch.resting) return false;
        for (uint32_t i = 0; i < to.count_size; ++i) {
            if (from.count[i].value != to.count[i].value) return false;
        }
        return same_behind(from, to);
    }

    // The last of the checkpoints recorded after `from` that `to` will come to, too; null if there is none.
    const Checkpoint* reach(const Snapshot& from, const Snapshot& to,
                            const std::vector<std::unique_ptr<Checkpoint>>& history) const {
        const Checkpoint* best = nullptr;
        uint64_t alike = 0;
        for (uint64_t i = from.history; i < history.size(); ++i) {
            const Checkpoint& next = *history[i];
            if (next.fetches != from.fetch.bursts) break;
            const uint64_t length = next.index - from.index;
            if (alike <= length) alike = program_.common(from.index, to.index, length + 1);
            if (alike <= length || !fetch_lasts(to.fetch, length * to.fetch.beats_per_word)) break;
            if (next.resting && fetch_rests(next, from, to)) best = &next;
        }
        return best;
    }

private:
    static constexpr uint64_t kMany = ~0u >> 1;

    static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

    static bool same_bytes(const Snapshot& from, const Snapshot& to) {
        return from.size == to.size && std::memcmp(from.bytes, to.bytes, to.size) == 0;
    }

    // near : no copy lies between the two, so that equal `loads` mean that the count was not reloaded.
    static uint64_t of_count(const Snapshot::Count& from, const Snapshot::Count& to, bool near) {
        if (from.value == to.value) return kMany;
        if (!near || from.loads != to.loads || from.value < to.value || to.value <= to.floor) return 0;
        return (to.value - to.floor - 1) / (from.value - to.value);
    }

    // Neither end of the FIFO may be met: it only fills, or only empties.
    static uint64_t of_level(const Snapshot::Level& from, const Snapshot::Level& to, bool near) {
        if (from.inner == to.inner) return kMany;
        if (!near) return 0;
        if (to.inner > from.inner && from.pops == to.pops && to.inner <= to.most) {
            return (to.most - to.inner) / (to.inner - from.inner);
        }
        if (to.inner < from.inner && from.pushes == to.pushes && to.inner >= 1) {
            return (to.inner - 1) / (from.inner - to.inner);
        }
        return 0;
    }

    // While nothing is fetched, the words waiting must last and must not leave room for a burst.
    static uint64_t of_fetch(const Snapshot::Fetch& from, const Snapshot::Fetch& to) {
        if (!to.resting) return kMany;
        if (from.bursts != to.bursts) return 0;
        const uint32_t taken = from.level - to.level;
        if (taken == 0) return kMany;
        if (to.level < 2 || to.credit + 1 >= to.burst) return 0;
        return least((to.level - 2) / taken, (to.burst - 1 - to.credit) / taken);
    }

    static bool fetch_lasts(const Snapshot::Fetch& fetch, uint64_t beats) {
        return fetch.level >= beats + 2 && fetch.credit + beats < fetch.burst;
    }

    // Of the beats that the fetch channel loses on the way to `next`.
    static bool fetch_rests(const Checkpoint& next, const Snapshot& from, const Snapshot& to) {
        return fetch_lasts(to.fetch, taken(next, from));
    }

public:
    static uint32_t taken(const Checkpoint& next, const Snapshot& from) {
        return from.fetch.level - const_cast<Checkpoint&>(next).core.fetch().level();
    }

private:
    // The instructions in the machine are alike.
    bool same_behind(const Snapshot& from, const Snapshot& to) const {
        const uint64_t behind = to.oldest;
        return from.index == to.index || program_.common(from.index - behind, to.index - behind, behind) >= behind;
    }

    // So are as many that follow, with the one the dispatcher looks at.
    uint64_t of_program(const Snapshot& from, const Snapshot& to, uint64_t limit) const {
        const uint64_t length = to.index - from.index;
        if (!same_behind(from, to)) return 0;
        const uint64_t alike = program_.common(from.index, to.index, limit * length + 1);
        return alike == 0 ? 0 : (alike - 1) / length;
    }

    const Program& program_;
};

// Snapshots by a hash: a few of each, the oldest is overwritten.
class SnapshotTable {
public:
    explicit SnapshotTable(uint32_t sets) : mask_{sets - 1}, next_(sets), keys_(kWays * sets), slots_(kWays * sets) {}

    template <class Use>
    void each(uint64_t key, Use use) const {
        const uint64_t set = (key & mask_) * kWays;
        for (unsigned way = 0; way < kWays; ++way) {
            if (keys_[set + way] == key && slots_[set + way]) use(*slots_[set + way]);
        }
    }

    void insert(uint64_t key, const Snapshot& state) {
        const uint64_t set = key & mask_, slot = set * kWays + next_[set]++ % kWays;
        if (!slots_[slot]) slots_[slot] = std::make_unique<Snapshot>();
        keys_[slot] = key;
        Snapshot& to = *slots_[slot];
        std::memcpy(&to, &state, offsetof(Snapshot, count) + state.count_size * sizeof(Snapshot::Count));
        std::memcpy(to.bytes, state.bytes, state.size);
    }

    void clear() {
        for (auto& slot : slots_) slot.reset();
    }

private:
    static constexpr unsigned kWays = 4;

    uint64_t mask_;
    std::vector<uint8_t> next_;
    std::vector<uint64_t> keys_;
    std::vector<std::unique_ptr<Snapshot>> slots_;
};
