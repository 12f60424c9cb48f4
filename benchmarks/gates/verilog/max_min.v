// One step of an adder layer: adds N distances |x - w| = max(x, w) - min(x, w) to an accumulator.
module max_min #(
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
  reg [A-1:0] activation, weight, larger, smaller;

  always @* begin
    next = first ? offset : sum;
    for (i = 0; i < N; i = i + 1) begin
      activation = x[i*A +: A];
      weight = w[i*A +: A];
      larger = activation > weight ? activation : weight;
      smaller = activation > weight ? weight : activation;
      next = next + (larger - smaller);
    end
  end

  always @(posedge clk) sum <= next;
endmodule
