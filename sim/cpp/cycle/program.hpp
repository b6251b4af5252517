// The instruction stream as the units see it: each instruction is an index into a table of different command sets.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.hpp"

// Mirrored by `_Arch` in sim/cycle.py.
struct ArchConfig {
    uint32_t rows, lanes, lane_depth, row_depth, bus_bytes;
    uint32_t out_bytes[reader::kCount], fifo_beats[reader::kCount];  // of the read channels
    uint32_t write_bytes, writer_beats;                              // bytes of a word to the writer, depth of its FIFO
    uint32_t array_latency;                                          // cycles of a step in the lanes
    uint32_t sums_depth, results_depth;                              // columns queued before and after the post unit
};

// Addresses are taken modulo the longest burst: no unit sees more of them. wait : for the instruction's `dep`. wide : a column
// is two words.
struct ReadCommand {
    uint32_t addr, words, repeats, stride, wait, wide;
};

struct WriteCommand {
    uint32_t addr, words, repeats, stride, store, wide;
};

// All commands of one instruction, without data. Instructions with equal commands take equal time. Only words, so that
// equal commands are equal bytes.
struct Commands {
    ReadCommand read[reader::kCount];
    WriteCommand write;
    struct { uint32_t count, from_rows, bypass; } load;
    struct { uint32_t groups, n, word_steps, k, cols, dense, held; } array;  // held : on the columns of the command before
    struct { uint32_t source, cols, load_table, psum_in, psum_out, by_column, by_row, residual, rows; } post;
    struct { uint32_t cols, is_max, is_norm, last; } row;
    struct { uint32_t count, lanes; } row_out;
    struct { uint32_t cols, transposed, from_rows; } store;
    uint32_t units;  // one bit for each unit that gets a command
    uint32_t halt, counted;  // counted : the dispatcher divides to count position words
};

inline uint32_t log2_of(uint32_t power) { return __builtin_ctz(power); }

inline uint32_t get(const uint8_t* raw, Field field) {
    const unsigned byte = field.offset / 8 < kInstructionBytes - 8 ? field.offset / 8 : kInstructionBytes - 8;
    uint64_t word;
    std::memcpy(&word, raw + byte, sizeof word);
    return static_cast<uint32_t>(word >> (field.offset - 8 * byte)) & (~0u >> (32 - field.bits));
}

inline uint32_t index_bits(uint32_t m) {
    uint32_t bits = 0;
    while ((1u << bits) < m) ++bits;
    return bits ? bits : 1;
}

// hw.dispatch.Dispatcher._issue
class Decoder {
public:
    explicit Decoder(const ArchConfig& arch) : arch_{arch}, span_{arch.bus_bytes * kBurstBeats - 1} {}

    void decode(const uint8_t* raw, Commands& c) const {
        std::memset(&c, 0, sizeof c);
        const uint32_t opcode = get(raw, field::opcode);
        c.halt = opcode == opcode::HALT;
        if (c.halt) return;
        c.units = 1u << unit::write;
        if (opcode == opcode::TABLE) return decode_table(raw, c);
        const bool psum_out = get(raw, field::psum_out);
        const uint32_t source = get(raw, field::source), cols = get(raw, field::cols);
        decode_out(raw, c, cols);
        decode_post(raw, c, source, cols, psum_out);
        decode_rows(raw, c, cols);
        if (source == source::ARRAY) decode_array(raw, c, cols);
        if (source == source::STREAM) {
            read(raw, c, unit::read_a, reader::a, field::a_addr, cols);
            load(c, cols, false, true);
        }
    }

private:
    void read(const uint8_t* raw, Commands& c, unsigned unit, unsigned channel, Field addr, uint32_t words) const {
        c.units |= 1u << unit;
        c.read[channel] = {get(raw, addr) & span_, words, 1, 0, channel == reader::a || channel == reader::r, 0};
    }

    static void load(Commands& c, uint32_t count, bool from_rows, bool bypass) {
        c.units |= 1u << unit::load;
        c.load = {count, from_rows, bypass};
    }

