// Skipping: the machine is a finite automaton, so when its state recurs, what followed the first time follows again.
//
// Inside an instruction only counts change from period to period: whole periods are skipped until one of them nears its
// end (`Comparison::periods`). Across instructions the state recurs as a whole, at another place of the program: then what
// followed is copied, up to a checkpoint recorded there, as long as each unit sees equal commands (`Comparison::reach`). While
// the dispatcher can issue nothing, the numbers of commands that wait in the queues may differ.
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
    Comparison(const Program& program, const Waits& waits) : program_{program}, waits_{waits} {}

    // How many more periods between the snapshots are certain: 0 if none is.
    uint64_t periods(const Snapshot& from, const Present& to) const {
        if (!same_bytes(from, to) || !same_queues(from, to)) return 0;
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
        return true;
    }

    // The last of the checkpoints recorded after `from` that `to` will come to, too; null if there is none.
    const Checkpoint* reach(const Snapshot& from, const Present& to, const std::vector<const Checkpoint*>& history) const {
        const Checkpoint* best = nullptr;
        uint64_t dispatched = to.index, alike[unit::kCount];
        std::copy(std::begin(to.held), std::end(to.held), alike);
        for (uint64_t i = from.history; i < history.size(); ++i) {
            const Checkpoint& next = *history[i];
            if (next.fetches != from.fetch.bursts) break;
            if (!same_program(from, to, next, dispatched, alike)) break;
            const bool rests = next.index == from.index && to.dispatcher.rests();
            if (!same_queues(from, to) && !(rests && rest_lasts(from, to, next))) break;
            const uint64_t words = next.index - from.index;  // that the dispatcher fetches
            if (rests ? to.fetch.credit >= to.fetch.burst : !fetch_lasts(to.fetch, words * to.fetch.beats_per_word)) break;
            if (next.resting && (rests || fetch_lasts(to.fetch, taken(next, from)))) best = &next;
        }
        return best;
    }

    // Beats that the fetch channel loses between a snapshot and a checkpoint.
    static uint32_t taken(const Checkpoint& next, const Snapshot& from) { return from.fetch.level - next.core.fetch().level(); }

    // As many commands wait in the queues, and the dispatcher does the same with them.
    static bool same_queues(const Snapshot& from, const Snapshot& to) {
        return from.dispatcher.finishing() == to.dispatcher.finishing() &&
               std::equal(std::begin(from.behind), std::end(from.behind), to.behind);
    }

