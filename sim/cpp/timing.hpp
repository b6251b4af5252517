// Timing of the AXI4 memory, without data; sim/memory.py documents it. The RTL's memory and the cycle engine share it.
#pragma once

#include <cstdint>

struct MemoryConfig {
    uint64_t latency;          // cycles from address (or last write beat) to first data (or response)
    uint64_t bytes_per_cycle;  // shared by reads and writes
    uint64_t stall_threshold;  // a channel stalls in a cycle whose hash is below this
    uint64_t seed;
};

// A burst in flight. beats : still to be presented (reads) or received (writes).
struct TimedBurst {
    uint64_t due;
    uint32_t beats;
};

// Queue : a container of TimedBurst with the members of std::deque that are used here.
template <class Queue>
class MemoryTiming {
public:
    MemoryTiming(const MemoryConfig& config, uint64_t bus_bytes)
        : config_{config}, bus_{static_cast<int64_t>(bus_bytes)}, credit_cap_{static_cast<int64_t>(config.bytes_per_cycle)} {
        if (credit_cap_ < bus_) credit_cap_ = bus_;
        credit_ = credit_cap_;
    }

    // Outputs of a cycle. read_starts, response_starts : R or B becomes valid in this cycle.
    bool arready = false, awready = false, wready = false, rvalid = false, rlast = false, bvalid = false;
    bool read_starts = false, response_starts = false;

    // Sets the outputs for this cycle. They depend on earlier cycles only.
    void begin(uint64_t cycle) {
        credit_ += static_cast<int64_t>(config_.bytes_per_cycle);
        if (credit_ > credit_cap_) credit_ = credit_cap_;
        const bool bandwidth = credit_ > 0;
        arready = go(cycle, kAR);
        awready = go(cycle, kAW);
        wready = bandwidth && received_ < writes_.size() && go(cycle, kW);
        read_starts = !rvalid && bandwidth && !reads_.empty() && cycle >= reads_.front().due && go(cycle, kR);
        response_starts = !bvalid && received_ > 0 && cycle >= writes_.front().due && go(cycle, kB);
        if (read_starts) {
            rvalid = true;
            rlast = --reads_.front().beats == 0;
            credit_ -= bus_;
        }
        if (response_starts) bvalid = true;
    }

    void retire_read() {
        if (rlast) reads_.pop_front();
        rvalid = false;
    }

    void retire_response() {
        writes_.pop_front();
        --received_;
        bvalid = false;
    }

    void accept_read(uint64_t cycle, uint32_t beats) { reads_.push_back({cycle + config_.latency, beats}); }

    void accept_write(uint32_t beats) { writes_.push_back({0, beats}); }

    // One beat of write data; returns whether it was the burst's last.
    bool accept_data(uint64_t cycle) {
        TimedBurst& write = writes_[received_];
        credit_ -= bus_;
        if (--write.beats != 0) return false;
        write.due = cycle + config_.latency;
        ++received_;
        return true;
    }

    uint64_t receiving() const { return received_; }  // index of the write burst that the next beat belongs to

    void clear() {
        reads_.clear();
        writes_.clear();
        received_ = 0;
        rvalid = bvalid = false;
    }

    // All that later cycles depend on, with due times as distances from `cycle`.
    template <class Visitor>
    void visit(Visitor& v, uint64_t cycle) {
        v.exact(credit_);
        v.exact(static_cast<uint8_t>(rvalid | rlast << 1 | bvalid << 2));
        visit_queue(v, reads_, cycle);
        v.exact(static_cast<uint16_t>(received_));
        visit_queue(v, writes_, cycle);
    }

    // Time has passed and nothing else has changed.
    void shift(uint64_t cycles) {
        for (uint64_t i = 0; i < reads_.size(); ++i) reads_[i].due += cycles;
        for (uint64_t i = 0; i < writes_.size(); ++i) writes_[i].due += cycles;
    }

private:
    enum Channel : uint64_t { kAR, kR, kAW, kW, kB };

    // A stall depends on seed, channel and cycle alone.
    bool go(uint64_t cycle, Channel channel) const {
        if (config_.stall_threshold == 0) return true;
        uint64_t z = config_.seed * 0x9E3779B97F4A7C15ull + cycle * 8 + channel;  // splitmix64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return ((z ^ (z >> 31)) >> 32) >= config_.stall_threshold;
    }

    template <class Visitor>
    static void visit_queue(Visitor& v, Queue& queue, uint64_t cycle) {
        v.exact(static_cast<uint16_t>(queue.size()));
        for (uint64_t i = 0; i < queue.size(); ++i) {
            v.exact(static_cast<uint32_t>(queue[i].due > cycle ? queue[i].due - cycle : 0));
            v.exact(static_cast<uint16_t>(queue[i].beats));
        }
    }

    MemoryConfig config_;
    int64_t bus_, credit_cap_, credit_;
    Queue reads_, writes_;
    uint64_t received_ = 0;  // write bursts whose data are complete
};