    void decode_table(const uint8_t* raw, Commands& c) const {
        read(raw, c, unit::read_p, reader::p, field::p_addr, kTableWords);
        c.units |= 1u << unit::post;
        c.post.load_table = true;
    }

    void decode_out(const uint8_t* raw, Commands& c, uint32_t cols) const {
        const uint32_t out = get(raw, field::out), row_op = get(raw, field::row_op);
        const bool transposed = out == out::STORE8T, wide = out == out::STORE16;
        if (out == out::NONE || out == out::LANES) return;
        const uint32_t tiles = (cols + arch_.lanes - 1) / arch_.lanes;
        c.units |= 1u << unit::store;
        c.store = {cols, transposed, row_op != row_op::NONE};
        c.write = {get(raw, field::o_addr) & span_, transposed ? arch_.rows : wide ? 2 * cols : cols,
                   transposed ? tiles : 1, transposed ? get(raw, field::o_stride) & span_ : 0, true, wide};
    }

    void decode_post(const uint8_t* raw, Commands& c, uint32_t source, uint32_t cols, bool psum_out) const {
        const uint32_t scale = get(raw, field::scale), residual = get(raw, field::residual);
        const bool wide = residual == residual::INT16 || residual == residual::MUL16;
        c.units |= 1u << unit::post;
        c.post = {source, cols, false, get(raw, field::psum_in) != 0, psum_out, scale == scale::COLUMN && !psum_out,
                  scale == scale::ROW && !psum_out, residual != residual::NONE, get(raw, field::row_op) != row_op::NONE};
        if (c.post.by_column) read(raw, c, unit::read_p, reader::p, field::p_addr, cols);
        if (!c.post.residual) return;
        read(raw, c, unit::read_r, reader::r, field::r_addr, wide ? 2 * cols : cols);
        c.read[reader::r].wide = wide;
    }

    void decode_rows(const uint8_t* raw, Commands& c, uint32_t cols) const {
        const uint32_t op = get(raw, field::row_op), out = get(raw, field::out);
        if (op == row_op::NONE) return;
        const bool norm = op == row_op::LAYERNORM || op == row_op::RMSNORM;
        const bool whole = op != row_op::MAX && op != row_op::EXP;
        c.units |= 1u << unit::row;
        c.row = {cols, op == row_op::MAX, norm, whole || get(raw, field::row_last) != 0};
        if (norm) read(raw, c, unit::read_g, reader::g, field::g_addr, cols);
        if (out == out::NONE) return;
        c.units |= 1u << unit::row_out;
        c.row_out = {cols, out == out::LANES};
    }

    void decode_array(const uint8_t* raw, Commands& c, uint32_t cols) const {
        const uint32_t format = get(raw, field::format), k = get(raw, field::k);
        const bool dense = format == format::DENSE, bitmap = format == format::BITMAP;
        const uint32_t n = dense ? 1 : get(raw, field::n), m = dense ? 1 : get(raw, field::m);
        const uint32_t groups = (k + m - 1) / m, tiles = (cols + arch_.lanes - 1) / arch_.lanes;
        const uint32_t operand = get(raw, field::operand);
        c.units |= 1u << unit::array;
        c.array = {groups, n, dense ? 0 : bitmap ? 32 / m * n : 32 / index_bits(m), k, cols, dense, operand == operand::HELD};
        if (operand == operand::MEMORY) read(raw, c, unit::read_a, reader::a, field::a_addr, k);
        if (operand != operand::HELD) load(c, k, operand == operand::ROWS, false);
        read(raw, c, unit::read_w, reader::w, field::w_addr, groups * n);
        ReadCommand& w = c.read[reader::w];
        w.repeats = tiles;
        w.stride = get(raw, field::w_stride) & span_;
        w.wait = get(raw, field::w_dep);
        c.counted = !dense;
        if (dense) return;
        const uint32_t words = bitmap ? ceil_div(groups, 32 / m) : ceil_div(groups * n, 32 / index_bits(m));
        read(raw, c, unit::read_x, reader::x, field::x_addr, words);
        c.read[reader::x].repeats = tiles;
        c.read[reader::x].stride = words * 4 * arch_.lanes & span_;
    }

