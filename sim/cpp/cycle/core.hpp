// hw/dispatch.py and hw/top.py: the dispatcher, its command queues, the units, and the streams between them.
#pragma once

#include "../timing.hpp"
#include "array.hpp"
#include "post.hpp"
#include "program.hpp"
#include "reader.hpp"
#include "row.hpp"
#include "state.hpp"
#include "writer.hpp"

class Dispatcher {
public:
    bool fetching() const { return state_ == kFetch; }
    bool requesting() const { return state_ == kRequest; }
    bool done(uint32_t completed) const { return state_ == kFinish && completed == index_; }
    bool wants_queues() const { return state_ == kIssue; }
    bool decided() const { return state_ > kDecide; }
    bool finishing() const { return state_ == kFinish; }
    bool rests() const { return state_ >= kIssue; }  // until there is room in the queues, or all has completed
    uint32_t index() const { return index_; }

    // issue : every queue has room. fetched : an instruction is offered.
    void step(const Program& program, bool issue, bool fetched) {
        if ((state_ == kFetch && !fetched) || (state_ == kIssue && !issue)) return;
        const bool divided = division_ == 0;
        if (!divided) --division_;
        switch (state_) {
            case kRequest: state_ = kFetch; break;
            case kFetch:
                if (fetched) state_ = kCheck;
                break;
            case kCheck: state_ = kDecide; break;
            case kDecide: {
                const Commands& c = program[index_];
                state_ = c.halt ? kFinish : c.counted ? kGroups : kIssue;
                break;
            }
            case kGroups: divide(kSteps); break;
            case kSteps:
                if (divided) state_ = kParts;
                break;
            case kParts: state_ = kProduct; break;
            case kProduct: state_ = kWords; break;
            case kWords: divide(kCounted); break;
            case kCounted:
                if (divided) state_ = kIssue;
                break;
            case kIssue:
                if (!issue) break;
                ++index_;
                state_ = kFetch;
                break;
            case kFinish: break;
        }
    }

    template <class Visitor>
    void visit(Visitor& v) {
        v.exact(static_cast<uint8_t>(rests() ? kIssue : state_));
        v.exact(division_);
        v.instruction(index_);
    }

private:
    enum State : uint8_t { kRequest, kFetch, kCheck, kDecide, kGroups, kSteps, kParts, kProduct, kWords, kCounted, kIssue, kFinish };

    void divide(State next) {
        division_ = kDivisionCycles;
        state_ = next;
    }

    State state_ = kRequest;
    uint8_t division_ = 0;  // steps left
    uint32_t index_ = 0;
};

// The queues between dispatcher and units. What is in a queue is a piece of the unit's stream.
class CommandQueues {
public:
    const Commands* head(unsigned unit) const { return heads_[unit]; }
    uint32_t place(unsigned unit) const { return taken_[unit]; }  // in the unit's stream, of the head
    bool offers(unsigned unit) const { return fifos_[unit].out; }
    uint32_t seen(unsigned unit) const { return taken_[unit] + fifos_[unit].out; }
    uint32_t behind(unsigned unit) const { return fifos_[unit].inner; }  // commands behind the head
    bool writable() const { return full_ == 0; }
    uint32_t offered() const { return offered_; }  // one bit for each unit with a command at its queue

    void step(const Program& program, uint32_t push, uint32_t pop) {
        for (uint32_t units = push | pop | settling_; units != 0; units &= units - 1) {
            const unsigned unit = __builtin_ctz(units), bit = 1u << unit;
            Fifo& fifo = fifos_[unit];
            taken_[unit] += (pop & bit) != 0;
            fifo.tick(push & bit, pop & bit);
            heads_[unit] = fifo.out ? &program.command(unit, taken_[unit]) : nullptr;
            offered_ = fifo.out ? offered_ | bit : offered_ & ~bit;
            full_ = fifo.writable(kQueueDepth) ? full_ & ~bit : full_ | bit;
            settling_ = fifo.settling() ? settling_ | bit : settling_ & ~bit;
        }
    }

