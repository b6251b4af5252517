// One Verilated accelerator with its memory; sim/harness.py loads the C functions at the end.
#include <memory>

#include "memory.hpp"
#include "verilated.h"
#if VM_TRACE
#include "verilated_fst_c.h"
#endif

namespace {

// Master of the register bus: one access at a time.
class Registers {
public:
    void start(bool write, uint32_t address, uint32_t data) {
        write_ = write;
        address_ = address;
        data_ = data;
        address_open_ = busy_ = true;
        data_open_ = write;
    }

    bool busy() const { return busy_; }
    uint32_t data() const { return data_; }
    unsigned response() const { return response_; }
    bool accepted() const { return !address_open_ && !data_open_; }

    void drive(Vtop& top) const {
        top.s_axi_awvalid = busy_ && write_ && address_open_;
        top.s_axi_wvalid = busy_ && write_ && data_open_;
        top.s_axi_arvalid = busy_ && !write_ && address_open_;
        top.s_axi_bready = busy_ && write_;
        top.s_axi_rready = busy_ && !write_;
        if (write_) {
            top.s_axi_awaddr = address_;
            top.s_axi_wdata = data_;
            top.s_axi_wstrb = 15;
        } else {
            top.s_axi_araddr = address_;
        }
    }

    void sample(const Vtop& top) {
        if (top.s_axi_awvalid && top.s_axi_awready) address_open_ = false;
        if (top.s_axi_arvalid && top.s_axi_arready) address_open_ = false;
        if (top.s_axi_wvalid && top.s_axi_wready) data_open_ = false;
        if (top.s_axi_bready && top.s_axi_bvalid) finish(top.s_axi_bresp);
        if (top.s_axi_rready && top.s_axi_rvalid) {
            data_ = top.s_axi_rdata;
            finish(top.s_axi_rresp);
        }
    }

private:
    void finish(unsigned response) {
        response_ = response;
        busy_ = false;
    }

    bool write_ = false, busy_ = false, address_open_ = false, data_open_ = false;
    uint32_t address_ = 0, data_ = 0;
    unsigned response_ = 0;
};

enum Stop : int { kProtocolError = -2, kNoAnswer = -1, kSliceOver = 0, kInterrupt = 1 };

class Harness {
public:
    Harness(const Config& config, uint8_t* bytes, uint64_t size) : memory{config, bytes, size} {
#if VM_TRACE
        context_.traceEverOn(true);
#endif
        top_ = std::make_unique<Vtop>(&context_);
        reset(4);
    }

    ~Harness() {
        close_trace();
        top_->final();
    }

    void reset(uint64_t cycles) {
        memory.reset(*top_);
        top_->rst = 1;
        while (cycles-- > 0) tick();
        top_->rst = 0;
    }

    int run(uint64_t cycles) {
        for (; cycles > 0; --cycles) {
            tick();
            if (top_->irq) {
                if (!memory.statistics.finished) memory.statistics.finished = memory.statistics.cycle;
                return kInterrupt;
            }
            if (!memory.error.empty()) return kProtocolError;
        }
        return kSliceOver;
    }

    // Returns the AXI response, or a negative `Stop`.
    int access(bool write, uint32_t address, uint32_t* data, uint64_t patience) {
        registers_.start(write, address, *data);
        bool waiting = write;
        while (registers_.busy()) {
            if (patience-- == 0) return kNoAnswer;
            tick();
            if (waiting && registers_.accepted()) {
                waiting = false;
                memory.statistics.started = memory.statistics.cycle;
                memory.statistics.finished = 0;
            }
            if (!memory.statistics.finished && top_->irq) memory.statistics.finished = memory.statistics.cycle;
            if (!memory.error.empty()) return kProtocolError;
        }
        *data = registers_.data();
        return static_cast<int>(registers_.response());
    }

    bool interrupt() const { return top_->irq; }

    void trace(const char* path, uint64_t first, uint64_t last) {
        close_trace();
#if VM_TRACE
        trace_first_ = first;
        trace_last_ = last;
        trace_ = std::make_unique<VerilatedFstC>();
        top_->trace(trace_.get(), 99);
        trace_->open(path);
#else
        (void)path, (void)first, (void)last;
#endif
    }

    void close_trace() {
#if VM_TRACE
        if (trace_) trace_->close();
        trace_.reset();
#endif
    }

    Memory memory;

private:
    // One clock cycle: inputs, settle, transfers, rising edge.
    void tick() {
        const uint64_t cycle = memory.statistics.cycle;
        memory.drive(*top_, cycle);
        registers_.drive(*top_);
        top_->clk = 0;
        top_->eval();
        dump(cycle, 0);
        if (!top_->rst) memory.sample(*top_, cycle);
        if (registers_.busy()) registers_.sample(*top_);
        top_->clk = 1;
        top_->eval();
        dump(cycle, 1);
        memory.statistics.cycle = cycle + 1;
    }

    void dump(uint64_t cycle, uint64_t phase) {
#if VM_TRACE
        if (!trace_ || cycle < trace_first_) return;
        if (cycle >= trace_last_) return close_trace();
        trace_->dump(2 * cycle + phase);
#else
        (void)cycle, (void)phase;
#endif
    }

    VerilatedContext context_;
    std::unique_ptr<Vtop> top_;
    Registers registers_;
#if VM_TRACE
    std::unique_ptr<VerilatedFstC> trace_;
    uint64_t trace_first_ = 0, trace_last_ = 0;
#endif
};

}  // namespace

extern "C" {

Harness* nm_open(const Config* config, uint8_t* bytes, uint64_t size) { return new Harness{*config, bytes, size}; }
void nm_close(Harness* harness) { delete harness; }
void nm_reset(Harness* harness, uint64_t cycles) { harness->reset(cycles); }
int nm_run(Harness* harness, uint64_t cycles) { return harness->run(cycles); }
int nm_write(Harness* harness, uint32_t address, uint32_t data, uint64_t patience) {
    return harness->access(true, address, &data, patience);
}
int nm_read(Harness* harness, uint32_t address, uint32_t* data, uint64_t patience) {
    return harness->access(false, address, data, patience);
}
int nm_interrupt(const Harness* harness) { return harness->interrupt(); }
void nm_trace(Harness* harness, const char* path, uint64_t first, uint64_t last) {
    harness->trace(path, first, last);
}
void nm_close_trace(Harness* harness) { harness->close_trace(); }
void nm_statistics(const Harness* harness, Statistics* out) { *out = harness->memory.statistics; }
const char* nm_error(const Harness* harness) { return harness->memory.error.c_str(); }
uint64_t nm_log_runs(const Harness* harness, const WriteRun** runs) {
    *runs = harness->memory.log_runs.data();
    return harness->memory.log_runs.size();
}
uint64_t nm_log_bytes(const Harness* harness, const uint8_t** bytes) {
    *bytes = harness->memory.log_bytes.data();
    return harness->memory.log_bytes.size();
}
uint64_t nm_log_times(const Harness* harness, const WriteTime** times) {
    *times = harness->memory.log_times.data();
    return harness->memory.log_times.size();
}
void nm_clear_log(Harness* harness) {
    harness->memory.log_runs.clear();
    harness->memory.log_bytes.clear();
    harness->memory.log_times.clear();
}
}
