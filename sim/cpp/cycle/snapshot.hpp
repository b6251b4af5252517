// What a moment of the machine has in common with another.
//
// A snapshot has four parts. `bytes` must be equal. `count`: numbers that matter only at their end (columns left, words
// left). The FIFO of the row unit, which may only fill or only empty. The fetch channel, while it rests. Of the instructions
// there are only the commands that a unit holds; where they stand in the unit's stream does not matter.
#pragma once

#include <algorithm>
#include <cstring>

#include "core.hpp"

struct Snapshot {
    struct Count {
        uint32_t value, loads;
    };

    struct Level {
        uint32_t inner, pushes, pops, most;
    };

    struct Fetch {
        bool resting;
        uint32_t level, credit, burst, bursts, beats_per_word, place, left;
    };

    uint64_t cycle, hash;       // hash : of the bytes
    uint64_t whole;             // of bytes and counts
    uint64_t stores, history;   // stores noted, checkpoints recorded by now
    Dispatcher dispatcher;
    uint32_t era, index, completed, size, count_size, total_size;
    Level level;
    Fetch fetch;
    Counts counts;
    uint32_t totals[6];
    uint32_t seen[unit::kCount];    // of each stream: commands that the unit has seen
    uint32_t behind[unit::kCount];  // and that wait behind these
    Count* count;
    uint8_t* bytes;
};

// The present, with room for all that a snapshot may hold, and the values at which counts matter.
struct Present : Snapshot {
    Present() {
        count = counts_buffer;
        bytes = bytes_buffer;
    }

    static constexpr unsigned kBytes = 2048, kCounts = 96;
    uint32_t floors[kCounts];
    uint32_t held[unit::kCount];  // place of the first command that the unit holds, or will see next
    Count counts_buffer[kCounts];
    uint8_t bytes_buffer[kBytes];
};

// Visitor that fills a snapshot.
class Capture {
public:
    Capture(const Program& program, Present& to, uint64_t cycle) : program_{program}, to_{to} {
        to_.cycle = cycle;
        to_.size = to_.count_size = to_.total_size = 0;
        to_.fetch.resting = false;
    }

    template <class T>
    void exact(T value) {
        std::memcpy(to_.bytes + to_.size, &value, sizeof value);
        to_.size += sizeof value;
    }

    void instruction(uint32_t index) { to_.index = index; }
    void completed(uint32_t count) { to_.completed = count; }
    void unit(unsigned unit) { unit_ = unit; }

    // A unit's queue. taken : the place of its next command.
    void stream(unsigned unit, uint32_t taken, const Fifo& queue) {
        unit_ = unit;
        to_.held[unit] = taken;
        to_.seen[unit] = taken + queue.out;
        to_.behind[unit] = queue.inner;
        exact(static_cast<uint8_t>(queue.out | queue.settling() << 1));
        if (queue.out) exact(program_.number(unit, taken));
    }

    void reference(uint32_t place) {
        if (unit_ == unit::kCount) return;  // the fetch channel has no stream
        if (place < to_.held[unit_]) to_.held[unit_] = place;
        exact(static_cast<uint16_t>(to_.seen[unit_] - place));
        exact(program_.number(unit_, place));
    }

    void held(uint32_t place, uint32_t) { reference(place); }
    void countdown(const Countdown& c, uint32_t floor) { add(c.value, c.loads, floor); }
    void progress(const Progress& p, uint32_t count) { add(count - p.moved, p.loads, 1); }
    void distance(uint32_t value, uint32_t loads) { add(value, loads, 0); }
    void total(uint32_t value) { to_.totals[to_.total_size++] = value; }

    void level(const Fifo& fifo, uint32_t depth, uint32_t pushes, uint32_t pops) {
        exact(static_cast<uint8_t>(fifo.out | (fifo.inner == 0) << 1 | !fifo.writable(depth) << 2));
        to_.level = {fifo.inner, pushes, pops, depth - 2};
    }

    void fetch(const Reader& reader, uint32_t bursts) {
        to_.fetch = {true, reader.level(), reader.credit(), reader.next_burst(), bursts, reader.beats_per_word(),
                     reader.place(), reader.left()};
    }

    // The counts so far run down with the program: they are not hashed.
    void program_read() { program_counts_ = to_.count_size; }

