// hw/reader.py: the read channels and the arbiter that owns AR and R.
#pragma once

#include "program.hpp"
#include "state.hpp"

// Reader, with its _Runs, _Issuer, _Framer and the gearbox of its width.
class Reader {
public:
    void configure(const ArchConfig& arch, unsigned channel) {
        bus_ = arch.bus_bytes;
        bytes_ = arch.out_bytes[channel];
        bus_shift_ = log2_of(bus_);
        byte_shift_ = log2_of(bytes_);
        narrow_ = bytes_ < bus_;
        widen_ = bytes_ > bus_;
        ratio_ = narrow_ ? bus_ / bytes_ : bytes_ / bus_;
        credit_ = room_ = arch.fifo_beats[channel];
        span_ = bus_ * kBurstBeats - 1;
        buffered_ = channel != reader::fetch;
    }

    // Combinational outputs; they depend on registers only.
    bool cmd_ready() const { return !hold_ && (!narrow_ || commands_.writable(kCommandsAhead)); }
    bool valid() const { return buffered_ ? buffer_.valid() : word(); }
    bool requesting() const { return requests_.valid(); }
    uint32_t request_beats() const { return request_beats_[0]; }

    // In the last cycle the command `held` could start but for its `dep`.
    bool waits() const { return waits_; }
    uint32_t held() const { return hold_ref_; }  // its place in the stream

    // A word may go from the FIFO into the buffer although no input moves.
    bool flowing() const { return buffered_ && word() && buffer_.ready(); }

    // Something else may.
    bool awake() const {
        if ((!run_ && (more_ || hold_)) || (run_ && !active_) || fifo_.settling() || commands_.settling()) return true;
        if (active_ && requests_.ready() && credit_ >= burst()) return true;
        if (narrow_) return !framed_ ? framing_ || commands_.level() : !framing_ && commands_.level();
        return widen_ && fifo_.out && !full_;
    }

    // The cycle of a reader that is not awake, in the middle of a run of words: a beat arrives, words move, or both.
    // Returns false, and does nothing, if it is not that simple.
    bool step_inside(bool data, bool taken) {
        if (!framing_ || !framed_ || frame_first_ + frame_left_.value <= ratio_) return false;
        const bool ready = buffer_.ready();
        buffer_.tick(fifo_.out, taken);
        const uint32_t current = (inside_ ? slot_ : first_) | wide_;
        const bool read = ready && fifo_.out && current == last_;
        if (read) {
            inside_ = false;
            first_ = frame_first_;
            last_ = ratio_ - 1;
            wide_ = frame_wide_;
            frame_left_.value -= ratio_ - frame_first_;
            frame_first_ = 0;
            ++credit_;
        } else if (ready && fifo_.out) {
            inside_ = true;
            slot_ = (current + 1) & (ratio_ - 1);
            if (!data) return true;
        }
        fifo_.tick(data, read);
        return true;
    }

    // One cycle. ref : place of the command that is taken. awaited : instructions that must have completed before, 0 for any.
    // data : a beat arrives. taken : of the output. granted : the request is taken. completed : the writer's counter.
    void step(const ReadCommand* cmd, uint32_t ref, uint32_t awaited, bool data, bool taken, bool granted, uint32_t completed) {
        const bool ready = buffered_ ? buffer_.ready() : taken;
        if (buffered_) buffer_.tick(word(), taken);
        const bool read = narrow_ ? step_narrow(cmd, ref, ready) : widen_ ? step_wide(ready) : ready;
        const bool pop = fifo_.out && read;
        issue(granted, completed, pop);
        if (cmd) {
            hold_ = true;
            held_ = *cmd;
            hold_ref_ = ref;
            awaited_ = awaited;
        }
        fifo_.tick(data, read);
    }

    // Nothing is on its way, and words wait at the output, or none are to come: whoever takes the words cannot tell how many
    // are left, until the next burst is requested or there are none. Not for words narrower than the bus.
    bool resting() const {
        const bool words = fifo_.out && (!widen_ || full_), none = !more_ && !active_ && !full_ && fifo_.level() == 0;
        const bool idle = !hold_ && !run_ && !requests_.valid();
        return !narrow_ && idle && (words || none) && credit_ + fifo_.level() == room_;
    }

    uint32_t level() const { return fifo_.level(); }
    uint32_t credit() const { return credit_; }
    uint32_t next_burst() const { return active_ ? burst() : ~0u; }
    uint32_t beats_per_word() const { return widen_ ? ratio_ : 1; }
    uint32_t place() const { return active_ ? beat_ : ~0u; }
    uint32_t left() const { return left_.value; }

    // A resting reader after whole periods in which so many beats were requested and have arrived and gone.
    void request(uint32_t beats) { left_.value -= beats; }

