// Parts that the units are made of: counters with a history, rings, and the level of a FIFO.
#pragma once

#include <cstdint>

// Counts down to an end that alone matters; `loads` tells a later value of the same count from one of another.
struct Countdown {
    uint32_t value = 0, loads = 0;

    void load(uint32_t start) {
        value = start;
        ++loads;
    }
};

// Counts up to the length of the command at the head of a queue.
struct Progress {
    uint32_t moved = 0, loads = 0;

    bool last(uint32_t count) const { return moved + 1 == count; }

    void move(bool last) {
        moved = last ? 0 : moved + 1;
        loads += last;
    }
};

// A queue of fixed size (a power of two); the hardware it stands for keeps it from overflowing.
template <class T, unsigned kSize>
class Ring {
    static_assert((kSize & (kSize - 1)) == 0, "a power of two");

public:
    void push_back(const T& value) { items_[(head_ + size_++) & (kSize - 1)] = value; }

    void pop_front() {
        head_ = (head_ + 1) & (kSize - 1);
        --size_;
    }

    T& front() { return items_[head_]; }
    const T& front() const { return items_[head_]; }
    T& operator[](uint64_t i) { return items_[(head_ + i) & (kSize - 1)]; }
    uint32_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    void clear() { head_ = size_ = 0; }

private:
    T items_[kSize] = {};
    uint32_t head_ = 0, size_ = 0;
};

// Level of Amaranth's SyncFIFOBuffered: entries in its memory, and whether its output register holds one.
struct Fifo {
    uint16_t inner = 0;
    bool out = false;

    bool writable(unsigned depth) const { return inner != depth - 1; }
    unsigned level() const { return inner + out; }
    bool settling() const { return inner != 0 && !out; }

    // write : an entry is accepted. read : r_en, whether or not there is an entry. Returns whether one reached the output.
    bool tick(bool write, bool read) {
        const bool advance = inner != 0 && (!out || read);
        inner += write - advance;
        out = advance || (out && !read);
        return advance;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(static_cast<uint16_t>(inner << 1 | out));
    }
};

// hw/stream_util.py, StreamBuffer: two places, registers on both sides.
struct Buffer {
    uint8_t held = 0;

    bool valid() const { return held != 0; }
    bool ready() const { return held != 2; }

    // offered : at the input. taken : what follows is ready. Returns whether anything moved.
    bool tick(bool offered, bool taken) {
        const bool enter = offered && ready(), leave = taken && valid();
        held += enter - leave;
        return enter || leave;
    }
};
