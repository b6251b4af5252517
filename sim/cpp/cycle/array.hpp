// hw/loader.py, hw/feeder.py, hw/array.py: columns into the lanes' ring, steps through the array, sums out of it.
#pragma once

#include "program.hpp"
#include "state.hpp"

// Columns in the lanes' ring. All counts run on; only their differences matter.
struct LaneRing {
    uint32_t loaded = 0;   // columns written
    uint32_t claimed = 0;  // columns of the commands that have started, and of those before
    uint32_t ended = 0;    // columns that the feeder has done with
    uint32_t passing = 0;  // the same, a move of the array later
    uint32_t freed = 0;    // and another one: as the loader sees it
    uint32_t starts = 0;   // commands started
};

class Loader {
public:
    // Combinational: what moves in this cycle. memory, rows : a column is offered. bypass_ready : the post unit takes one.
    struct Move {
        bool column, last, to_lanes, full;
    };

    Move decide(const Commands* c, bool memory, bool rows, bool bypass_ready, const LaneRing& ring, uint32_t depth) const {
        if (c == nullptr) return {};
        if (c->load.bypass) return {memory && bypass_ready, moved_.last(c->load.count), false, false};
        const bool available = c->load.from_rows ? rows : memory, room = ring.loaded - ring.freed < depth;
        return {available && room, moved_.last(c->load.count), available && room, available && !room};
    }

    void step(const Move& move, LaneRing& ring) {
        if (!move.column) return;
        ring.loaded += move.to_lanes;
        moved_.move(move.last);
    }

    template <class Visitor>
    void visit(Visitor& v, const Commands* c) {
        if (c) v.progress(moved_, c->load.count);
    }

private:
    Progress moved_;
};

class Feeder {
public:
    // Combinational: fire needs `advance`.
    bool ready_to_fire(bool values) const { return active_ && values && (now_->array.dense || word_); }
    bool starved(bool values) const { return active_ && !(values && (now_->array.dense || word_)); }
    bool waits() const { return !active_ && decoded_ && !enough_; }
    bool sleeping() const { return !active_ && !decoded_ && word_; }

    // One cycle. c : command at the queue. Returns the columns of a tile whose last step this is, else 0.
    struct Result {
        uint32_t tile_cols;
        bool cmd_taken, word_taken;
    };

    Result step(const Commands* c, uint32_t ref, bool fire, bool words, LaneRing& ring, uint32_t lanes) {
        Result result{};
        bool cmd_end = false, word_end = false;
        if (fire) {
            const bool group_end = in_group_ + 1u == now_->array.n, tile_end = group_end && groups_.value == 1;
            word_end = tile_end || in_word_ + 1u == now_->array.word_steps;
            cmd_end = tile_end && columns_.value <= lanes;
            if (tile_end) result.tile_cols = columns_.value < lanes ? columns_.value : lanes;
            in_group_ = group_end ? 0 : in_group_ + 1;
            in_word_ = word_end ? 0 : in_word_ + 1;
            if (group_end) --groups_.value;
            if (tile_end) {
                groups_.load(now_->array.groups);
                if (!cmd_end) columns_.value -= lanes;
            }
        }
        const bool start = (!active_ || cmd_end) && enough_, there = !start && columns_there(ring);
        const bool dense = active_ && now_->array.dense;
        result.word_taken = !word_ || (fire && word_end && !dense);
        if (result.word_taken) word_ = words;
        spent_ |= cmd_end;
        if (spent_ && decoded_ && !next_->array.held) {
            ring.ended = ring.claimed;
            spent_ = false;
        }
        enough_ = there;
        if (start) begin(ring);
        else if (cmd_end) active_ = false;
        result.cmd_taken = !decoded_;
        if (result.cmd_taken) {
            decoded_ = c != nullptr;
            next_ = c;
            next_ref_ = ref;
        } else if (start) {
            decoded_ = false;
        }
        return result;
    }

