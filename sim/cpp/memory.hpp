// AXI4 memory with latency, bandwidth and seeded stalls. sim/memory.py documents the timing it keeps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "Vtop.h"
#include "timing.hpp"

constexpr uint64_t kBus = NM_BUS_BYTES;        // bytes in a beat
constexpr uint64_t kStrobeBytes = kBus / 8;    // bytes of WSTRB
constexpr uint64_t kPage = 4096;               // no burst may cross a multiple of this
constexpr uint8_t kOkay = 0, kSlaveError = 2;  // AXI responses

// Mirrored by `_Config` in sim/harness.py.
struct Config {
    MemoryConfig timing;
    uint64_t log_writes;  // keep every byte written, in order
};

// Mirrored by `_Statistics` in sim/harness.py.
struct Statistics {
    uint64_t cycle, started, finished;
    uint64_t read_bursts, read_bytes, write_bursts, write_bytes;
    uint64_t hazards, hazard_cycle, hazard_read, hazard_write;
};

// One contiguous run of written bytes.
struct WriteRun {
    uint64_t address, bytes;
};

// When a burst was answered: so many bytes had been logged by then.
struct WriteTime {
    uint64_t bytes, cycle;
};

inline std::string format(const char* text, uint64_t a = 0, uint64_t b = 0) {
    char line[200];
    std::snprintf(line, sizeof line, text, static_cast<unsigned long long>(a), static_cast<unsigned long long>(b));
    return line;
}

class Memory {
public:
    Memory(const Config& config, uint8_t* bytes, uint64_t size)
        : config_{config}, bytes_{bytes}, size_{size}, timing_{config.timing, kBus} {}

    // Sets the memory's outputs for this cycle. They depend on earlier cycles only.
    void drive(Vtop& top, uint64_t cycle) {
        timing_.begin(cycle);
        top.m_axi_arready = timing_.arready;
        top.m_axi_awready = timing_.awready;
        top.m_axi_wready = timing_.wready;
        if (timing_.read_starts) present_read(top);
        if (timing_.response_starts) present_response(top);
        top.m_axi_rvalid = timing_.rvalid;
        top.m_axi_bvalid = timing_.bvalid;
    }

    // Takes the transfers of this cycle, once the accelerator's outputs have settled.
    void sample(Vtop& top, uint64_t cycle) {
        check_held(top, cycle);
        if (timing_.rvalid && top.m_axi_rready) retire_read();
        if (timing_.bvalid && top.m_axi_bready) retire_write();
        if (top.m_axi_wvalid && top.m_axi_wready) accept_data(top, cycle);
        if (top.m_axi_arvalid && top.m_axi_arready) accept_read(top, cycle);
        if (top.m_axi_awvalid && top.m_axi_awready) accept_write(top, cycle);
    }

    void reset(Vtop& top) {
        reads_.clear();
        writes_.clear();
        timing_.clear();
        top.m_axi_rvalid = top.m_axi_bvalid = 0;
        held_ar_ = held_aw_ = held_w_ = false;
    }

    Statistics statistics{};
    std::string error;  // first violation of the protocol
    std::vector<WriteRun> log_runs;
    std::vector<uint8_t> log_bytes;
    std::vector<WriteTime> log_times;

private:
    struct Read {
        uint32_t id;
        uint64_t address, end;
        bool ok;
        uint64_t next;              // bytes already presented
        std::vector<uint8_t> data;  // as it was when the address was accepted
    };

    struct Write {
        uint32_t id;
        uint64_t address, end;
        bool ok;
        uint64_t next;  // bytes received
        std::vector<uint8_t> data, strobe;
    };

    void present_read(Vtop& top) {
        Read& read = reads_.front();
        std::memcpy(&top.m_axi_rdata, read.data.data() + read.next, kBus);
        read.next += kBus;
        top.m_axi_rid = read.id;
        top.m_axi_rresp = read.ok ? kOkay : kSlaveError;
        top.m_axi_rlast = timing_.rlast;
        statistics.read_bytes += kBus;
    }