    void hash() {
        uint64_t h = to_.size;
        std::memset(to_.bytes + to_.size, 0, 8);
        for (uint32_t i = 0; i < to_.size; i += 8) {
            uint64_t word;
            std::memcpy(&word, to_.bytes + i, sizeof word);
            h = mix(h, word);
        }
        to_.hash = h;
        for (uint32_t i = program_counts_; i < to_.count_size; ++i) h = mix(h, to_.count[i].value);
        to_.whole = mix(h, to_.level.inner);
    }

private:
    void add(uint32_t value, uint32_t loads, uint32_t floor) {
        to_.floors[to_.count_size] = floor;
        to_.count[to_.count_size++] = {value, loads};
    }

    static uint64_t mix(uint64_t h, uint64_t word) {
        const auto product = static_cast<unsigned __int128>(h ^ word ^ 0x9E3779B97F4A7C15ull) * 0xD6E8FEB86659FD93ull;
        return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }

    const Program& program_;
    Present& to_;
    uint32_t program_counts_ = 0;
    unsigned unit_ = 0;
};

// Visitor that moves the machine on in the program, as if it had met its state there.
class Move {
public:
    // As much further, `times` over, as `to` is than `from`.
    Move(const Program& program, const Snapshot& from, const Snapshot& to, uint32_t times)
        : program_{program}, instructions_{times * (to.index - from.index)},
          completed_{times * (to.completed - from.completed)} {
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            places_[unit] = times * (to.seen[unit] - from.seen[unit]);
            behind_[unit] = to.behind[unit] - from.behind[unit];
        }
    }

    template <class T>
    void exact(T) {}
    void instruction(uint32_t& index) { index += instructions_; }
    void completed(uint32_t& count) { count += completed_; }
    void unit(unsigned unit) { unit_ = unit; }
    void program_read() {}

    void stream(unsigned unit, uint32_t& taken, Fifo& queue) {
        unit_ = unit;
        taken += places_[unit];
        queue.inner += behind_[unit];
    }

    void reference(uint32_t& place) { place += places_[unit_]; }

    void held(uint32_t& place, uint32_t& awaited) {
        reference(place);
        if (unit_ != unit::kCount) awaited = program_.awaited(unit_, place);
    }

    void countdown(Countdown&, uint32_t) {}
    void progress(Progress&, uint32_t) {}
    void distance(uint32_t, uint32_t) {}
    void total(uint32_t) {}
    void level(Fifo&, uint32_t, uint32_t, uint32_t) {}
    void fetch(Reader&, uint32_t) {}

private:
    const Program& program_;
    const uint32_t instructions_, completed_;
    uint32_t places_[unit::kCount + 1] = {}, behind_[unit::kCount];  // the fetch channel's place stays
    unsigned unit_ = 0;
};

// Visitor that brings the machine from `to` as many periods ahead as lie between `from` and `to`, but for its place in the
// program.
class Advance {
public:
    Advance(const Snapshot& from, const Snapshot& to, uint32_t periods) : from_{from}, to_{to}, periods_{periods} {}

    template <class T>
    void exact(T) {}
    void instruction(uint32_t) {}
    void completed(uint32_t) {}
    void unit(unsigned) {}
    void stream(unsigned, uint32_t, const Fifo&) {}
    void reference(uint32_t) {}
    void held(uint32_t, uint32_t) {}
    void program_read() {}

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
        fifo.inner += periods_ * (to_.level.inner - from_.level.inner);
        pushes += periods_ * (to_.level.pushes - from_.level.pushes);
        pops += periods_ * (to_.level.pops - from_.level.pops);
    }

    void fetch(Reader& reader, uint32_t& bursts) {
        reader.take(periods_ * (from_.fetch.level - to_.fetch.level));
        reader.request(periods_ * (from_.fetch.left - to_.fetch.left));
        bursts += periods_ * (to_.fetch.bursts - from_.fetch.bursts);
    }

private:
    uint32_t fall() const { return periods_ * (from_.count[next_].value - to_.count[next_].value); }

    uint32_t reloads() {
        const uint32_t reloads = periods_ * (to_.count[next_].loads - from_.count[next_].loads);
        ++next_;
        return reloads;
    }

    const Snapshot &from_, &to_;
    const uint32_t periods_;
    uint32_t next_ = 0, next_total_ = 0;
};
