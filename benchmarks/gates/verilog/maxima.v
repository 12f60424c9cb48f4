// One step of an adder layer whose filters share the sum of the window: adds N maxima to an accumulator.
//
// |x - w| = 2 max(x, w) - x - w. The sum of the weights is a constant, and the sum of the window is the same for all
// filters, so an array computes it once and subtracts it from the sum of each filter at the end.
module maxima #(
    parameter A = 8,   // bits of an activation and of a weight, both unsigned
    parameter N = 16,  // activations
    parameter S = 24   // bits of the accumulator
) (
    input clk,
    input first,  // start from the offset instead of the last sum
    input [S-1:0] offset,
    input [N*A-1:0] x,
    input [N*A-1:0] w,
    output reg [S-1:0] sum
);
  integer i;
  reg [S-1:0] next;
  reg [A-1:0] activation, weight;

  always @* begin
    next = first ? offset : sum;
    for (i = 0; i < N; i = i + 1) begin
      activation = x[i*A +: A];
      weight = w[i*A +: A];
      next = next + (activation > weight ? activation : weight);
    end
  end

  always @(posedge clk) sum <= next;
endmodule