    // A resting reader after `beats` more were taken.
    void take(uint32_t beats) {
        fifo_.inner -= beats;
        credit_ += beats;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(static_cast<uint8_t>(hold_ | active_ << 1 | run_ << 2 | inside_ << 3 | full_ << 4 | framed_ << 5 |
                                     framing_ << 6 | more_ << 7));
        v.exact(static_cast<uint8_t>(buffer_.held | requests_.held << 4));
        v.exact(static_cast<uint16_t>(credit_));
        fifo_.visit(v);
        if (hold_) v.held(hold_ref_, awaited_);
        if (run_ || more_) {  // how long the run is follows from its address and its command
            v.reference(run_ref_);
            v.exact(run_beat_);
            v.exact(following_);
        }
        if (more_) v.countdown(repeats_, 2);
        if (active_) {
            v.reference(ref_);
            v.exact(beat_);
            v.countdown(left_, kBurstBeats);
        }
        for (uint32_t i = 0; i < requests_.held; ++i) v.exact(request_beats_[i]);
        if (widen_) v.exact(slot_);
        if (narrow_) visit_framer(v);
    }

private:
    // Before the buffer.
    bool word() const { return narrow_ ? fifo_.out && framed_ : widen_ ? full_ : fifo_.out; }

    uint32_t beats(uint32_t addr, uint32_t words) const {
        if (!narrow_) return words * ratio_;
        return (words + (addr >> byte_shift_ & (ratio_ - 1)) + ratio_ - 1) / ratio_;
    }

    // Beats of the next burst.
    uint32_t burst() const {
        const uint32_t edge = kBurstBeats - beat_;
        return left_.value <= edge ? left_.value : edge;
    }

    void issue(bool granted, uint32_t completed, bool pop) {
        waits_ = false;
        const uint32_t count = burst();
        const bool take = active_ && requests_.ready() && credit_ >= count, final = take && left_.value <= count;
        credit_ += pop;
        const bool free = !active_ || final, taken = run_ && free;
        if (!take && !granted && !taken && (run_ || !(more_ || hold_))) return;
        if (granted) request_beats_[0] = request_beats_[1];
        if (take) {
            credit_ -= count;
            request_beats_[requests_.held - granted] = static_cast<uint8_t>(count);
        }
        requests_.tick(take, granted);
        if (free) {
            active_ = run_;
            beat_ = run_beat_;
            ref_ = run_ref_;
            if (run_) left_.load(run_left_);
        } else if (take) {
            beat_ = (beat_ + count) % kBurstBeats;
            left_.value -= count;
        }
        if (!run_ || taken) next_run(completed);
    }

    // The next repeat, or the next command if its time has come.
    void next_run(uint32_t completed) {
        run_ = more_;
        if (more_) {
            start(following_, words_);
            following_ = (following_ + stride_) & span_;
            more_ = repeats_.value != 2;
            --repeats_.value;
        } else if (hold_) {
            // 16-bit counts that wrap; a distance in the upper half is a wait
            waits_ = awaited_ != 0 && static_cast<uint16_t>(completed - awaited_) >> 15;
            if (waits_) return;
            hold_ = false;
            run_ = true;
            load();
        }
    }

    void start(uint32_t addr, uint32_t words) {
        run_beat_ = (addr >> bus_shift_) % kBurstBeats;
        run_left_ = beats(addr, words);
    }

    void load() {
        start(held_.addr, held_.words);
        words_ = held_.words;
        repeats_.load(held_.repeats);
        more_ = held_.repeats != 1;
        stride_ = held_.stride;
        following_ = (held_.addr + held_.stride) & span_;
        run_ref_ = hold_ref_;
    }

    bool step_wide(bool ready) {
        const bool accept = !full_ || ready, take = fifo_.out && accept;
        if (ready) full_ = false;
        if (take) {
            full_ = slot_ == ratio_ - 1;
            slot_ = (slot_ + 1) & (ratio_ - 1);
        }
        return accept;
    }

    // Narrower, _Framer and its queue of commands.
    bool step_narrow(const ReadCommand* cmd, uint32_t ref, bool ready) {
        const uint32_t current = (inside_ ? slot_ : first_) | wide_;
        const bool final = current == last_, next = ready && final;
        const bool read = next && framed_, framer_ready = next && fifo_.out;
        if (fifo_.out && framed_ && ready) {
            inside_ = !final;
            slot_ = (current + 1) & (ratio_ - 1);
        }
        frame(framer_ready, cmd != nullptr, ref, cmd);
        return read;
    }

    void frame(bool ready, bool push, uint32_t ref, const ReadCommand* cmd) {
        const uint32_t end = frame_first_ + frame_left_.value;
        const bool final = end <= ratio_, take = framing_ && (!framed_ || ready);
        bool accept = false;
        if (ready) framed_ = false;
        if (take) {
            framed_ = true;
            first_ = frame_first_;
            last_ = (final ? end : ratio_) - 1;
            wide_ = frame_wide_;
            frame_first_ = 0;
            frame_left_.value = final ? 0 : end - ratio_;
        }
        if (!push && framing_ && !(take && final) && !commands_.settling()) return;
        if (take && final && frame_repeats_.value != 1) {
            frame_first_ = frame_following_;
            frame_left_.load(frame_words_);
            --frame_repeats_.value;
            frame_following_ = (frame_following_ + frame_stride_) & (ratio_ - 1);
        } else if (!framing_ || (take && final)) {
            accept = true;
            framing_ = commands_.out;
            if (framing_) load_frame();
        }
        if (push) waiting_.push_back({cmd, ref});
        if (push || accept || commands_.settling()) commands_.tick(push, accept);
    }

