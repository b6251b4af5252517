// hw/writer.py: words in, bursts out, instructions completed in program order.
#pragma once

#include "program.hpp"
#include "state.hpp"

class Writer {
public:
    void configure(const ArchConfig& arch) {
        ratio_ = arch.bus_bytes / arch.write_bytes;
        word_shift_ = log2_of(arch.write_bytes);
        span_ = kBurstBeats * ratio_ - 1;
        beats_room_ = arch.writer_beats - kRoomMargin;
    }

    // Combinational outputs; they depend on registers only.
    bool cmd_ready() const { return !hold_; }
    bool ready() const { return active_ && current_.store && room_; }
    bool awvalid() const { return bursts_.out; }
    uint32_t aw_beats() { return order_[addressed_].beats; }
    bool allowed() const { return lead_ > 0 || (lead_ == 0 && bursts_.out); }
    bool wvalid() const { return beats_.out && allowed(); }
    bool bready() const { return tokens_.out && !token_.front().null; }
    bool idle() const { return !hold_ && !active_ && !full_ && !ended_ && tokens_.level() == 0; }
    uint32_t completed() const { return completed_; }
    bool answers_last() { return order_.front().last; }  // the oldest burst is its instruction's last

    // Without a word or a command nothing moves in this cycle.
    bool waiting(bool bvalid) const {
        const bool packing = full_ || ended_ || (hold_ && !active_) || (active_ && !current_.store) || room_ != has_room();
        const bool sending = bursts_.level() || beats_.settling() || (beats_.out && lead_ > 0) || tokens_.settling();
        return !packing && !sending && !(tokens_.out && (token_.front().null || bvalid));
    }

    // One cycle. word : the store unit offers a column. Returns whether an instruction was completed.
    bool step(const Commands* c, uint32_t ref, bool word, bool awready, bool wready, bool bvalid) {
        const bool push = full_, null = ended_, commit = push && (end_ || beat_ == kBurstBeats - 1);
        const Token token{null, null || (last_ && commit)};
        const bool aw = bursts_.out && awready, w = wvalid() && wready;
        const bool token_read = tokens_.out && (token_.front().null || bvalid);
        const bool done = token_read && token_.front().last;
        const bool room = has_room();
        const bool beats_read = wready && allowed();

        beats_.tick(push, beats_read);
        const bool last = w && send();
        bursts_.tick(commit, awready);
        addressed_ += aw;
        if (push) count_beat(commit);
        pack(c, ref, word);
        lead_ += aw - last;
        tokens_.tick(commit || null, token_read);
        if (commit || null) token_.push_back(token);
        if (token_read) retire();
        completed_ += done;
        room_ = room;
        return done;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(static_cast<uint8_t>(hold_ | active_ << 1 | full_ << 2 | end_ << 3 | last_ << 4 | ended_ << 5 | room_ << 6));
        v.exact(beat_);
        v.exact(lead_);
        v.exact(open_beats_);
        v.exact(sent_beats_);
        v.exact(static_cast<uint16_t>(addressed_ | sent_ << 8));
        beats_.visit(v);
        bursts_.visit(v);
        tokens_.visit(v);
        for (uint32_t i = 0; i < order_.size(); ++i) v.exact(static_cast<uint8_t>(order_[i].beats | order_[i].last << 7));
        for (uint32_t i = 0; i < token_.size(); ++i) v.exact(static_cast<uint8_t>(token_[i].null | token_[i].last << 1));
        v.completed(completed_);
        if (hold_) v.reference(hold_ref_);
        if (!active_) return;
        v.reference(ref_);
        v.exact(place_);
        v.exact(following_);
        v.countdown(left_, 1 + current_.wide);
        v.countdown(repeats_, 1);
    }

private:
    static constexpr unsigned kWriteRoom = kWriteBursts - kRoomMargin;

    bool has_room() const {
        return beats_.level() <= beats_room_ && bursts_.level() <= kWriteRoom && tokens_.level() <= kWriteRoom;
    }

    // null : an instruction that stores nothing. last : it ends an instruction.
    struct Token {
        bool null, last;
    };

    struct Burst {
        uint8_t beats;
        bool last;
    };

    // _Packer
    void pack(const Commands* c, uint32_t ref, bool word) {
        const uint32_t wide = current_.wide;  // 1: a column is two words
        const bool take = word && ready(), final = left_.value == 1 + wide;
        const bool null = active_ && !current_.store && room_;
        const bool done = (take && final && repeats_.value == 1) || null;
        full_ = false;
        ended_ = null;
        if (take) {
            full_ = final || ((place_ | wide) & (ratio_ - 1)) == ratio_ - 1;
            beat_ = static_cast<uint8_t>(place_ / ratio_);
            end_ = final;
            last_ = done;
            place_ = ((place_ | wide) + 1) & span_;
            left_.value -= 1 + wide;
            if (final) {
                place_ = following_;
                left_.load(current_.words);
                --repeats_.value;
                following_ = (following_ + (current_.stride >> word_shift_)) & span_;
            }
        }
        const bool free = !hold_;
        if (!active_ || done) {
            active_ = hold_;
            if (hold_) load();
            hold_ = false;
        }
        if (c == nullptr || !free) return;
        hold_ = true;
        held_ = c->write;
        hold_ref_ = ref;
    }

    void load() {
        current_ = held_;
        ref_ = hold_ref_;
        place_ = current_.addr >> word_shift_ & span_;
        following_ = (place_ + (current_.stride >> word_shift_)) & span_;
        left_.load(current_.words);
        repeats_.load(current_.repeats);
    }

    // A beat of the open burst was queued.
    void count_beat(bool commit) {
        ++open_beats_;
        if (!commit) return;
        order_.push_back({open_beats_, last_});
        open_beats_ = 0;
    }

    // A beat leaves on W; returns whether it is its burst's last.
    bool send() {
        if (++sent_beats_ != order_[sent_].beats) return false;
        sent_beats_ = 0;
        ++sent_;
        return true;
    }

    void retire() {
        if (!token_.front().null) {
            order_.pop_front();
            --addressed_;
            --sent_;
        }
        token_.pop_front();
    }

    uint32_t ratio_ = 0, word_shift_ = 0, span_ = 0, beats_room_ = 0;
    bool hold_ = false, active_ = false, full_ = false, end_ = false, last_ = false, ended_ = false, room_ = false;
    uint8_t beat_ = 0, open_beats_ = 0, sent_beats_ = 0;
    int16_t lead_ = 0;
    uint32_t hold_ref_ = 0, ref_ = 0, place_ = 0, following_ = 0, completed_ = 0;
    WriteCommand held_{}, current_{};
    Countdown left_, repeats_;
    Fifo beats_, bursts_, tokens_;
    Ring<Burst, 2 * kWriteBursts> order_;  // bursts not yet answered
    uint32_t addressed_ = 0, sent_ = 0;            // of them: accepted on AW, finished on W
    Ring<Token, 2 * kWriteBursts> token_;
};
