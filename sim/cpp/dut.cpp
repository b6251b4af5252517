// Any Verilated module, driven signal by signal; sim/handle.py loads the C functions at the end.
#include <memory>
#include <sstream>
#include <string>

#include "Vtop.h"
#include "verilated.h"
#include "verilated_sym_props.h"
#include "verilated_syms.h"
#if VM_TRACE
#include "verilated_fst_c.h"
#endif

namespace {

class Dut {
public:
    Dut() {
#if VM_TRACE
        context_.traceEverOn(true);
#endif
        top_ = std::make_unique<Vtop>(&context_);
        list_signals();
    }

    ~Dut() {
        close_trace();
        top_->final();
    }

    void eval() {
        top_->eval();
#if VM_TRACE
        if (trace_) trace_->dump(time_++);
#endif
    }

    void tick(uint8_t* clock, uint64_t cycles) {
        for (; cycles > 0; --cycles) {
            *clock = 1;
            eval();
            *clock = 0;
            eval();
        }
    }

    void trace(const char* path) {
        close_trace();
#if VM_TRACE
        trace_ = std::make_unique<VerilatedFstC>();
        top_->trace(trace_.get(), 99);
        trace_->open(path);
#else
        (void)path;
#endif
    }

    void close_trace() {
#if VM_TRACE
        if (trace_) trace_->close();
        trace_.reset();
#endif
    }

    const char* signals() const { return signals_.c_str(); }

private:
    // One line a signal: scope, name, bits, direction, bytes of an entry, entries, lowest index, address.
    void list_signals() {
        std::ostringstream out;
        for (const auto& scope : *context_.scopeNameMap()) {
            if (scope.second->varsp() == nullptr) continue;
            for (const auto& item : *scope.second->varsp()) {
                const VerilatedVar& var = item.second;
                if (var.udims() > 1 || var.isParam()) continue;
                out << scope.first << '\t' << item.first << '\t' << var.entBits() << '\t' << var.vldir() << '\t'
                    << var.entSize() << '\t' << (var.udims() ? var.elements(1) : 0) << '\t'
                    << (var.udims() ? var.low(1) : 0) << '\t' << reinterpret_cast<uintptr_t>(var.datap()) << '\n';
            }
        }
        signals_ = out.str();
    }

    VerilatedContext context_;
    std::unique_ptr<Vtop> top_;
    std::string signals_;
#if VM_TRACE
    std::unique_ptr<VerilatedFstC> trace_;
    uint64_t time_ = 0;
#endif
};

}  // namespace

extern "C" {

Dut* dut_open() { return new Dut; }
void dut_close(Dut* dut) { delete dut; }
const char* dut_signals(const Dut* dut) { return dut->signals(); }
void dut_eval(Dut* dut) { dut->eval(); }
void dut_tick(Dut* dut, uint8_t* clock, uint64_t cycles) { dut->tick(clock, cycles); }
void dut_trace(Dut* dut, const char* path) { dut->trace(path); }
void dut_close_trace(Dut* dut) { dut->close_trace(); }
}