    void load_frame() {
        const Waiting& w = waiting_.front();
        frame_first_ = w.cmd->addr >> byte_shift_ & (ratio_ - 1);
        frame_stride_ = w.cmd->stride >> byte_shift_ & (ratio_ - 1);
        frame_following_ = (frame_first_ + frame_stride_) & (ratio_ - 1);
        frame_words_ = w.cmd->words;
        frame_wide_ = w.cmd->wide;
        frame_left_.load(w.cmd->words);
        frame_repeats_.load(w.cmd->repeats);
        frame_ref_ = w.ref;
        waiting_.pop_front();
    }

    template <class Visitor>
    void visit_framer(Visitor& v) {
        commands_.visit(v);
        for (uint32_t i = 0; i < waiting_.size(); ++i) v.reference(waiting_[i].ref);
        if (inside_) v.exact(slot_);
        if (framed_) {
            v.exact(first_);
            v.exact(static_cast<uint8_t>(last_ | wide_ << 7));
        }
        if (!framing_) return;
        v.reference(frame_ref_);
        v.exact(frame_first_);
        v.exact(frame_following_);
        v.countdown(frame_left_, ratio_);
        v.countdown(frame_repeats_, 1);
    }

    struct Waiting {
        const ReadCommand* cmd;
        uint32_t ref;
    };

    uint32_t bus_ = 0, bytes_ = 0, bus_shift_ = 0, byte_shift_ = 0, ratio_ = 0, room_ = 0, span_ = 0;
    bool narrow_ = false, widen_ = false;
    // _Runs
    bool hold_ = false, waits_ = false, run_ = false, more_ = false;  // run_ : one is offered; more_ : others follow
    uint8_t run_beat_ = 0;
    uint32_t hold_ref_ = 0, awaited_ = 0, run_ref_ = 0, run_left_ = 0, words_ = 0, stride_ = 0, following_ = 0;
    ReadCommand held_{};
    Countdown repeats_;
    // _Issuer
    bool active_ = false;
    uint8_t request_beats_[2] = {}, beat_ = 0;
    uint32_t ref_ = 0, credit_ = 0;
    Countdown left_;
    Buffer requests_;
    Fifo fifo_;
    // StreamBuffer at the output
    bool buffered_ = true;
    Buffer buffer_;
    // Narrower, Widener
    bool inside_ = false, full_ = false;
    uint8_t slot_ = 0;
    // _Framer
    bool framing_ = false, framed_ = false;
    uint8_t wide_ = 0, frame_wide_ = 0;  // 1: the words leave in pairs
    uint8_t first_ = 0, last_ = 0, frame_first_ = 0, frame_following_ = 0, frame_stride_ = 0;
    uint32_t frame_ref_ = 0, frame_words_ = 0;
    Countdown frame_left_, frame_repeats_;
    Fifo commands_;
    Ring<Waiting, kCommandsAheadRing> waiting_;
};

// ReadArbiter. The owners of the bursts in flight, and the order in which readers are served.
class ReadArbiter {
public:
    // requests : one bit a reader. Returns the reader whose request is taken in this cycle, or -1.
    int grant(uint32_t requests, bool arready, bool abort) const {
        if (requests == 0 || abort || (arvalid_ && !arready) || !owners_.writable(kReadBursts)) return -1;
        const uint32_t above = requests >> (last_ + 1) << (last_ + 1);
        return __builtin_ctz(above ? above : requests);
    }

    bool arvalid() const { return arvalid_; }
    uint32_t beats() const { return beats_; }
    bool rready() const { return owners_.out; }
    int owner() const { return order_.front(); }
    bool idle() const { return !arvalid_ && owners_.level() == 0; }
    bool awake() const { return arvalid_ || owners_.settling(); }

    void step(int granted, uint32_t beats, bool arready, bool end_of_burst) {
        if (arready) arvalid_ = false;
        if (granted >= 0) {
            last_ = static_cast<uint8_t>(granted);
            arvalid_ = true;
            beats_ = static_cast<uint8_t>(beats);
            order_.push_back(static_cast<uint8_t>(granted));
        }
        if (end_of_burst && owners_.out) order_.pop_front();
        owners_.tick(granted >= 0, end_of_burst);
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(static_cast<uint8_t>(arvalid_ | last_ << 1));
        if (arvalid_) v.exact(beats_);
        owners_.visit(v);
        for (uint32_t i = 0; i < order_.size(); ++i) v.exact(order_[i]);
    }

private:
    bool arvalid_ = false;
    uint8_t last_ = 0, beats_ = 0;
    Fifo owners_;
    Ring<uint8_t, 2 * kReadBursts> order_;
};
