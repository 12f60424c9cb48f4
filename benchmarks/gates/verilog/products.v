// One step of a convolution: adds N products of an activation and a weight to an accumulator.
//
// Activations are unsigned, weights in two's complement. The sign bit of a weight has the factor -2^(B-1), so its
// product is subtracted. -p is ~p plus a constant, and all constants together are part of `offset`, as is the bias
// (Baugh and Wooley, 1973): signed weights cost no more than unsigned ones.
module products #(
    parameter A = 8,   // bits of an activation
    parameter B = 8,   // bits of a weight
    parameter N = 16,  // products
    parameter S = 24   // bits of the accumulator
) (
    input clk,
    input first,  // start from the offset instead of the last sum
    input [S-1:0] offset,
    input [N*A-1:0] x,
    input [N*B-1:0] w,
    output reg [S-1:0] sum
);
  integer i;
  reg [S-1:0] next;
  reg [A-1:0] activation, signed_part;
  reg [B-1:0] weight;

  always @* begin
    next = first ? offset : sum;
    for (i = 0; i < N; i = i + 1) begin
      activation = x[i*A +: A];
      weight = w[i*B +: B];
      signed_part = ~(activation & {A{weight[B-1]}});
      next = next + activation * weight[B-2:0] + ({{S{1'b0}}, signed_part} << (B - 1));
    end
  end

  always @(posedge clk) sum <= next;
endmodule
