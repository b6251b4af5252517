// Copies BEATS bus words from SRC to DST with overlapping bursts: the least design with the accelerator's ports.
// Registers: 0 SRC, 4 DST, 8 BEATS, 12 GO (write) / DONE (read), 16 FAULT (break the protocol on purpose).
module nmforge_top #(parameter BUS = `NM_TEST_BUS) (
  input clk, input rst, output irq,
  input [11:0] s_axi_awaddr, input s_axi_awvalid, output s_axi_awready,
  input [31:0] s_axi_wdata, input [3:0] s_axi_wstrb, input s_axi_wvalid, output s_axi_wready,
  output [1:0] s_axi_bresp, output reg s_axi_bvalid, input s_axi_bready,
  input [11:0] s_axi_araddr, input s_axi_arvalid, output s_axi_arready,
  output reg [31:0] s_axi_rdata, output [1:0] s_axi_rresp, output reg s_axi_rvalid, input s_axi_rready,
  output [0:0] m_axi_awid, output [31:0] m_axi_awaddr, output [7:0] m_axi_awlen, output [2:0] m_axi_awsize,
  output [1:0] m_axi_awburst, output m_axi_awvalid, input m_axi_awready,
  output [8*BUS-1:0] m_axi_wdata, output [BUS-1:0] m_axi_wstrb, output m_axi_wlast, output m_axi_wvalid,
  input m_axi_wready, input [0:0] m_axi_bid, input [1:0] m_axi_bresp, input m_axi_bvalid, output m_axi_bready,
  output [0:0] m_axi_arid, output [31:0] m_axi_araddr, output [7:0] m_axi_arlen, output [2:0] m_axi_arsize,
  output [1:0] m_axi_arburst, output m_axi_arvalid, input m_axi_arready,
  input [0:0] m_axi_rid, input [8*BUS-1:0] m_axi_rdata, input [1:0] m_axi_rresp, input m_axi_rlast,
  input m_axi_rvalid, output m_axi_rready);

  localparam LOG = $clog2(BUS);
  reg [31:0] src, dst, beats, fault;
  reg [31:0] ar_left, aw_left, w_left, b_left, ar_next, aw_next;
  reg [6:0] level, room;              // beats in the FIFO; FIFO places not promised to a read burst
  reg [5:0] head, tail;
  reg [8*BUS-1:0] fifo [0:63];
  reg running, done, failed;
  reg [3:0] w_beat;

  wire start = s_axi_awvalid && s_axi_awready && s_axi_awaddr == 12;
  assign irq = done;

  // register bus: address and data together
  assign s_axi_awready = s_axi_wvalid && !s_axi_bvalid;
  assign s_axi_wready = s_axi_awvalid && !s_axi_bvalid;
  assign s_axi_arready = !s_axi_rvalid;
  assign s_axi_bresp = 0, s_axi_rresp = 0;

  // bursts of up to 16 beats; addresses are multiples of 16 beats
  wire [31:0] ar_beats = ar_left < 16 ? ar_left : 16, aw_beats = aw_left < 16 ? aw_left : 16;
  assign m_axi_arvalid = ar_left != 0 && room >= 16 && !(fault == 1 && level[0]);
  assign m_axi_araddr = fault == 2 ? 32'd4096 - BUS : ar_next;
  assign m_axi_arlen = ar_beats - 1, m_axi_arsize = LOG, m_axi_arburst = 1, m_axi_arid = 0;
  assign m_axi_awvalid = aw_left != 0;
  assign m_axi_awaddr = aw_next, m_axi_awlen = aw_beats - 1, m_axi_awsize = LOG, m_axi_awburst = 1, m_axi_awid = 0;
  assign m_axi_wvalid = level != 0;
  assign m_axi_wdata = fifo[head];
  assign m_axi_wstrb = fault == 4 ? 1 : ~0;
  assign m_axi_wlast = (w_beat == 15 || w_left == 1) ^ (fault == 3);
  assign m_axi_bready = 1, m_axi_rready = 1;

  wire put = m_axi_rvalid, take = m_axi_wvalid && m_axi_wready, ask = m_axi_arvalid && m_axi_arready;
  always @(posedge clk) begin
    if (s_axi_bready) s_axi_bvalid <= 0;
    if (s_axi_rready) s_axi_rvalid <= 0;
    if (s_axi_awvalid && s_axi_awready) begin
      s_axi_bvalid <= 1;
      case (s_axi_awaddr)
        0: src <= s_axi_wdata;
        4: dst <= s_axi_wdata;
        8: beats <= s_axi_wdata;
        16: fault <= s_axi_wdata;
      endcase
    end
    if (s_axi_arvalid && s_axi_arready) begin
      s_axi_rvalid <= 1;
      case (s_axi_araddr)
        0: s_axi_rdata <= src;
        12: s_axi_rdata <= {failed, done};
        default: s_axi_rdata <= 32'hdead0000;
      endcase
    end
    if (put) begin fifo[tail] <= m_axi_rdata; tail <= tail + 1; end
    if (put && m_axi_rresp != 0) failed <= 1;
    if (take) begin head <= head + 1; w_beat <= w_beat + 1; w_left <= w_left - 1; end
    level <= level + put - take;
    room <= room + take - (ask ? ar_beats : 0);
    if (ask) begin ar_left <= ar_left - ar_beats; ar_next <= ar_next + 16 * BUS; end
    if (m_axi_awvalid && m_axi_awready) begin aw_left <= aw_left - aw_beats; aw_next <= aw_next + 16 * BUS; end
    if (m_axi_bvalid) b_left <= b_left - 1;
    if (running && b_left == 0) begin running <= 0; done <= 1; end
    if (start) begin
      ar_left <= beats; aw_left <= beats; w_left <= beats; b_left <= (beats + 15) / 16;
      ar_next <= src; aw_next <= dst; level <= 0; room <= 64; head <= 0; tail <= 0; w_beat <= 0;
      running <= 1; done <= 0; failed <= 0;
    end
    if (rst) begin
      ar_left <= 0; aw_left <= 0; level <= 0; running <= 0; done <= 0; fault <= 0; s_axi_bvalid <= 0; s_axi_rvalid <= 0;
    end
  end
endmodule