    template <class Visitor>
    void visit(Visitor& v) {
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            v.stream(unit, taken_[unit], fifos_[unit]);
        }
    }

    // The places in the streams have changed, and how many commands wait behind the heads.
    void move(const Program& program) {
        full_ = 0;
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            if (heads_[unit]) heads_[unit] = &program.command(unit, taken_[unit]);
            full_ |= !fifos_[unit].writable(kQueueDepth) << unit;
        }
    }

private:
    Fifo fifos_[unit::kCount];
    uint32_t taken_[unit::kCount] = {};
    const Commands* heads_[unit::kCount] = {};
    uint32_t full_ = 0, settling_ = 0, offered_ = 0;
};

// Marks for the commands of each stream that have waited.
class Waits {
public:
    explicit Waits(const Program& program) {
        for (unsigned unit = 0; unit < unit::kCount; ++unit) marks_[unit].resize(program.told(unit));
    }

    void mark(unsigned unit, uint32_t place) { marks_[unit][place] = true; }
    bool waited(unsigned unit, uint32_t place) const { return marks_[unit][place]; }

    // Commands up to before `end` have done as those `later` before them.
    void repeat(unsigned unit, uint32_t place, uint32_t end, uint32_t later) {
        for (; place < end; ++place) marks_[unit][place] |= marks_[unit][place - later];
    }

private:
    std::vector<uint8_t> marks_[unit::kCount];
};

struct Counts {
    uint64_t events[event::kCount] = {}, read_beats[reader::kCount] = {}, write_beats = 0;
};

using Memory = MemoryTiming<Ring<TimedBurst, kMemoryRing>>;

// The accelerator and its memory while a program runs.
class Core {
public:
    // waits : gets a mark for each command that waits for instructions before it.
    Core(const ArchConfig& arch, const MemoryConfig& memory, const Program& program, Waits& waits)
        : arch_{arch}, program_{&program}, waits_for_{&waits}, memory_{memory, arch.bus_bytes} {
        for (unsigned channel = 0; channel < reader::kCount; ++channel) readers_[channel].configure(arch_, channel);
        feeder_.configure(arch_.lanes);
        array_.configure(arch_.array_latency, arch_.sums_depth);
        store_.configure(arch_);
        row_.configure(arch_);
        writer_.configure(arch_);
        fetch_ = {0, static_cast<uint32_t>(program.size()), 1, 0, 0};
    }

    // In the last cycle: a read burst was requested, an instruction was issued, the last write of one was answered.
    bool requested = false, issued = false, stored = false;
    uint32_t bursts_left = 0;  // of the command whose burst was requested
    bool done = false;  // HALT was reached and everything completed
    Counts counts;

    void step(uint64_t cycle, bool abort) {
        memory_.begin(cycle);
        done = dispatcher_.done(writer_.completed());
        uint32_t pops = 0, ready = 0;  // queues and read channels whose head is taken
        step_outputs(pops, ready);
        step_array(pops, ready);
        step_memory(cycle, abort, pops, ready);
    }

    bool drained() const { return arbiter_.idle() && writer_.idle(); }

    // Only the memory ports go on: the core is reset, and what arrives is dropped.
    void step_aborted(uint64_t cycle) {
        memory_.begin(cycle);
        const bool accepted = memory_.rvalid && arbiter_.rready();
        const bool address = arbiter_.arvalid() && memory_.arready;
        const uint32_t beats = arbiter_.beats();
        arbiter_.step(-1, 0, memory_.arready, memory_.rvalid && memory_.rlast);
        if (accepted) memory_.retire_read();
        if (address) memory_.accept_read(cycle, beats);
    }