    void retire_read() {
        if (timing_.rlast) reads_.pop_front();
        timing_.retire_read();
    }

    void retire_write() {
        writes_.pop_front();
        timing_.retire_response();
    }

    // The data reach the memory now, not earlier: a read that does not wait for the response sees old bytes.
    void present_response(Vtop& top) {
        Write& write = writes_.front();
        if (write.ok) commit(write);
        top.m_axi_bid = write.id;
        top.m_axi_bresp = write.ok ? kOkay : kSlaveError;
    }

    void commit(const Write& write) {
        const uint64_t bytes = write.data.size();
        for (uint64_t start = 0; start < bytes;) {
            const bool on = strobed(write, start);
            uint64_t stop = start + 1;
            while (stop < bytes && strobed(write, stop) == on) ++stop;
            if (on) store(write.address + start, write.data.data() + start, stop - start);
            start = stop;
        }
        if (config_.log_writes) log_times.push_back({log_bytes.size(), statistics.cycle});
    }

    static bool strobed(const Write& write, uint64_t byte) { return write.strobe[byte / 8] >> (byte % 8) & 1; }

    void store(uint64_t address, const uint8_t* data, uint64_t count) {
        std::memcpy(bytes_ + address, data, count);
        statistics.write_bytes += count;
        if (!config_.log_writes) return;
        if (!log_runs.empty() && log_runs.back().address + log_runs.back().bytes == address) {
            log_runs.back().bytes += count;
        } else {
            log_runs.push_back({address, count});
        }
        log_bytes.insert(log_bytes.end(), data, data + count);
    }

    void accept_data(Vtop& top, uint64_t cycle) {
        Write& write = writes_[timing_.receiving()];
        std::memcpy(write.data.data() + write.next, &top.m_axi_wdata, kBus);
        std::memcpy(write.strobe.data() + write.next / 8, &top.m_axi_wstrb, kStrobeBytes);
        write.next += kBus;
        const bool last = timing_.accept_data(cycle);
        if (last != static_cast<bool>(top.m_axi_wlast)) {
            fail(cycle, format(last ? "WLAST missing on the last beat of the burst at 0x%llx"
                                    : "WLAST set before the last beat of the burst at 0x%llx", write.address));
        }
    }

    void accept_read(Vtop& top, uint64_t cycle) {
        const uint64_t bytes = (top.m_axi_arlen + 1ull) * kBus, address = top.m_axi_araddr / kBus * kBus;
        check_burst(cycle, "AR", top.m_axi_araddr, bytes, top.m_axi_arsize, top.m_axi_arburst);
        const bool ok = in_range(address, bytes);
        reads_.push_back({static_cast<uint32_t>(top.m_axi_arid), address, address + bytes, ok, 0,
                          std::vector<uint8_t>(bytes)});
        timing_.accept_read(cycle, top.m_axi_arlen + 1u);
        if (ok) std::memcpy(reads_.back().data.data(), bytes_ + address, bytes);
        ++statistics.read_bursts;
        for (const Write& write : writes_) note_hazard(cycle, reads_.back(), write);
    }

    void accept_write(Vtop& top, uint64_t cycle) {
        const uint64_t bytes = (top.m_axi_awlen + 1ull) * kBus, address = top.m_axi_awaddr / kBus * kBus;
        check_burst(cycle, "AW", top.m_axi_awaddr, bytes, top.m_axi_awsize, top.m_axi_awburst);
        writes_.push_back({static_cast<uint32_t>(top.m_axi_awid), address, address + bytes, in_range(address, bytes), 0,
                           std::vector<uint8_t>(bytes), std::vector<uint8_t>(bytes / 8)});
        timing_.accept_write(top.m_axi_awlen + 1u);
        ++statistics.write_bursts;
        for (const Read& read : reads_) note_hazard(cycle, read, writes_.back());
    }