    static uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

    const ArchConfig& arch_;
    const uint32_t span_;
};

// The part of them that one unit gets.
inline std::string command_of(const Commands& c, unsigned unit) {
    const auto bytes = [](const auto& part) { return std::string(reinterpret_cast<const char*>(&part), sizeof part); };
    switch (unit) {
        case unit::load: return bytes(c.load);
        case unit::array: return bytes(c.array);
        case unit::post: return bytes(c.post);
        case unit::row: return bytes(c.row);
        case unit::row_out: return bytes(c.row_out);
        case unit::store: return bytes(c.store);
        case unit::write: return bytes(c.write);
        default: return bytes(c.read[unit + 1]);
    }
}

// The instructions, and what becomes of them: for each unit a stream of commands, which it sees one after the other.
class Program {
public:
    Program(const ArchConfig& arch, const uint8_t* code, uint64_t instructions) {
        const Decoder decoder{arch};
        std::unordered_map<std::string, uint32_t> known;
        std::string key(sizeof(Commands), '\0');
        kinds_.reserve(instructions);
        deps_.reserve(instructions);
        for (uint64_t i = 0; i < instructions; ++i) {
            Commands commands;
            decoder.decode(code + i * kInstructionBytes, commands);
            std::memcpy(key.data(), &commands, sizeof commands);
            const auto [found, fresh] = known.emplace(key, static_cast<uint32_t>(table_.size()));
            if (fresh) add(commands);
            kinds_.push_back(found->second);
            deps_.push_back(static_cast<uint16_t>(get(code + i * kInstructionBytes, field::dep)));
            for (uint32_t units = commands.units; units != 0; units &= units - 1) {
                streams_[__builtin_ctz(units)].push_back(static_cast<uint32_t>(i));
            }
        }
    }

    const Commands& operator[](uint64_t index) const { return table_[kinds_[index]]; }
    uint64_t size() const { return kinds_.size(); }

    // All that the dispatcher tells instructions apart by: first what it does before it issues them, then where to.
    uint32_t decision(uint64_t index) const { return (*this)[index].halt | (*this)[index].counted << 1; }
    uint32_t dispatch(uint64_t index) const { return decision(index) | (*this)[index].units << 2; }

    // A unit's stream: its length, and by place the commands, and a number that equal commands share.
    uint64_t told(unsigned unit) const { return streams_[unit].size(); }
    const Commands& command(unsigned unit, uint64_t place) const { return table_[kinds_[streams_[unit][place]]]; }
    uint32_t number(unsigned unit, uint64_t place) const { return numbers_[kinds_[streams_[unit][place]]][unit]; }

    // How many instructions must have completed before a read command begins, 0 if it does not wait.
    uint32_t awaited(unsigned unit, uint64_t place) const {
        const uint32_t index = streams_[unit][place], dep = deps_[index];
        return dep != 0 && (*this)[index].read[unit + 1].wait ? index + 1 - dep : 0;
    }

private:
    void add(const Commands& commands) {
        table_.push_back(commands);
        numbers_.emplace_back();
        for (unsigned unit = 0; unit < unit::kCount; ++unit) {
            auto& known = known_[unit];
            numbers_.back()[unit] = known.emplace(command_of(commands, unit), static_cast<uint32_t>(known.size())).first->second;
        }
    }

    std::vector<Commands> table_;
    std::vector<std::array<uint32_t, unit::kCount>> numbers_;  // of the commands in the table
    std::unordered_map<std::string, uint32_t> known_[unit::kCount];
    std::vector<uint32_t> kinds_, streams_[unit::kCount];
    std::vector<uint16_t> deps_;
};
