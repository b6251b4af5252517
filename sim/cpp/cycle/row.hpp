// hw/row.py, hw/exp2.py, hw/rownorm.py, hw/rowscale.py, hw/scatter.py: the row unit.
#pragma once

#include "program.hpp"
#include "state.hpp"

// hw/pipeline.py: stages that move together. One bit per stage.
template <unsigned kStages>
class Pipeline {
public:
    bool valid() const { return stages_ >> (kStages - 1) & 1; }
    bool enabled(bool ready) const { return !valid() || ready; }
    bool empty() const { return stages_ == 0; }

    void step(bool enter, bool ready) {
        if (enabled(ready)) stages_ = (stages_ << 1 | enter) & ((1u << kStages) - 1);
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(stages_);
    }

private:
    uint32_t stages_ = 0;
};

class Scatter {
public:
    bool ready() const { return left_ == 0; }
    bool valid() const { return left_ != 0; }

    void step(bool load, bool ready, uint32_t rows) {
        if (load && left_ == 0) left_ = static_cast<uint8_t>(rows);
        else if (left_ != 0 && ready) --left_;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(left_);
    }

private:
    uint8_t left_ = 0;
};

class Gather {
public:
    bool ready(uint32_t rows) const { return count_ != rows; }
    bool valid(uint32_t rows) const { return count_ == rows; }

    void step(bool enter, bool ready, uint32_t rows) {
        if (count_ == rows) count_ = ready ? 0 : count_;
        else count_ += enter;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(count_);
    }

private:
    uint8_t count_ = 0;
};

class RowCollector {
public:
    bool columns() const { return state_ == kColumns; }
    bool is_max() const { return job_->row.is_max; }
    bool giving() const { return state_ == kGive; }
    bool busy() const { return state_ != kIdle; }
    const Commands* job() const { return job_; }
    bool is_exp() const { return !job_->row.is_norm; }
    uint32_t ref() const { return ref_; }

    // Returns whether the command at the queue is taken.
    bool step(const Commands* c, uint32_t ref, bool take, bool job_ready) {
        bool ready = false;
        switch (state_) {
            case kIdle:
                ready = true;
                if (c) state_ = kColumns;
                break;
            case kColumns:
                if (take && left_.value == 1) state_ = is_max() ? kIdle : job_->row.is_norm ? kSquares : kGive;
                break;
            case kSquares:
                state_ = kSum;
                break;
            case kSum:
                state_ = kGive;
                break;
            case kGive:
                ready = job_ready;
                if (job_ready) state_ = c ? kColumns : kIdle;
                break;
        }
        if (c && ready) {
            job_ = c;
            ref_ = ref;
            left_.load(c->row.cols);
            return true;
        }
        if (take) --left_.value;
        return false;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(state_);
        if (state_ == kIdle) return;
        v.reference(ref_);
        v.countdown(left_, 1);
    }

private:
    enum State : uint8_t { kIdle, kColumns, kSquares, kSum, kGive };
    State state_ = kIdle;
    const Commands* job_ = nullptr;
    uint32_t ref_ = 0;
    Countdown left_;
};

class ExpPass {
public:
    bool active() const { return left_.value != 0; }
    bool idle() const { return !active() && stages_ == 0; }
    bool scale_valid() const { return scale_; }
    bool valid(bool scale_ready) const { return stages_ >> (kExpSteps - 1) & 1 && !(scale_ && !scale_ready); }

    bool enabled(bool ready, bool scale_ready) const {
        return !(scale_ && !scale_ready) && (!(stages_ >> (kExpSteps - 1) & 1) || ready);
    }

