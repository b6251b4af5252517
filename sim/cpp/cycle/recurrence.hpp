// Skipping: the machine is a finite automaton, so when its state recurs, what followed the first time follows again.
//
// Inside an instruction only counts change from period to period: whole periods are skipped until one of them nears its
// end (`Comparison::periods`). Across instructions the state recurs as a whole, at another place of the program: then what
// followed is copied, up to a checkpoint recorded there, as long as the instructions are alike (`Comparison::reach`).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
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
    Comparison(const Program& program, uint8_t* waited) : program_{program}, waited_{waited} {}

    const Program& program() const { return program_; }

    // The instructions from `first` have been followed again by as many from `second` on: they have waited alike.
    void repeat_waits(uint64_t first, uint64_t second, uint64_t count) const {
        for (uint64_t i = 0; i < count; ++i) {
            if (program_.dep(first + i) == program_.dep(second + i)) waited_[second + i] |= waited_[first + i];
        }
    }

    // How many more periods between the snapshots are certain: 0 if none is.
    uint64_t periods(const Snapshot& from, const Present& to) const {
        if (!same_bytes(from, to)) return 0;
        const bool near = from.era == to.era;
        uint64_t limit = kMany;
        for (uint32_t i = 0; i < to.count_size && limit != 0; ++i) {
            limit = least(limit, of_count(from.count[i], to.count[i], to.floors[i], near));
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
                            const std::vector<const Checkpoint*>& history) const {
        const Checkpoint* best = nullptr;
        uint64_t alike = 0;
        for (uint64_t i = from.history; i < history.size(); ++i) {
            const Checkpoint& next = *history[i];
            if (next.fetches != from.fetch.bursts) break;
            const uint64_t length = next.index - from.index;
            if (alike <= length) alike = common(from, to, 0, length + 1, kMany);
            if (alike <= length || !fetch_lasts(to.fetch, length * to.fetch.beats_per_word)) break;
            if (next.resting && fetch_lasts(to.fetch, taken(next, from))) best = &next;
        }
        return best;
    }

    // Beats that the fetch channel loses between a snapshot and a checkpoint.
    static uint32_t taken(const Checkpoint& next, const Snapshot& from) { return from.fetch.level - next.core.fetch().level(); }

private:
    static constexpr uint64_t kMany = ~0u >> 1;

    static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

    static bool same_bytes(const Snapshot& from, const Snapshot& to) {
        return from.size == to.size && std::memcmp(from.bytes, to.bytes, to.size) == 0;
    }

    // near : no copy lies between the two, so that equal `loads` mean that the count was not reloaded.
    static uint64_t of_count(const Snapshot::Count& from, const Snapshot::Count& to, uint32_t floor, bool near) {
        if (from.value == to.value) return kMany;
        if (!near || from.loads != to.loads || from.value < to.value || to.value <= floor) return 0;
        return (to.value - floor - 1) / (from.value - to.value);
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

    // While nothing is fetched, the words waiting must last and must not leave room for a burst. If bursts were fetched, the
    // channel must be where it was.
    static uint64_t of_fetch(const Snapshot::Fetch& from, const Snapshot::Fetch& to) {
        if (!to.resting) return kMany;
        if (from.bursts != to.bursts) {
            const bool same = from.level == to.level && from.credit == to.credit && from.place == to.place;
            return same && to.left > kBurstBeats ? (to.left - kBurstBeats - 1) / (from.left - to.left) : 0;
        }
        const uint32_t taken = from.level - to.level;
        if (taken == 0) return kMany;
        if (to.level < 2 || to.credit + 1 >= to.burst) return 0;
        return least((to.level - 2) / taken, (to.burst - 1 - to.credit) / taken);
    }

    static bool fetch_lasts(const Snapshot::Fetch& fetch, uint64_t beats) {
        return fetch.level >= beats + 2 && fetch.credit + beats < fetch.burst;
    }

    // The instructions in the machine are alike.
    bool same_behind(const Snapshot& from, const Snapshot& to) const {
        const uint64_t behind = to.oldest;
        return from.index == to.index || common(from, to, behind, behind, kMany) >= behind;
    }

    // How many instructions from `behind` before `from` on are like those from `behind` before `to` on, up to `limit`.
    // What waited in the first of several periods of `length` instructions may wait in all of them.
    uint64_t common(const Snapshot& from, const Snapshot& to, uint64_t behind, uint64_t limit, uint64_t length) const {
        const uint64_t first = from.index - behind, second = to.index - behind;
        limit = least(limit, program_.size() - second);
        uint64_t count = 0;
        while (count < limit && program_.kind(first + count) == program_.kind(second + count) &&
               same_wait(first + count, second + count, first + count % length, to.completed)) {
            ++count;
        }
        return count;
    }

    // The second instruction waits for the same, or neither waits at all: `base` stands for the first.
    bool same_wait(uint64_t first, uint64_t second, uint64_t base, uint64_t completed) const {
        const uint64_t dep = program_.dep(second);
        if (dep == program_.dep(first)) return true;
        return !waited_[base] && (dep > program_.dep(first) || second + 1 <= completed + dep);
    }

    // So are as many that follow, with the one the dispatcher looks at.
    uint64_t of_program(const Snapshot& from, const Snapshot& to, uint64_t limit) const {
        const uint64_t length = to.index - from.index, behind = to.oldest;
        const uint64_t alike = common(from, to, behind, behind + limit * length + 1, length);
        return alike <= behind ? 0 : (alike - behind - 1) / length;
    }

    const Program& program_;
    uint8_t* const waited_;
};

// Snapshots and checkpoints, each in as much memory as it needs. They go all at once.
class SnapshotStore {
public:
    const Checkpoint* keep(const Checkpoint& moment) { return new (reserve(sizeof moment)) Checkpoint(moment); }

    const Snapshot* keep(const Snapshot& state) {
        const size_t counts = sizeof(Snapshot::Count) * state.count_size, size = sizeof state + counts + state.size;
        uint8_t* const place = reserve(size);
        auto* const kept = new (place) Snapshot(state);
        kept->count = reinterpret_cast<Snapshot::Count*>(place + sizeof state);
        kept->bytes = place + sizeof state + counts;
        std::memcpy(kept->count, state.count, counts);
        std::memcpy(kept->bytes, state.bytes, state.size);
        return kept;
    }

    bool full() const { return chunks_.size() == kMostChunks; }

    void clear() {
        chunks_.clear();
        used_ = kChunk;
    }

private:
    static constexpr size_t kChunk = 1 << 21, kMostChunks = 32;

    struct Free {
        void operator()(uint8_t* chunk) const { std::free(chunk); }
    };

    uint8_t* reserve(size_t size) {
        size = (size + 7) / 8 * 8;
        if (used_ + size > kChunk) {
            auto* const chunk = static_cast<uint8_t*>(std::aligned_alloc(kChunk, kChunk));
            if (chunk == nullptr) throw std::bad_alloc{};
            madvise(chunk, kChunk, MADV_HUGEPAGE);  // one page fault instead of 512
            chunks_.emplace_back(chunk);
            used_ = 0;
        }
        used_ += size;
        return chunks_.back().get() + used_ - size;
    }

    std::vector<std::unique_ptr<uint8_t, Free>> chunks_;
    size_t used_ = kChunk;
};

// Snapshots by a hash: a few of each, the oldest gives way.
class SnapshotTable {
public:
    explicit SnapshotTable(uint32_t sets) : sets_(sets) {}

    template <class Use>
    void each(uint64_t key, Use use) const {
        for (const Entry& entry : sets_[key % sets_.size()].entries) {
            if (entry.state && entry.key == key) use(*entry.state);
        }
    }

    void insert(uint64_t key, const Snapshot* state) {
        Set& set = sets_[key % sets_.size()];
        set.entries[set.next++ % kWays] = {key, state};
    }

    void clear() { std::fill(sets_.begin(), sets_.end(), Set{}); }

private:
    static constexpr unsigned kWays = 4;

    struct Entry {
        uint64_t key = 0;
        const Snapshot* state = nullptr;
    };

    struct Set {
        Entry entries[kWays];
        uint32_t next = 0;
    };

    std::vector<Set> sets_;
};