private:
    static constexpr uint64_t kMany = ~0u >> 1;

    static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

    static bool same_bytes(const Snapshot& from, const Snapshot& to) {
        return from.size == to.size && std::memcmp(from.bytes, to.bytes, to.size) == 0;
    }

    // The dispatcher rests here as it does from there to `next`, and no queue runs empty in one of the two alone.
    static bool rest_lasts(const Snapshot& from, const Snapshot& to, const Checkpoint& next) {
        const CommandQueues& queues = next.core.queues();
        bool full = false;
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            const uint32_t there = queues.behind(unit), here = there + to.behind[unit] - from.behind[unit];
            if (there != here && (!queues.offers(unit) || static_cast<int32_t>(here) < 0)) return false;
            full |= here == kQueueDepth - 1;
        }
        return to.dispatcher.finishing() ? to.completed + (next.core.completed() - from.completed) < to.index : full;
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

    // From `to` on up to where `next` is after `from`, dispatcher and units cannot tell the program from what it was there.
    // dispatched, alike : instructions, and commands of each stream, up to which that is known already.
    bool same_program(const Snapshot& from, const Present& to, const Checkpoint& next, uint64_t& dispatched,
                      uint64_t* alike) const {
        const uint64_t later = to.index - from.index, last = next.index + later;
        dispatched = same_dispatch(dispatched, last, later);
        if (dispatched < last) return false;
        const bool decides = next.core.dispatcher().decided() && (next.index != from.index || !from.dispatcher.decided());
        if (decides && (last >= program_.size() || program_.decision(next.index) != program_.decision(last))) return false;
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            const uint64_t end = to.seen[unit] + (next.core.queues().seen(unit) - from.seen[unit]);
            alike[unit] = same_commands(from, to, unit, alike[unit], end, kMany);
            if (alike[unit] < end) return false;
        }
        return true;
    }

    // For how many more periods the program repeats itself, at most `limit`.
    uint64_t of_program(const Snapshot& from, const Present& to, uint64_t limit) const {
        const uint64_t length = to.index - from.index;
        const uint64_t dispatched = same_dispatch(to.index, to.index + limit * length + 1, length) - to.index;
        limit = dispatched == 0 ? 0 : (dispatched - 1) / length;
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            const uint64_t period = to.seen[unit] - from.seen[unit];
            if (period == 0) {
                limit = least(limit, of_held(from, to, unit));
                continue;
            }
            const uint64_t alike = same_commands(from, to, unit, to.held[unit], to.seen[unit] + limit * period, period);
            limit = alike < to.seen[unit] ? 0 : least(limit, (alike - to.seen[unit]) / period);
        }
        return limit;
    }

    // For how many more periods a unit that got no command in this one does not begin those it holds.
    uint64_t of_held(const Snapshot& from, const Present& to, unsigned unit) const {
        const uint32_t completed = to.completed - from.completed;
        uint64_t limit = kMany;
        for (uint64_t i = to.held[unit]; unit < unit::load && completed != 0 && i < to.seen[unit]; ++i) {
            const auto left = static_cast<int32_t>(program_.awaited(unit, i) - to.completed);
            if (program_.awaited(unit, i) == 0 || left <= -static_cast<int32_t>(completed)) continue;
            limit = least(limit, left <= 0 ? 0 : (left - 1) / completed);
        }
        return limit;
    }

    // The dispatcher cannot tell the instructions from `i` on from those `later` before them: up to which, at most `end`?
    uint64_t same_dispatch(uint64_t i, uint64_t end, uint64_t later) const {
        end = least(end, program_.size());
        while (i < end && program_.dispatch(i) == program_.dispatch(i - later)) ++i;
        return i;
    }

    // A unit cannot tell the commands of its stream from `i` on from those that it saw instead of them after `from`: up to
    // which, at most `end`? Which of the latter have waited is known of the first `period`.
    uint64_t same_commands(const Snapshot& from, const Present& to, unsigned unit, uint64_t i, uint64_t end,
                           uint64_t period) const {
        const uint64_t further = to.seen[unit] - from.seen[unit], first = to.held[unit];
        end = least(end, program_.told(unit));
        for (; i < end && program_.number(unit, i) == program_.number(unit, i - further); ++i) {
            if (unit < unit::load && !same_wait(from, to, unit, i, first + (i - first) % period)) break;
        }
        return i;
    }

    // The command at place `i` waits like the one it is like, or neither waits at all: the latter has not, nor has any in
    // between. What the one `base` is like has done is known; of those that the unit holds, only if it has waited.
    bool same_wait(const Snapshot& from, const Present& to, unsigned unit, uint64_t i, uint64_t base) const {
        const uint32_t further = to.seen[unit] - from.seen[unit], later = to.completed - from.completed;
        const uint32_t before = program_.awaited(unit, i - further), now = program_.awaited(unit, i);
        if ((before == 0) == (now == 0) && (now == 0 || now - before == later)) return true;
        if (waits_.waited(unit, base - further)) return false;
        for (uint64_t place = base; place < least(i, to.seen[unit]); place += further) {
            if (waits_.waited(unit, place)) return false;
        }
        const bool sooner = before != 0 && static_cast<int32_t>(now - before - later) < 0;
        const bool over = static_cast<int32_t>(now - to.completed) <= 0;
        return now == 0 || sooner || over;
    }

    const Program& program_;
    const Waits& waits_;
};

// Snapshots and checkpoints, each in as much memory as it needs. They go all at once; the memory stays.
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

    bool full() const { return next_ == kMostChunks; }

    void clear() {
        next_ = 0;
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
            if (next_ == chunks_.size()) chunks_.emplace_back(allocate());
            ++next_;
            used_ = 0;
        }
        used_ += size;
        return chunks_[next_ - 1].get() + used_ - size;
    }

    static uint8_t* allocate() {
        auto* const chunk = static_cast<uint8_t*>(std::aligned_alloc(kChunk, kChunk));
        if (chunk == nullptr) throw std::bad_alloc{};
        madvise(chunk, kChunk, MADV_HUGEPAGE);  // one page fault instead of 512
        return chunk;
    }

    std::vector<std::unique_ptr<uint8_t, Free>> chunks_;
    size_t next_ = 0, used_ = kChunk;  // chunks in use, bytes of the last
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