    template <class Visitor>
    void visit(Visitor& v, uint64_t cycle) {
        dispatcher_.visit(v);
        queues_.visit(v);
        memory_.visit(v, cycle);
        arbiter_.visit(v);
        visit_fetch(v);
        for (unsigned channel = 1; channel < reader::kCount; ++channel) {
            v.unit(kReaderUnit[channel]);
            readers_[channel].visit(v);
        }
        v.unit(unit::write);
        writer_.visit(v);
        loader_.visit(v, queues_.head(unit::load));
        v.unit(unit::array);
        feeder_.visit(v, ring_, arch_.lane_depth);
        array_.visit(v);
        post_.visit(v, queues_.head(unit::post));
        scales_.visit(v);
        v.unit(unit::row);
        row_.visit(v);
        v.exact(static_cast<uint8_t>(normed_.held | bypass_.held << 2 | posted_.held << 4 | words_.held << 6));
        v.exact(static_cast<uint8_t>((room_ && !dispatcher_.finishing()) | routed_rows_.held << 1));
        results_.visit(v);
        if (const Commands* const route = queues_.head(unit::row_out)) v.progress(routed_, route->row_out.count);
        store_.visit(v, queues_.head(unit::store));
    }

    // Time has passed, and the places in the streams may have changed.
    void move(uint64_t cycles) {
        memory_.shift(cycles);
        queues_.move(*program_);
    }

    const CommandQueues& queues() const { return queues_; }
    const Dispatcher& dispatcher() const { return dispatcher_; }

    // What rests is another dispatcher's, with other numbers of commands in the queues: of which one is full, or none matters.
    void replace(const Dispatcher& dispatcher) {
        dispatcher_ = dispatcher;
        room_ = false;
    }

    uint32_t completed() const { return writer_.completed(); }
    const Reader& fetch() const { return readers_[reader::fetch]; }

    // The state of `other`, where this one's fetch channel rests after it has lost `beats` more.
    void copy(const Core& other, uint32_t beats) {
        Reader fetch = readers_[reader::fetch];
        const uint32_t fetches = fetches_;
        *this = other;
        fetch.take(beats);
        readers_[reader::fetch] = fetch;
        fetches_ = fetches;
    }

private:
    // While the fetch channel rests, the rest of the machine does not depend on it.
    template <class Visitor>
    void visit_fetch(Visitor& v) {
        Reader& fetch = readers_[reader::fetch];
        const bool resting = fetch.resting();
        v.unit(kReaderUnit[reader::fetch]);
        v.exact(static_cast<uint8_t>(resting));
        if (resting) v.fetch(fetch, fetches_);
        else fetch.visit(v);
        v.program_read();
    }

    bool valid(unsigned channel) const { return valid_ >> channel & 1; }
    void count(unsigned event, bool happened) { counts.events[event] += happened; }

    // All that can end a standstill of `step_outputs`.
    uint32_t outputs_key() const {
        const bool room = ring_.loaded - ring_.freed < arch_.lane_depth;
        return valid_ | queues_.offered() << 8 | array_.valid() << 24 | writer_.ready() << 25 | scales_.out << 26 | room << 27;
    }

    // Row unit, store unit, post unit, loader. Where nothing moves, nothing moves until a signal from outside changes.
    void step_outputs(uint32_t& pops, uint32_t& ready) {
        const uint32_t key = outputs_key();
        if (still_ && key == still_key_) {
            count(event::load_full, moved_.full);
            count(event::post_wait_input, waits_);
            count(event::post_wait_output, blocked_);
            count(event::row_busy, row_waits_);
            return;
        }
        still_ = !move_outputs(pops, ready);
        still_key_ = key;
    }