    // load : a job of `cols` columns starts. take : a column enters.
    void step(const Commands* load, uint32_t ref, bool take, bool enabled, bool scale_ready) {
        const bool sum = enabled && stages_ >> (kExpSteps - 1) & 1 && lasts_ >> (kExpSteps - 1) & 1;
        const bool last = take && last_ && left_.value == 1;
        if (enabled) {
            stages_ = (stages_ << 1 | take) & ((1 << kExpSteps) - 1);
            lasts_ = (lasts_ << 1 | last) & ((1 << kExpSteps) - 1);
        }
        if (load) {
            left_.load(load->row.cols);
            last_ = load->row.last;
            ref_ = ref;
        } else if (take) {
            --left_.value;
        }
        if (sum) scale_ = true;
        else if (scale_ready) scale_ = false;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(stages_);
        v.exact(lasts_);
        v.exact(static_cast<uint8_t>(scale_ | active() << 1));
        if (!active()) return;
        v.reference(ref_);
        v.countdown(left_, 1);
    }

private:
    uint8_t stages_ = 0, lasts_ = 0;
    bool scale_ = false, last_ = false;
    uint32_t ref_ = 0;
    Countdown left_;
};

class RowScale {
public:
    bool ready() const { return scatter_.ready(); }
    bool valid(uint32_t rows) const { return gather_.valid(rows); }
    bool busy() const { return inside_ != 0; }

    void step(bool enter, bool ready, uint32_t rows) {
        const bool gather_ready = gather_.ready(rows), enabled = scale_.enabled(gather_ready);
        const bool taken = enter && scatter_.ready(), left = gather_.valid(rows) && ready;
        gather_.step(scale_.valid(), ready, rows);
        scale_.step(scatter_.valid(), gather_ready);
        scatter_.step(enter, enabled, rows);
        inside_ += taken - left;
    }

    template <class Visitor>
    void visit(Visitor& v) {
        scatter_.visit(v);
        scale_.visit(v);
        gather_.visit(v);
        v.exact(inside_);
    }

private:
    Scatter scatter_;
    Pipeline<kScaleLatency> scale_;
    Gather gather_;
    uint8_t inside_ = 0;
};

class NormScale {
public:
    bool busy() const { return busy_; }
    bool valid(uint32_t rows) const { return gather_.valid(rows); }
    const Commands* job() const { return job_; }
    uint32_t ref() const { return ref_; }

    void step(const Commands* job, uint32_t ref, bool ready, uint32_t rows) {
        const bool load = job && !busy_, leave = gather_.valid(rows) && ready;
        const bool gather_ready = gather_.ready(rows), root_ready = root_.enabled(gather_ready);
        const bool variance_ready = variance_.enabled(root_ready);
        gather_.step(root_.valid(), ready, rows);
        root_.step(variance_.valid(), gather_ready);
        variance_.step(scatter_.valid(), root_ready);
        scatter_.step(load, variance_ready, rows);
        if (load) {
            busy_ = true;
            job_ = job;
            ref_ = ref;
        } else if (leave) {
            busy_ = false;
        }
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(static_cast<uint8_t>(busy_));
        scatter_.visit(v);
        variance_.visit(v);
        root_.visit(v);
        gather_.visit(v);
        if (busy_) v.reference(ref_);
    }

private:
    bool busy_ = false;
    const Commands* job_ = nullptr;
    uint32_t ref_ = 0;
    Scatter scatter_;
    Pipeline<kVarianceLatency> variance_;
    Pipeline<kRootLatency> root_;
    Gather gather_;
};

class NormPass {
public:
    bool active() const { return left_.value != 0; }
    bool valid() const { return stages_ >> (kNormSteps - 1) & 1; }
    bool idle() const { return !active() && stages_ == 0; }
    bool enabled(bool ready) const { return !valid() || ready; }
    bool job_ready() const { return !active() && (stages_ & ((1u << kNormRowSteps) - 1)) == 0; }  // the first steps use the last job's rows

    void step(const Commands* load, uint32_t ref, bool take, bool enabled) {
        if (enabled) stages_ = (stages_ << 1 | take) & ((1 << kNormSteps) - 1);
        if (load) {
            left_.load(load->row.cols);
            ref_ = ref;
        } else if (take) {
            --left_.value;
        }
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(stages_);
        v.exact(static_cast<uint8_t>(active()));
        if (!active()) return;
        v.reference(ref_);
        v.countdown(left_, 1);
    }

private:
    uint16_t stages_ = 0;
    uint32_t ref_ = 0;
    Countdown left_;
};