    bool in_range(uint64_t address, uint64_t bytes) const { return address + bytes <= size_; }

    // A read and a write in flight at once that overlap by more than one beat, of which they may use different bytes.
    void note_hazard(uint64_t cycle, const Read& read, const Write& write) {
        const uint64_t start = std::max(read.address, write.address), end = std::min(read.end, write.end);
        if (end < start + 2 * kBus) return;
        if (statistics.hazards++ != 0) return;
        statistics.hazard_cycle = cycle;
        statistics.hazard_read = read.address;
        statistics.hazard_write = write.address;
    }

    void check_burst(uint64_t cycle, const char* channel, uint64_t address, uint64_t bytes, unsigned size,
                     unsigned burst) {
        if (burst != 1) fail(cycle, std::string{channel} + format("BURST is %llu, not INCR (1)", burst));
        if (kBus != 1ull << size) {
            fail(cycle, std::string{channel} + format("SIZE is %llu: a beat has %llu bytes", size, kBus));
        }
        const uint64_t first = address / kBus * kBus;
        if (first / kPage != (first + bytes - 1) / kPage) {
            fail(cycle, std::string{channel} + format(" burst at 0x%llx of %llu bytes crosses 4 KiB", first, bytes));
        }
    }

    // VALID must stay, with its payload, until READY.
    void check_held(Vtop& top, uint64_t cycle) {
        check_channel(cycle, "AR", held_ar_, held_ar_word_, top.m_axi_arvalid, top.m_axi_arready,
                      address_word(top.m_axi_araddr, top.m_axi_arlen, top.m_axi_arid));
        check_channel(cycle, "AW", held_aw_, held_aw_word_, top.m_axi_awvalid, top.m_axi_awready,
                      address_word(top.m_axi_awaddr, top.m_axi_awlen, top.m_axi_awid));
        check_data_held(top, cycle);
    }

    static uint64_t address_word(uint64_t address, uint64_t length, uint64_t id) {
        return address | length << 32 | id << 40;
    }

    void check_channel(uint64_t cycle, const char* channel, bool& held, uint64_t& word, bool valid, bool ready,
                       uint64_t now) {
        if (held && !valid) fail(cycle, std::string{channel} + "VALID dropped before " + channel + "READY");
        if (held && valid && word != now) {
            fail(cycle, std::string{channel} + " payload changed before " + channel + "READY");
        }
        held = valid && !ready;
        word = now;
    }

    void check_data_held(Vtop& top, uint64_t cycle) {
        if (held_w_) {
            if (!top.m_axi_wvalid) fail(cycle, "WVALID dropped before WREADY");
            else if (std::memcmp(held_w_data_, &top.m_axi_wdata, kBus) != 0 ||
                     std::memcmp(held_w_strobe_, &top.m_axi_wstrb, kStrobeBytes) != 0) {
                fail(cycle, "W payload changed before WREADY");
            }
        }
        held_w_ = top.m_axi_wvalid && !top.m_axi_wready;
        if (!held_w_) return;
        std::memcpy(held_w_data_, &top.m_axi_wdata, kBus);
        std::memcpy(held_w_strobe_, &top.m_axi_wstrb, kStrobeBytes);
    }

    void fail(uint64_t cycle, const std::string& text) {
        if (error.empty()) error = text + format(" (cycle %llu)", cycle);
    }

    const Config config_;
    uint8_t* const bytes_;
    const uint64_t size_;
    MemoryTiming<std::deque<TimedBurst>> timing_;
    std::deque<Read> reads_;
    std::deque<Write> writes_;
    bool held_ar_ = false, held_aw_ = false, held_w_ = false;
    uint64_t held_ar_word_ = 0, held_aw_word_ = 0;
    uint8_t held_w_data_[kBus], held_w_strobe_[kStrobeBytes];
};
