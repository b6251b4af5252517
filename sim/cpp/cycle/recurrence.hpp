// Skipping: the machine is a finite automaton, so when its state recurs, what followed the first time follows again.
//
// A snapshot has three parts. `bytes` must be equal. Counts that only matter at their end (columns left, words left) may
// have fallen, if they were not reloaded in between and stay above the value that matters. Indices of instructions are
// relative to the dispatcher's; if it has moved on, the instructions that are and will be used must have equal commands.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "core.hpp"

struct Snapshot {
    static constexpr unsigned kBytes = 1400, kCounts = 64, kTotals = 12;

    struct Count {
        uint32_t value, loads, floor;
    };

    uint64_t cycle, hash, stores;
    uint32_t index, oldest, size, count_size, total_size;
    uint32_t inner, pushes, pops, room;  // FIFO of the row unit
    Counts counts;
    uint32_t totals[kTotals];
    Count count[kCounts];
    uint8_t bytes[kBytes];
};

// Visitor that fills a snapshot.
class Capture {
public:
    Capture(Snapshot& to, uint64_t cycle) : to_{to} {
        to_.cycle = cycle;
        to_.size = to_.count_size = to_.total_size = to_.oldest = 0;
    }

    template <class T>
    void exact(T value) {
        std::memcpy(to_.bytes + to_.size, &value, sizeof value);
        to_.size += sizeof value;
    }

    void instruction(uint32_t index) { to_.index = index; }
    void completed(uint32_t count) { exact(to_.index - count); }

    // The counts so far run down with the program: they are not hashed.
    void program_read() { program_counts_ = to_.count_size; }

    void oldest(uint32_t ref) {
        const uint32_t distance = to_.index - ref;
        if (distance > to_.oldest) to_.oldest = distance;
        exact(distance);
    }

    void reference(uint32_t ref) {
        if (ref != kNoInstruction) oldest(ref);
    }

    void countdown(const Countdown& c, uint32_t floor) { to_.count[to_.count_size++] = {c.value, c.loads, floor}; }
    void progress(const Progress& p, uint32_t count) { to_.count[to_.count_size++] = {count - p.moved, p.loads, 1}; }
    void distance(uint32_t value, uint32_t loads) { to_.count[to_.count_size++] = {value, loads, 0}; }
    void total(uint32_t value) { to_.totals[to_.total_size++] = value; }

    void level(const Fifo& fifo, uint32_t depth, uint32_t pushes, uint32_t pops) {
        exact(static_cast<uint8_t>(fifo.out | (fifo.inner == 0) << 1 | !fifo.writable(depth) << 2));
        to_.inner = fifo.inner;
        to_.pushes = pushes;
        to_.pops = pops;
        to_.room = depth - 2;
    }

    // Mixes the bytes; with `counts` also their values, for states that recur as a whole.
    uint64_t hash(bool counts) const {
        uint64_t h = to_.size;
        std::memset(to_.bytes + to_.size, 0, 8);
        for (uint32_t i = 0; i < to_.size; i += 8) {
            uint64_t word;
            std::memcpy(&word, to_.bytes + i, sizeof word);
            h = mix(h, word);
        }
        for (uint32_t i = program_counts_; counts && i < to_.count_size; ++i) h = mix(h, to_.count[i].value);
        return h;
    }

private:
    static uint64_t mix(uint64_t h, uint64_t word) {
        const auto product = static_cast<unsigned __int128>(h ^ word ^ 0x9E3779B97F4A7C15ull) * 0xD6E8FEB86659FD93ull;
        return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }

    Snapshot& to_;
    uint32_t program_counts_ = 0;
};

// Visitor that brings the machine from `to` as many periods ahead as lie between `from` and `to`.
class Advance {
public:
    Advance(const Snapshot& from, const Snapshot& to, uint32_t periods) : from_{from}, to_{to}, periods_{periods} {
        instructions_ = periods * (to.index - from.index);
    }

    template <class T>
    void exact(T) {}
    void instruction(uint32_t& index) { index += instructions_; }
    void completed(uint32_t& count) { count += instructions_; }
    void oldest(uint32_t) {}
    void program_read() {}

    void reference(uint32_t& ref) {
        if (ref != kNoInstruction) ref += instructions_;
    }

    void countdown(Countdown& c, uint32_t) {
        c.value -= fall();
        c.loads += reloads();
    }

    void progress(Progress& p, uint32_t) {
        p.moved += fall();
        p.loads += reloads();
    }

    void distance(uint32_t, uint32_t) { ++next_; }

    void total(uint32_t& value) {
        value += periods_ * (to_.totals[next_total_] - from_.totals[next_total_]);
        ++next_total_;
    }