class RowUnit {
public:
    void configure(const ArchConfig& arch) {
        rows_ = arch.rows;
        depth_ = 2 * arch.row_depth + 1;
    }

    // Combinational, from registers.
    bool ready() const { return collector_.columns() && (collector_.is_max() || fifo_.writable(depth_)); }
    bool valid() const { return norm_.valid() || exp_.valid(scale_.ready()); }
    bool scale_valid() const { return scale_.valid(rows_); }
    bool settling() const { return fifo_.settling() || (fifo_.out && columns_.ready()); }

    // Only the first pass has work, and waits for a column.
    bool collecting() const {
        return collector_.columns() && exp_.idle() && !exp_.scale_valid() && !scale_.busy() && !norm_scale_.busy() && norm_.idle();
    }

    bool busy() const {
        return collector_.busy() || fifo_.out || columns_.valid() || !exp_.idle() || exp_.scale_valid() || scale_.busy() || norm_scale_.busy() ||
               !norm_.idle();
    }

    struct Result {
        bool cmd_taken, params_taken;
    };

    // One cycle. c, ref : command at the queue. column : one is taken from the post unit. params : norm parameters are
    // offered. ready, scale_ready : the outputs are taken.
    Result step(const Commands* c, uint32_t ref, bool column, bool params, bool ready, bool scale_ready) {
        const bool job = collector_.giving(), is_exp = job && collector_.is_exp();
        const bool exp_turn = is_exp && !norm_scale_.busy() && norm_.idle(), norm_turn = exp_.idle();
        const bool exp_load = exp_turn && !exp_.active(), norm_job = job && !is_exp;
        const bool job_ready = is_exp ? exp_load : !norm_scale_.busy();
        const bool norm_ready = norm_.job_ready() && norm_turn, norm_load = norm_scale_.valid(rows_) && norm_ready;
        const bool sums_ready = scale_.ready(), exp_enabled = exp_.enabled(ready, sums_ready);
        const bool norm_enabled = norm_.enabled(ready);
        const bool exp_ready = exp_.active() && exp_enabled, norm_takes = params && norm_.active() && norm_enabled;
        const bool exp_take = columns_.valid() && exp_ready, norm_take = columns_.valid() && norm_takes;
        const bool push = column && !collector_.is_max(), sums = exp_.scale_valid();
        const Commands* const given = job ? collector_.job() : nullptr;

        norm_.step(norm_load ? norm_scale_.job() : nullptr, norm_scale_.ref(), norm_take, norm_enabled);
        norm_scale_.step(norm_job ? given : nullptr, collector_.ref(), norm_ready, rows_);
        exp_.step(exp_load ? given : nullptr, collector_.ref(), exp_take, exp_enabled, sums_ready);
        scale_.step(sums, scale_ready, rows_);
        pushes_ += push;
        const bool room = columns_.ready();
        columns_.tick(fifo_.out, exp_ready || norm_takes);
        pops_ += fifo_.tick(push, room);
        return {collector_.step(c, ref, column, job_ready), norm_take};
    }

    template <class Visitor>
    void visit(Visitor& v) {
        collector_.visit(v);
        exp_.visit(v);
        scale_.visit(v);
        norm_scale_.visit(v);
        norm_.visit(v);
        v.exact(columns_.held);
        v.level(fifo_, depth_, pushes_, pops_);
    }

private:
    uint32_t rows_ = 0, depth_ = 0, pushes_ = 0, pops_ = 0;
    RowCollector collector_;
    Fifo fifo_;
    Buffer columns_;
    ExpPass exp_;
    RowScale scale_;
    NormScale norm_scale_;
    NormPass norm_;
};