    // Their handshakes depend on each other from the outputs back. Returns whether anything moves.
    bool move_outputs(uint32_t& pops, uint32_t& ready) {
        const Commands *const load = queues_.head(unit::load), *const post = queues_.head(unit::post);
        const Commands *const store = queues_.head(unit::store), *const route = queues_.head(unit::row_out);
        const bool row_offered = row_.valid(), row_valid = normed_.valid(), to_lanes = route && route->row_out.lanes;
        const bool word_ready = words_.ready(), post_column = posted_.valid();
        const bool column = store && (store->store.from_rows ? routed_rows_.valid() : post_column);
        const Store::Result stored = store_.decide(store, column, word_ready);
        const bool stores_rows = stored.take && store->store.from_rows, rows_room = routed_rows_.ready();
        const bool post_ready = post_.out_rows() ? row_.ready() : results_.writable(arch_.results_depth);
        const bool result = post_.out_valid() && !post_.out_rows() && post_ready, result_taken = stored.take && !stores_rows;
        const bool result_moves = results_.out && posted_.ready();
        bool moves = result || result_moves || results_.settling();
        if (moves) {
            const bool room = posted_.ready(), column_waits = results_.out;
            results_.tick(result, room);
            posted_.tick(column_waits, result_taken);
        } else {
            moves = posted_.tick(false, result_taken);
        }
        const bool to_rows = post_.out_valid() && post_.out_rows() && post_ready;

        // and before the post unit, on the loader's way past the lanes
        const bool bypass_offered = load && load->load.bypass && valid(reader::a), bypass_ready = bypass_.ready();
        const Post::Operands offered{array_.valid(), bypass_.valid(), valid(reader::p), valid(reader::r), scales_.out};
        Post::Result posted{};
        if (post || !post_.sleeping()) posted = post_.step(post, offered, post_ready);
        acc_ready_ = posted.take && post->post.source == source::ARRAY;
        moves |= bypass_.tick(bypass_offered, posted.take && post->post.source == source::STREAM);
        const bool scale_taken = posted.take && post->post.by_row && posted.last;

        moved_ = loader_.decide(load, valid(reader::a), to_lanes && row_valid, bypass_ready, ring_, arch_.lane_depth);
        const bool from_rows = moved_.column && load->load.from_rows;
        const bool row_ready = route && (to_lanes ? from_rows : rows_room), scale_ready = scales_.writable(kScalesDepth);
        const bool row_room = normed_.ready();
        moves |= normed_.tick(row_offered, row_ready);
        moves |= routed_rows_.tick(route && !to_lanes && row_valid, stores_rows);
        const bool row_busy = row_.busy(), scale = row_.scale_valid(), routed = row_valid && row_ready;
        RowUnit::Result rowed{};
        const bool row_steps = to_rows || (row_busy && !row_.collecting()) || (!row_busy && queues_.head(unit::row)) ||
                               row_.settling();
        count(event::row_stalled, (row_offered && !row_room) || (scale && !scale_ready));
        if (row_steps) {
            const Commands* const row = queues_.head(unit::row);
            rowed = row_.step(row, queues_.place(unit::row), to_rows, valid(reader::g), row_room, scale_ready);
        }
        if (scale || scales_.level()) scales_.tick(scale && scale_ready, scale_taken);
        if (routed && routed_.last(route->row_out.count)) pops |= 1u << unit::row_out;
        if (routed) routed_.move(routed_.last(route->row_out.count));
        if (stored.take || stored.word || store_.owes()) store_.step(store, stored, word_ready);

        word_ = words_.valid();
        moves |= words_.tick(stored.word, writer_.ready());
        if (stored.take && stored.last) pops |= 1u << unit::store;
        if (posted.done) pops |= 1u << unit::post;
        if (posted.take && post->post.residual) ready |= 1u << reader::r;
        if (posted.params_taken) ready |= 1u << reader::p;
        if (moved_.column && moved_.last) pops |= 1u << unit::load;
        if (moved_.column && !from_rows) ready |= 1u << reader::a;
        if (rowed.cmd_taken) pops |= 1u << unit::row;
        if (rowed.params_taken) ready |= 1u << reader::g;

        count(event::load_busy, moved_.column);
        count(event::load_full, moved_.full);
        count(event::post_busy, posted.take);
        count(event::post_wait_input, posted.waits);
        count(event::post_wait_output, posted.blocked);
        count(event::row_busy, row_busy);
        count(event::store_busy, stored.word && word_ready);
        row_waits_ = row_busy;
        waits_ = posted.waits;
        blocked_ = posted.blocked;
        return row_steps || moves || !post_.sleeping() || posted.take || (post && post->post.load_table) || moved_.column ||
               stored.take || store_.owes() || scales_.settling();
    }