    void level(Fifo& fifo, uint32_t, uint32_t& pushes, uint32_t& pops) {
        fifo.inner += periods_ * (to_.inner - from_.inner);
        pushes += periods_ * (to_.pushes - from_.pushes);
        pops += periods_ * (to_.pops - from_.pops);
    }

private:
    uint32_t fall() const { return periods_ * (from_.count[next_].value - to_.count[next_].value); }

    uint32_t reloads() {
        const uint32_t reloads = periods_ * (to_.count[next_].loads - from_.count[next_].loads);
        ++next_;
        return reloads;
    }

    const Snapshot &from_, &to_;
    uint32_t periods_, instructions_, next_ = 0, next_total_ = 0;
};

// How many more periods between the snapshots are certain: 0 if none is.
class Comparison {
public:
    static uint64_t periods(const Program& program, const Snapshot& from, const Snapshot& to) {
        if (from.size != to.size || std::memcmp(from.bytes, to.bytes, to.size) != 0) return 0;
        uint64_t limit = kMany;
        for (uint32_t i = 0; i < to.count_size && limit != 0; ++i) limit = least(limit, of_count(from.count[i], to.count[i]));
        limit = least(limit, of_level(from, to));
        if (limit != 0 && from.index != to.index) limit = least(limit, of_program(program, from, to, limit));
        return limit == kMany ? 0 : limit;  // nothing runs down: an endless loop
    }

private:
    static constexpr uint64_t kMany = ~0u >> 1;

    static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

    static uint64_t of_count(const Snapshot::Count& from, const Snapshot::Count& to) {
        if (from.value == to.value) return kMany;
        if (from.loads != to.loads || from.value < to.value || to.value <= to.floor) return 0;
        return (to.value - to.floor - 1) / (from.value - to.value);
    }

    // Neither end of the FIFO may be met: it only fills, or only empties.
    static uint64_t of_level(const Snapshot& from, const Snapshot& to) {
        if (from.inner == to.inner) return kMany;
        if (to.inner > from.inner && from.pops == to.pops && to.inner <= to.room) {
            return (to.room - to.inner) / (to.inner - from.inner);
        }
        if (to.inner < from.inner && from.pushes == to.pushes && to.inner >= 1) {
            return (to.inner - 1) / (from.inner - to.inner);
        }
        return 0;
    }

    // The instructions in the machine are alike, and so are as many that follow, with the one the dispatcher looks at.
    static uint64_t of_program(const Program& program, const Snapshot& from, const Snapshot& to, uint64_t limit) {
        const uint64_t length = to.index - from.index, behind = to.oldest;
        if (program.common(from.index - behind, to.index - behind, behind) < behind) return 0;
        const uint64_t alike = program.common(from.index, to.index, limit * length + 1);
        return alike == 0 ? 0 : (alike - 1) / length;
    }
};

// Snapshots by hash: a few of each, the oldest is overwritten.
class SnapshotTable {
public:
    explicit SnapshotTable(uint32_t sets) : mask_{sets - 1}, next_(sets), slots_(new Snapshot[kWays * sets]) {
        for (uint64_t i = 0; i < kWays * sets; ++i) slots_[i].hash = 0;
    }

    // The earlier state from which most cycles can be skipped, and how many periods. `state` is remembered.
    struct Found {
        const Snapshot* from;
        uint64_t periods;
    };

    Found find(const Program& program, const Snapshot& state) const {
        Found best{nullptr, 0};
        const Snapshot* const set = &slots_[(state.hash & mask_) * kWays];
        for (unsigned way = 0; way < kWays; ++way) {
            if (set[way].hash != state.hash) continue;
            const uint64_t periods = Comparison::periods(program, set[way], state);
            const uint64_t cycles = periods * (state.cycle - set[way].cycle);
            if (cycles > 0 && (best.from == nullptr || cycles > best.periods * (state.cycle - best.from->cycle))) {
                best = {&set[way], periods};
            }
        }
        return best;
    }

    void insert(const Snapshot& state) {
        const uint64_t set = state.hash & mask_;
        copy(slots_[set * kWays + next_[set]++ % kWays], state);
    }

private:
    static constexpr unsigned kWays = 4;

    static void copy(Snapshot& to, const Snapshot& from) {
        std::memcpy(&to, &from, offsetof(Snapshot, count) + from.count_size * sizeof(Snapshot::Count));
        std::memcpy(to.bytes, from.bytes, from.size);
    }

    uint64_t mask_;
    std::vector<uint8_t> next_;
    std::unique_ptr<Snapshot[]> slots_;
};
