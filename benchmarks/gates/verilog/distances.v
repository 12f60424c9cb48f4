// One step of an adder layer with T terms per weight: adds N * T distances |x - w| to an accumulator. The distances of
// term j have the factor 2^(T-1-j), which is wiring.
//
// With a negative difference d, |d| = ~d + 1. The tree that adds the distances adds these ones as well, so that no
// distance needs an adder of its own for them.
module distances #(
    parameter A = 8,   // bits of an activation and of a weight, both unsigned
    parameter T = 1,   // terms per weight
    parameter N = 16,  // activations
    parameter S = 24   // bits of the accumulator
) (
    input clk,
    input first,  // start from the offset instead of the last sum
    input [S-1:0] offset,
    input [N*A-1:0] x,
    input [T*N*A-1:0] w,
    output reg [S-1:0] sum
);
  integer i, j;
  reg [S-1:0] next;
  reg [A:0] difference;
  reg [A-1:0] magnitude;

  always @* begin
    next = first ? offset : sum;
    for (j = 0; j < T; j = j + 1)
      for (i = 0; i < N; i = i + 1) begin
        difference = {1'b0, x[i*A +: A]} - {1'b0, w[(j*N+i)*A +: A]};
        magnitude = difference[A-1:0] ^ {A{difference[A]}};
        next = next + ({{S{1'b0}}, magnitude} << (T - 1 - j)) + ({{S{1'b0}}, difference[A]} << (T - 1 - j));
      end
  end

  always @(posedge clk) sum <= next;
endmodule