    void step_array(uint32_t& pops, uint32_t& ready) {
        const bool advance = array_.advance(), values = valid(reader::w);
        const bool fire = feeder_.ready_to_fire(values) && advance;
        count(event::array_busy, fire);
        count(event::array_blocked, !advance);
        count(event::array_wait_weights, feeder_.starved(values));
        count(event::array_wait_columns, feeder_.waits());
        const Commands* const c = queues_.head(unit::array);
        const uint32_t ended = ring_.ended;
        Feeder::Result fed{};
        if (c || !feeder_.sleeping()) {
            fed = feeder_.step(c, queues_.place(unit::array), fire, valid(reader::x), ring_, arch_.lanes);
        }
        if (fed.tile_cols || !array_.sleeping() || ring_.freed != ring_.ended) {
            array_.step(advance, acc_ready_, fed.tile_cols, ring_, ended);
        }
        loader_.step(moved_, ring_);
        if (c && fed.cmd_taken) pops |= 1u << unit::array;
        if (fire) ready |= 1u << reader::w;
        if (fed.word_taken) ready |= 1u << reader::x;
    }

    // Readers, arbiter, writer, memory, dispatcher, command queues.
    void step_memory(uint64_t cycle, bool abort, uint32_t& pops, uint32_t& ready) {
        const bool beat = memory_.rvalid && arbiter_.rready();
        const int owner = beat && !abort ? arbiter_.owner() : -1;
        const int granted = arbiter_.grant(requests_, memory_.arready, abort);
        const uint32_t granted_beats = granted >= 0 ? readers_[granted].request_beats() : 0;
        if (owner >= 0) ++counts.read_beats[owner];
        requested = granted >= 0;
        bursts_left = requested ? readers_[granted].left() / kBurstBeats : 0;
        fetches_ += granted == static_cast<int>(reader::fetch);
        const bool fetched = dispatcher_.fetching() && valid(reader::fetch), requesting = dispatcher_.requesting();
        if (dispatcher_.fetching()) ready |= 1u << reader::fetch;
        step_readers(ready, owner, granted, requesting, pops);

        const bool ar = arbiter_.arvalid() && memory_.arready;
        const uint32_t ar_beats = arbiter_.beats();
        if (requested || memory_.rvalid || arbiter_.awake()) {
            arbiter_.step(granted, granted_beats, memory_.arready, memory_.rvalid && memory_.rlast);
        }
        step_writer(pops);
        if (beat) memory_.retire_read();
        if (write_response_) memory_.retire_response();
        if (write_data_) memory_.accept_data(cycle);
        if (ar) memory_.accept_read(cycle, ar_beats);
        if (write_address_) memory_.accept_write(write_address_beats_);

        issued = dispatcher_.wants_queues() && room_;
        room_ = queues_.writable();
        const uint32_t push = issued ? (*program_)[dispatcher_.index()].units : 0;
        count(event::instructions, issued);
        dispatcher_.step(*program_, issued, fetched);
        queues_.step(*program_, push, pops);
    }