    template <class Visitor>
    void visit(Visitor& v, LaneRing& ring, uint32_t depth) {
        const uint32_t ahead = ring.loaded - ring.claimed, used = ring.loaded - ring.freed;
        const bool there = columns_there(ring);
        v.exact(static_cast<uint8_t>(active_ | decoded_ << 1 | word_ << 2 | there << 3 | (used >= depth) << 4 | spent_ << 5 | enough_ << 6));
        v.exact(static_cast<uint16_t>(ring.claimed - ring.ended));
        v.exact(static_cast<uint16_t>(ring.ended - ring.passing));
        v.exact(static_cast<uint16_t>(ring.ended - ring.freed));
        v.distance(depth > used ? depth - used : 0, ring.starts);
        v.distance(decoded_ && !there ? next_->array.k - ahead : 0, ring.starts);
        v.total(ring.loaded);
        v.total(ring.claimed);
        v.total(ring.ended);
        v.total(ring.passing);
        v.total(ring.freed);
        v.total(ring.starts);
        if (decoded_) v.reference(next_ref_);
        if (!active_) return;
        v.reference(ref_);
        v.exact(in_group_);
        if (!now_->array.dense) v.exact(in_word_);
        v.countdown(groups_, 1);
        v.countdown(columns_, lanes_floor_);
    }

    void configure(uint32_t lanes) { lanes_floor_ = lanes; }

private:
    bool columns_there(const LaneRing& ring) const {
        return decoded_ && (next_->array.held || ring.loaded - ring.claimed >= next_->array.k);
    }

    void begin(LaneRing& ring) {
        active_ = true;
        spent_ = false;
        now_ = next_;
        ref_ = next_ref_;
        groups_.load(now_->array.groups);
        columns_.load(now_->array.cols);
        if (!now_->array.held) ring.claimed += now_->array.k;
        ++ring.starts;
    }

    bool active_ = false, decoded_ = false, word_ = false;
    bool spent_ = false, enough_ = false;  // the columns wait for the next command; its columns are there
    uint8_t in_group_ = 0, in_word_ = 0;
    const Commands *now_ = nullptr, *next_ = nullptr;
    uint32_t ref_ = 0, next_ref_ = 0, lanes_floor_ = 0;
    Countdown groups_, columns_;
};

// MacArray without its feeder: the pipeline's tile ends, and the drain.
class MacArray {
public:
    void configure(uint32_t latency, uint32_t depth) {
        latency_ = latency;
        depth_ = depth;
    }

    bool valid() const { return sums_.out; }

    bool advance() const { return total() == 0 || free(); }

    void step(bool advance, bool ready, uint32_t tile_cols, LaneRing& ring, uint32_t ended_before) {
        const uint32_t cols = total();
        const bool take = takes(), copy = cols != 0 && advance;
        room_ = sums_.level() + kSumsMargin <= depth_;
        sums_.tick(valid_, ready);
        valid_ = take;
        left_ -= take;
        if (copy) left_ = static_cast<uint16_t>(cols);
        if (!advance) return;
        stages_ = (stages_ << kBits | tile_cols) & ((1ull << kBits * latency_) - 1);
        ring.freed = ring.passing;
        ring.passing = ended_before;
    }

    bool sleeping() const { return left_ == 0 && !valid_ && sums_.level() == 0 && stages_ == 0 && room_; }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(stages_);
        v.exact(left_);
        v.exact(static_cast<uint8_t>(valid_ | room_ << 1));
        sums_.visit(v);
    }

private:
    static constexpr unsigned kBits = 10;  // of a stage: up to 256 columns
    static_assert(kMaxArrayLatency * kBits < 64, "all stages in a word");

    uint32_t total() const { return stages_ >> kBits * (latency_ - 1) & ((1u << kBits) - 1); }
    bool takes() const { return left_ != 0 && room_; }
    bool free() const { return left_ == 0 || (left_ == 1 && takes()); }

    uint64_t stages_ = 0;  // a field per pipeline stage: columns of the tile that ends there, or 0
    uint16_t left_ = 0;    // columns still to be drained
    uint32_t latency_ = 1, depth_ = 2;
    bool valid_ = false, room_ = false;  // a drained column; room for more
    Fifo sums_;
};
