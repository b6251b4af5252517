// hw/post.py, hw/store.py: the post unit and the store unit.
#pragma once

#include "program.hpp"
#include "state.hpp"

class Post {
public:
    // Which operands are offered.
    struct Operands {
        bool acc, bypass, params, residual, scale;
    };

    struct Result {
        bool take, last, waits, blocked, params_taken, done;
    };

    // What leaves the skid behind the last stage.
    bool out_valid() const { return kept_ || (stages_ >> kLast & kValid); }
    bool out_rows() const { return kept_ ? kept_rows_ : stages_ >> kLast & kRows; }
    bool sleeping() const { return stages_ == 0 && flushed_ == 0 && !kept_; }

    // One cycle. out_ready : what follows takes the column that is offered.
    Result step(const Commands* c, const Operands& offered, bool out_ready) {
        const bool advance = !kept_ || !(stages_ >> kLast & kValid), keep = out_valid() && !out_ready;
        kept_rows_ = out_rows();
        kept_ = keep;
        Result result{};
        uint64_t enter = 0;
        bool loading = false;
        if (c) {
            const auto& post = c->post;
            if (post.load_table) {
                loading = true;
                load_table(offered.params, advance, result);
            } else {
                const bool inputs = ready(post, offered);
                result.take = inputs && advance;
                result.waits = !inputs;
                result.blocked = inputs && !advance;
                if (result.take) {
                    result.last = index_.last(post.cols);
                    result.params_taken = post.by_column;
                    result.done = result.last;
                    enter = kValid | post.psum_out * kKeep | post.rows * kRows;
                    index_.move(result.last);
                }
            }
        }
        if (!loading) flushed_ = 0;
        if (advance) move(enter);
        return result;
    }

    template <class Visitor>
    void visit(Visitor& v, const Commands* c) {
        v.exact(stages_);
        v.exact(static_cast<uint8_t>(kept_ | (kept_ && kept_rows_) << 1));
        v.exact(entry_);
        v.exact(flushed_);
        if (!c || c->post.load_table) return;
        v.exact(static_cast<uint8_t>(index_.moved == 0));
        v.progress(index_, c->post.cols);
    }

private:
    static constexpr uint64_t kValid = 1, kKeep = 2, kRows = 4, kBoth = kValid | kKeep;
    static constexpr unsigned kBits = 4, kLast = kBits * (kPostStages - 1);  // of a stage
    static_assert(kBits * kPostStages < 64, "all stages in a word");
    static constexpr uint64_t kStageMask = (1ull << kBits * kPostStages) - 1;

    template <class Command>
    bool ready(const Command& post, const Operands& offered) const {
        const bool source = post.source == source::ZERO || (post.source == source::ARRAY && offered.acc) ||
                            (post.source == source::STREAM && offered.bypass);
        const bool owed = (stages_ & kBoth) == kBoth || (stages_ >> kBits & kBoth) == kBoth;
        const bool keep_busy = owed && post.psum_in && index_.moved == 0;
        return source && (!post.by_column || offered.params) && (!post.by_row || offered.scale) &&
               (!post.residual || offered.residual) && !keep_busy;
    }

    void load_table(bool params, bool advance, Result& result) {
        const bool ready = params && flushed_ == kTableFlush;
        if (flushed_ != kTableFlush && advance) ++flushed_;
        if (!ready) return;
        result.params_taken = entry_ % 8 == 7;
        result.done = entry_ == 8 * kTableWords - 1;
        entry_ = result.done ? 0 : entry_ + 1;
    }

    // Partial sums end after the third stage: they are no output.
    void move(uint64_t enter) {
        if (stages_ >> 2 * kBits & kKeep) stages_ &= ~(kValid << 2 * kBits);
        stages_ = (stages_ << kBits | enter) & kStageMask;
    }

    uint64_t stages_ = 0;
    bool kept_ = false, kept_rows_ = false;  // StreamSkid: a column kept aside, and where it goes
    uint16_t entry_ = 0;
    uint8_t flushed_ = 0;
    Progress index_;
};

// Store, with its Transposer.
class Store {
public:
    void configure(const ArchConfig& arch) {
        columns_ = arch.lanes;
        words_ = arch.rows;
    }

    struct Result {
        bool take, last, word;
    };

    bool owes() const { return owed_ != 0; }

    // Combinational. column : the command's source offers one. ready : the writer takes a word. word : one is offered.
    Result decide(const Commands* c, bool column, bool ready) const {
        Result result{};
        const bool valid = c && column;
        if (valid) {
            const auto& store = c->store;
            result.take = store.transposed ? !full(filling_) : owed_ == 0 && ready;
            result.last = moved_.last(store.cols);
        }
        result.word = owed_ != 0 ? out_ : valid && !c->store.transposed;
        return result;
    }

    void step(const Commands* c, const Result& result, bool ready) {
        const bool transposed = result.take && c->store.transposed;
        const bool word_left = owed_ != 0 && result.word && ready;
        if (transposed || owed_ != 0 || out_) transpose(transposed, result.last, ready);
        const bool block = transposed && (result.last || moved_.moved % columns_ == columns_ - 1);
        owed_ += (block ? words_ : 0) - word_left;
        if (result.take) moved_.move(result.last);
    }

    template <class Visitor>
    void visit(Visitor& v, const Commands* c) {
        v.exact(static_cast<uint8_t>(out_ | (filling_ ^ reading_) << 1 | full(reading_) << 2 | full(reading_ ^ 1) << 3));
        v.exact(column_);
        v.exact(row_);
        v.exact(owed_);
        if (!c) return;
        if (c->store.transposed) v.exact(static_cast<uint8_t>(moved_.moved % columns_));
        v.progress(moved_, c->store.cols);
    }

private:
    bool full(unsigned bank) const { return full_ >> bank & 1; }

    void transpose(bool write, bool last, bool ready) {
        const bool read = full(reading_) && (!out_ || ready);
        if (write) {
            const bool end = last || column_ == columns_ - 1;
            column_ = end ? 0 : column_ + 1;
            if (end) {
                full_ |= 1 << filling_;
                filling_ ^= 1;
            }
        }
        if (read && ++row_ == words_) {
            row_ = 0;
            full_ &= ~(1 << reading_);
            reading_ ^= 1;
        }
        if (ready || read) out_ = read;
    }

    uint32_t columns_ = 0, words_ = 0;
    bool out_ = false;
    uint8_t full_ = 0, filling_ = 0, reading_ = 0, column_ = 0, row_ = 0;
    uint16_t owed_ = 0;
    Progress moved_;
};