    void step_readers(uint32_t ready, int owner, int granted, bool fetch, uint32_t& pops) {
        static_assert(kReaderUnit[reader::a] == 0 && kReaderUnit[reader::g] == reader::g - 1, "units start with the readers");
        const uint32_t offered = queues_.offered() << 1 & ((1u << reader::kCount) - 1);
        uint32_t busy = awake_ | (offered & accepting_);
        if (granted >= 0) busy |= 1u << granted;
        if (fetch) busy |= 1u << reader::fetch;
        uint32_t wake = busy | flowing_ | (ready & valid_);
        if (owner >= 0) wake |= 1u << owner;
        const uint32_t completed = writer_.completed();
        for (; wake != 0; wake &= wake - 1) {
            const int channel = __builtin_ctz(wake);
            const uint32_t bit = 1u << channel;
            Reader& reader = readers_[channel];
            if (!(busy & bit) && reader.step_inside(channel == owner, ready & bit)) {
                awake_ |= reader.awake() << channel;
                flowing_ = reader.flowing() ? flowing_ | bit : flowing_ & ~bit;
                valid_ = reader.valid() ? valid_ | bit : valid_ & ~bit;
                continue;
            }
            const ReadCommand* cmd = nullptr;
            uint32_t place = 0, awaited = 0;
            if (reader.cmd_ready()) {
                if (channel == reader::fetch) {
                    cmd = fetch ? &fetch_ : nullptr;
                } else if (const unsigned unit = kReaderUnit[channel]; const Commands* const c = queues_.head(unit)) {
                    cmd = &c->read[channel];
                    place = queues_.place(unit);
                    awaited = program_->awaited(unit, place);
                    pops |= 1u << unit;
                }
            }
            reader.step(cmd, place, awaited, channel == owner, ready & bit, channel == granted, completed);
            if (reader.waits()) waits_for_->mark(kReaderUnit[channel], reader.held());
            accepting_ = reader.cmd_ready() ? accepting_ | bit : accepting_ & ~bit;
            awake_ = reader.awake() ? awake_ | bit : awake_ & ~bit;
            flowing_ = reader.flowing() ? flowing_ | bit : flowing_ & ~bit;
            valid_ = reader.valid() ? valid_ | bit : valid_ & ~bit;
            requests_ = reader.requesting() ? requests_ | bit : requests_ & ~bit;
        }
    }

    void step_writer(uint32_t& pops) {
        const Commands* c = queues_.head(unit::write);
        stored = write_response_ = write_data_ = write_address_ = false;
        if (!writer_.cmd_ready()) c = nullptr;
        if (!c && !word_ && writer_.waiting(memory_.bvalid)) return;
        if (c) pops |= 1u << unit::write;
        stored = memory_.response_starts && writer_.answers_last();
        write_response_ = memory_.bvalid && writer_.bready();
        write_data_ = writer_.wvalid() && memory_.wready;
        write_address_ = writer_.awvalid() && memory_.awready;
        if (write_address_) write_address_beats_ = writer_.aw_beats();
        counts.write_beats += write_data_;
        writer_.step(c, queues_.place(unit::write), word_, memory_.awready, memory_.wready, memory_.bvalid);
    }

    ArchConfig arch_;
    const Program* program_;
    Waits* waits_for_;
    ReadCommand fetch_;
    Memory memory_;
    Dispatcher dispatcher_;
    CommandQueues queues_;
    Reader readers_[reader::kCount];
    ReadArbiter arbiter_;
    Writer writer_;
    LaneRing ring_;
    Loader loader_;
    Feeder feeder_;
    MacArray array_;
    Post post_;
    Fifo results_, scales_;
    Buffer normed_, routed_rows_, bypass_, posted_, words_;  // StreamBuffers between units
    bool room_ = false;                        // every command queue had room
    RowUnit row_;
    Progress routed_;  // RowRoute
    Store store_;
    uint32_t fetches_ = 0;                           // bursts requested by the fetch channel
    uint32_t awake_ = 0, flowing_ = 0, valid_ = 0, requests_ = 0, accepting_ = ~0u;  // one bit a read channel
    // signals of the current cycle
    Loader::Move moved_{};
    bool acc_ready_ = false, word_ = false;
    bool still_ = false, waits_ = false, blocked_ = false, row_waits_ = false;  // nothing moved in `step_outputs`, and why
    uint32_t still_key_ = 0;
    bool write_response_ = false, write_data_ = false, write_address_ = false;
    uint32_t write_address_beats_ = 0;
};
